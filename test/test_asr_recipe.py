"""Recipes of recognisers: their configs, and mini_an4 from start to end."""

import json
import re
import shutil
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from pretrained import write_pretrained
from running import ROOT, copy_of_the_recipes, environment, shell, snippet_of

TEMPLATE = ROOT / "egs2" / "TEMPLATE" / "asr1"
CONFIGS = sorted(ROOT.glob("egs2/*/asr1/conf/train_asr*.yaml"))
SYSTEMS = sorted((ROOT / "conf" / "systems").glob("*.yaml"))
PRETRAINED = dict(train_asr_wavlm="wavlm", train_asr_whisper="whisper")
# they begin with early exit's weights
ANYTIME = ("anytime", "anytime_uniform")
PULLED = ("dld_paper", "dld", "nested", *ANYTIME)  # to a reference
EARLY_EXIT = ("early_exit", "early_exit_half")

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    "config", CONFIGS, ids=lambda path: f"{path.parts[-4]}-{path.stem}"
)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda path: path.stem)
def test_every_config_builds_its_model(config, system, tmp_path, capsys, monkeypatch):
    from dldkit.bin import asr_train, merge_config

    kind = PRETRAINED.get(config.stem)
    if system.stem == "stochastic_depth" and (
        kind or config.stem == "train_asr_e_branchformer"
    ):
        pytest.skip("neither ESPnet's E-Branchformer nor ld_hf has stochastic depth")
    monkeypatch.chdir(tmp_path)
    parts = [config, system]
    own = config.parent / "systems" / system.name
    if own.exists():
        parts.append(own)
    parts = [str(part) for part in parts]
    if system.stem in PULLED:
        parts.append("model_conf.reference=exp/asr_static")
    if system.stem in ANYTIME:
        parts.append("init_param=[]")
    if kind:
        layers = yaml.safe_load(config.read_text())["encoder_conf"]["num_blocks"]
        write_pretrained("pretrained", kind, layers)
        parts.append("encoder_conf.model=pretrained")
    merge_config.main(parts)
    merged = capsys.readouterr().out
    Path("train.yaml").write_text(merged)
    Path("tokens.txt").write_text("<blank>\n<unk>\na\n<sos/eos>\n")

    asr_train.main(
        "--dry_run true --config train.yaml --token_type char --token_list tokens.txt "
        "--output_dir out".split()
    )

    built = yaml.safe_load(Path("out/config.yaml").read_text())
    encoder = built["encoder_conf"]
    assert built["encoder"].startswith("ld_")
    ours = system.stem in (*PULLED, "rd", *EARLY_EXIT)
    dynamic = ours and system.stem not in EARLY_EXIT
    assert (encoder["depth_sampler"] != "full") == dynamic
    assert built["model"] == ("dld" if ours else "espnet")
    if ours:
        reference = built["model_conf"]["reference"]
        assert reference == ("exp/asr_static" if system.stem in PULLED else None)
    exits = (*EARLY_EXIT, *ANYTIME)
    assert bool(encoder.get("exits")) == (system.stem in exits)
    prefix = ("nested", *exits)
    choice = dict.fromkeys(prefix, "prefix") | dict(dld="even", rd="even")
    assert encoder.get("layer_choice", "random") == choice.get(system.stem, "random")
    assert bool(encoder.get("stochastic_depth_rate")) == (
        system.stem == "stochastic_depth"
    )
    assert built["unused_parameters"] is True and built["num_att_plot"] == 0
    assert built["best_model_criterion"][0] == ["valid", "loss_ctc", "min"]


def test_variants_of_anytime_differ_in_what_they_are_named_for():
    shared = ROOT / "conf/systems"
    anytime = yaml.safe_load((shared / "anytime.yaml").read_text())
    assert anytime["encoder_conf"]["depth_sampler"] == "exits"
    uniform = yaml.safe_load((shared / "anytime_uniform.yaml").read_text())
    uniform["encoder_conf"]["depth_sampler"] = "exits"
    assert uniform == anytime
    own = ROOT / "egs2/digits/asr1/conf/systems/anytime_each.yaml"
    anytime["encoder_conf"]["exits"] = 1
    del anytime["specaug_conf"]  # of no use to waveforms
    assert yaml.safe_load(own.read_text()) == anytime
    half = yaml.safe_load((shared / "early_exit_half.yaml").read_text())
    assert half["model_conf"].pop("exit_gradient") == 0.5
    assert half == yaml.safe_load((shared / "early_exit.yaml").read_text())


class An4:
    """mini_an4 after stages 1-15, with its experiments on "another disk"."""

    def __init__(self, root):
        self.recipe = copy_of_the_recipes(root) / "mini_an4" / "asr1"
        self.exp = root / "another disk" / "exp"
        self.dump = self.recipe / "my dump"
        self.student = self.exp / "asr_anytime_raw_char"
        self.reference = self.exp / "asr_early_exit_raw_char"
        self.printed = self.run()

    def run(self, *words, **options):
        """Run the system that has most stages, if no other one is named."""
        given = ["--expdir", self.exp, "--dumpdir", self.dump.name]
        given += ["--system", "anytime"]
        return shell("./run.sh", *given, *words, cwd=self.recipe, **options)

    def utterance(self):
        wav = (self.dump / "raw/test/wav.scp").read_text().split("\n")[0]
        path = self.recipe / wav.split(maxsplit=1)[1]
        return soundfile.read(path, dtype="float32")[0]


@pytest.fixture(scope="module")
def an4(tmp_path_factory):
    return An4(tmp_path_factory.mktemp("recipes"))


def test_a_stage_without_the_one_before_says_which(tmp_path):
    recipe = copy_of_the_recipes(tmp_path) / "mini_an4" / "asr1"
    for stage, needed in ((4, "stage 3"), (10, "stage 5"), (12, "stage 11")):
        words = ["--stage", stage, "--stop_stage", stage]
        text = shell("./run.sh", *words, cwd=recipe, status=1)
        assert f"run {needed} first" in text


def test_of_a_validation_set_all_of_it_is_decoded(tmp_path):
    """Also what stage 4 left out; what would decode it is shown, and not run."""
    recipe = copy_of_the_recipes(tmp_path) / "mini_an4" / "asr1"
    shell("./run.sh", "--stop_stage", 4, "--max_wav_duration", 2.1, cwd=recipe)
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\ncase "$*" in *bin.decode*) echo "$*" ;; '
        f'*) exec {sys.executable} "$@" ;; esac\n'
    )
    python.chmod(0o755)
    exp = recipe / "exp" / "asr_untrained"
    exp.mkdir(parents=True)
    (exp / "valid.loss_ctc.ave.pth").touch()
    words = ["--stage", 12, "--stop_stage", 12, "--asr_exp", exp, "--python", python]
    text = shell("./run.sh", *words, "--use_depth_profile", "false", cwd=recipe)
    assert "--data_dirs dump/raw/org/train_dev dump/raw/test --depths" in text
    sizes = [
        len((recipe / f"dump/raw/{name}/text").read_text().splitlines())
        for name in ("org/train_dev", "train_dev")
    ]
    assert sizes == [2, 1]


def test_settings_with_commas_and_colons_give_a_name_that_espnet_takes(tmp_path):
    recipe = copy_of_the_recipes(tmp_path) / "mini_an4" / "asr1"
    drawn = "--encoder_conf depth_sampler={4:1,2:1}"
    words = ["--stage", 12, "--stop_stage", 12, "--asr_args", drawn]
    text = shell("./run.sh", *words, cwd=recipe, status=1)
    assert "exp/asr_early_exit_half_raw_char_encoder_confdepth_sampler4-1_2-1/" in text
    words += ["--lang", "cy"]  # whose tokens are others
    text = shell("./run.sh", *words, cwd=recipe, status=1)
    assert "exp/asr_early_exit_half_raw_cy_char_encoder_conf" in text


def test_all_stages_of_mini_an4(an4):
    """With spaces in the paths, and an absolute --expdir."""
    for stage in range(1, 16):
        assert f"Stage {stage}: " in an4.printed
    assert "Stage 9: skipped: the reference runs beside the student" in an4.printed
    assert (
        "2epoch results: [train] " in an4.printed
    )  # progress of the trainings is seen
    for no_news in ("WARNING", "Warning", "flash_attn"):
        assert no_news not in an4.printed
    decoded_at = {an4.reference: [4], an4.student: [4, 2]}
    for exp, depths in decoded_at.items():
        model = exp / "valid.loss_ctc.ave.pth"
        assert model.exists()
        for depth in depths:
            for test_set, size in (("train_dev", 2), ("test", 2)):
                decoded = exp / "decode_valid.loss_ctc.ave" / f"depth{depth}"
                assert len((decoded / test_set / "text").open().readlines()) == size
    config = yaml.safe_load((an4.student / "config.yaml").read_text())
    reference = f"{an4.reference}/valid.loss_ctc.ave.pth"
    assert config["model_conf"]["reference"] == reference
    assert config["init_param"] == [reference]
    assert config["frontend_conf"]["fs"] == 16000
    assert list(an4.student.glob("*.profile.pth"))

    results = json.loads((an4.student / "results.json").read_text())["results"]
    measured = {(r["system"], r["test_set"], r["depth"]) for r in results}
    assert measured == {
        (exp.name.removeprefix("asr_"), test_set, depth)
        for exp, depths in decoded_at.items()
        for test_set in ("train_dev", "test")
        for depth in depths
    }
    for row in (an4.student / "RESULTS.md").read_text().splitlines():
        if row.startswith("| anytime"):
            assert row in an4.printed
    assert "eight real recordings" in an4.printed
    stopped = json.loads((an4.student / "results.json").read_text())["early_stopping"]
    assert {r["test_set"] for r in stopped} == {"train_dev", "test"}
    assert all(2 <= r["depth"] <= 4 for r in stopped)  # its exit, and all layers
    assert "| early stopping | test set | threshold |" in re.sub(" +", " ", an4.printed)


def as_a_stranger(code, speech, directory, **variables):
    """Run code of a model card in an empty directory; return what `text` is then."""
    directory.mkdir(parents=True)
    np.save(directory / "speech.npy", speech)
    empty = directory / "empty"
    empty.mkdir()
    code = f"import numpy\nspeech = numpy.load('../speech.npy')\n{code}\nprint([text])"
    home = dict(HOME=str(empty), PYTHONPATH=str(ROOT))
    printed = shell(
        *(sys.executable, "-c", code), cwd=empty, env=environment(**home, **variables)
    )
    return printed.splitlines()[-1]


def test_the_model_card_s_snippet_runs_elsewhere(an4, tmp_path):
    """As it stands; a hub without network is a cache in its layout."""
    from dldkit.asr.inference import Speech2Text

    card = an4.student / "huggingface" / "README.md"
    front = yaml.safe_load(card.read_text().split("---")[1])
    assert front.pop("tags") == ["espnet", "audio", "automatic-speech-recognition"]
    assert front == dict(
        license="cc-by-4.0",
        language="en",
        datasets=["mini_an4"],
        library_name="espnet",
        pipeline_tag="automatic-speech-recognition",
    )
    assert "pip install /path/to/dldkit" in card.read_text()
    zip_file = an4.student / "pack_valid.loss_ctc.ave" / "anytime_raw_char.zip"
    assert f'from_pretrained("{zip_file}")' in snippet_of(card)

    # `hf upload` puts it where from_pretrained would download it to
    hub = tmp_path / "hub" / "hub" / "models--some--body"
    uploader = tmp_path / "bin" / "hf"
    uploader.parent.mkdir()
    uploader.write_text(
        f"#!/bin/sh\n[ \"$1 $2\" = 'upload some/body' ] || exit 1\n"
        f"mkdir -p {hub}/snapshots {hub}/refs\n"
        f'cp -r "$3" {hub}/snapshots/abc && printf abc >{hub}/refs/main\n'
    )
    uploader.chmod(0o755)
    env = environment(DLDKIT_VENV=str(tmp_path))
    env["PATH"] = f"{uploader.parent}:{env['PATH']}"
    an4.run("--stage", 15, "--hf_repo", "some/body", env=env)
    code = snippet_of(card)
    assert 'from_pretrained("some/body")' in code

    speech = an4.utterance()
    recognise = Speech2Text(
        an4.student / "config.yaml", an4.student / "valid.loss_ctc.ave.pth"
    )
    recognise.set_depth(2)
    text, *_, hypothesis = recognise(speech)[0]
    code += "\ntext = text, round(float(speech2text(speech)[0][-1].score), 2)"
    wanted = str([(text, round(float(hypothesis.score), 2))])
    offline = dict(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    assert as_a_stranger(code, speech, tmp_path / "from hub", **offline) == wanted
    code = code.replace("some/body", str(zip_file))
    assert as_a_stranger(code, speech, tmp_path / "from zip") == wanted


def test_a_pack_names_nothing_outside(an4):
    zip_file = an4.student / "pack_valid.loss_ctc.ave" / "anytime_raw_char.zip"
    packed = zipfile.ZipFile(zip_file)
    names = set(packed.namelist())
    assert {"train.yaml", "RESULTS.md", "images/loss.png"} <= names
    assert "valid.loss_ctc.ave.profile.pth" in names
    assert not [n for n in names if "early" in n or n.startswith("/") or ".." in n]
    meta = yaml.safe_load(packed.read("meta.yaml"))
    assert set(meta["files"].values()) | set(meta["yaml_files"].values()) <= names
    assert meta["dldkit"] and meta["install"].startswith("pip install /path/to/dldkit")
    config = yaml.safe_load(packed.read("config.yaml"))
    assert config["normalize_conf"]["stats_file"] == "./feats_stats.npz"


def test_a_second_run_keeps_everything(an4):
    kept = [
        path
        for pattern in ("asr_*/*epoch.pth", "asr_stats*/*/*", "asr_*/*/*.zip")
        for path in an4.exp.glob(pattern)
    ]
    kept += an4.exp.glob("asr_*/*/depth*/*/text")
    before = {path: path.stat().st_mtime_ns for path in kept if path.is_file()}
    assert len(before) > 20
    printed = an4.run()
    assert "epoch results" not in printed and "real-time factor" not in printed
    assert "| anytime" in printed  # the table is shown again
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_default_is_one_training_without_a_reference(an4):
    paths = ["--expdir", an4.exp, "--dumpdir", an4.dump.name]
    words = ["--stage", 6, "--stop_stage", 13, "--rtf_utts", 0]
    text = shell("./run.sh", *paths, *words, cwd=an4.recipe)
    for stage in (6, 7, 8, 9):
        assert f"Stage {stage}: skipped: early_exit_half needs no reference" in text
    student = an4.exp / "asr_early_exit_half_raw_char"
    config = yaml.safe_load((student / "config.yaml").read_text())
    assert config["model_conf"]["exit_gradient"] == 0.5
    assert config["model_conf"]["reference"] is None and not config["init_param"]
    results = json.loads((student / "results.json").read_text())["results"]
    of_both = {(r["system"], r["depth"]) for r in results}
    assert of_both == {("early_exit_half_raw_char", depth) for depth in (4, 2)}


@pytest.mark.slow
def test_audio_in_arks(an4):
    words = ["--dumpdir", "arks", "--audio_format", "flac.ark", "--asr_tag", "arks"]
    words += ["--asr_stats_dir", an4.exp / "arks stats", "--asr_args", "--max_epoch 2"]
    text = an4.run(*words, "--system", "static", "--stage", 3, "--stop_stage", 11)
    assert "Stage 11: Training" in text and "2epoch results" in text
    found = "train", "feats_stats.npz"
    as_files = an4.exp.joinpath("asr_stats_raw_char", *found).read_bytes()
    assert an4.exp.joinpath("arks stats", *found).read_bytes() == as_files
    assert not list((an4.recipe / "arks").rglob("*.flac"))


def test_systems_without_a_reference_and_references_that_exist(an4):
    """Neither trains one; and ESPnet's names of options are known."""
    words = ["--stage", 6, "--stop_stage", 11]
    text = an4.run(*words, "--system", "rd", "--asr_exp", an4.exp / "mine")
    for stage in (6, 7, 8, 9):
        assert f"Stage {stage}: skipped: rd needs no reference" in text
    assert (an4.exp / "mine" / "valid.loss_ctc.ave.pth").exists()
    own = ["--reference", an4.exp / "mine", "--asr_tag", "second"]
    checkpoint = an4.exp / "mine" / "valid.loss_ctc.ave.pth"
    own += ["--pretrained_model", checkpoint, "--asr_stats_dir", an4.exp / "my stats"]
    text = an4.run(*words, *own, "--asr_args", "--max_epoch 1")
    assert f"Stage 7: skipped: the reference is {an4.exp}/mine" in text
    config = yaml.safe_load((an4.exp / "asr_second" / "config.yaml").read_text())
    assert config["model_conf"]["reference"] == f"{an4.exp}/mine"
    assert config["init_param"] == [str(checkpoint)]
    assert (an4.exp / "my stats" / "train" / "feats_stats.npz").is_file()


def test_a_student_begins_with_the_weights_of_its_reference(an4):
    """A learning rate of zero leaves them, and early exit trained them."""
    words = ["--system", "anytime", "--stage", 7, "--stop_stage", 11]
    words += ["--skip_stages", "8 10", "--reference_tag", "exits"]
    words += ["--asr_tag", "begins"]
    words += ["--reference_args", "--max_epoch 1"]
    an4.run(*words, "--asr_args", "--max_epoch 1 --optim_conf lr=0")

    config = yaml.safe_load((an4.exp / "asr_exits/config.yaml").read_text())
    assert config["encoder_conf"]["exits"] == 2
    assert config["encoder_conf"]["depth_sampler"] == "full"
    first, second = (
        torch.load(an4.exp / f"asr_{name}" / "valid.loss_ctc.ave.pth")
        for name in ("exits", "begins")
    )
    weights = [n for n in first if "running_" not in n and "num_batches" not in n]
    assert len(weights) > 20
    assert all(torch.equal(first[name], second[name]) for name in weights)


def test_a_student_that_is_its_own_reference(an4):
    """The system leaves open what --asr_args give."""
    words = ["--stage", 6, "--stop_stage", 11, "--skip_stages", 10, "--asr_tag", "own"]
    text = an4.run(*words, "--asr_args", "--max_epoch 1 --model_conf reference=self")
    assert "Stage 7: skipped: anytime needs no reference" in text
    assert "anytime will begin with random weights" in text
    config = yaml.safe_load((an4.exp / "asr_own" / "config.yaml").read_text())
    assert config["model_conf"]["reference"] == "self" and config["init_param"] == []
    text = an4.run("--asr_tag", "own", "--reference_tag", "own", status=1)
    assert "asr_own would be of the reference and of anytime" in text


def test_decoding_with_a_language_model_of_espnet(an4, tmp_path):
    from dldkit.asr.inference import Speech2Text

    lm = an4.exp / "lm"
    command = [sys.executable, "-m", "espnet2.bin.lm_train", "--output_dir", lm]
    command += "--token_type char --lm_conf unit=8 --lm_conf nlayers=1".split()
    command += "--max_epoch 1 --batch_type unsorted --batch_size 4".split()
    command += ["--token_list", "data/token_list/char/tokens.txt"]
    for part, name in (("train", "train_nodev"), ("valid", "train_dev")):
        text, shapes = an4.dump / "raw" / name / "text", an4.exp / "asr_stats_raw_char"
        command += [f"--{part}_data_path_and_name_and_type", f"{text},text,text"]
        command += [f"--{part}_shape_file", shapes / part / "text_shape"]
    shell(*command, cwd=an4.recipe)
    beam = dict(beam_size=2, ctc_weight=1.0, lm_weight=0.5)
    config = tmp_path / "beam.yaml"
    config.write_text(yaml.safe_dump({**beam, "batch_size": 1}))
    words = ["--stage", 12, "--inference_depths", 2, "--skip_stages", "13 14 15"]
    words += ["--use_lm", "true", "--lm_exp", lm, "--inference_config", config]
    an4.run(*words)

    tag = "decode_valid.loss_ctc.ave_beam_lm_lm_valid.loss.ave"
    scores = an4.student / tag / "depth2" / "test" / "score"
    found = re.search(r"\((.*)\)", scores.read_text().split("\n")[0])[1]
    model = [an4.student / "config.yaml", an4.student / "valid.loss_ctc.ave.pth"]
    files = [str(lm / name) for name in ("config.yaml", "valid.loss.ave.pth")]
    for with_lm in (dict(zip(("lm_train_config", "lm_file"), files)), {}):
        recognise = Speech2Text(*model, depth=2, **beam, **with_lm)
        score = float(recognise(an4.utterance())[0][-1].score)
        assert (score == pytest.approx(float(found), rel=1e-3)) == bool(with_lm)


def test_cached_posteriors_are_data_of_the_student(an4):
    words = ["--stage", 9, "--skip_stages", 10, "--kd_source", "cached", "--top_k", 5]
    words += ["--stop_stage", 11, "--asr_tag", "third", "--asr_args", "--max_epoch 1"]
    text = an4.run(*words)
    assert "Stage 9: Posteriors of the reference" in text
    config = yaml.safe_load((an4.exp / "asr_third" / "config.yaml").read_text())
    cache = config["model_conf"]["reference"]
    assert Path(cache).name == "posteriors_top5"  # those of another number stay
    for part in ("train", "valid"):
        entries = config[f"{part}_data_path_and_name_and_type"]
        assert [f"{cache}/posteriors.scp", "posteriors", "numpy_ark"] in entries
    again = an4.run(*words, "--stop_stage", 9)
    assert "posteriors_top5 is finished already, kept" in again


def test_a_published_model_is_what_a_training_starts_from(an4, tmp_path):
    """A hub without network is a cache in its layout."""
    hub = tmp_path / "hub" / "hub" / "models--some--body"
    (packed,) = an4.student.glob("pack_*/*.zip")
    shutil.unpack_archive(packed, hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    env = environment(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")

    words = ["--stage", 5, "--start_from", "some/body", "--inference_depths", "4"]
    words += ["--asr_args", "--max_epoch 1", "--exit_thresholds", "none"]
    words += ["--use_depth_profile", "false"]
    text = an4.run(*words, "--stop_stage", 13, env=env)
    assert "Stage 7: skipped: the model is some/body" in text
    for stage in (5, 8, 10, 11, 12, 13):
        assert f"Stage {stage}: " in text and f"Stage {stage}: skipped" not in text
    reference = an4.exp / "asr_from_some_body"
    student = an4.exp / "asr_anytime_raw_from_some_body_max_epoch1"
    for exp in (reference, student):
        theirs = (an4.student / "tokens.txt").read_text()
        assert (exp / "tokens.txt").read_text() == theirs
    config = yaml.safe_load((student / "config.yaml").read_text())
    checkpoint = f"{reference}/valid.loss_ctc.ave.pth"
    assert config["model_conf"]["reference"] == checkpoint
    assert config["init_param"] == [checkpoint]
    results = json.loads((student / "results.json").read_text())["results"]
    both = {"from_some_body", "anytime_raw_from_some_body_max_epoch1"}
    assert {r["system"] for r in results} == both
    words += ["--system", "early_exit_half", "--asr_tag", "half"]
    again = an4.run(*words, "--stop_stage", 13, env=env)
    assert "is finished already, kept" in again
    assert "Stage 7: skipped: early_exit_half needs no reference" in again
    config = yaml.safe_load((an4.exp / "asr_half" / "config.yaml").read_text())
    assert config["init_param"] == [checkpoint]
    results = json.loads((an4.exp / "asr_half" / "results.json").read_text())["results"]
    assert {r["system"] for r in results} == {"from_some_body", "half"}


@pytest.mark.slow
def test_all_stages_with_a_pretrained_encoder(an4, tmp_path):
    """With a reference, and then from that reference; the pretrained model is gone."""
    config = ROOT / "egs2/librispeech_100/asr1/conf/train_asr_wavlm.yaml"
    small = yaml.safe_load(config.read_text())
    pretrained = write_pretrained(tmp_path / "pretrained", "wavlm", 4)
    small["encoder_conf"] |= dict(model=str(pretrained), num_blocks=4)
    small |= dict(batch_type="sorted", batch_size=2, max_epoch=2, num_workers=0)
    (tmp_path / "train_asr_wavlm.yaml").write_text(yaml.safe_dump(small))
    exp = tmp_path / "exp"
    words = ["--expdir", exp, "--stop_stage", 13, "--feats_normalize", "none"]
    words += ["--asr_config", tmp_path / "train_asr_wavlm.yaml"]
    words += ["--inference_depths", "4 2", "--system", "anytime"]

    def depths_of(name):
        results = json.loads((exp / name / "results.json").read_text())["results"]
        return {r["depth"] for r in results if f"asr_{r['system']}" == name}

    text = an4.run(*words)
    for stage in range(3, 14):
        assert f"Stage {stage}: " in text
    anytime = "asr_anytime_train_asr_wavlm_raw_char"
    assert depths_of(anytime) == {4, 2}
    shutil.rmtree(pretrained)
    reference = exp / "asr_early_exit_train_asr_wavlm_raw_char"
    words += ["--stage", 5, "--start_from", reference, "--asr_tag", "started"]
    an4.run(*words)
    config = yaml.safe_load((exp / "asr_started" / "config.yaml").read_text())
    assert config["encoder"] == "ld_hf" and config["encoder_conf"]["exits"] == 2
    started = exp / "asr_from_early_exit_train_asr_wavlm_raw_char"
    checkpoint = started / "valid.loss_ctc.ave.pth"
    assert config["init_param"] == [str(checkpoint)]
    assert depths_of("asr_started") == {4, 2}


def test_run_sh_of_an_experiment_goes_on_with_its_training(an4):
    shell(an4.student / "run.sh", "--max_epoch", "3", cwd="/")
    assert (an4.student / "3epoch.pth").exists()
    log = (an4.student / "train.log").read_text()
    assert log.count("1epoch results") == 1 and log.count("3epoch results") == 1


@pytest.fixture
def launcher(tmp_path):
    """The options for ESPnet's launcher with a script of Kaldi's kind."""
    script = tmp_path / "run.pl"
    script.write_text(
        "#!/usr/bin/env bash\n"
        "while [[ $1 == --* ]]; do shift 2; done\n"
        'log=$1; shift; "$@" >"$log" 2>&1\n'
    )
    script.chmod(0o755)
    return ["--launch_args", f"--cmd {script}"]


def test_a_failure_shows_the_line_that_explains_it(an4, launcher):
    """Also where ESPnet's launcher writes a log of its own."""
    words = ["--stage", 11, "--stop_stage", 11, "--asr_tag", "bad", "--asr_args"]
    for more in ([], launcher):
        text = an4.run(*words, "--optim sdg", *more, status=1)
        assert "invalid choice: 'sdg'" in text.splitlines()[-1]
    launcher[-1] += " --no_such_option 2"
    text = an4.run(*words, "", *launcher, status=1)
    assert "no_such_option" in text.splitlines()[-1]


def test_a_launched_training_shows_its_progress(an4, launcher):
    words = ["--stage", 11, "--stop_stage", 11, "--asr_tag", "launched"]
    text = an4.run(*words, *launcher)
    assert text.count("    2epoch results: [train] ") == 1
    log = (an4.exp / "asr_launched" / "train.log").read_text()
    assert log.count("2epoch results") == 1


@pytest.mark.slow
def test_a_comparison_goes_on_where_it_stopped(an4):
    """Four trainings: the one with equal arithmetic begins with that of equal steps."""

    def compare(*words):
        command = [TEMPLATE / "compare.sh", "--systems", "static3 static1"]
        command += ["--epochs", "2", "--seeds", "1", "--jobs", "1"]
        return shell(*command, *words, cwd=an4.recipe)

    def log_of(exp, epoch):
        log = (an4.recipe / exp / "train.log").read_text()
        line = re.search(rf"{epoch}epoch results: .* iter_time", log)[0]
        return [v for v in line.split(", ") if "time" not in v], log

    compare("--stop_stage", 3)
    results = an4.recipe / "results"
    long = max(int(p.stem.split("_e")[1].split("_")[0]) for p in results.iterdir())
    names = ["static3_e2_seed1", "static1_e2_seed1", f"static1_e{long}_seed1"]
    assert long > 2 and {p.stem for p in results.glob("*.json")} == set(names)
    went_on, log = log_of(f"exp/compare/asr_{names[2]}", long)
    assert log.count("1epoch results") == log.count(f"{long}epoch results") == 1
    assert (
        "goes on where" in (an4.recipe / f"exp/compare/log/{names[2]}.log").read_text()
    )

    # one that never was shorter gives the same numbers
    (results / f"{names[2]}.json").rename(an4.recipe / "before.json")
    (results / f"{names[1]}.json").unlink()
    compare("--expdir", "elsewhere", "--budgets", "arithmetic", "--stage", 3)
    fresh, _ = log_of(f"elsewhere/asr_{names[2]}", long)
    assert fresh == went_on
    before = json.loads((an4.recipe / "before.json").read_text())
    after = json.loads((results / f"{names[2]}.json").read_text())
    assert after["errors"] == before["errors"] and after["steps"] == before["steps"]
    table = (results / "README.md").read_text()
    assert "static1" in table
