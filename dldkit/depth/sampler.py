"""Which layers run in a training step: first how many, then which.

Given its size, every subset of independent Bernoulli gates is equally likely. So the
paper's gates and all other policies are one thing: a distribution over the depth, and a
choice of layers for a depth.
"""

import math
import random
from typing import Mapping, Sequence, Union

from dldkit.depth.selector import SELECTORS
from dldkit.errors import UserError

LAYER_CHOICES = ("random", *SELECTORS)


class DepthSampler:
    """Draws the layers of training steps; subclasses say how deep steps are.

    Args:
        min_depth: fewest layers of a step.
        layer_choice: `random` = any subset of that size (DLD, arXiv 2601.16117), else
            the layers that a selector means at inference: `even` | `prefix`.

    Attributes:
        full_depth_share: of the epochs, the first ones, whose steps run all layers.

    Raises:
        UserError: for an option out of its range.
    """

    is_full = False
    full_depth_share = 0.0

    def __init__(self, min_depth: int = 1, layer_choice: str = "random"):
        if min_depth < 1:
            raise UserError(
                f"min_depth {min_depth} is impossible: at least 1 layer has to run"
            )
        if layer_choice not in LAYER_CHOICES:
            raise UserError(
                f"unknown layer_choice {layer_choice!r}: choose one of "
                f"{', '.join(LAYER_CHOICES)}"
            )
        self.min_depth = min_depth
        self.layer_choice = layer_choice

    def weights(self, num_layers: int) -> list[float]:
        """Return the unnormalised probability of each depth, 1 to `num_layers`."""
        raise NotImplementedError

    def check(self, num_layers: int) -> None:
        """Refuse options that do not fit an encoder of so many layers.

        Raises:
            UserError: naming the option.
        """
        self.draw(range(num_layers), random.Random(0))

    def draw(self, layers: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """Draw some of `layers`, in order, never none of them.

        Raises:
            UserError: when `layers` are fewer than `min_depth`.
        """
        weights = self.weight_of_each_depth(len(layers))
        (depth,) = rng.choices(list(weights), list(weights.values()))
        return self.choose(layers, depth, rng)

    def smallest(self, num_layers: int) -> int:
        """Return the smallest depth that may be drawn."""
        return min(
            depth for depth, w in self.weight_of_each_depth(num_layers).items() if w
        )

    def weight_of_each_depth(self, num_layers: int) -> dict[int, float]:
        """Return the unnormalised probability of each depth, from `min_depth` up.

        Raises:
            UserError: when no depth is left.
        """
        depths = range(1, num_layers + 1)
        weights = {
            depth: weight if depth >= self.min_depth else 0.0
            for depth, weight in zip(depths, self.weights(num_layers))
        }
        if not any(weights.values()):
            raise UserError(
                f"min_depth {self.min_depth} is impossible with {num_layers} layers: "
                "no depth is left to draw, of those that depth_sampler allows"
            )
        return weights

    def share_of_each_depth(self, num_layers: int) -> dict[int, float]:
        """Return the share of a whole training's steps that run each depth."""
        weights = self.weight_of_each_depth(num_layers)
        first, total = self.full_depth_share, sum(weights.values())
        shares = {depth: (1 - first) * w / total for depth, w in weights.items()}
        shares[num_layers] += first
        return shares

    def choose(
        self, layers: Sequence[int], depth: int, rng: random.Random
    ) -> tuple[int, ...]:
        """Return the layers that a depth means, drawn where they are random."""
        if self.layer_choice == "random":
            return tuple(sorted(rng.sample(list(layers), depth)))
        chosen = SELECTORS[self.layer_choice](depth, len(layers))
        return tuple(layers[place] for place in chosen)


class BernoulliSampler(DepthSampler):
    """Keeps each layer with probability `keep_prob` (DLD, arXiv 2601.16117)."""

    def __init__(
        self, keep_prob: float = 0.5, min_depth: int = 1, layer_choice: str = "random"
    ):
        super().__init__(min_depth, layer_choice)
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
    """Runs all layers, always: a static model, or early exit."""

    is_full = True

    def weights(self, num_layers: int) -> list[float]:
        return [0.0] * (num_layers - 1) + [1.0]


class WeightedSampler(DepthSampler):
    """Draws each depth as often as its weight says; a depth without one, never."""

    def __init__(
        self,
        weight_of_depth: Mapping[int, float],
        min_depth: int = 1,
        layer_choice: str = "random",
    ):
        super().__init__(min_depth, layer_choice)
        self.weight_of_depth = dict(weight_of_depth)
        if not self.weight_of_depth or not all(
            isinstance(depth, int) and depth >= 1 and weight >= 0
            for depth, weight in weight_of_depth.items()
        ):
            raise UserError(
                f"depth_sampler {self.weight_of_depth} is impossible: write depths "
                "from 1 and weights from 0, such as {12: 2, 6: 1, 2: 1}"
            )

    def check(self, num_layers: int) -> None:
        if max(self.weight_of_depth) > num_layers:
            raise UserError(
                f"depth_sampler {self.weight_of_depth} has a depth above the "
                f"{num_layers} layers that there are"
            )
        super().check(num_layers)

    def weights(self, num_layers: int) -> list[float]:
        return [self.weight_of_depth.get(n, 0.0) for n in range(1, num_layers + 1)]


class ExitSampler(DepthSampler):
    """Draws the depths that have an exit, and the full one, equally often.

    Raises:
        UserError: when there are no exits.
    """

    def __init__(
        self,
        exits: Union[int, Sequence[int], None],
        min_depth: int = 1,
        layer_choice: str = "prefix",
    ):
        super().__init__(min_depth, layer_choice)
        if not exits:
            raise UserError(
                "depth_sampler: exits draws depths that have one: set exits"
            )
        self.exits = exits

    def weights(self, num_layers: int) -> list[float]:
        exits = self.exits
        if isinstance(exits, int):
            exits = range(exits, num_layers, exits)
        drawn = {*exits, num_layers}
        return [float(depth in drawn) for depth in range(1, num_layers + 1)]


def build_sampler(
    name: Union[str, Mapping[int, float]],
    keep_prob: float = 0.5,
    min_depth: int = 1,
    layer_choice: str = "random",
    exits: Union[int, Sequence[int], None] = (),
    full_depth_share: float = 0.0,
) -> DepthSampler:
    """Build the sampler that a config names, or whose weights it gives by depth.

    Args:
        exits: depths, or a number that stands for every so many layers.
        full_depth_share: of the epochs, the first ones, whose steps run all layers.

    Raises:
        UserError: for an unknown name, or options out of range.
    """
    sampler = _sampler_of(name, keep_prob, min_depth, layer_choice, exits)
    if not 0.0 <= full_depth_share < 1.0:
        raise UserError(
            f"full_depth_share {full_depth_share} is impossible: it is a share of the "
            "epochs, from 0 to below 1"
        )
    if full_depth_share and sampler.is_full:
        raise UserError(
            "full_depth_share is for a depth_sampler that draws depths afterwards, and "
            "full draws none: remove one of them"
        )
    sampler.full_depth_share = full_depth_share
    return sampler


def _sampler_of(
    name: Union[str, Mapping[int, float]],
    keep_prob: float,
    min_depth: int,
    layer_choice: str,
    exits: Union[int, Sequence[int], None],
) -> DepthSampler:
    if isinstance(name, Mapping):
        return WeightedSampler(name, min_depth, layer_choice)
    if name == "bernoulli":
        return BernoulliSampler(keep_prob, min_depth, layer_choice)
    if name == "uniform":
        return UniformSampler(min_depth, layer_choice)
    if name == "full":
        return FullSampler(min_depth, layer_choice)
    if name == "exits":
        return ExitSampler(exits, min_depth, layer_choice)
    raise UserError(
        f"unknown depth_sampler {name!r}: choose bernoulli, uniform, exits or full, or "
        "give each depth a weight, as {12: 2, 6: 1, 2: 1}"
    )
