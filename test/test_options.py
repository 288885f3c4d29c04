from argparse import ArgumentTypeError

import pytest

from dldkit.bin import calibrate, decode
from dldkit.options import depth_list, learning_rates, sampling_rate

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


@pytest.mark.parametrize("text", ["0", "x", "²", ""])
def test_other_sampling_rates_are_refused(text):
    assert sampling_rate("16k") == 16000
    with pytest.raises(ArgumentTypeError, match="write a sampling rate in Hz"):
        sampling_rate(text)


def test_learning_rates_of_tasks():
    assert learning_rates("") == {}
    rates = {"pr": [5e-4], "sid": [0.01, 0.001]}
    assert learning_rates("pr=5e-4,sid=1e-2:1e-3:0.01") == rates


@pytest.mark.parametrize("text", ["pr", "1e-3", "pr=x", "pr=0", "=1", "pr=1,pr=2"])
def test_other_learning_rates_are_refused(text):
    with pytest.raises(ArgumentTypeError, match="such as pr=5e-4,sid=1e-2:1e-3"):
        learning_rates(text)
