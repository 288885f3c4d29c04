"""Options of the recipes: what can not work is refused before the first stage."""

import dataclasses
import inspect
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dldkit.errors import UserError
from dldkit.recipe.encoders import options_of

ROOT = Path(__file__).resolve().parents[2]
AN4 = ROOT / "egs2" / "mini_an4" / "asr1"  # a model of four layers
DISTILL = ROOT / "egs2" / "digits" / "ssl1"  # a student of twelve


def run_recipe(recipe, *words, shell=(), **variables):
    """Run `run.sh`; return its status and what it printed."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TEACHER": "/any/teacher",
        **variables,
    }
    process = subprocess.run(
        [*shell, "./run.sh", *map(str, words)],
        cwd=recipe,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return process.returncode, process.stdout


BAD_ASR = """
--stage two | --stage is a number
--stage 1.5 | --stage 1.5: write an integer from 1 to 15
--stop_stage 16 | --stop_stage 16: write an integer from 1 to 15
--stage 5 --stop_stage 4 | --stage 5 comes after --stop_stage 4
--skip_stages "2 x" | --skip_stages x: write an integer from 1 to 15
--skip_train yes | --skip_train is true or false
--fs 0 | --fs 0: write a sampling rate in Hz, as 16000 or 16k
--fs -8000 | --fs -8000: write a sampling rate
--nj 0 | --nj 0: write an integer of at least 1
--ngpu many | --ngpu many: write an integer of at least 0, or auto
--seed x | --seed x: write an integer of at least 0, or nothing
--system nope | there is no nope.yaml .* choose one of anytime, anytime_uniform
--valid_set train_nodev | --train_set and --valid_set are both train_nodev
--train_set "" | --train_set "": name a directory of data/
--train_set data/train | --train_set "data/train": name a directory
--test_sets "" | --test_sets is empty
--test_sets "a b a" | --test_sets names a twice
--inference_depths 5 | the encoder has 4 layers, so choose depths from 1 to 4
--inference_depths 4,0 | write numbers of layers, such as "12 6 2"
--inference_depths "4 half" | write numbers of layers, such as "12 6 2"
--inference_depths "" | --inference_depths is empty
--asr_args "--encoder_conf num_blocks=2" --inference_depths "4 2" | encoder has 2 layers
--inference_asr_model valid.acc.ave.pth | makes valid.loss_ctc.ave.pth, .* latest.pth
--inference_asr_model valid.loss_ctc.ave_5best.pth | this training will not make it
--inference_asr_model 3epoch.pth | --inference_asr_model 3epoch.pth: .* has 2 epochs
--exit_thresholds some | --exit_thresholds 'some': write a number from 0 to 1
--exit_thresholds 0.1,2 | --exit_thresholds '2': write a number from 0 to 1
--exit_thresholds 0.1 --system dld | --exit_thresholds 0.1: dld has no exits
--asr_args "--encoder_conf exits=abc" | exits .*: 'a' is no depth below the 4 layers
--asr_args "--encoder_conf exits=[9]" | exits .*: 9 is no depth below the 4 layers
--asr_args "--encoder_conf exits=2.5" | exits: 2.5: write a number above 0, or depths
--asr_args "--encoder_conf {num_blocks: 2}" --inference_depths 4 | can not be read
--asr_args "--encoder_conf '{num_blocks: 2}'" --inference_depths 4 | has 2 layers
--asr_args "--encoder_conf num_blocks=four" | num_blocks: 'four': write a number
--asr_args "--best_model_criterion 5" | best_model_criterion: 5: write lists, such as
--asr_args "--seed ${nope}" | --asr_args --seed .*nope.* can not be read
--asr_tag a,b | --asr_tag a,b: choose a path without commas and colons
--reference_tag a:b | --reference_tag a:b: choose a path without commas and colons
--asr_tag a/b | --asr_tag a/b: .* choose one without slashes and =
--reference_tag lr=0.1 | --reference_tag lr=0.1: .* choose one without slashes and =
--inference_args "--depth 2" | says depth: .* say --inference_depths
--asr_exp exp/a=b | --asr_exp exp/a=b: .* choose one without slashes and =
--inference_args --exit_threshold=0.1 | says exit_threshold: .* say --exit_thresholds
--exit_thresholds 0.1 --selector even | leave out --selector even
--exit_thresholds 0.1 --inference_args "--beam_size 5" | leave out --beam_size
--feats_type fbank --frame_shift 0.02 | makes a frame every 0.01 s; leave it out
--feats_type mfcc | --feats_type mfcc: choose one of raw, fbank, extracted
--token_type phone | --token_type phone: choose one of char, bpe, word
--audio_format mp3 | --audio_format mp3: choose one of flac, wav
--kd_source dead | --kd_source dead: choose one of live, cached
--selector middle | --selector middle: choose one of even, prefix
--feats_normalize cmvn | --feats_normalize cmvn: choose one of global_mvn
--speed_perturb_factors "0.9 fast" | --speed_perturb_factors fast: write a number above
--min_wav_duration 9 --max_wav_duration 3 | --min_wav_duration 9 is not below
--asr_config conf/nope.yaml | --asr_config conf/nope.yaml: there is no such file
--asr_config run.sh | run.sh can not be merged
--inference_config nope.yaml | --inference_config nope.yaml: there is no such file
--parallel_config nope.yaml | --parallel_config nope.yaml: there is no such file
--pretrained_model nope.pth:a:b | --pretrained_model nope.pth: there is no such file
--start_from ./nope | --start_from ./nope does not exist: .* or a model on Hugging Face
--start_from x --pretrained_model run.sh | both say where the weights begin
--reference conf | early_exit_half takes no reference .* anytime or dld
--reference_args "--max_epoch 3" | early_exit_half takes no reference
--top_k 5 | --top_k 5: early_exit_half takes no reference
--asr_args "--config x.yaml" | --asr_args says config, .* say --asr_config
--reference_args "--output_dir x" --system dld | says output_dir, .* --reference_tag
--asr_args "--model_conf a=1 b=2" | write --model_conf before each of a=1 b=2
--system rd --reference_system static | --reference_system static: rd takes no reference
--reference exp/nope | --reference exp/nope does not exist: name an experiment
--expdir run.sh/exp | --expdir run.sh/exp: run.sh is a file
--dumpdir a,b | --dumpdir a,b: choose a path without commas
--asr_args "--a 'b" | --asr_args --a 'b: No closing quotation
--asr_args "--optim_conf lr=[1," | --optim_conf lr=.1, can not be read
--use_lm true | name the experiment directory of an existing language
--use_lm true --lm_exp nope | there is no nope/valid.loss.ave.pth
--num_nodes 2 | --num_nodes 2 .*: say where to train, .*--host
--launch_args "--max_num_log_files 2" | say where to train, .*--host
--launch_args node1,node2 | say where to train, .*--host
--launch_args "--cmd slurm.pl" | there is no slurm.pl; .* Slurm with --launch_args "srun
--launch_args "srun --ntasks 2" --num_nodes 2 | say --nodes 2 to srun, and --num_nodes 1
--launch_args srun --ngpu 4 | say --ntasks-per-node 4 to srun, and --ngpu 1
--hf_repo model | --hf_repo model: write user/name
--python /bin/false | run tools/install.sh
"""

BAD_SFM = """
--system nope | there is no nope.yaml .* choose one of every_depth, fast, full
--targets dead | --targets dead: choose one of live, cached, cached_features
--sfm_args "--model_conf teacher_layers=3" | layers 3: write a list of numbers
--sfm_args "--model_conf teacher_layers=4,8" | layers 4,8: write a list of numbers
--targets cached_features | --system full has a CNN of its own: choose --system fast
--system fast --targets cached_features --sfm_args "--model_conf cnn_init=" | fast has
--train_shar nope --targets live | --train_shar nope: there is no cuts.*.jsonl.gz in it
--train_shar nope | --train_shar nope: say --targets live; cached ones are those of
--train_shar nope --sfm_args "--num_iters_per_epoch null" | how many batches an epoch
--probe nope | --probe nope: choose one of probe, superb, none
--valid_set train | --train_set and --valid_set are both train
--export_depths 13 | the encoder has 12 layers, so choose depths from 1
--inference_model valid.acc.ave.pth | will not make it; .* valid.loss.ave.pth
--probe superb | SUPERB has nothing to run: name the directory
--probe_args "--seeds a" | --probe_args: argument --seeds: 'a': write numbers
--probe_args "--help" | see python3 -m dldkit.bin.sfm_probe --help
--probe superb --superb_args "--tasks pr" | (PR needs a corp|SUPERB needs .*install)
--probe superb --superb_args "--tasks nope" | --tasks nope: choose from pr ks
--probe superb --superb_args "--lr pr" | --superb_args: argument --lr: 'pr': write
--probe superb --superb_args "--nj 0" | argument --nj: '0': write an integer above 0
--probe superb --superb_args "--rate 1" | --superb_args: unrecognized arguments
--probe superb --superb_args "--help" | see python3 -m dldkit.bin.sfm_superb --help
"""


def table(text):
    return [re.split(r" +\| ", line) for line in text.strip().splitlines()]


@pytest.mark.parametrize(
    "recipe, words, complaint",
    [(AN4, *row) for row in table(BAD_ASR)]
    + [(DISTILL, *row) for row in table(BAD_SFM)],
)
def test_bad_options_end_with_one_line(recipe, words, complaint):
    before = {path for path in recipe.iterdir() if path.name != "run.log"}
    corpora = dict(LIBRISPEECH="", VOXCELEB1="", SNIPS="", IEMOCAP="")

    status, printed = run_recipe(recipe, *shlex.split(words), **corpora)

    assert status in (1, 2)
    assert re.fullmatch(f"error: .*{complaint}.*\n", printed), printed
    assert {path for path in recipe.iterdir() if path.name != "run.log"} == before


@pytest.mark.parametrize("recipe", sorted(ROOT.glob("egs2/*/*/run.sh")), ids=str)
def test_every_recipe_accepts_its_own_systems(recipe):
    systems = "systems" if recipe.parent.name == "asr1" else "systems_ssl"
    stage = ["--stage", 15, "--skip_upload", "true"]
    for system in sorted((ROOT / "conf" / systems).glob("*.yaml")):
        status, printed = run_recipe(recipe.parent, *stage, "--system", system.stem)
        assert status == 0 and "Stage 15: skipped\n" in printed, printed


def test_a_distillation_without_a_teacher_or_a_corpus_of_superb(tmp_path):
    status, printed = run_recipe(DISTILL, TEACHER="")
    assert status == 1 and "there is no teacher: set --teacher, or TEACHER" in printed
    words = ["--probe", "superb", "--stage", "13", "--superb_args"]
    status, printed = run_recipe(DISTILL, *words, f"--iemocap '{tmp_path}'")
    lacking = f"--iemocap {tmp_path} .*has no Session1|SUPERB needs .*install.sh"
    assert status == 1 and re.match(f"error: ({lacking})", printed)


def test_librispeech_is_scored_where_stage_1_downloads_it():
    """The recipe says so before it begins; alone, stage 13 finds nothing there."""
    recipe = ROOT / "egs2" / "librispeech" / "ssl1"
    words = ["--stage", "13", "--stop_stage", "13"]
    status, printed = run_recipe(recipe, *words, LIBRISPEECH="")
    lacking = "--librispeech downloads .*has no SPEAKERS.TXT|SUPERB needs .*install.sh"
    assert status == 1 and re.match(f"error: ({lacking})", printed)


def test_what_superb_downloads_is_there_before_the_first_stage(tmp_path, monkeypatch):
    from dldkit.recipe.sfm import check_sfm
    from dldkit.sfm.superb import checks, tasks

    monkeypatch.chdir(DISTILL)
    monkeypatch.setattr(checks, "MODULES", ())
    source = tmp_path / "lexicon.txt"
    pr = tasks.TASKS["pr"]
    lists = dict(lists={"lexicon.txt": source.as_uri()}, corpora={"root": "voxceleb1"})
    monkeypatch.setitem(tasks.TASKS, "pr", dataclasses.replace(pr, **lists))
    (tmp_path / "dev" / "wav").mkdir(parents=True)
    options = defaults(ROOT / "egs2/TEMPLATE/ssl1/sfm.sh")
    words = f"--tasks pr --voxceleb1 {tmp_path} --list_dir {tmp_path}/lists"
    options.update(teacher="teacher", probe="superb", superb_args=words)
    with pytest.raises(UserError, match="PR needs file:.*put it at .*lists/lexicon"):
        check_sfm(options, ROOT / "conf" / "systems_ssl")
    source.write_text("A AH0\n")
    check_sfm(options, ROOT / "conf" / "systems_ssl")
    assert (tmp_path / "lists" / "lexicon.txt").read_text() == "A AH0\n"


@pytest.mark.parametrize("shell", ["sh", "dash"])
@pytest.mark.parametrize("recipe", [AN4, DISTILL], ids=lambda path: path.parent.name)
def test_another_shell_is_told_that_it_needs_bash(shell, recipe):
    if os.path.realpath(f"/bin/{shell}").endswith("bash"):
        pytest.skip(f"{shell} is bash here")
    status, printed = run_recipe(recipe, shell=[shell])
    assert (status, printed) == (1, "error: ./run.sh needs bash: bash ./run.sh\n")


# ---------------------------------------------------------------- what is accepted


def defaults(script):
    """The options of a script with their defaults, as the shell passes them."""
    lines = script.read_text().split("options.sh")[0].splitlines()
    found = (re.match(r"([a-z_]+)=(.*?)  # ", line) for line in lines)
    return {m[1]: m[2].strip('"') for m in found if m}


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Return a function that checks asr.sh's options for a model of six layers."""
    from dldkit.recipe.asr import check_asr

    monkeypatch.chdir(tmp_path)
    Path("conf").mkdir()
    config = dict(
        encoder="ld_conformer",
        encoder_conf=dict(num_blocks=6),
        best_model_criterion=[["valid", "loss_ctc", "min"]],
        keep_nbest_models=[3, 5],
        max_epoch=8,
    )
    Path("conf/train_asr.yaml").write_text(yaml.safe_dump(config))
    options = defaults(ROOT / "egs2/TEMPLATE/asr1/asr.sh")
    options.update(test_sets="test", inference_depths="6 2")

    def run(**changes):
        assert not set(changes) - set(options)
        return check_asr({**options, **changes}, ROOT / "conf" / "systems")

    return run


@pytest.mark.parametrize(
    "changes, depths",
    [
        (dict(system="every_depth"), "3 6 9"),
        (dict(system="every_depth", export_depths="4,2"), "4 2"),
        (dict(system="every_depth", sfm_args="--model_conf exits=5"), "5 10"),
        (dict(system="full"), ""),
    ],
)
def test_exits_are_exported_where_no_depths_are_named(monkeypatch, changes, depths):
    from dldkit.recipe.sfm import check_sfm

    monkeypatch.chdir(DISTILL)
    options = defaults(ROOT / "egs2/TEMPLATE/ssl1/sfm.sh")
    options.update(teacher="teacher", **changes)
    settings = check_sfm(options, ROOT / "conf" / "systems_ssl")
    assert settings["export_depths"] == depths


@pytest.mark.parametrize(
    "layers, cached", [("[2,3]", "2 3"), ("[[1,2],3]", "1 2 3"), ("null", "")]
)
def test_layers_that_are_learnt_are_cached(monkeypatch, layers, cached):
    """Of a group whose mean is learnt, all."""
    from dldkit.recipe.sfm import check_sfm

    monkeypatch.chdir(DISTILL)
    options = defaults(ROOT / "egs2/TEMPLATE/ssl1/sfm.sh")
    options.update(teacher="teacher", sfm_args=f"--model_conf teacher_layers={layers}")
    settings = check_sfm(options, ROOT / "conf" / "systems_ssl")
    assert settings["teacher_layers"] == cached


@pytest.mark.parametrize(
    "text, rate", [("16k", "16000"), ("22.05k", "22050"), ("8000", "8000")]
)
def test_sampling_rates(check, text, rate):
    assert check(fs=text)["fs"] == rate


@pytest.mark.parametrize("text", ["6 4 2", "6,4,2", "6, 4, 2", "6 4 4 2"])
def test_depths_with_spaces_or_commas(check, text):
    assert check(inference_depths=text)["inference_depths"] == "6 4 2"


def test_layers_count_as_the_training_will_have_them(check):
    words = "--encoder_conf num_blocks=12 --max_epoch 3"
    assert check(asr_args=words, inference_depths="12")["inference_depths"] == "12"
    words = "--encoder_conf=num_blocks=12 --encoder_conf output_size=8"
    assert check(asr_args=words, inference_depths="12")["inference_depths"] == "12"


@pytest.mark.parametrize(
    "changes, thresholds, exits",
    [
        (dict(system="anytime"), None, "2 4"),
        (dict(system="early_exit", exit_thresholds="0.1"), None, "2 4"),
        (dict(asr_args="--encoder_conf exits=[1,5]"), None, "1 5"),
        (dict(system="anytime", exit_thresholds="none"), "none", ""),
        (dict(system="static"), "none", ""),
        (dict(selector="even"), "none", ""),
        (dict(inference_args="--beam_size 1"), None, "2 4"),
        (dict(inference_args="--beam_size 10"), "none", ""),
        (dict(inference_config="beam.yaml"), "none", ""),
        # as in ESPnet, the command line has the last word
        (
            dict(inference_config="beam.yaml", inference_args="--beam_size=1"),
            None,
            "2 4",
        ),
    ],
)
def test_early_stopping_is_for_systems_with_exits(check, changes, thresholds, exits):
    """And for greedy search; `auto` is none elsewhere."""
    Path("beam.yaml").write_text("beam_size: 10\n")
    settings = check(**changes)
    assert settings["exits"] == exits
    assert settings.get("exit_thresholds") == thresholds


@pytest.mark.parametrize(
    "name",
    [
        "valid.loss_ctc.ave.pth",
        "valid.loss_ctc.best.pth",
        "valid.loss_ctc.ave_5best.pth",
        "valid.loss_ctc.ave_3best.pth",
        "latest.pth",
        "8epoch.pth",
    ],
)
def test_checkpoints_that_the_training_makes(check, name):
    check(inference_asr_model=name)


def test_criteria_of_the_command_line_count(check):
    words = "--best_model_criterion valid,acc,max train,loss,min --keep_nbest_models 2"
    for name in ("valid.acc.ave_2best.pth", "train.loss.best.pth"):
        check(asr_args=words, inference_asr_model=name, system="early_exit")


def test_a_reference_makes_the_checkpoint_that_is_decoded(check):
    """It would not be known until it is trained."""
    wanted = dict(system="anytime", asr_args="--max_epoch 20")
    wanted.update(inference_asr_model="20epoch.pth")
    with pytest.raises(UserError, match="the reference's .* has 8 epochs"):
        check(**wanted)
    check(**wanted, reference_args="--max_epoch 20")
    check(**wanted, stage="8")
    check(**wanted, skip_reference="true")
    check(**{**wanted, "system": "early_exit"})
    wanted = dict(system="anytime", asr_args="--keep_nbest_models 4")
    wanted.update(inference_asr_model="valid.loss_ctc.ave_4best.pth")
    with pytest.raises(UserError, match="the reference's training .* will not make it"):
        check(**wanted)


@pytest.mark.parametrize(
    "system, depths, expected",
    [
        ("dld", "6 3 2 1", "[6,3,1]"),
        ("rd", "6 3", "[6,3]"),
        ("rd", "6", "[6]"),
        ("early_exit", "2", "[6,2]"),
        ("anytime", "6 4 2", "[6,2]"),
        ("static", "6 3", ""),
    ],
)
def test_validation_is_at_full_half_and_the_smallest_depth(
    check, system, depths, expected
):
    assert check(system=system, inference_depths=depths)["valid_depths"] == expected


@pytest.mark.parametrize(
    "system, needed",
    [
        ("dld", "true"),
        ("dld_paper", "true"),
        ("nested", "true"),
        ("anytime", "true"),
        ("anytime_uniform", "true"),
        ("early_exit_half", "false"),
        ("rd", "false"),
        ("static", "false"),
        ("early_exit", "false"),
        ("stochastic_depth", "false"),
    ],
)
def test_which_systems_need_a_reference(check, system, needed):
    assert check(system=system)["needs_reference"] == needed


def test_a_system_of_the_recipe_s_own(check):
    Path("conf/systems").mkdir()
    Path("conf/systems/mine.yaml").write_text("model_conf:\n  reference: ???\n")
    assert check(system="mine")["needs_reference"] == "true"
    Path("conf/systems/dld.yaml").write_text("model_conf: {reference: exp/x}\n")
    assert check(system="dld")["needs_reference"] == "false"


@pytest.mark.parametrize(
    "system, reference",
    [("anytime", "early_exit"), ("nested", "static"), ("dld", "static")],
)
def test_a_student_that_begins_with_exits_has_a_reference_with_exits(
    check, system, reference
):
    assert check(system=system)["reference_system"] == reference
    asked = check(system=system, reference_system="stochastic_depth")
    assert asked["reference_system"] == "stochastic_depth"


@pytest.mark.parametrize("system, why", [("dld", "needs a reference"), ("x", "no x")])
def test_a_reference_that_can_not_be_trained_is_refused(check, system, why):
    with pytest.raises(UserError, match=f"--reference_system {system}: .*{why}"):
        check(system="dld", reference_system=system)


@pytest.mark.parametrize(
    "encoder, changes, unknown",
    [
        ("ld_e_branchformer", dict(system="stochastic_depth"), "stochastic_depth_rate"),
        ("ld_conformer", dict(asr_args="--encoder_conf '{kept: 1, x: 2}'"), "kept, x"),
        (
            "ld_e_branchformer",
            dict(system="dld", reference_system="stochastic_depth"),
            "stochastic_depth_rate",
        ),
    ],
)
def test_an_encoder_that_lacks_an_option_is_refused(check, encoder, changes, unknown):
    config = yaml.safe_load(Path("conf/train_asr.yaml").read_text())
    Path("conf/train_asr.yaml").write_text(
        yaml.safe_dump({**config, "encoder": encoder})
    )
    with pytest.raises(UserError, match=f"encoder_conf {unknown}: {encoder} has no"):
        check(**changes)
    Path("exp").mkdir()  # of a reference that is not to be trained
    check(**{**changes, "system": "dld", "asr_args": "", "reference": "exp"})


@pytest.mark.parametrize(
    "value, complaint",
    [
        ("layer_weights=mean", "layer_weights 'mean': write last or weighted_sum"),
        ("freeze_steps=1.5", "freeze_steps 1.5: write a whole number from 0"),
        ("model=/nowhere", "model: /nowhere has no config.json: name the directory"),
        ("model=../nowhere", "model: ../nowhere has no config.json"),
    ],
)
def test_values_of_a_pretrained_encoder_are_checked(check, value, complaint):
    wavlm = str(ROOT / "egs2/librispeech_100/asr1/conf/train_asr_wavlm.yaml")
    options = dict(feats_normalize="none", fs="16k", inference_depths="12 2")
    check(asr_config=wavlm, **options)  # the Hub is not asked
    changed = dict(asr_config=wavlm, asr_args=f"--encoder_conf {value}")
    with pytest.raises(UserError, match=f"encoder_conf {complaint}"):
        check(**changed, **options)
    of_reference = dict(reference_config=wavlm, reference_args=changed["asr_args"])
    with pytest.raises(UserError, match=f"encoder_conf {complaint}"):
        check(asr_config=wavlm, system="dld", **of_reference, **options)


def test_a_pretrained_encoder_that_was_trained_needs_no_directory(check):
    wavlm = str(ROOT / "egs2/librispeech_100/asr1/conf/train_asr_wavlm.yaml")
    options = dict(feats_normalize="none", fs="16k", inference_depths="12 2")
    options.update(asr_config=wavlm, asr_args="--encoder_conf model=/nowhere")
    check(stage="12", **options)
    check(skip_train="true", **options)


def test_options_of_encoders_are_those_of_their_classes():
    """Which are not imported: that would take as long as all other checks together."""
    code = "import sys; import dldkit.recipe.asr; "
    code += "from dldkit.recipe.encoders import options_of; "
    code += "options_of('LDHuggingFaceEncoder'); print('torch' in sys.modules)"
    printed = subprocess.check_output([sys.executable, "-c", code], text=True)
    assert printed == "False\n"

    from dldkit import registry

    kinds = "Conformer Transformer Branchformer EBranchformer HuggingFace"
    for name in (f"LD{kind}Encoder" for kind in kinds.split()):
        own = inspect.signature(getattr(registry, name)).parameters
        assert options_of(name) == set(own) - {"input_size"}


@pytest.mark.parametrize(
    "begins_with, changes",
    [
        ("reference", {}),
        ("reference", dict(reference_args="--max_epoch 20")),
        ("reference", dict(asr_args="--encoder_conf depth_sampler=full")),
        # its weights would not fit
        ("random", dict(reference_args="--encoder_conf num_blocks=4")),
        ("random", dict(asr_args="--encoder_conf output_size=144")),
        ("random", dict(asr_args="--model_conf shared_head=false")),
        ("random", dict(reference="exp")),
        ("random", dict(asr_args="--model_conf reference=self")),
        ("", dict(asr_args="--init_param other.pth")),
        ("", dict(system="dld")),
    ],
)
def test_what_the_weights_begin_with(check, begins_with, changes):
    Path("exp").mkdir()
    Path("conf/systems").mkdir()
    Path("conf/systems/mine.yaml").write_text(
        "init_param: ???\nmodel_conf:\n  reference: ???\n"
    )
    assert check(**{"system": "mine", **changes})["begins_with"] == begins_with


@pytest.mark.parametrize(
    "words, needed, given",
    [
        ("", "true", ""),
        ("--model_conf reference=self", "false", "model_conf.reference=null"),
        ("--model_conf reference=null", "false", "model_conf.reference=null"),
        ("--init_param other.pth", "true", "init_param=null"),
    ],
)
def test_what_the_system_leaves_open_may_be_given(check, words, needed, given):
    settings = check(system="anytime", asr_args=words)
    assert settings["needs_reference"] == needed and settings["given_values"] == given
    assert settings["reference_system"] == "early_exit"


def test_the_number_of_layers_has_to_be_known(check):
    config = Path("conf/train_asr.yaml")
    config.write_text(config.read_text().replace("num_blocks: 6", "output_size: 8"))
    with pytest.raises(UserError, match="train_asr.yaml .*write encoder_conf: num_bl"):
        check()


def test_a_trained_experiment_says_its_own_layers_and_checkpoints(check):
    exp = Path("exp/mine")
    exp.mkdir(parents=True)
    (exp / "config.yaml").write_text("encoder_conf: {num_blocks: 12}\n")
    (exp / "old.pth").touch()
    trained = dict(asr_exp=str(exp), inference_asr_model="old.pth", stage="12")
    assert check(**trained, inference_depths="12")["inference_depths"] == "12"


class TestPretrainedEncoder:
    """encoder: ld_hf, whose layers the model's own config.json tells."""

    @pytest.fixture
    def check_hf(self, check):
        def run(model="model", model_config='{"num_hidden_layers": 6}', **changes):
            config = dict(encoder="ld_hf", input_size=1, encoder_conf=dict(model=model))
            config["best_model_criterion"] = [["valid", "loss_ctc", "min"]]
            Path("conf/train_hf.yaml").write_text(yaml.safe_dump(config))
            Path("model").mkdir(exist_ok=True)
            Path("model/config.json").write_text(model_config)
            options = dict(asr_config="conf/train_hf.yaml", feats_normalize="none")
            return check(**{**options, **changes})

        return run

    def test_has_the_layers_of_its_model(self, check_hf):
        settings = check_hf(inference_depths="6 2")
        assert (settings["exits"], settings["valid_depths"]) == ("2 4", "[6,2]")
        with pytest.raises(UserError, match="the encoder has 6 layers"):
            check_hf(inference_depths="12")

    @pytest.mark.parametrize("text", ["<!DOCTYPE html>", "[12]", ""])
    def test_refuses_what_is_no_config(self, check_hf, text):
        with pytest.raises(UserError, match="model/config.json is not the JSON object"):
            check_hf(model_config=text, inference_depths="6")

    def test_of_the_hub_has_to_be_said(self, check_hf):
        hub = dict(model="user/name", inference_depths="12 6")
        with pytest.raises(UserError, match="write encoder_conf: num_blocks"):
            check_hf(**hub)
        settings = check_hf(**hub, asr_args="--encoder_conf num_blocks=12")
        assert settings["valid_depths"] == "[12,6]"

    @pytest.mark.parametrize(
        "changes, message",
        [
            (dict(fs="8k"), "--fs 8k: .*say --fs 16k"),
            (dict(feats_type="fbank"), "say --feats_type raw"),
            (dict(feats_normalize="global_mvn"), "say --feats_normalize none"),
            (dict(system="stochastic_depth"), "rate: ld_hf has no such option"),
            (dict(asr_args="--encoder_conf keep_final_norm=1"), "norm: ld_hf has no"),
        ],
    )
    def test_takes_no_other_speech_or_option(self, check_hf, changes, message):
        with pytest.raises(UserError, match=message):
            check_hf(**changes)


def test_a_schedule_of_transformers_needs_them(check, monkeypatch):
    schedule = dict(asr_args="--scheduler transformers")
    check(**schedule)
    with pytest.raises(UserError, match="warmup_steps: .* takes name and warmup_ratio"):
        check(asr_args="--scheduler transformers --scheduler_conf warmup_steps=9")
    monkeypatch.setattr("dldkit.hf_options.find_spec", lambda name: None)
    check()
    with pytest.raises(UserError, match="scheduler: transformers needs transformers"):
        check(**schedule)


def test_a_language_model_needs_a_beam(check):

    lm = Path("exp/lm")
    lm.mkdir(parents=True)
    for name in ("config.yaml", "valid.loss.ave.pth", "5epoch.pth"):
        (lm / name).touch()
    with pytest.raises(UserError, match="greedy search takes no language model"):
        check(use_lm="true", lm_exp=str(lm))
        check(use_lm="true", lm_exp=str(lm), inference_args="--beam_size 1")
    check(use_lm="true", lm_exp=str(lm), inference_args="--beam_size 5")
    Path("beam.yaml").write_text("beam_size: 5\n")
    check(use_lm="true", lm_file=str(lm / "5epoch.pth"), inference_config="beam.yaml")


def test_a_model_to_start_from_says_its_layers_and_tokens(check):
    """It has eight layers, where the recipe's has six."""

    exp = Path("exp/asr_mine")
    exp.mkdir(parents=True)
    config = dict(encoder="conformer", encoder_conf=dict(num_blocks=8))
    config |= dict(token_type="char", frontend_conf=dict(fs=16000))
    (exp / "config.yaml").write_text(yaml.safe_dump(config))
    (exp / "valid.acc.best.pth").touch()
    started = dict(start_from=str(exp), inference_depths="8 2", token_type="bpe")
    settings = check(**started)
    assert settings["start_name"] == "from_mine"
    assert settings["token_type"] == "char"
    assert settings["valid_depths"] == "[8,2]"
    with pytest.raises(UserError, match="takes audio of 16000 Hz, and --fs is 8000"):
        check(**started, fs="8k")
    config["decoder"] = "transducer"
    (exp / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match="exp/asr_mine can not be .* transducer"):
        check(**started)
