"""The depth profile: each depth's layers, and BatchNorm statistics that fit it.

A model trained at random depths gathers running statistics that fit no single depth.
A profile re-estimates them for each depth from audio. It belongs to one checkpoint, and
is kept in a file beside it; the checkpoint stays as it is.
"""

import hashlib
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Optional, Union

import torch

from dldkit.depth.statistics import Statistics
from dldkit.errors import UserError
from dldkit.step import atomic

PathLike = Union[str, Path]


@dataclass
class CalibratedDepth:
    """The layers of one depth, and what is known about them.

    Attributes:
        layers: the slots that run.
        statistics: of their BatchNorms; empty where the checkpoint's own are better.
        selector: which choice of layers this is: `even`, `prefix`; None = another one.
        made_from: data and options of the calibration.
        ctc_loss: on held-back utterances, with the checkpoint's statistics and with the
            estimated ones.
    """

    layers: tuple[int, ...]
    statistics: Statistics
    selector: Optional[str] = None
    made_from: dict[str, Any] = field(default_factory=dict)
    ctc_loss: Optional[tuple[float, float]] = None


class DepthProfile:
    """The calibrated depths of one trained encoder.

    Args:
        depths: what was calibrated, in the order in which it was.
        checkpoint: fingerprint of the encoder's weights the statistics belong to.
    """

    def __init__(self, depths: Iterable[CalibratedDepth], checkpoint: str):
        self.checkpoint = checkpoint
        self.depths = {depth.layers: depth for depth in depths}

    def add(self, depth: CalibratedDepth) -> None:
        """Add a depth, or put a newer calibration of it in its place."""
        self.depths.pop(depth.layers, None)
        self.depths[depth.layers] = depth

    def layers_of(self, depth: int) -> Optional[tuple[int, ...]]:
        """Return the layers that were calibrated last for a depth."""
        found = [layers for layers in self.depths if len(layers) == depth]
        return found[-1] if found else None

    @property
    def statistics(self) -> dict[tuple[int, ...], Statistics]:
        """The statistics of each choice of layers that has some."""
        return {d.layers: d.statistics for d in self.depths.values() if d.statistics}

    def save(self, path: PathLike) -> None:
        """Write the profile; a reader never sees half of it."""
        depths = [asdict(depth) for depth in self.depths.values()]
        with atomic(path) as part:
            torch.save({"checkpoint": self.checkpoint, "depths": depths}, part)

    @classmethod
    def load(cls, path: PathLike) -> "DepthProfile":
        """Read a profile.

        Raises:
            UserError: when there is no profile at `path`.
        """
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            depths = [
                CalibratedDepth(**{**depth, "layers": tuple(depth["layers"])})
                for depth in stored["depths"]
            ]
            return cls(depths, stored["checkpoint"])
        except FileNotFoundError:
            raise UserError(
                f"no depth profile {path}: write it with dldkit.bin.calibrate"
            ) from None
        except Exception as error:
            raise UserError(
                f"{path} is no depth profile ({error}): write it again with "
                "dldkit.bin.calibrate"
            ) from error


def profile_path(checkpoint: PathLike) -> Path:
    """Return where the profile of a checkpoint is kept.

    `valid.loss_ctc.ave.pth` is a link to the file it means today, which gives the name:
    another average beside it has a profile of its own.
    """
    checkpoint = Path(checkpoint)
    if checkpoint.is_symlink():
        target = os.readlink(checkpoint)
        if os.path.basename(target) == target:  # in the same directory
            checkpoint = checkpoint.with_name(target)
    return checkpoint.with_suffix(".profile.pth")


def find_profile(
    checkpoint: PathLike, states: Mapping[str, torch.Tensor]
) -> Optional[Path]:
    """Return the profile beside a checkpoint that was made for its weights.

    It has another name where links became files, as in a copied or packed directory.
    A profile that belongs to other weights is not used; that is logged if nothing fits.

    Args:
        states: the encoder's state dict, as it is in the checkpoint.
    """
    own = profile_path(checkpoint)
    others = sorted(own.parent.glob("*.profile.pth"))
    candidates = [own] if own.is_file() else []
    candidates += [path for path in others if path != own]
    if not candidates:
        return None
    wanted = fingerprint(states)
    for path in candidates:
        if DepthProfile.load(path).checkpoint == wanted:
            return path
    if own in candidates:
        logging.warning(
            f"{candidates[0]} was calibrated for other weights than those of "
            f"{checkpoint}: it is not used. Make one with: python -m "
            f"dldkit.bin.calibrate --asr_model_file {checkpoint} ..."
        )
    return None


def fingerprint(encoder_states: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of an encoder's state dict without the running statistics."""
    digest = hashlib.sha256()
    for name, values in sorted(encoder_states.items()):
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            digest.update(name.encode())
            digest.update(values.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
