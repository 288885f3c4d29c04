"""What every family of teachers can do."""

from dataclasses import dataclass
from pathlib import Path
from typing import Optional, Protocol, Sequence, Union

import torch

PathLike = Union[str, Path]
Targets = tuple[list[torch.Tensor], torch.Tensor]


@dataclass
class TeacherInfo:
    """What the student must know of a teacher.

    Args:
        hidden_size: dimension of its hidden states.
        num_layers: N. Layer 0 is what enters the first block, 1 to N - 1 are the
            blocks' outputs, and N is the model's output, after its final LayerNorm if
            it has one.
        sampling_rate: in Hz.
        normalize: it takes waveforms of zero mean and unit variance.
        layers: those that a directory of cached targets holds; None for a model.
    """

    hidden_size: int
    num_layers: int
    sampling_rate: int
    normalize: bool
    layers: Optional[list[int]] = None


class Teacher(Protocol):
    """A source of hidden states.

    Args:
        path: see `dldkit.sfm.teacher.opening.teacher_info`.
        info: its description.
        layers: which hidden states it gives.
        device: where its model runs, if it has one.

    Raises:
        UserError: when it can not be loaded, or lacks one of the layers.
    """

    info: TeacherInfo
    layers: list[int]

    def __init__(
        self,
        path: PathLike,
        info: TeacherInfo,
        layers: list[int],
        device: Union[str, torch.device],
    ): ...

    @staticmethod
    def describe(path: PathLike) -> TeacherInfo:
        """Read the description, without the weights.

        Raises:
            UserError: when there is no such teacher.
        """

    @staticmethod
    def weight_files(path: PathLike) -> list[Path]:
        """Return the files whose content says which teacher it is; none on the Hub."""

    def __call__(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]] = None,
        **known: torch.Tensor,
    ) -> Targets:
        """Return float32 (Batch, Time, Dim) for each layer, and valid frames (Batch,).

        Args:
            speech: (Batch, Samples), as it was recorded: the teacher normalises it. Or
                what its CNN makes of that (Batch, Time, Channels), where it has one.
            speech_lengths: (Batch,), best on the CPU, where the valid frames are.
            utt_ids: the utterances' names, for messages.
            known: what a family need not compute, see there.

        Raises:
            UserError: for speech that the teacher can not take.
        """
