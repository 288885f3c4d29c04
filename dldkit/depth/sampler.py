"""Which layers run in a training step: a random depth, then a random subset.

Given its size, every subset of independent Bernoulli gates is equally likely. So the
paper's gates and all other policies are one thing: a distribution over the depth.
"""

import math
import random
from typing import Sequence

from dldkit.errors import UserError


class DepthSampler:
    """Draws the layers of one training step; subclasses say how deep steps are."""

    def __init__(self, min_depth: int = 1):
        if min_depth < 1:
            raise UserError(
                f"min_depth {min_depth} is impossible: at least 1 layer has to run"
            )
        self.min_depth = min_depth

    def weights(self, num_layers: int) -> list[float]:
        """Return the unnormalised probability of each depth, 1 to `num_layers`."""
        raise NotImplementedError

    def draw(self, layers: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """Draw some of `layers`, in order, never none of them.

        Raises:
            UserError: when `layers` are fewer than `min_depth`.
        """
        depths = range(1, len(layers) + 1)
        weights = [
            w if n >= self.min_depth else 0.0
            for n, w in zip(depths, self.weights(len(layers)))
        ]
        if not any(weights):
            raise UserError(
                f"min_depth {self.min_depth} is impossible with {len(layers)} layers"
            )
        (depth,) = rng.choices(depths, weights)
        return tuple(sorted(rng.sample(list(layers), depth)))


class BernoulliSampler(DepthSampler):
    """Keeps each layer with probability `keep_prob` (DLD, arXiv 2601.16117)."""

    def __init__(self, keep_prob: float = 0.5, min_depth: int = 1):
        super().__init__(min_depth)
        if not 0.0 < keep_prob <= 1.0:
            raise UserError(
                f"keep_prob {keep_prob} is impossible: it is a probability above 0"
            )
        self.keep_prob = keep_prob

    def weights(self, num_layers: int) -> list[float]:
        p = self.keep_prob
        return [
            math.comb(num_layers, n) * p**n * (1 - p) ** (num_layers - n)
            for n in range(1, num_layers + 1)
        ]


class UniformSampler(DepthSampler):
    """Draws every depth from `min_depth` up equally often."""

    def weights(self, num_layers: int) -> list[float]:
        return [1.0] * num_layers


class FullSampler(DepthSampler):
    """Runs all layers, always: a static model."""

    def weights(self, num_layers: int) -> list[float]:
        return [0.0] * (num_layers - 1) + [1.0]


def build_sampler(name: str, keep_prob: float, min_depth: int) -> DepthSampler:
    """Build the sampler that a config names.

    Raises:
        UserError: for an unknown name, or options out of range.
    """
    if name == "bernoulli":
        return BernoulliSampler(keep_prob, min_depth)
    if name == "uniform":
        return UniformSampler(min_depth)
    if name == "full":
        return FullSampler(min_depth)
    raise UserError(
        f"unknown depth_sampler {name!r}: choose bernoulli, uniform or full"
    )
