"""What is asked of the user before anything runs."""

from pathlib import Path

import pytest

from dldkit.data.corpus import DOWNLOADS
from dldkit.data.librispeech import SUPERB
from dldkit.errors import UserError
from dldkit.sfm.superb import checks
from dldkit.sfm.superb.checks import (
    check_environment,
    check_tasks,
    fetch_lists,
    find_corpora,
)
from dldkit.sfm.superb.tasks import TASKS, Task


def test_missing_corpus_is_named_with_its_source():
    with pytest.raises(UserError) as error:
        find_corpora(["ks"], {"speech_commands": None})
    for part in ("--speech_commands", "SPEECH_COMMANDS", "http://", "CC BY 4.0"):
        assert part in str(error.value)


def test_wrong_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="VOXCELEB1.*has no dev/wav"):
        find_corpora(["sid"], {"voxceleb1": str(tmp_path)})


def librispeech(directory: Path) -> Path:
    """What SUPERB looks for in LibriSpeech."""
    root = directory / "LibriSpeech"
    for split in SUPERB:
        (root / split).mkdir(parents=True)
    (root / "SPEAKERS.TXT").touch()
    return root


def test_librispeech_may_be_the_directory_above(tmp_path):
    root = librispeech(tmp_path)
    for path in (root, tmp_path):
        found = find_corpora(["pr", "asr"], {"librispeech": str(path)})
        assert found == {"librispeech": root}


def test_splits_that_are_missing_are_named(tmp_path):
    (librispeech(tmp_path) / "test-clean").rmdir()
    with pytest.raises(UserError, match="LIBRISPEECH. has no test-clean: name"):
        find_corpora(["asr"], {"librispeech": str(tmp_path)})


def test_librispeech_alone_is_enough_also_when_it_is_yet_to_come(tmp_path, monkeypatch):
    """As in librispeech/ssl1, whose stage 1 downloads it where it is not named."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checks, "MODULES", ())
    named = {"librispeech": DOWNLOADS}
    with pytest.raises(UserError, match="--librispeech downloads .* has no SPEAKERS"):
        check_tasks([], named, None, {})
    place = tmp_path / DOWNLOADS
    tasks, _ = check_tasks([], named, None, {}, downloads=True)
    assert tasks == ["pr", "asr"]
    root = librispeech(place)
    assert check_tasks([], named, None, {}) == (tasks, {"librispeech": root})


@pytest.mark.parametrize(
    "rates, complaint",
    [
        (dict(ks=[0.1]), "--lr names ks, which does not run: choose from asv"),
        (dict(asv=[0.1, 0.01]), "ASV has no dev set to choose on"),
    ],
)
def test_learning_rates_that_can_not_be_chosen_from(
    rates, complaint, tmp_path, monkeypatch
):
    monkeypatch.setattr(checks, "MODULES", ())
    monkeypatch.setattr(checks.shutil, "which", lambda name: "/bin/" + name)
    (tmp_path / "dev" / "wav").mkdir(parents=True)
    with pytest.raises(UserError, match=complaint):
        check_tasks(["asv"], {"voxceleb1": str(tmp_path)}, None, rates)


@pytest.mark.parametrize("task", ["qbe", "kss"])
def test_tasks_that_can_not_be_run_are_refused(task):
    with pytest.raises(UserError, match=f"--tasks {task}: choose from pr ks ic sid"):
        check_environment([task])


def test_list_that_can_not_be_downloaded_is_named(tmp_path, monkeypatch):
    url = (tmp_path / "nothing.txt").as_uri()
    task = Task("SuperbSID", {}, {}, lists={"kept.txt": url, "split.txt": url})
    monkeypatch.setitem(TASKS, "sid", task)
    (tmp_path / "kept.txt").write_text("1 a\n")
    with pytest.raises(UserError, match=f"{url}.*put it at {tmp_path / 'split.txt'}"):
        fetch_lists(["sid"], tmp_path)
    assert (tmp_path / "kept.txt").read_text() == "1 a\n"


def test_list_is_downloaded_once(tmp_path, monkeypatch):
    source = tmp_path / "source.txt"
    source.write_text("1 a\n")
    task = Task("SuperbSID", {}, {}, lists={"split.txt": source.as_uri()})
    monkeypatch.setitem(TASKS, "sid", task)
    fetch_lists(["sid"], tmp_path / "lists")
    source.unlink()
    fetch_lists(["sid"], tmp_path / "lists")
    assert [p.name for p in (tmp_path / "lists").iterdir()] == ["split.txt"]
    assert (tmp_path / "lists" / "split.txt").read_text() == "1 a\n"
