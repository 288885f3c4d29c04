"""SUPERB: what is asked of the user, how s3prl is run, and the table row."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from dldkit.errors import UserError
from dldkit.sfm import superb
from dldkit.sfm.s3prl_main import apply_effects_tensor, audio_info
from dldkit.step import Step

ROOT = Path(__file__).resolve().parents[2]
NEEDS_S3PRL = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in superb.MODULES),
    reason="the extra superb is not installed",
)
KEYWORDS = ["yes", "no", "go", "bed"]  # bed is none of the ten: _unknown_


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Path:
    """A tiny student as sfm_export writes it."""
    directory = tmp_path_factory.mktemp("hf")
    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    HubertModel(config).save_pretrained(directory)
    Wav2Vec2FeatureExtractor().save_pretrained(directory)
    return directory


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


def finished(directory: Path, result: str, args=(), **scores: float) -> None:
    """Write what a finished task leaves."""
    path = directory / result
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(scores))
    with Step(directory, {}, keep=True, upstream="x", args=list(args)):
        pass


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("| ").split("|")]


# ---------------------------------------------------------------- the table


def test_row_has_the_order_of_superbs_table(tmp_path):
    header, _, row = superb.collect(tmp_path, "student").splitlines()
    names = "upstream PR KS IC SID ER ASR QbE SF SF ASV SD".split()
    assert [cell.split()[0] for cell in cells(header)] == names
    assert cells(row) == ["student", *"–" * 11]


def test_row_is_in_percent_and_averages_folds(tmp_path):
    best = "evaluate/valid_best/test-clean/result.yaml"
    finished(tmp_path / "pr", best, per=0.0541)
    finished(tmp_path / "sf", best, slot_type_f1=0.8853, slot_value_cer=0.252, wer=1)
    finished(tmp_path / "er" / "fold0", best, accuracy=0.6)
    finished(tmp_path / "er" / "fold3", best, accuracy=0.7)
    finished(tmp_path / "asv", "evaluate/test_trial/best_result.yaml", EER=0.0511)
    args = ["--train.total_steps", "9"]
    finished(tmp_path / "sd", "evaluate/valid_best/test/dscore.yaml", args, der=5.88)
    (tmp_path / "ks").mkdir()  # under way
    table = superb.collect(tmp_path, "hubert")
    expected = "hubert 5.41 – – – 65.00 – – 88.53 25.20 5.11 5.88"
    assert cells(table.splitlines()[2]) == expected.split()
    assert "ER: only fold0 fold3 of 5 folds" in table
    assert "SD: not SUPERB's settings, but with --train.total_steps 9" in table
    assert (tmp_path / "superb.md").read_text().strip() == table
    scores = json.loads((tmp_path / "superb.json").read_text())["scores"]
    assert scores["PR PER ↓"] == pytest.approx(5.41) and scores["KS acc ↑"] is None


# ---------------------------------------------------------------- refusals


def test_missing_corpus_is_named_with_its_source():
    with pytest.raises(UserError) as error:
        superb.find_corpora(["ks"], {"speech_commands": None})
    for part in ("--speech_commands", "SPEECH_COMMANDS", "http://", "CC BY 4.0"):
        assert part in str(error.value)


def test_wrong_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="VOXCELEB1.*has no dev/wav"):
        superb.find_corpora(["sid"], {"voxceleb1": str(tmp_path)})


def test_librispeech_may_be_the_directory_above(tmp_path):
    root = tmp_path / "LibriSpeech"
    root.mkdir()
    (root / "SPEAKERS.TXT").touch()
    for path in (root, tmp_path):
        found = superb.find_corpora(["pr", "asr"], {"librispeech": str(path)})
        assert found == {"librispeech": root}


@pytest.mark.parametrize("task", ["qbe", "kss"])
def test_tasks_that_can_not_be_run_are_refused(task):
    with pytest.raises(UserError, match=f"--tasks {task}: choose from pr ks ic sid"):
        superb.check_environment([task])


def test_upstream_must_be_an_exported_student(upstream, tmp_path):
    with pytest.raises(UserError, match="config.json is not there.*sfm_export"):
        superb.check_upstream(tmp_path)
    shutil.copytree(upstream, tmp_path, dirs_exist_ok=True)
    assert superb.check_upstream(tmp_path) == superb.check_upstream(upstream)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "wavlm"}))
    with pytest.raises(UserError, match="holds a wavlm model"):
        superb.check_upstream(tmp_path)


def test_list_that_can_not_be_downloaded_is_named(tmp_path, monkeypatch):
    url = (tmp_path / "nothing.txt").as_uri()
    task = superb.Task("SuperbSID", {}, {}, lists={"kept.txt": url, "split.txt": url})
    monkeypatch.setitem(superb.TASKS, "sid", task)
    (tmp_path / "kept.txt").write_text("1 a\n")
    with pytest.raises(UserError, match=f"{url}.*put it at {tmp_path / 'split.txt'}"):
        superb.fetch_lists(["sid"], tmp_path)
    assert (tmp_path / "kept.txt").read_text() == "1 a\n"


def test_list_is_downloaded_once(tmp_path, monkeypatch):
    source = tmp_path / "source.txt"
    source.write_text("1 a\n")
    task = superb.Task("SuperbSID", {}, {}, lists={"split.txt": source.as_uri()})
    monkeypatch.setitem(superb.TASKS, "sid", task)
    superb.fetch_lists(["sid"], tmp_path / "lists")
    source.unlink()
    superb.fetch_lists(["sid"], tmp_path / "lists")
    assert [p.name for p in (tmp_path / "lists").iterdir()] == ["split.txt"]
    assert (tmp_path / "lists" / "split.txt").read_text() == "1 a\n"


# ---------------------------------------------------------------- what s3prl lacks


def test_audio_info_counts_frames(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1234), 8000)
    info = audio_info(tmp_path / "a.wav")
    assert (info.num_frames, info.sample_rate) == (1234, 8000)


def test_gain_is_in_decibels():
    speech = torch.tensor([[0.5, -0.25, 0.0]])
    effects = [["channels", "1"], ["rate", "16000"], ["gain", "-6.020599913"]]
    quieter, rate = apply_effects_tensor(speech, 16000, effects)
    assert rate == 16000
    torch.testing.assert_close(quieter, speech / 2)


@pytest.mark.skipif(not shutil.which("sox"), reason="needs the program sox")
def test_silence_is_cut_and_speech_kept():
    time = torch.arange(16000) / 16000
    tone = 0.5 * torch.sin(2 * torch.pi * 300 * time)
    speech = torch.cat([torch.zeros(16000), tone, torch.zeros(32000), tone])[None]
    effects = [["silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%"]]
    kept, _ = apply_effects_tensor(speech, 16000, effects)
    assert kept.dtype == torch.float32
    assert kept.shape[0] == 1 and abs(kept.shape[1] - 2 * 16000) < 0.25 * 16000
    assert kept.square().sum() == pytest.approx(float(speech.square().sum()), rel=0.02)


# ---------------------------------------------------------------- runs


@NEEDS_S3PRL
def test_finished_task_is_kept_and_another_upstream_refused(
    upstream, speech_commands, tmp_path
):
    train, test = map(str, speech_commands)
    corpora = {"speech_commands": train, "speech_commands_test": test}
    directory = tmp_path / "ks"
    finished(directory, "evaluate/valid_best/test/result.yaml", accuracy=0.5)
    with pytest.raises(UserError, match="ks is from another upstream or other"):
        superb.run(["ks"], upstream, tmp_path, corpora, tmp_path / "lists")
    settings = {"upstream": superb.check_upstream(upstream), "args": []}
    for mark in (".done", ".part"):
        (directory / mark).unlink(missing_ok=True)
    with Step(directory, {}, keep=True, **settings):
        pass
    superb.run(["ks"], upstream, tmp_path, corpora, tmp_path / "lists")
    assert not (directory / "superb.log").exists()  # s3prl was not started


@NEEDS_S3PRL
@pytest.mark.integration
def test_keyword_spotting_runs_resumes_and_reports(upstream, speech_commands, tmp_path):
    """superb.sh, two steps; a checkpoint that s3prl died in does not stop the next."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    template = ROOT / "egs2" / "TEMPLATE"
    (recipe / "superb.sh").symlink_to(template / "ssl1" / "superb.sh")
    (recipe / "path.sh").symlink_to(template / "asr1" / "path.sh")

    def run(*args: object, status: int = 0) -> str:
        command = ["./superb.sh", "--upstream_dir", upstream, "--tasks", "ks"]
        command += ["--upstream_name", "tiny", "--ngpu", "0", "--nj", "0", *args]
        process = subprocess.run(
            [str(word) for word in command],
            cwd=recipe,
            env={
                **{k: v for k, v in os.environ.items() if "SPEECH_COMMANDS" not in k},
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SPEECH_COMMANDS": str(speech_commands[0]),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=1700,
        )
        assert process.returncode == status, process.stdout
        return process.stdout

    assert "SPEECH_COMMANDS_TEST in the environment" in run(status=1)
    corpus = ["--speech_commands_test", speech_commands[1]]
    steps = "--train.eval_step 1 --train.save_step 1 --train.log_step 1"
    args = [*corpus, "--task_args", f"{steps} --train.total_steps 2"]
    exp = recipe / "exp" / "superb_tiny" / "ks"
    broken = exp / "train" / "step_1" / "model"
    broken.mkdir(parents=True)
    printed = run(*args)
    row = cells(printed.splitlines()[-3])
    accuracy = yaml.safe_load(
        (exp / "evaluate" / "valid_best" / "test" / "result.yaml").read_text()
    )["accuracy"]
    assert row[:3] == ["tiny", "–", f"{100 * accuracy:.2f}"]
    log = (exp / "superb.log").read_text()
    assert "step_1 is incomplete, removed" in printed
    assert "train at step 1" in log and "train at step 2" in log

    (exp / ".done").unlink()
    run(*args)
    again = (exp / "superb.log").read_text()[len(log) :]
    assert "Loading checkpoints from" in again and "train at step" not in again
