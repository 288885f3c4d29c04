"""The recipes: their configs, their shell, and one of them from start to end."""

import json
import os
import re
import shutil
import sys
import zipfile
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from running import GENERATED, ROOT, copy_of_the_recipes, environment, shell

TEMPLATE = ROOT / "egs2" / "TEMPLATE" / "asr1"
RECIPES = sorted(path.parents[1] for path in ROOT.glob("egs2/*/asr1/conf"))
CONFIGS = sorted(ROOT.glob("egs2/*/asr1/conf/train_asr*.yaml"))
SYSTEMS = sorted((ROOT / "conf" / "systems").glob("*.yaml"))
SSL_TEMPLATE = ROOT / "egs2" / "TEMPLATE" / "ssl1"
SSL_RECIPES = sorted(path.parents[1] for path in ROOT.glob("egs2/*/ssl1/conf"))
SSL_SYSTEMS = sorted((ROOT / "conf" / "systems_ssl").glob("*.yaml"))
SCRIPTS = [
    path
    for path in sorted(ROOT.rglob("*.sh"))
    if not GENERATED & set(path.relative_to(ROOT).parts)
]

pytestmark = pytest.mark.integration


def options(script):
    """The options of a script, by another rule than the parser's."""
    lines = script.read_text().split("options.sh")[0].splitlines()
    found = (re.match(r"([a-z_]+)=(.*?)  # ", line) for line in lines)
    return {m[1]: m[2].strip('"') for m in found if m}


# ---------------------------------------------------------------- configs


def write_pretrained(directory, kind, layers):
    """A small speech encoder with random weights, as transformers saves it."""
    from transformers import AutoConfig, AutoModel

    sizes = {**TINY_STUDENT, "num_hidden_layers": layers}
    if kind == "whisper":
        sizes = dict(d_model=16, encoder_attention_heads=2, encoder_ffn_dim=32)
        sizes |= dict(decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=32)
        sizes |= dict(encoder_layers=layers)
    torch.manual_seed(0)
    AutoModel.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(
        directory
    )
    return directory


PRETRAINED = dict(train_asr_wavlm="wavlm", train_asr_whisper="whisper")
# to a reference
PULLED = ("dld_paper", "dld", "nested", "anytime")


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
    if system.stem == "anytime":
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
    dynamic = system.stem in (*PULLED, "rd")
    assert (encoder["depth_sampler"] != "full") == dynamic
    ours = dynamic or system.stem == "early_exit"
    assert built["model"] == ("dld" if ours else "espnet")
    if ours:
        reference = built["model_conf"]["reference"]
        assert reference == ("exp/asr_static" if system.stem in PULLED else None)
    exits = ("early_exit", "anytime")
    assert bool(encoder.get("exits")) == (system.stem in exits)
    prefix = ("nested", *exits)
    choice = dict.fromkeys(prefix, "prefix") | dict(dld="even", rd="even")
    assert encoder.get("layer_choice", "random") == choice.get(system.stem, "random")
    assert bool(encoder.get("stochastic_depth_rate")) == (
        system.stem == "stochastic_depth"
    )
    assert built["unused_parameters"] is True and built["num_att_plot"] == 0
    assert built["best_model_criterion"][0] == ["valid", "loss_ctc", "min"]


def test_anytime_each_is_anytime_with_more_exits():
    name = "anytime{}.yaml"
    shared = yaml.safe_load((ROOT / "conf/systems" / name.format("")).read_text())
    own = ROOT / "egs2/digits/asr1/conf/systems" / name.format("_each")
    shared["encoder_conf"]["exits"] = 1
    del shared["specaug_conf"]  # of no use to waveforms
    assert yaml.safe_load(own.read_text()) == shared


# ---------------------------------------------------------------- shell


def test_shellcheck_finds_nothing():
    checker = Path(sys.executable).parent / "shellcheck"
    assert len(SCRIPTS) > 10
    shell(checker, *SCRIPTS, ROOT / ".ci" / "run", cwd=ROOT)


@pytest.mark.parametrize(
    "script",
    [TEMPLATE / "asr.sh", SSL_TEMPLATE / "sfm.sh", ROOT / "run_all.sh"],
    ids=lambda path: path.name,
)
def test_help_prints_every_option_with_its_default(script):
    text = shell(script, "--help", cwd=ROOT)
    found = options(script)
    assert found
    for name, default in found.items():
        assert f'  --{name} "{default}" ' in text
    assert len(re.findall(r"^  --", text, re.M)) == len(found)


@pytest.mark.parametrize(
    "recipe",
    [path / "asr1" for path in RECIPES] + [path / "ssl1" for path in SSL_RECIPES],
    ids=lambda path: f"{path.parent.name}-{path.name}",
)
def test_help_of_a_recipe_shows_its_own_values(recipe):
    text = shell("./run.sh", "--help", cwd=recipe, env=environment(TEACHER=""))
    script = (recipe / "run.sh").read_text()
    script = script.replace("${TEACHER:-", "").replace("${token_type}", "bpe")
    script = re.sub(r"\$\{lang(//-/_)?\}", "en", script).replace("}", "")
    own = dict(re.findall(r'^    --(\w+) "?(.*?)"? \\$', script, re.M))
    assert own
    for name, value in own.items():
        assert f'  --{name} "{value}" ' in text


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--no_such_option", "3"], "unknown option --no_such_option"),
        (["--stage"], "--stage needs a value"),
        (["7"], "unexpected argument '7'"),
    ],
)
def test_wrong_options_are_refused_by_name(words, complaint):
    for script in ("./run.sh", "../../TEMPLATE/asr1/asr.sh"):
        text = shell(script, *words, cwd=ROOT / "egs2/mini_an4/asr1", status=2)
        assert complaint in text


def test_run_all_refuses_unknown_recipes_before_it_installs():
    for name, directory in (("nope", "nope/asr1"), ("nope_ssl", "nope/ssl1")):
        text = shell("./run_all.sh", "--recipes", f"digits {name}", cwd=ROOT, status=1)
        assert f"no egs2/{directory}/run.sh" in text and "nstall" not in text


def test_run_all_prints_one_table_for_each_kind_of_recipe(tmp_path):
    """Its own part alone: recipes of two lines each, and nothing to install."""
    for file in ("run_all.sh", "egs2/TEMPLATE/asr1/options.sh"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, tmp_path / file)
    scripts = {"tools/install.sh": "true"}
    for name, kind, title, report in (
        (
            "a",
            "asr1",
            "Scores and depth report",
            "| system | WER |\n|---|--:|\n| dld | 1.5 |\n",
        ),
        ("b", "ssl1", "Probe scores", "|upstream|WER|\n|---|--:|\n|full|2.5|\n"),
        ("c", "ssl1", "Probe scores", "|upstream|WER|\n|---|--:|\n|full|3.5|\n"),
    ):
        directory = tmp_path / "egs2" / name / kind
        directory.mkdir(parents=True)
        (directory / "RESULTS.md").write_text(f"{report}\nMade by somebody.\n")
        end = "false" if name == "c" else "true"
        scripts[f"egs2/{name}/{kind}/run.sh"] = (
            f"cd $(dirname $0); echo 'Stage 13: {title}: RESULTS.md'; {end}"
        )
    for file, content in scripts.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(f"#!/usr/bin/env bash\n{content}\n")
        (tmp_path / file).chmod(0o755)

    text = shell("./run_all.sh", "--recipes", "a b_ssl c_ssl", cwd=tmp_path, status=1)

    table = [re.sub(" +", " ", line) for line in text.splitlines() if "|" in line]
    assert table == [
        "| recipe | system | WER |",
        "| ---------------- |---|--:|",
        "| a | dld | 1.5 |",
        "| recipe |upstream|WER|",
        "| ---------------- |---|--:|",
        "| b_ssl |full|2.5|",
        "| c_ssl |full|3.5|",
    ]
    assert "b_ssl, report: egs2/b/ssl1/RESULTS.md" in text
    assert text.endswith("these recipes failed: c_ssl\n")


def test_install_without_a_python_says_what_to_do(tmp_path):
    env = {**os.environ, "DLDKIT_VENV": str(tmp_path), "DLDKIT_PYTHON": "/bin/false"}
    text = shell("tools/install.sh", cwd=ROOT, status=1, env=env)
    assert "not a virtual environment" in text
    env["DLDKIT_VENV"] = str(tmp_path / "venv")
    text = shell("tools/install.sh", cwd=ROOT, status=1, env=env)
    assert "no Python 3.12 or 3.13" in text and "DLDKIT_PYTHON" in text
    shell("tools/install.sh", "--nope", cwd=ROOT, status=2, env=env)


# ---------------------------------------------------------------- a recipe of one's own


@pytest.fixture
def own_recipe(tmp_path):
    """What setup.sh makes, and a corpus of real recordings for it."""
    recipes = copy_of_the_recipes(tmp_path)
    template = recipes / "TEMPLATE" / "asr1" / "setup.sh"
    text = shell(template, "my_words", cwd=tmp_path)
    assert "set MY_WORDS to your corpus" in text
    for words, complaint in (
        (["my_words"], "exists already"),
        (["My-Words"], "write small letters"),
        ([], "usage: "),
    ):
        assert complaint in shell(template, *words, cwd=tmp_path, status=1)
    assert "egs2/NAME/asr1" in shell(template, "--help", cwd=tmp_path)

    shell("local/data.sh", cwd=recipes / "mini_an4" / "asr1")
    corpus = tmp_path / "my córpus"
    for name, source in (
        ("train", "train_nodev"),
        ("dev", "train_dev"),
        ("test", "test"),
    ):
        data = recipes / "mini_an4" / "asr1" / "data" / source
        (corpus / name / "deep").mkdir(parents=True)
        shutil.copy(data / "text", corpus / name / "text")
        for line in (data / "wav.scp").read_text().splitlines():
            utt, path = line.split(maxsplit=1)
            audio = soundfile.read(data.parents[1] / path, dtype="int16")
            soundfile.write(corpus / name / "deep" / f"{utt}.flac", *audio)
    return recipes / "my_words" / "asr1", environment(MY_WORDS=str(corpus))


def test_a_recipe_of_one_s_own_prepares_its_data(own_recipe):
    recipe, env = own_recipe
    text = shell("./run.sh", "--stop_stage", 5, "--nj", 1, cwd=recipe, env=env)
    assert "Stage 5: Token list" in text
    for name, size in (("train", 4), ("dev", 2), ("test", 2)):
        lines = (recipe / "dump/raw" / name / "text").read_text().splitlines()
        assert len(lines) == size
        assert "my_words" in (recipe / "data" / name / "corpus_source").read_text()
    assert "@" not in (recipe / "README.md").read_text()
    env["MY_WORDS"] = ""
    text = shell("./run.sh", "--stop_stage", 1, cwd=recipe, env=env, status=1)
    assert "error: set MY_WORDS to the directory" in text


@pytest.mark.slow
def test_a_recipe_of_one_s_own_runs(own_recipe):
    recipe, env = own_recipe
    sizes = "num_blocks=2 output_size=8 linear_units=8 attention_heads=2".split()
    sizes = " ".join(f"--encoder_conf {size}" for size in sizes)
    words = ["--asr_tag", "tiny", "--skip_packing", "true", "--skip_upload", "true"]
    words += ["--system", "static", "--inference_depths", "2", "--rtf_utts", 0]
    words += ["--asr_args", f"--max_epoch 1 --num_workers 0 --accum_grad 1 {sizes}"]
    text = shell(
        "./run.sh", *words, "--nj", 1, "--inference_nj", 1, cwd=recipe, env=env
    )
    assert "Stage 13: Scores" in text and "| system" in text


# ---------------------------------------------------------------- mini_an4


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
        paths = ["--expdir", self.exp, "--dumpdir", self.dump.name]
        return shell("./run.sh", *paths, *words, cwd=self.recipe, **options)

    def utterance(self):
        wav = (self.dump / "raw/test/wav.scp").read_text().split("\n")[0]
        path = self.recipe / wav.split(maxsplit=1)[1]
        return soundfile.read(path, dtype="float32")[0]


@pytest.fixture(scope="module")
def an4(tmp_path_factory):
    return An4(tmp_path_factory.mktemp("recipes"))


def test_a_stage_without_the_one_before_says_which(tmp_path):
    recipe = copy_of_the_recipes(tmp_path) / "mini_an4" / "asr1"
    for stage, needed in ((4, "stage 3"), (6, "stage 5"), (12, "stage 11")):
        words = ["--stage", stage, "--stop_stage", stage]
        text = shell("./run.sh", *words, cwd=recipe, status=1)
        assert f"run {needed} first" in text


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
    decoded_at = {an4.reference: [4], an4.student: [4, 3, 2, 1]}
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


def snippet_of(card):
    return re.search("```python\n(.*?)```", card.read_text(), re.S)[1]


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
    assert "pip install dldkit" in card.read_text()
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
    assert meta["dldkit"] and meta["install"].startswith("pip install dldkit")
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
    words = ["--system", "anytime", "--stage", 6, "--stop_stage", 11]
    words += ["--skip_stages", 8, "--reference_tag", "exits", "--asr_tag", "begins"]
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
    words = ["--stage", 9, "--stop_stage", 11, "--kd_source", "cached", "--top_k", 5]
    text = an4.run(*words, "--asr_tag", "third", "--asr_args", "--max_epoch 1")
    assert "Stage 9: Posteriors of the reference" in text
    config = yaml.safe_load((an4.exp / "asr_third" / "config.yaml").read_text())
    cache = config["model_conf"]["reference"]
    for part in ("train", "valid"):
        entries = config[f"{part}_data_path_and_name_and_type"]
        assert [f"{cache}/posteriors.scp", "posteriors", "numpy_ark"] in entries
    again = an4.run(*words, "--asr_tag", "third", "--asr_args", "--max_epoch 1")
    assert again.count("is finished already, kept") >= 2


def test_a_published_model_is_what_a_training_starts_from(an4, tmp_path):
    """A hub without network is a cache in its layout."""
    hub = tmp_path / "hub" / "hub" / "models--some--body"
    (packed,) = an4.student.glob("pack_*/*.zip")
    shutil.unpack_archive(packed, hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    env = environment(HF_HOME=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")

    words = ["--stage", 5, "--start_from", "some/body", "--inference_depths", "4 2"]
    words += ["--asr_args", "--max_epoch 1"]
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
    again = an4.run(*words, "--stop_stage", 11, env=env)
    assert again.count("is finished already, kept") >= 2


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
    words += ["--inference_depths", "4 2 1"]

    def depths_of(name):
        results = json.loads((exp / name / "results.json").read_text())["results"]
        return {r["depth"] for r in results if f"asr_{r['system']}" == name}

    text = an4.run(*words)
    for stage in range(3, 14):
        assert f"Stage {stage}: " in text
    anytime = "asr_anytime_train_asr_wavlm_raw_char"
    assert depths_of(anytime) == {4, 2, 1}
    shutil.rmtree(pretrained)
    reference = exp / "asr_early_exit_train_asr_wavlm_raw_char"
    words += ["--stage", 5, "--start_from", reference, "--asr_tag", "started"]
    an4.run(*words)
    config = yaml.safe_load((exp / "asr_started" / "config.yaml").read_text())
    assert config["encoder"] == "ld_hf" and config["encoder_conf"]["exits"] == 2
    started = exp / "asr_from_early_exit_train_asr_wavlm_raw_char"
    checkpoint = started / "valid.loss_ctc.ave.pth"
    assert config["init_param"] == [str(checkpoint)]
    assert depths_of("asr_started") == {4, 2, 1}


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


# ---------------------------------------------------------------- digits, ssl1

TINY_STUDENT = dict(
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=2,
    num_hidden_layers=4,
    conv_dim=[8] * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)
SMALL = "--num_valid 2 --num_strings 10 --num_valid_strings 2 --num_probe_train 12"


def write_teacher(directory, layers):
    """A small HuBERT with random weights, as transformers saves it."""
    from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

    torch.manual_seed(0)
    config = HubertConfig(**{**TINY_STUDENT, "num_hidden_layers": layers})
    HubertModel(config).save_pretrained(directory)
    Wav2Vec2FeatureExtractor(return_attention_mask=False).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("recipe", SSL_RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("system", SSL_SYSTEMS, ids=lambda path: path.stem)
def test_every_distillation_config_builds_its_student(
    recipe, system, tmp_path, capsys, monkeypatch
):
    from dldkit.bin import merge_config, sfm_distill_train

    monkeypatch.chdir(tmp_path)
    write_teacher("teacher", layers=12)
    config = recipe / "ssl1" / "conf" / "train_sfm.yaml"
    merge_config.main([str(config), str(system), "model_conf.teacher=teacher"])
    Path("train.yaml").write_text(capsys.readouterr().out)
    soundfile.write("a.wav", np.zeros(16000), 16000)
    Path("wav.scp").write_text("a a.wav\n")

    sfm_distill_train.main(
        "--dry_run true --config train.yaml --output_dir out "
        "--train_data_path_and_name_and_type wav.scp,speech,sound "
        "--valid_data_path_and_name_and_type wav.scp,speech,sound".split()
    )

    built = yaml.safe_load(Path("out/config.yaml").read_text())
    assert (built["trainer"] == "resumable") == (system.stem == "full")
    conf = built["trainer_conf"]
    if system.stem != "full":
        assert conf["depths"] == [3, 6, 9, 12]
        methods = dict(stackbert="stack", every_depth="interleave", fast="interleave")
        assert conf["method"] == methods.get(system.stem, system.stem.split("_")[0])
        is_prop = system.stem in ("interleave_prop1", "every_depth")
        assert (conf["schedule"] == "prop") == is_prop
    assert built["model_conf"].get("freeze_cnn", False) == (system.stem == "fast")
    assert len(built["model_conf"]["teacher_layers"]) == 3
    assert built["best_model_criterion"] == [["valid", "loss", "min"]]
    # 7 % of the steps to warm up, then to zero, however many there are
    assert built["scheduler"] == "transformers"
    assert built["scheduler_conf"] == dict(name="linear", warmup_ratio=0.07)


# The mean depth of the steps of each of two epochs of ten steps: stages of 5 steps, or
# of 2, 4, 6 and 8; every_depth draws depths in the last one.
MEAN_DEPTHS = dict(full=(12, 12), interleave_prop1=(6.6, 11.4), every_depth=(6.6, None))
EQUAL_STAGES = (4.5, 10.5)


@pytest.mark.parametrize("system", SSL_SYSTEMS, ids=lambda path: path.stem)
def test_every_config_of_the_paper_takes_steps(system, tmp_path, capsys, monkeypatch):
    """Twenty steps of its own batches, at each depth; the layers alone are narrow."""
    from dldkit.bin import merge_config, sfm_distill_train
    from dldkit.sfm.model import SFMDistillModel

    monkeypatch.chdir(tmp_path)
    write_teacher("teacher", layers=12)
    config = ROOT / "egs2" / "librispeech" / "ssl1" / "conf" / "train_sfm.yaml"
    small = {**TINY_STUDENT, "num_hidden_layers": 12}
    words = [f"student_conf.{name}={value}" for name, value in small.items()]
    merge_config.main([str(config), str(system), "model_conf.teacher=teacher", *words])
    Path("train.yaml").write_text(capsys.readouterr().out)
    own = yaml.safe_load(Path("train.yaml").read_text())
    rng = np.random.default_rng(0)
    lengths = [1600 + 80 * (number % 4) for number in range(own["batch_size"])]
    for number, length in enumerate(lengths):
        soundfile.write(f"{number}.wav", 0.1 * rng.standard_normal(length), 16000)
    table = "".join(f"{number} {number}.wav\n" for number in range(len(lengths)))
    Path("wav.scp").write_text(table)
    shapes = "".join(f"{number} {length}\n" for number, length in enumerate(lengths))
    Path("speech_shape").write_text(shapes)
    heard, forward = [], SFMDistillModel.forward

    def recorded(model, speech, *args, **kwargs):
        if model.training:
            heard.append(len(speech))
        return forward(model, speech, *args, **kwargs)

    monkeypatch.setattr(SFMDistillModel, "forward", recorded)
    command = "--config train.yaml --output_dir out --num_iters_per_epoch 10"
    command += " --max_epoch 2 --num_workers 0 --ngpu 0"
    for part in ("train", "valid"):
        command += f" --{part}_data_path_and_name_and_type wav.scp,speech,sound"
        command += f" --{part}_shape_file speech_shape"
    sfm_distill_train.main(command.split())

    assert own["batch_size"] == 64 and heard == [64] * 20
    checkpoint = torch.load("out/checkpoint.pth", weights_only=True)
    assert checkpoint["optimizers"][0]["param_groups"][0]["lr"] == 0
    epochs = checkpoint["reporter"]["stats"]
    losses = [epochs[n][part]["loss"] for n in epochs for part in ("train", "valid")]
    assert np.isfinite(losses).all()
    assert epochs[2]["valid"]["depth"] == 12
    for epoch, depth in enumerate(MEAN_DEPTHS.get(system.stem, EQUAL_STAGES), 1):
        if depth is not None:
            assert epochs[epoch]["train"]["depth"] == pytest.approx(depth)


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--stop_stage", "1"], "there is no unlabelled speech: set UNLABELLED"),
        (
            ["--stop_stage", "1", "--local_data_opts", "--unlabelled missing"],
            "missing is not a directory",
        ),
    ],
)
def test_a_distillation_needs_speech(words, complaint, tmp_path):
    recipe = copy_of_the_recipes(tmp_path) / "digits" / "ssl1"
    env = environment(TEACHER="", UNLABELLED="")
    assert complaint in shell("./run.sh", *words, cwd=recipe, status=1, env=env)


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Variables that name a teacher, unlabelled speech, and digits.

    The digits are FSDD's where $FSDD is set, else chords that stand for them; the
    unlabelled speech is strung from them, in folders, in two formats.
    """
    root = tmp_path_factory.mktemp("speech")
    fsdd = os.environ.get("FSDD")
    rng = np.random.default_rng(0)
    if not fsdd:
        fsdd = root / "fsdd"
        fsdd.mkdir()
        time = np.arange(3200) / 8000
        names = "george jackson lucas nicolas theo yweweler".split()
        for digit, (voice, name) in product(range(10), enumerate(names)):
            chord = np.sin(2 * np.pi * (150 + 20 * voice) * time)
            chord += np.sin(2 * np.pi * 200 * (2 + digit) * time)
            for take in range(50):
                noisy = 0.2 * chord + 0.01 * rng.standard_normal(len(time))
                soundfile.write(fsdd / f"{digit}_{name}_{take}.wav", noisy, 8000)
    recordings = sorted(Path(fsdd).rglob("*.wav"))
    for number in range(8):
        chosen = rng.choice(recordings, 4)
        samples = np.concatenate([soundfile.read(path)[0] for path in chosen])
        folder = root / "unlabelled" / f"speaker {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{number}.{'wav' if number % 2 else 'flac'}"
        soundfile.write(folder / name, samples, 8000)
    (root / "unlabelled" / "notes.txt").write_text("no audio")
    return dict(
        TEACHER=str(write_teacher(root / "teacher", layers=3)),
        UNLABELLED=str(root / "unlabelled"),
        FSDD=str(fsdd),
    )


@pytest.fixture(scope="module")
def distilled(tmp_path_factory, speech):
    """digits/ssl1 with a tiny student that grows; what stages 1-15 printed."""
    recipe = copy_of_the_recipes(tmp_path_factory.mktemp("recipes"))
    recipe = recipe / "digits" / "ssl1"
    config = yaml.safe_load((recipe / "conf" / "train_sfm.yaml").read_text())
    config.update(
        student_conf=TINY_STUDENT, batch_size=4, num_iters_per_epoch=3, max_epoch=4
    )
    config["keep_nbest_models"] = 2
    config["model_conf"]["teacher_layers"] = [2, 3]
    (recipe / "conf" / "train_sfm.yaml").write_text(yaml.safe_dump(config))
    (recipe / "conf" / "systems").mkdir(exist_ok=True)
    (recipe / "conf" / "systems" / "interleave_eql.yaml").write_text(
        # 7 of 12 steps: it grows in the third of four epochs
        "trainer_conf: {depths: [2, 4], schedule: fractions, fractions: [0.6, 0.4]}\n"
    )

    def run(*words, status=0, **variables):
        command = ["./run.sh", "--system", "interleave_eql", "--num_threads", "1"]
        command += ["--nj", "1", "--local_data_opts", f"{SMALL} --num_probe_test 6"]
        env = environment(**{**speech, **variables})
        return shell(*command, *words, cwd=recipe, status=status, env=env)

    return recipe, run, run("--export_depths", "2")


def table_of(path):
    return dict(line.split(maxsplit=1) for line in path.read_text().splitlines())


def test_data_of_a_distillation(distilled, speech):
    recipe, _, _ = distilled
    for root in (recipe / "data", recipe / "dump" / "raw"):
        train, valid = table_of(root / "train/wav.scp"), table_of(
            root / "valid/wav.scp"
        )
        files = {utt for utt in {**train, **valid} if utt.startswith("speaker_")}
        assert files == {f"speaker_{n % 2}-{n}" for n in range(8)}
        held_out = sorted(files)[0], sorted(files)[4]
        assert files & set(valid) == set(held_out)
        assert len(train) == 6 + 10 and len(valid) == 2 + 2
        assert not set(train) & set(valid)
        for name in ("train", "valid"):
            assert not (root / name / "text").exists()
        for name, size in (("digits_train", 600), ("digits_test", 300)):
            text, speakers = table_of(root / name / "text"), table_of(
                root / name / "utt2spk"
            )
            assert len(text) == size and len(set(speakers.values())) == 6
            assert len(set(text.values())) == 10
        assert len(table_of(root / "strings_test/text")) == 6
    takes = {utt.split("-")[2] for utt in table_of(recipe / "data/digits_test/text")}
    assert takes == {"00", "01", "02", "03", "04"}  # FSDD's own test set
    used = " ".join(table_of(recipe / "data/strings_train/utt2recordings").values())
    assert not {f"{t}" for t in range(10)} & {r.split("_")[2] for r in used.split()}
    for wav in list(table_of(recipe / "dump/raw/train/wav.scp").values()):
        assert soundfile.info(recipe / wav).samplerate == 16000


def test_all_stages_of_a_distillation(distilled, speech):
    from transformers import AutoModel

    recipe, _, printed = distilled
    for stage in (1, 3, 4, *range(9, 16)):
        assert f"Stage {stage}: " in printed
    assert "4epoch results: [train] " in printed
    exp = recipe / "exp" / "sfm_interleave_eql"
    config = yaml.safe_load((exp / "config.yaml").read_text())
    assert config["model_conf"]["teacher"] == "exp/targets_teacher"
    assert config["trainer_conf"]["depths"] == [2, 4]
    lengths = table_of(recipe / "dump/raw/train_cut2.0/utt2num_samples")
    assert max(map(int, lengths.values())) <= 32000
    assert table_of(recipe / "exp/sfm_stats/train/speech_shape") == lengths
    assert set(table_of(recipe / "exp/targets_teacher/targets.scp")) == {
        *lengths,
        *table_of(recipe / "dump/raw/valid_cut2.0/wav.scp"),
    }
    # float16 is all that the cache costs: teacher and student hear the same
    own = json.loads((exp / "teacher_loss.json").read_text())
    assert 0 < own["loss"] < 1e-4
    assert "the teacher's own loss on the student's input: loss=" in printed
    # the average holds epochs of full depth alone: the last two of four
    averaged = os.readlink(exp / "valid.loss.ave.pth")
    average, third, fourth = (
        torch.load(exp / name) for name in (averaged, "3epoch.pth", "4epoch.pth")
    )
    for key, value in average.items():
        torch.testing.assert_close(value, (third[key] + fourth[key]) / 2)
    for name, layers in (("hf", 4), ("hf_depth2", 2)):
        model = AutoModel.from_pretrained(exp / name)
        assert model.config.num_hidden_layers == layers
    for row in ("teacher", "interleave_eql", "interleave_eql_depth2"):
        for text in (printed, (exp / "RESULTS.md").read_text()):
            assert f"| {row} " in text

    names = zipfile.ZipFile(
        exp / "pack_valid.loss.ave" / "interleave_eql.zip"
    ).namelist()
    files = "config.yaml valid.loss.ave.pth RESULTS.md hf/model.safetensors"
    assert {*files.split(), "hf_depth2/config.json", "meta.yaml"} <= set(names)
    assert not [name for name in names if "targets" in name or "checkpoint" in name]
    card = exp / "huggingface" / "README.md"
    front = yaml.safe_load(card.read_text().split("---")[1])
    assert front["library_name"] == "transformers" and front["datasets"] == ["digits"]
    found: dict = dict(speech=np.zeros(16000))
    exec(snippet_of(card), found)
    assert len(found["hidden_states"]) == 5


def test_a_second_distillation_keeps_everything(distilled):
    recipe, run, _ = distilled
    patterns = (
        "sfm_*/*epoch.pth sfm_*/*/*.zip sfm_stats/*/* targets_*/* hidden_states/*/*.pt"
    )
    kept = [path for p in patterns.split() for path in (recipe / "exp").glob(p)]
    kept = [path for path in kept if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) > 15
    printed = run("--export_depths", "2")
    assert "epoch results" not in printed
    assert "| interleave_eql " in printed  # the table is shown again
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_a_fast_distillation_reads_no_audio(distilled, speech):
    """Its CNN is the teacher's, whose features are cached beside the targets."""
    from transformers import AutoModel

    recipe, run, _ = distilled
    (recipe / "conf" / "systems" / "fast.yaml").write_text(
        "trainer_conf: {depths: [2, 4], schedule: equal}\n"
    )
    words = "--system fast --targets cached_features --probe none --skip_packing true"
    printed = run("--stage", 9, "--stop_stage", 12, *words.split())
    assert "CNN features of 8 values: " in printed
    assert "Collecting targets" not in printed  # those of the first training stay
    exp = recipe / "exp" / "sfm_fast"
    config = yaml.safe_load((exp / "config.yaml").read_text())
    for part in ("train", "valid"):
        files = {f[1]: f[0] for f in config[f"{part}_data_path_and_name_and_type"]}
        assert files == dict(
            speech="exp/targets_teacher/features/features.scp",
            targets="exp/targets_teacher/targets.scp",
        )
    own = json.loads((exp / "teacher_loss.json").read_text())
    assert 0 < own["loss"] < 1e-4
    ours, theirs = (
        AutoModel.from_pretrained(path).feature_extractor.state_dict()
        for path in (exp / "hf", speech["TEACHER"])
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_another_teacher_has_targets_of_its_own(distilled, tmp_path):
    _, run, _ = distilled
    teacher = write_teacher(tmp_path / "other", layers=3)
    text = run("--stage", 11, "--stop_stage", 11, status=1, TEACHER=str(teacher))
    assert "exp/targets_other/targets.scp does not exist: run stage 9 first" in text


def test_run_sh_of_a_distillation_resumes_it(distilled):
    recipe, _, _ = distilled
    exp = recipe / "exp" / "sfm_interleave_eql"
    shell(exp / "run.sh", "--max_epoch", "5", cwd="/")
    assert (exp / "5epoch.pth").exists()
    assert (exp / "train.log").read_text().count("1epoch results") == 1


@pytest.mark.slow
def test_the_comparison_of_growing_students(distilled, speech):
    """Last: it changes the README of the copy."""
    recipe, _, _ = distilled
    words = ["--systems", "full interleave_eql", "--more_seeds", "2"]
    words += ["--more_seeds_for", "full", "--probe_seeds", "0", "--num_threads", "1"]
    words += ["--learning_rates", "0.00001 0.004", "--grid_epochs", "3"]
    exp = recipe / "exp" / "compare"
    exp.mkdir(parents=True)
    results = exp / "results"  # those of the recipe would stand for these runs
    words += ["--results", results]
    times = dict(depths={"4": 1.0}, schedules=dict(equal=0.75, prop1=0.8))
    results.mkdir()
    (results / "step_time.json").write_text(json.dumps(times))
    words += ["--run_opts", f"--local_data_opts '{SMALL} --num_probe_test 6'"]
    command = ["local/compare.sh", *words]
    shell(*command, cwd=recipe, env=environment(**speech))

    def rows() -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for line in (recipe / "README.md").read_text().splitlines():
            if line.startswith("|"):
                name, *cells = (cell.strip() for cell in line.split("|")[1:-1])
                found.setdefault(name, cells)
        return found

    first = rows()
    assert first["full"][:3] == ["2", "0.004", "1.00"]
    assert first["interleave_eql"][0] == "1" and first["interleave_eql"][2] == "0.75"
    assert first["teacher"][:3] == first["untrained"][:3] == [""] * 3
    assert 0 < float(first["teacher"][3]) < 1e-4 and not first["untrained"][3]
    assert first["learning rate"] == ["1e-05", "0.004"]
    result = json.loads((results / "full_seed1.json").read_text())
    log = (exp / "sfm_full_seed1" / "train.log").read_text()
    last = re.findall(r"4epoch results: .*\[valid\] .*?\bloss=([0-9.]+)", log)[-1]
    assert result["loss"]["4"] == pytest.approx(float(last), rel=0.01)
    for file in results.glob("*_seed*.json"):
        for scores in json.loads(file.read_text())["scores"].values():
            assert all(value >= 0 for values in scores.values() for value in values)
    # elsewhere, what is recorded is not trained again, and its learning rate is known
    for run in ("full_seed1", "interleave_eql_seed1", "full_lr0.004_seed1"):
        shutil.rmtree(exp / f"sfm_{run}")
    (results / "full_seed2.json").unlink()
    shell(*command, cwd=recipe, env=environment(**speech))
    again = rows()
    assert again == first
    assert not (exp / "sfm_full_lr0.004_seed1").exists()
    assert not (exp / "sfm_full_seed1" / "checkpoint.pth").exists()
