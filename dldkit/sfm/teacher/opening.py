"""Find the family of a teacher, describe it and open it."""

from pathlib import Path
from typing import Sequence, Union

import torch

from dldkit.errors import UserError
from dldkit.random_state import untouched_random_numbers
from dldkit.sfm.teacher import hub
from dldkit.sfm.teacher.cached import TARGETS_DESCRIPTION, CachedTeacher, is_cached
from dldkit.sfm.teacher.espnet import ESPnetTeacher
from dldkit.sfm.teacher.protocol import PathLike, Teacher, TeacherInfo
from dldkit.sfm.teacher.wave import WaveTeacher
from dldkit.sfm.teacher.whisper import WhisperTeacher


def teacher_info(path: PathLike) -> TeacherInfo:
    """Describe a teacher by its configuration, without reading its weights.

    Args:
        path: name or directory of a Hugging Face model; experiment directory,
            checkpoint or packed zip of an ESPnet SSL model; or a directory of targets
            that `dldkit.bin.sfm_collect_targets` wrote.

    Raises:
        UserError: when there is no such teacher.
    """
    return _family(path).describe(path)


def weight_files(path: PathLike) -> list[Path]:
    """Return the files whose content says which teacher it is; none on the Hub.

    Raises:
        UserError: when there is no such teacher.
    """
    return _family(path).weight_files(path)


def open_teacher(
    path: PathLike,
    layers: Sequence[int],
    device: Union[str, torch.device] = "cpu",
) -> Teacher:
    """Open a teacher that gives the hidden states of `layers`.

    Args:
        path: see `teacher_info`.
        layers: see `TeacherInfo`; what lies above the deepest one is not computed.

    Raises:
        UserError: when it can not be loaded, or lacks one of the layers.
    """
    family, layers = _family(path), list(layers)
    info = family.describe(path)
    wrong = [layer for layer in layers if not 0 <= layer <= info.num_layers]
    if wrong or not layers:
        raise UserError(
            f"the teacher {path} has the layers 0 (input) to {info.num_layers} "
            f"(output): choose among them, not {layers}"
        )
    with untouched_random_numbers():
        return family(path, info, layers, device)


def _family(path: PathLike) -> type[Teacher]:
    directory = Path(path)
    if is_cached(path):
        return CachedTeacher
    if directory.is_file() or (directory / "config.yaml").is_file():
        return ESPnetTeacher
    if directory.is_dir() and not (directory / "config.json").is_file():
        raise UserError(
            f"no teacher in {path}: it has neither config.json (Hugging Face), nor "
            f"config.yaml (ESPnet SSL), nor {TARGETS_DESCRIPTION} (cached targets)"
        )
    is_whisper = hub.read_config(path).model_type == "whisper"
    return WhisperTeacher if is_whisper else WaveTeacher
