"""Cached targets: hidden states that were written to the disk once."""

from functools import cached_property
from pathlib import Path
from typing import Any, Optional, Sequence, Union

import torch
import transformers
import yaml

from dldkit.data.frames import collected_from
from dldkit.errors import UserError
from dldkit.random_state import untouched_random_numbers
from dldkit.sfm.data import TARGETS
from dldkit.sfm.pretrained import load_pretrained
from dldkit.sfm.teacher.protocol import PathLike, Targets, TeacherInfo

TARGETS_DESCRIPTION = "teacher.yaml"
CNN = "cnn"  # a directory of Hugging Face, see WaveTeacher.save_cnn


def is_cached(path: PathLike) -> bool:
    """Say whether `path` is a directory of cached targets."""
    return (Path(path) / TARGETS_DESCRIPTION).is_file()


class CachedTeacher:
    """Hidden states that `dldkit.bin.sfm_collect_targets` wrote, and ESPnet reads."""

    def __init__(
        self,
        path: PathLike,
        info: TeacherInfo,
        layers: list[int],
        device: Union[str, torch.device],
    ):
        lacking = sorted(set(layers) - set(info.layers))
        if lacking:
            raise UserError(
                f"{path} holds the targets of the layers {info.layers}, not of "
                f"{lacking}: collect them again with all that you want"
            )
        self.path, self.info, self.layers = path, info, layers
        self.device = device
        self.made_by = _read_description(path)["teacher"]
        self.columns = [info.layers.index(layer) for layer in layers]

    @cached_property
    def model(self) -> Optional[torch.nn.Module]:
        """Of the teacher, its CNN alone, if it has one on waveforms."""
        path = Path(self.path) / CNN
        if not path.is_dir():
            return None
        with untouched_random_numbers():
            model = load_pretrained(transformers.AutoModel, path, "teacher's CNN")
        return model.requires_grad_(False).eval().to(self.device)

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read teacher.yaml."""
        description = _read_description(path)
        del description["teacher"]
        return TeacherInfo(**description)

    @staticmethod
    def weight_files(path: PathLike) -> list[Path]:
        """Return the note of what was collected."""
        return [collected_from(Path(path), TARGETS)]

    def __call__(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]] = None,
        targets: Optional[torch.Tensor] = None,
        targets_lengths: Optional[torch.Tensor] = None,
    ) -> Targets:
        """Return what `Teacher` promises.

        Args:
            targets: what was cached for the batch (Batch, Time, Layers, Dim).
            targets_lengths: (Batch,).
        """
        if targets is None:
            raise UserError(
                f"the batch has no targets of {self.path}: only training reads them"
            )
        states = [targets[:, :, column] for column in self.columns]
        return states, targets_lengths.cpu()


def _read_description(path: PathLike) -> dict[str, Any]:
    file = Path(path) / TARGETS_DESCRIPTION
    return yaml.safe_load(file.read_text(encoding="utf-8"))
