"""The recipes: their configs, their shell, and one of them from start to end."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import soundfile
import yaml

ROOT = Path(__file__).resolve().parents[1]
TEMPLATE = ROOT / "egs2" / "TEMPLATE" / "asr1"
RECIPES = sorted(path.parents[1] for path in ROOT.glob("egs2/*/asr1/conf"))
SYSTEMS = sorted((ROOT / "conf" / "systems").glob("*.yaml"))
GENERATED = {".venv", "data", "dump", "exp", "exp_fbank", "exp_bpe", "downloads"}
SCRIPTS = [
    path
    for path in sorted(ROOT.rglob("*.sh"))
    if not GENERATED & set(path.relative_to(ROOT).parts)
]

pytestmark = pytest.mark.integration


def shell(*command, cwd, status=0, env=None, timeout=800):
    """Run a command with this Python first in PATH; return all that it printed."""
    env = env or {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
    }
    process = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
    )
    assert process.returncode == status, process.stdout
    return process.stdout


def options(script):
    """The options of a script, by another rule than the parser's."""
    lines = script.read_text().split("options.sh")[0].splitlines()
    found = (re.match(r"([a-z_]+)=(.*?)  # ", line) for line in lines)
    return {m[1]: m[2].strip('"') for m in found if m}


# ---------------------------------------------------------------- configs


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
@pytest.mark.parametrize("system", SYSTEMS, ids=lambda path: path.stem)
def test_every_config_builds_its_model(recipe, system, tmp_path, capsys, monkeypatch):
    from dldkit.bin import asr_train, merge_config

    monkeypatch.chdir(tmp_path)
    parts = [recipe / "asr1" / "conf" / "train_asr.yaml", system]
    own = recipe / "asr1" / "conf" / "systems" / system.name
    if own.exists():
        parts.append(own)
    parts = [str(part) for part in parts]
    if system.stem == "dld":
        parts.append("model_conf.reference=exp/asr_static")
    merge_config.main(parts)
    merged = capsys.readouterr().out
    Path("train.yaml").write_text(merged)
    Path("tokens.txt").write_text("<blank>\n<unk>\na\n<sos/eos>\n")

    asr_train.main(
        "--dry_run true --config train.yaml --token_type char --token_list tokens.txt "
        "--output_dir out".split()
    )

    built = yaml.safe_load(Path("out/config.yaml").read_text())
    dynamic = system.stem in ("rd", "dld")
    assert built["encoder"].startswith("ld_")
    assert (built["encoder_conf"]["depth_sampler"] != "full") == dynamic
    assert built["model"] == ("dld" if dynamic else "espnet")
    if dynamic:
        reference = built["model_conf"]["reference"]
        assert reference == ("exp/asr_static" if system.stem == "dld" else None)
    assert bool(built["encoder_conf"].get("interctc_layer_idx")) == (
        system.stem == "early_exit"
    )
    assert bool(built["encoder_conf"].get("stochastic_depth_rate")) == (
        system.stem == "stochastic_depth"
    )
    assert built["unused_parameters"] is True and built["num_att_plot"] == 0
    assert built["best_model_criterion"] == [["valid", "loss_ctc", "min"]]


# ---------------------------------------------------------------- shell


def test_shellcheck_finds_nothing():
    checker = Path(sys.executable).parent / "shellcheck"
    assert len(SCRIPTS) > 10
    shell(checker, *SCRIPTS, ROOT / ".ci" / "run", cwd=ROOT)


@pytest.mark.parametrize("script", [TEMPLATE / "asr.sh", ROOT / "run_all.sh"])
def test_help_prints_every_option_with_its_default(script):
    text = shell(script, "--help", cwd=ROOT)
    found = options(script)
    assert found
    for name, default in found.items():
        assert f'  --{name} "{default}" ' in text
    assert len(re.findall(r"^  --", text, re.M)) == len(found)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)
def test_help_of_a_recipe_shows_its_own_values(recipe):
    text = shell("./run.sh", "--help", cwd=recipe / "asr1")
    script = (recipe / "asr1" / "run.sh").read_text()
    own = dict(re.findall(r'^    --(\w+) "?(.*?)"? \\$', script, re.M))
    assert own
    for name, value in own.items():
        assert f'  --{name} "{value}" ' in text


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--no_such_option", "3"], "unknown option --no_such_option"),
        (["--stage"], "--stage needs a value"),
        (["--stage", "two"], "--stage is a number"),
        (["--skip_train", "yes"], "--skip_train is true or false"),
        (["7"], "unexpected argument '7'"),
    ],
)
def test_wrong_options_are_refused_by_name(words, complaint):
    for script in ("./run.sh", "../../TEMPLATE/asr1/asr.sh"):
        text = shell(script, *words, cwd=ROOT / "egs2/mini_an4/asr1", status=2)
        assert complaint in text


@pytest.mark.parametrize(
    "words, complaint",
    [
        (["--system", "nope"], "there is no nope.yaml"),
        (["--feats_type", "mfcc"], "choose raw, fbank or extracted"),
        (["--kd_source", "dead"], "choose live or cached"),
        (["--test_sets", ""], "--test_sets is empty"),
        (["--python", "/bin/false"], "run tools/install.sh"),
    ],
)
def test_impossible_settings_are_refused_at_once(words, complaint):
    recipe = ROOT / "egs2" / "mini_an4" / "asr1"
    assert complaint in shell("./run.sh", *words, cwd=recipe, status=1)


def test_run_all_refuses_unknown_recipes_before_it_installs():
    text = shell("./run_all.sh", "--recipes", "digits nope", cwd=ROOT, status=1)
    assert "egs2/nope" in text and "nstall" not in text


def test_install_without_a_python_says_what_to_do(tmp_path):
    env = {**os.environ, "DLDKIT_VENV": str(tmp_path), "DLDKIT_PYTHON": "/bin/false"}
    text = shell("tools/install.sh", cwd=ROOT, status=1, env=env)
    assert "not a virtual environment" in text
    env["DLDKIT_VENV"] = str(tmp_path / "venv")
    text = shell("tools/install.sh", cwd=ROOT, status=1, env=env)
    assert "no Python 3.12 or 3.13" in text and "DLDKIT_PYTHON" in text
    shell("tools/install.sh", "--nope", cwd=ROOT, status=2, env=env)


# ---------------------------------------------------------------- mini_an4


def copy_of_the_recipes(directory):
    for name in ("dldkit", "conf", "egs2"):
        shutil.copytree(
            ROOT / name,
            directory / name,
            symlinks=True,
            ignore=(
                shutil.ignore_patterns(*GENERATED, "__pycache__")
                if name == "egs2"
                else shutil.ignore_patterns("__pycache__")
            ),
        )
    return directory / "egs2" / "mini_an4" / "asr1"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """mini_an4 after stages 1-15, and what they printed."""
    recipe = copy_of_the_recipes(tmp_path_factory.mktemp("recipes"))
    return recipe, shell("./run.sh", cwd=recipe)


def test_a_stage_without_the_one_before_says_which(tmp_path):
    recipe = copy_of_the_recipes(tmp_path)
    for stage, needed in ((4, "stage 3"), (6, "stage 5"), (12, "stage 11")):
        words = ["--stage", stage, "--stop_stage", stage]
        text = shell("./run.sh", *words, cwd=recipe, status=1)
        assert f"run {needed} first" in text


def test_all_stages_of_mini_an4(finished):
    recipe, printed = finished
    for stage in range(1, 16):
        assert f"Stage {stage}: " in printed
    assert "2epoch results: [train] " in printed  # progress of the trainings is seen
    for exp in ("asr_static", "asr_dld"):
        model = recipe / "exp" / exp / "valid.loss_ctc.ave.pth"
        assert model.exists()
        for depth in (4, 3, 2, 1):
            for test_set, size in (("train_dev", 2), ("test", 2)):
                decoded = model.parent / "decode_valid.loss_ctc.ave" / f"depth{depth}"
                assert len((decoded / test_set / "text").open().readlines()) == size
    dld = recipe / "exp" / "asr_dld"
    config = yaml.safe_load((dld / "config.yaml").read_text())
    assert config["model_conf"]["reference"] == "exp/asr_static/valid.loss_ctc.ave.pth"
    assert config["frontend_conf"]["fs"] == 16000
    assert (dld / "depth_profile.pth").exists()

    results = json.loads((dld / "results.json").read_text())["results"]
    measured = {(r["system"], r["test_set"], r["depth"]) for r in results}
    assert measured == {
        (system, test_set, depth)
        for system in ("static", "dld")
        for test_set in ("train_dev", "test")
        for depth in (4, 3, 2, 1)
    }
    for row in (dld / "RESULTS.md").read_text().splitlines():
        if row.startswith("| dld"):
            assert row in printed
    assert "eight real recordings" in printed


def test_the_packed_model_recognises_at_any_depth(finished, tmp_path, monkeypatch):
    from dldkit.asr.inference import Speech2Text

    recipe, _ = finished
    dld = recipe / "exp" / "asr_dld"
    (packed,) = dld.glob("*.zip")
    assert "static" not in " ".join(zipfile.ZipFile(packed).namelist())
    card = dld / "huggingface" / "README.md"
    assert "automatic-speech-recognition" in card.read_text()
    model = re.search(r'asr_model_file="(.*)"', card.read_text())[1]

    # as someone who downloaded the repository
    shutil.copytree(dld / "huggingface", tmp_path / "model")
    monkeypatch.chdir(tmp_path / "model")
    recognise = Speech2Text("exp/asr_dld/config.yaml", model)
    wav = (recipe / "dump/raw/test/wav.scp").read_text().split()[1]
    speech, _ = soundfile.read(recipe / wav, dtype="float32")
    for depth in (4, 1):
        recognise.set_depth(depth)
        assert len(recognise.asr_model.encoder.active_layers) == depth
        recognise(speech)


def test_a_second_run_keeps_everything(finished):
    recipe, _ = finished
    kept = [
        path
        for pattern in ("asr_*/*epoch.pth", "asr_stats*/*/*", "asr_*/*.zip")
        for path in (recipe / "exp").glob(pattern)
    ]
    kept += (recipe / "exp").glob("asr_*/*/depth*/*/text")
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert len(before) > 20
    printed = shell("./run.sh", cwd=recipe)
    assert printed.count("is trained already") == 2
    assert "epoch results" not in printed and "real-time factor" not in printed
    assert "| dld" in printed  # the table is shown again
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_run_sh_of_an_experiment_goes_on_with_its_training(finished):
    recipe, _ = finished
    exp = recipe / "exp" / "asr_dld"
    shell(exp / "run.sh", "--max_epoch", "3", cwd="/")
    assert (exp / "3epoch.pth").exists()
    log = (exp / "train.log").read_text()
    assert log.count("1epoch results") == 1 and log.count("3epoch results") == 1


def test_a_training_does_not_go_on_with_other_data(finished):
    recipe, _ = finished
    data = recipe / "exp" / "asr_static" / ".data"
    key = data.read_text()
    data.write_text("another corpus\n")
    words = ["--stage", "7", "--stop_stage", "7"]
    text = shell("./run.sh", *words, cwd=recipe, status=1)
    data.write_text(key)
    assert "exp/asr_static was trained on other data" in text
