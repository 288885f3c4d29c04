"""The depth profile: each depth's layers, and BatchNorm statistics that fit it.

A model trained at random depths gathers running statistics that fit no single depth.
A profile re-estimates them for each depth from unlabelled audio and is kept in a file
beside the checkpoint, which stays as it is.
"""

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping, Optional, Sequence, Union

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from dldkit.errors import UserError

Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""(mean, variance) of each BatchNorm, by its name in the encoder."""


@dataclass
class CalibratedDepth:
    """The layers of one depth, and their BatchNorm statistics."""

    layers: tuple[int, ...]
    statistics: Statistics


class DepthProfile:
    """The calibrated depths of one trained encoder.

    Args:
        depths: what to run at each depth.
        checkpoint: fingerprint of the encoder's weights the statistics belong to.
    """

    def __init__(self, depths: Mapping[int, CalibratedDepth], checkpoint: str):
        self.depths = dict(depths)
        self.checkpoint = checkpoint
        self._trained: Statistics = {}

    def save(self, path: Union[str, Path]) -> None:
        """Write the profile; a reader never sees half of it."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        torch.save(
            {
                "checkpoint": self.checkpoint,
                "depths": {
                    depth: {"layers": list(d.layers), "statistics": d.statistics}
                    for depth, d in self.depths.items()
                },
            },
            partial,
        )
        partial.replace(path)

    @classmethod
    def load(cls, path: Union[str, Path]) -> "DepthProfile":
        """Read a profile.

        Raises:
            UserError: when there is no profile at `path`.
        """
        try:
            stored = torch.load(path, map_location="cpu", weights_only=True)
            depths = {
                depth: CalibratedDepth(tuple(d["layers"]), d["statistics"])
                for depth, d in stored["depths"].items()
            }
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

    def attach(self, encoder: torch.nn.Module) -> None:
        """Remember the statistics of `encoder` itself, to restore them."""
        self._trained = {
            name: (norm.running_mean.clone(), norm.running_var.clone())
            for name, norm in batch_norms(encoder).items()
        }

    def apply(self, encoder: torch.nn.Module, layers: Optional[Sequence[int]]) -> None:
        """Put the statistics for `layers` into the attached encoder.

        Those of the checkpoint are put back first: they serve every layer, or choice
        of layers (None among them), that was not calibrated.
        """
        statistics = dict(self._trained)
        for calibrated in self.depths.values():
            if layers is not None and calibrated.layers == tuple(layers):
                statistics.update(calibrated.statistics)
        norms = batch_norms(encoder)
        for name, (mean, variance) in statistics.items():
            norms[name].running_mean.copy_(mean)
            norms[name].running_var.copy_(variance)


def batch_norms(encoder: torch.nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms of `encoder` that keep running statistics, by name."""
    return {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def fingerprint(encoder_states: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of an encoder's state dict without the running statistics."""
    digest = hashlib.sha256()
    for name, values in sorted(encoder_states.items()):
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            digest.update(name.encode())
            digest.update(values.cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def calibrate(
    encoder: torch.nn.Module,
    layers: Sequence[int],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> CalibratedDepth:
    """Estimate the BatchNorm statistics of `encoder` when just `layers` run.

    Each batch is normalised by its own statistics, as in training; means and
    variances are accumulated over all frames in float64.

    Args:
        encoder: a `DynamicDepth` encoder; it is left at `layers`, otherwise unchanged.
        batches: unpadded batches: padded frames would enter the statistics.
        forward: runs the encoder on one batch.
    """
    encoder.set_depth(layers=layers)
    was_training = encoder.training
    encoder.eval()
    moments = {name: _Moments(norm) for name, norm in batch_norms(encoder).items()}
    with _batch_statistics(moments.values()):
        for batch in batches:
            forward(batch)
    encoder.train(was_training)
    return CalibratedDepth(
        tuple(layers),
        {name: m.statistics() for name, m in moments.items() if m.count > 0},
    )


class _Moments:
    """Sums over all frames that enter one BatchNorm, as (Batch, Channel, Time)."""

    def __init__(self, norm: _BatchNorm):
        self.norm = norm
        self.count = 0
        self.sum = torch.zeros(norm.num_features, dtype=torch.float64)
        self.square_sum = torch.zeros(norm.num_features, dtype=torch.float64)

    def __call__(self, norm: _BatchNorm, inputs: tuple[torch.Tensor]) -> None:
        frames = inputs[0].transpose(0, 1).flatten(1).double()
        self.count += frames.size(1)
        self.sum += frames.sum(1).cpu()
        self.square_sum += frames.square().sum(1).cpu()

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.sum / self.count
        # unbiased, as BatchNorm's own running variance
        variance = (self.square_sum - self.count * mean**2) / max(self.count - 1, 1)
        return mean.float(), variance.clamp(min=0.0).float()


@contextmanager
def _batch_statistics(all_moments: Iterable[_Moments]):
    """Normalise by batch statistics and leave the running ones alone."""
    handles = []
    for moments in all_moments:
        handles.append(moments.norm.register_forward_pre_hook(moments))
        moments.norm.track_running_stats = False
        moments.norm.training = True
    try:
        yield
    finally:
        for handle, moments in zip(handles, all_moments):
            handle.remove()
            moments.norm.track_running_stats = True
            moments.norm.training = False
