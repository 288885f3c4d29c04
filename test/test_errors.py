"""What a command's main does with errors."""

import pytest

from dldkit.errors import report_user_errors


def test_a_file_that_can_not_be_read_ends_in_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        report_user_errors(tmp_path.read_text)()
    assert stop.value.code == 1
    assert capsys.readouterr().err == f"error: {tmp_path}: Is a directory\n"


def closed():
    raise BrokenPipeError(32, "Broken pipe")


def test_other_errors_keep_their_trace():
    with pytest.raises(ZeroDivisionError):
        report_user_errors(lambda: 1 / 0)()
    with pytest.raises(BrokenPipeError):  # it has no file's name
        report_user_errors(closed)()
