"""What is asked of the user before anything runs."""

import json
import shutil

import pytest

from dldkit.errors import UserError
from dldkit.sfm.superb.checks import check_environment, check_upstream, find_corpora


def test_missing_corpus_is_named_with_its_source():
    with pytest.raises(UserError) as error:
        find_corpora(["ks"], {"speech_commands": None})
    for part in ("--speech_commands", "SPEECH_COMMANDS", "http://", "CC BY 4.0"):
        assert part in str(error.value)


def test_wrong_corpus_is_refused(tmp_path):
    with pytest.raises(UserError, match="VOXCELEB1.*has no dev/wav"):
        find_corpora(["sid"], {"voxceleb1": str(tmp_path)})


def test_librispeech_may_be_the_directory_above(tmp_path):
    root = tmp_path / "LibriSpeech"
    root.mkdir()
    (root / "SPEAKERS.TXT").touch()
    for path in (root, tmp_path):
        found = find_corpora(["pr", "asr"], {"librispeech": str(path)})
        assert found == {"librispeech": root}


@pytest.mark.parametrize("task", ["qbe", "kss"])
def test_tasks_that_can_not_be_run_are_refused(task):
    with pytest.raises(UserError, match=f"--tasks {task}: choose from pr ks ic sid"):
        check_environment([task])


def test_upstream_must_be_an_exported_student(upstream, tmp_path):
    with pytest.raises(UserError, match="config.json is not there.*sfm_export"):
        check_upstream(tmp_path)
    shutil.copytree(upstream, tmp_path, dirs_exist_ok=True)
    assert check_upstream(tmp_path) == check_upstream(upstream)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "wavlm"}))
    with pytest.raises(UserError, match="holds a wavlm model"):
        check_upstream(tmp_path)
