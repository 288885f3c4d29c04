"""Which layers run in a training step: first how many, then which.

Given its size, every subset of independent Bernoulli gates is equally likely. So the
paper's gates and all other policies are one thing: a distribution over the depth, and a
choice of layers for a depth.
"""

import math
import random
from typing import Mapping, Sequence, Union

from dldkit.depth.exits import depths_of_exits, listed
from dldkit.depth.selector import SELECTORS
from dldkit.errors import UserError

NAMES = ("bernoulli", "uniform", "exits", "full")
LAYER_CHOICES = ("random", *SELECTORS)


class DepthSampler:
    """Draws the layers of training steps; its options are those of `encoder_conf`.

    Args:
        depth_sampler: how many layers run: `bernoulli` = each with probability
            `keep_prob` (DLD, arXiv 2601.16117) | `uniform`, every depth equally often |
            `exits`, the depths that have one and the full one, equally often | `full` =
            all, always: a static model, or early exit | a weight for each depth.
        keep_prob: probability of keeping a layer, for `bernoulli`.
        min_depth: fewest layers of a step.
        layer_choice: which they are: `random` = any subset of that size (DLD), else the
            layers that a selector means at inference: `even` | `prefix`.
        exits: depths, or a number that stands for every so many layers.

    Raises:
        UserError: for an unknown name, or an option out of its range.
    """

    def __init__(
        self,
        depth_sampler: Union[str, Mapping[int, float]],
        keep_prob: float = 0.5,
        min_depth: int = 1,
        layer_choice: str = "random",
        exits: Union[int, Sequence[int], None] = (),
    ):
        self.depth_sampler = depth_sampler
        self.keep_prob = keep_prob
        self.min_depth = min_depth
        self.layer_choice = layer_choice
        self.exits = exits
        self._refuse_impossible_options()

    def _refuse_impossible_options(self) -> None:
        if isinstance(self.depth_sampler, Mapping):
            _refuse_impossible_weights(self.depth_sampler)
        elif self.depth_sampler not in NAMES:
            raise UserError(
                f"unknown depth_sampler {self.depth_sampler!r}: choose bernoulli, "
                "uniform, exits or full, or give each depth a weight, as "
                "{12: 2, 6: 1, 2: 1}"
            )
        if not 0.0 < self.keep_prob <= 1.0:
            raise UserError(
                f"keep_prob {self.keep_prob} is impossible: it is a probability above 0"
            )
        if self.min_depth < 1:
            raise UserError(
                f"min_depth {self.min_depth} is impossible: at least 1 layer has to run"
            )
        if self.layer_choice not in LAYER_CHOICES:
            raise UserError(
                f"unknown layer_choice {self.layer_choice!r}: choose one of "
                f"{', '.join(LAYER_CHOICES)}"
            )
        if self.depth_sampler == "exits" and not self.exits:
            raise UserError(
                "depth_sampler: exits draws depths that have one: set exits"
            )

    @property
    def is_full(self) -> bool:
        """Whether all layers run, always."""
        return self.depth_sampler == "full"

    @property
    def selector(self) -> str:
        """Which layers a depth means at inference."""
        return self.layer_choice if self.layer_choice in SELECTORS else "even"

    def check(self, num_layers: int) -> None:
        """Refuse options that do not fit an encoder of so many layers.

        Raises:
            UserError: naming the option.
        """
        self.exits_of(num_layers)
        weights = self.depth_sampler
        if isinstance(weights, Mapping) and max(weights) > num_layers:
            raise UserError(
                f"depth_sampler {dict(weights)} has a depth above the {num_layers} "
                "layers that there are"
            )
        self.weight_of_each_depth(num_layers)

    def draw(self, layers: Sequence[int], rng: random.Random) -> tuple[int, ...]:
        """Draw some of `layers`, in order, never none of them.

        Raises:
            UserError: when `layers` are fewer than `min_depth`.
        """
        weights = self.weight_of_each_depth(len(layers))
        (depth,) = rng.choices(list(weights), list(weights.values()))
        return self.choose(layers, depth, rng)

    def choose(
        self, layers: Sequence[int], depth: int, rng: random.Random
    ) -> tuple[int, ...]:
        """Return the layers that a depth means, drawn where they are random."""
        if self.layer_choice == "random":
            return tuple(sorted(rng.sample(list(layers), depth)))
        chosen = SELECTORS[self.layer_choice](depth, len(layers))
        return tuple(layers[place] for place in chosen)

    def smallest(self, num_layers: int) -> int:
        """Return the smallest depth that may be drawn."""
        return min(
            depth for depth, w in self.weight_of_each_depth(num_layers).items() if w
        )

    def exits_of(self, num_layers: int) -> list[int]:
        """Return the depths of the exits below the last layer, in order.

        Raises:
            UserError: for an exit that does not exist, or exits that mean no depth.
        """
        return depths_of_exits(self.exits, num_layers, self.layer_choice)

    def trains(self, depth: int, num_layers: int) -> bool:
        """Say whether a model is trained at a depth: it is drawn, or has an exit.

        Without exits, all depths count: random and even layers were parts of others.
        """
        exits = self.exits_of(num_layers)
        if not exits or depth in (*exits, num_layers):
            return True
        return self.weight_of_each_depth(num_layers)[depth] > 0

    def weight_of_each_depth(self, num_layers: int) -> dict[int, float]:
        """Return the unnormalised probability of each depth, from 1 layer to all.

        Raises:
            UserError: when no depth is left.
        """
        weights = {
            depth: weight if depth >= self.min_depth else 0.0
            for depth, weight in enumerate(self._weights(num_layers), start=1)
        }
        if not any(weights.values()):
            raise UserError(
                f"min_depth {self.min_depth} is impossible with {num_layers} layers: "
                "no depth is left to draw, of those that depth_sampler allows"
            )
        return weights

    def _weights(self, num_layers: int) -> list[float]:
        """Return the weight of each depth, 1 to `num_layers`, whatever `min_depth`."""
        depths, keep = range(1, num_layers + 1), self.keep_prob
        match self.depth_sampler:
            case "bernoulli":
                return [
                    math.comb(num_layers, n) * keep**n * (1 - keep) ** (num_layers - n)
                    for n in depths
                ]
            case "uniform":
                return [1.0] * num_layers
            case "full":
                drawn = {num_layers: 1.0}
            case "exits":
                exits = listed(self.exits, num_layers)  # fewer layers may be selected
                drawn = dict.fromkeys([*exits, num_layers], 1.0)
            case weight_of_depth:
                drawn = weight_of_depth
        return [drawn.get(n, 0.0) for n in depths]


def _refuse_impossible_weights(weight_of_depth: Mapping[int, float]) -> None:
    if not weight_of_depth or not all(
        isinstance(depth, int) and depth >= 1 and weight >= 0
        for depth, weight in weight_of_depth.items()
    ):
        raise UserError(
            f"depth_sampler {dict(weight_of_depth)} is impossible: write depths "
            "from 1 and weights from 0, such as {12: 2, 6: 1, 2: 1}"
        )
