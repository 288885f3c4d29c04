"""What the families share that run a frozen model."""

from abc import ABC, abstractmethod
from typing import Optional, Sequence, Union

import torch

from dldkit.errors import UserError
from dldkit.sfm.teacher.protocol import PathLike, Targets, TeacherInfo


class LiveTeacher(ABC):
    """Forward of a frozen model, up to the deepest layer that is asked for.

    It computes in float32, or as the autocast says that it is called in.
    """

    def __init__(
        self,
        path: PathLike,
        info: TeacherInfo,
        layers: list[int],
        device: Union[str, torch.device],
    ):
        self.path, self.info, self.layers = path, info, layers
        # in eval mode dropout, LayerDrop and SpecAugment are off
        self.model = self.load(path).requires_grad_(False).eval().to(device)

    @abstractmethod
    def load(self, path: PathLike) -> torch.nn.Module:
        """Build the model, without the blocks that are not needed: see `truncate`.

        Raises:
            UserError: when it can not be loaded.
        """

    @abstractmethod
    def forward(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]],
    ) -> Targets:
        """Return the hidden states (Batch, Time, Dim) of all layers, and valid frames.

        The arguments are those of the call; `speech_lengths` is on the CPU.

        Raises:
            UserError: for speech that the model can not take.
        """

    @torch.no_grad()
    def __call__(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        utt_ids: Optional[Sequence[str]] = None,
    ) -> Targets:
        """Return what `Teacher` promises."""
        if next(self.model.parameters()).device != speech.device:
            self.model.to(speech.device)
        lengths = speech_lengths.cpu()  # where they are in training already
        states, lengths = self.forward(speech, lengths, utt_ids)
        longest = int(lengths.max())
        return [states[layer][:, :longest].float() for layer in self.layers], lengths

    def truncate(
        self,
        encoder: torch.nn.Module,
        blocks: torch.nn.ModuleList,
        final_norm: Optional[str],
    ) -> None:
        """Delete the blocks above the deepest layer, and the norm that follows them."""
        deepest = max(self.layers)
        if deepest < self.info.num_layers:
            del blocks[max(deepest, 1) :]
            if final_norm is not None:
                setattr(encoder, final_norm, torch.nn.Identity())

    def refuse(
        self, utt_ids: Optional[Sequence[str]], place: int, samples: int, why: str
    ) -> None:
        """Raise a UserError that names an utterance of the batch."""
        name = f"number {place} of a batch" if utt_ids is None else utt_ids[place]
        raise UserError(
            f"utterance {name} has {samples} samples: {why} for the teacher {self.path}"
        )
