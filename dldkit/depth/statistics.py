"""BatchNorm statistics of one choice of layers: estimated, and used where it runs."""

from contextlib import contextmanager
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch.nn.modules.batchnorm import _BatchNorm

Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]
"""(mean, variance) of each BatchNorm, by its name in the encoder."""


def batch_norms(encoder: torch.nn.Module) -> dict[str, _BatchNorm]:
    """Return the BatchNorms of `encoder` that keep running statistics, by name."""
    return {
        name: module
        for name, module in encoder.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


@torch.no_grad()
def estimate(
    encoder: torch.nn.Module,
    layers: Sequence[int],
    batches: Iterable[Any],
    forward: Callable[[Any], Any],
) -> Statistics:
    """Estimate the BatchNorm statistics of `encoder` when just `layers` run.

    Each batch is normalised by its own statistics, as in training; means and
    variances are accumulated over all frames in float64.

    Args:
        encoder: a `DynamicDepth` encoder; it stays as it is.
        batches: unpadded batches: padded frames would enter the statistics.
        forward: runs the encoder on one batch.
    """
    was_training = encoder.training
    encoder.eval()
    moments = {name: _Moments(norm) for name, norm in batch_norms(encoder).items()}
    with encoder.running(layers), _batch_statistics(moments.values()):
        for batch in batches:
            forward(batch)
    encoder.train(was_training)
    return {name: m.statistics() for name, m in moments.items() if m.count > 0}


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


@contextmanager
def running_statistics_kept(encoder: torch.nn.Module) -> Iterator[None]:
    """Let forwards in training leave the running statistics as they are."""
    norms = list(batch_norms(encoder).values())
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta):
            norm.momentum = momentum


def use_statistics(
    encoder: torch.nn.Module,
    gates: torch.nn.Module,
    choices: Mapping[tuple[int, ...], Statistics],
) -> None:
    """Let each BatchNorm of `encoder` follow the layers that run.

    Weights, buffers and their names stay as they are, so that the checkpoint's own
    statistics serve every choice of layers that is not among `choices`.

    Args:
        gates: says which layers run.
        choices: statistics by the layers that they belong to; {} = the checkpoint's.
    """
    for name, norm in batch_norms(encoder).items():
        # An object changes its class, as in torch.nn.utils.parametrize: a new module
        # would not be known to whoever holds this one.
        norm.__class__ = CalibratedBatchNorm
        own = (norm.running_mean, norm.running_var)
        rows = [choices[layers].get(name, own) for layers in choices]
        norm.rows = {layers: row for row, layers in enumerate(choices)}
        norm.gates = (gates,)  # in a tuple, because it is no part of this module
        for buffer, place in (("means", 0), ("variances", 1)):
            values = [row[place].to(own[place]) for row in rows]
            values = torch.stack(values) if values else None
            norm.register_buffer(buffer, values, persistent=False)


class CalibratedBatchNorm(_BatchNorm):
    """A BatchNorm with statistics of its own for each choice of layers."""

    rows: dict[tuple[int, ...], int]

    def _check_input_dim(self, input: torch.Tensor) -> None:
        """Accept what the BatchNorm that it was accepts."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (Batch, Channel, Time)."""
        row = None if self.training else self.rows.get(self.gates[0].active)
        if row is None:
            return super().forward(input)
        return torch.nn.functional.batch_norm(
            input,
            self.means[row],
            self.variances[row],
            self.weight,
            self.bias,
            eps=self.eps,
        )
