"""What all recipes share: their shell, setup.sh and run_all.sh."""

import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import soundfile
from running import GENERATED, ROOT, copy_of_the_recipes, environment, shell

TEMPLATE = ROOT / "egs2" / "TEMPLATE"
RECIPES = sorted(path.parent for path in ROOT.glob("egs2/*/*1/conf"))
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


def test_shellcheck_finds_nothing():
    checker = Path(sys.executable).parent / "shellcheck"
    assert len(SCRIPTS) > 10
    shell(checker, *SCRIPTS, ROOT / ".ci" / "run", cwd=ROOT)


@pytest.mark.parametrize(
    "script",
    [TEMPLATE / "asr1/asr.sh", TEMPLATE / "ssl1/sfm.sh", ROOT / "run_all.sh"],
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
    RECIPES,
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

    scores = "\n\n| system | depth 2 |\n|--|--|\n| {} |\n\n"
    differences = "| anytime less | depth 2 |\n|--|--|\n| static | -1 |\n\n"
    (tmp_path / "egs2/a/asr1/results").mkdir()
    (tmp_path / "egs2/a/asr1/results/README.md").write_text(
        "### test, equal steps"
        + scores.format("static | 9.0")
        + differences
        + "### test, equal arithmetic"
        + scores.format("static | 8.0")
        + differences
        + "Made by `local/compare.sh` on 2026-11-26.\n"
    )

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
        "| system | depth 2 |",
        "|--|--|",
        "| static | 8.0 |",
    ]
    assert "Made by `local/compare.sh` on 2026-11-26." in text
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


@pytest.mark.parametrize("recipe", ["commonvoice/asr1", "digits/ssl1"])
def test_stage_1_has_the_jobs_and_the_language_of_run_sh(tmp_path, recipe):
    """Also where local/data.sh is given options of its own."""
    directory = copy_of_the_recipes(tmp_path) / recipe
    (directory / "local/data.sh").write_text(
        '#!/bin/sh\necho "got ${DLDKIT_NJ} ${DLDKIT_LANG} $*"; exit 3\n'
    )
    words = ["--nj", "3", "--lang", "cy", "--local_data_opts", "--data_dir x"]
    env = environment(TEACHER="any")
    text = shell("./run.sh", *words, cwd=directory, env=env, status=3)
    assert text.endswith("got 3 cy --data_dir x\n")


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
        (["path"], "find its corpus by $PATH, which is set already"),
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
    (Path(env["MY_WORDS"]) / "dev" / "text").unlink()
    text = shell("./run.sh", "--stop_stage", 1, cwd=recipe, env=env, status=1)
    assert text.endswith("lacks dev/text: complete the corpus\n")
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
