import pytest

from dldkit.bin import calibrate, decode
from dldkit.options import depth_list

NEEDED = {
    calibrate: ["--asr_model_file", "m.pth", "--data_dir", "d"],
    decode: ["--asr_exp", "e", "--inference_asr_model", "m", "--data_dirs", "d"]
    + ["--inference_tag", "t"],
}


@pytest.mark.parametrize("text", ["12 6 2", "12,6,2", " 12, 6 2"])
def test_depths_are_written_with_spaces_or_commas(text):
    assert depth_list(text) == [12, 6, 2]


@pytest.mark.parametrize("command", NEEDED, ids=["calibrate", "decode"])
@pytest.mark.parametrize("text", ["", "two", "4;2", "0", "-2", "6.5"])
def test_other_depths_are_refused_by_the_commands(command, text, capsys):
    with pytest.raises(SystemExit) as stop:
        command.main([*NEEDED[command], f"--depths={text}"])
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"argument --depths: {text!r}: write numbers of layers" in last
