"""Which family a path is of."""

import random

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from dldkit.errors import UserError
from dldkit.sfm.teacher.opening import open_teacher, teacher_info, weight_files


def test_random_numbers_are_those_of_a_run_without_teacher(any_teacher, waveforms):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    def seed():
        random.seed(3), np.random.seed(3), torch.manual_seed(3)

    seed()
    expected = draw()
    seed()
    open_teacher(any_teacher, [2])(*waveforms)
    assert draw() == expected


def test_the_description_needs_no_weights(any_teacher):
    info = teacher_info(any_teacher)
    for file in [*any_teacher.glob("*.safetensors"), *any_teacher.glob("*.pth")]:
        file.unlink()
    assert teacher_info(any_teacher) == info
    assert (info.hidden_size, info.num_layers, info.sampling_rate) == (16, 3, 16000)
    assert info.normalize is False and info.layers is None


@pytest.mark.parametrize("layers", [[], [4], [-1, 2]])
def test_refuses_layers_that_are_not_there(layers, any_teacher):
    with pytest.raises(UserError, match=r"layers 0 \(input\) to 3 \(output\)"):
        open_teacher(any_teacher, layers)


@pytest.mark.parametrize("name", ["nothing/here", "missing.pth", "directory"])
def test_refuses_what_is_no_teacher(name, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match=f"no teacher.* {name}"):
        teacher_info(name)


def test_weights_say_which_teacher_it_is(any_teacher):
    (file,) = weight_files(any_teacher)
    assert file.is_file() and file.suffix in (".safetensors", ".pth")
