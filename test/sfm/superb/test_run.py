"""How s3prl is run."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
import yaml
from layouts import WORDS, librispeech
from running import copy_of_the_recipes, environment, shell
from transformers import AutoModel

from dldkit.errors import UserError
from dldkit.sfm.superb.checks import MODULES
from dldkit.sfm.superb.results import COLUMNS, PUBLISHED, collect
from dldkit.sfm.superb.run import run
from dldkit.sfm.superb.tasks import CORPORA, LEXICONS
from dldkit.sfm.superb.upstream import find_upstream
from dldkit.step import Step

NEEDS_S3PRL = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in MODULES),
    reason="the extra superb is not installed",
)
KEYWORDS = ["yes", "no", "go", "bed"]  # bed is none of the ten: _unknown_


@pytest.fixture(scope="module")
def speech_commands(tmp_path_factory) -> tuple[Path, Path]:
    """Speech Commands' layout, and its test set's, with noise for speech."""
    root = tmp_path_factory.mktemp("commands")
    rng = np.random.default_rng(0)

    def write(path: Path, seconds: float) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, 0.1 * rng.standard_normal(int(seconds * 16000)), 16000)

    for word in KEYWORDS:
        for speaker in range(20):  # s3prl hashes names to training, validation, test
            write(root / "train" / word / f"{speaker:08x}_nohash_0.wav", 0.3)
        test = "_unknown_" if word == "bed" else word
        write(root / "test" / test / "0.wav", 0.3)
    write(root / "train" / "_background_noise_" / "noise.wav", 2.5)
    write(root / "test" / "_silence_" / "0.wav", 0.3)
    return root / "train", root / "test"


@NEEDS_S3PRL
def test_finished_task_is_kept_and_another_upstream_refused(
    upstream, speech_commands, finished, tmp_path
):
    train, test = map(str, speech_commands)
    corpora = {"speech_commands": train, "speech_commands_test": test}
    directory = tmp_path / "ks"
    finished(directory, "evaluate/valid_best/test/result.yaml", accuracy=0.5)
    with pytest.raises(UserError, match="ks is from another upstream or other"):
        run(["ks"], upstream, tmp_path, corpora, tmp_path / "lists")
    settings = {"upstream": find_upstream(upstream).identity, "args": []}
    for mark in (".done", ".part"):
        (directory / mark).unlink(missing_ok=True)
    with Step(directory, {}, keep=True, **settings):
        pass
    run(["ks"], upstream, tmp_path, corpora, tmp_path / "lists")
    assert not (directory / "superb.log").exists()  # s3prl was not started
    other = "evaluate/valid_best/test/result.yaml"
    finished(directory / "lr0.1", other, options=dict(lr=0.1), accuracy=0.5)
    with pytest.raises(UserError, match="ks/lr0.1 is from another upstream or other"):
        run(["ks"], upstream, tmp_path, corpora, tmp_path / "lists")
    shutil.rmtree(directory / "lr0.1")
    finished(tmp_path / "pr", other, accuracy=0.5)  # it would be in the same row
    with pytest.raises(UserError, match="pr is from another upstream"):
        run(["ks"], upstream, tmp_path, corpora, tmp_path / "lists")


@NEEDS_S3PRL
@pytest.mark.integration
def test_keyword_spotting_runs_resumes_and_reports(
    upstream, speech_commands, python, monkeypatch, tmp_path
):
    """Two steps; a checkpoint that s3prl died in does not stop the next."""
    monkeypatch.setenv("SPEECH_COMMANDS", str(speech_commands[0]))
    monkeypatch.delenv("SPEECH_COMMANDS_TEST", raising=False)

    def run(*args: object, status: int = 0) -> str:
        command = ["-m", "dldkit.bin.sfm_superb", "--upstream", upstream]
        command += ["--upstream_name", "tiny", "--output_dir", "exp", "--tasks", "ks"]
        process = python(*command, "--nj", 1, *args, status=status, cwd=tmp_path)
        return process.stdout + process.stderr

    assert "SPEECH_COMMANDS_TEST in the environment" in run(status=1)
    corpus = ["--speech_commands_test", speech_commands[1]]
    steps = "--train.eval_step 1 --train.save_step 1 --train.log_step 1"
    args = [*corpus, "--task_args", f"{steps} --train.total_steps 2"]
    args += ["--lr", "ks=1e-3"]
    exp = tmp_path / "exp" / "ks" / "lr0.001"
    broken = exp / "train" / "step_1" / "model"
    broken.mkdir(parents=True)
    printed = run(*args)
    assert "KS: learning rate 0.001\n" in printed
    (config,) = (exp / "configs").glob("*.yaml")
    optimizer = yaml.safe_load(config.read_text())["build_optimizer"]
    assert optimizer["conf"]["lr"] == 0.001
    (line,) = (line for line in printed.splitlines() if line.startswith("| tiny"))
    row = [cell.strip() for cell in line.strip("| ").split("|")]
    parameters = sum(
        p.numel() for p in AutoModel.from_pretrained(upstream).parameters()
    )
    accuracy = yaml.safe_load(
        (exp / "evaluate" / "valid_best" / "test" / "result.yaml").read_text()
    )["accuracy"]
    assert row[3:5] == ["–", f"{100 * accuracy:.2f}"]
    assert row[:2] == ["tiny", f"{parameters / 1e6:.2f}"]
    log = (exp / "superb.log").read_text()
    assert "step_1 is incomplete, removed" in printed
    assert "train at step 1" in log and "train at step 2" in log

    (exp / ".done").unlink()
    run(*args)
    again = (exp / "superb.log").read_text()[len(log) :]
    assert "Loading checkpoints from" in again and "train at step" not in again


@NEEDS_S3PRL
@pytest.mark.integration
@pytest.mark.parametrize("kind", ["wavlm", "fbank"])
def test_other_upstreams_are_trained_on(kind, wave_teacher, speech_commands, tmp_path):
    """A WavLM of Hugging Face is not taken for a HuBERT; s3prl's need no directory."""
    upstream = str(wave_teacher(kind)[1]) if kind == "wavlm" else kind
    train, test = map(str, speech_commands)
    corpora = {"speech_commands": train, "speech_commands_test": test}
    steps = "--train.total_steps 1 --train.eval_step 1 --train.save_step 1".split()
    places = dict(output_dir=tmp_path / "exp", list_dir=tmp_path / "lists")
    run(["ks"], upstream, corpora=corpora, task_args=steps, num_workers=0, **places)
    log = (tmp_path / "exp" / "ks" / "superb.log").read_text()
    assert "of type wavlm to instantiate a model of type hubert" not in log
    table = collect(tmp_path / "exp", kind)
    assert "SUPERB score (KS) ↑" in table and "KS: not SUPERB's settings" in table
    with pytest.raises(UserError, match="ks is from another upstream"):
        run(["ks"], "mel", corpora=corpora, task_args=steps, **places)


# Of two files, whose phonemes are none of the lexicons that s3prl would download.
LEXICON = (
    dict(ONE="w_ u_ n_", TWO="t_ u_", THREE="th_ r_ i_"),
    dict(FOUR="f_ o_ r_", FIVE="f_ a_ i_ v_"),
)


@NEEDS_S3PRL
@pytest.mark.slow
def test_librispeech_alone_gives_phonemes_and_words(upstream, tmp_path):
    """Stage 13 of librispeech/ssl1, two steps, on what stage 1 may have downloaded."""
    recipe = copy_of_the_recipes(tmp_path) / "librispeech" / "ssl1"
    shutil.copytree(upstream, recipe / "exp" / "sfm_full" / "hf")
    rng = np.random.default_rng(0)
    seconds = (0.8, 1.1, 0.9)
    speech = [0.1 * rng.standard_normal(int(16000 * s)) for s in seconds]
    librispeech(recipe / "downloads", speech)
    corpus = recipe / "downloads" / "LibriSpeech"
    for transcripts in corpus.rglob("*.trans.txt"):
        transcripts.write_text(transcripts.read_text() + "\n")
    speakers = "".join(f"{n} | F | any | 1.0 | Some {n}\n" for n in range(5))
    header = "; about\n;ID  |SEX| SUBSET           |MINUTES| NAME\n"
    (corpus / "SPEAKERS.TXT").write_text(header + speakers)
    lists = recipe / "downloads" / "superb"
    lists.mkdir()
    for name, words in zip(LEXICONS, LEXICON):
        lines = [f"{word}\t{phonemes}\n" for word, phonemes in words.items()]
        (lists / name).write_text("".join(lines))

    steps = "--train.total_steps 2 --train.eval_step 2 --prepare_data.n_jobs 1"
    command = ["./run.sh", "--stage", "13", "--stop_stage", "13", "--ngpu", "0"]
    command += ["--superb_args", f'--nj 1 --task_args "{steps}"']
    variables = {name.upper(): "" for name in CORPORA}
    variables |= dict(TEACHER=str(upstream), https_proxy="http://127.0.0.1:9")
    printed = shell(*command, cwd=recipe, env=environment(**variables))

    text = (recipe / "exp" / "sfm_full" / "RESULTS.md").read_text()
    assert text in printed
    lines = [line.strip("| ") for line in text.splitlines() if line.startswith("|")]
    header, _, ours, *published = [re.split(r" *\| *", line) for line in lines]
    assert header[3:-2] == COLUMNS and header[-2] == "SUPERB score (PR ASR) ↑"
    row, exp = dict(zip(header, ours)), recipe / "exp" / "superb_full"
    assert row["upstream"] == "full" and row["source"] == "exp/superb_full"
    spoken = {f"2-7-000{number}": words for number, words in enumerate(WORDS)}
    lexicon = LEXICON[0] | LEXICON[1]
    said = {
        utt: " ".join(lexicon[w] for w in words.split())
        for utt, words in spoken.items()
    }
    results = {}
    for task, key, column, expected in (
        ("pr", "per", "PR PER ↓", said),
        ("asr", "wer", "ASR WER ↓", spoken),
    ):
        place = exp / task / "evaluate" / "valid_best" / "test-clean"
        reference = (place / "ref").read_text().splitlines()
        assert dict(line.split(" ", 1) for line in reference) == expected
        score = 100 * yaml.safe_load((place / "result.yaml").read_text())[key]
        assert np.isfinite(score) and score > 0
        results[column] = f"{score:.2f}"
        assert f"{task.upper()}: not SUPERB's settings, but with {steps}" in text
    others = dict.fromkeys(set(COLUMNS) - set(results), "–")
    assert {column: row[column] for column in COLUMNS} == results | others
    assert np.isfinite(float(row[header[-2]]))
    for cells, known in zip(published, PUBLISHED["rows"], strict=True):
        assert cells[0] == known["upstream"] and cells[-1] == known["source"]
        assert cells[3] == f"{known['scores'][0]:.2f}"
    shutil.rmtree(exp / "asr" / "train")  # 0.5 GB
