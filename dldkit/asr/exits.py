"""Exits: outputs of smaller depths that a step passes on its way to a deeper one."""

from collections.abc import Iterable, Sequence
from typing import Optional, Union

import torch

from dldkit.depth.layers import Gates
from dldkit.errors import UserError


class ExitWeights:
    """How much each exit counts in a mean over exits.

    Args:
        weights: `equal` | `rising` = in proportion to its depth | a list: one for each
            of `exits`, and one for the deepest output of a forward.
        exits: the depths that have an exit.

    Raises:
        UserError: for weights that are none, or not as many.
    """

    def __init__(self, weights: Union[str, Sequence[float]], exits: Sequence[int]):
        self.weights, self.exits = weights, exits
        if weights in ("equal", "rising"):
            return
        if isinstance(weights, str):
            raise UserError(
                f"unknown exit_weights {weights!r}: choose equal, rising or a list"
            )
        fits = len(weights) == len(exits) + 1 and all(w >= 0 for w in weights)
        if not fits or not any(weights):
            raise UserError(
                f"exit_weights {list(weights)}: write one from 0 for each of the exits "
                f"{list(exits)}, and one for the deepest output, not all 0"
            )

    def __call__(self, depths: Sequence[int]) -> torch.Tensor:
        """Return weights (Exits,) with the sum 1; the last depth is the deepest."""
        if self.weights == "equal":
            weights = [1.0] * len(depths)
        elif self.weights == "rising":
            weights = [float(depth) for depth in depths]
        else:
            by_depth = dict(zip(self.exits, self.weights))
            weights = [by_depth.get(depth, self.weights[-1]) for depth in depths[:-1]]
            weights.append(self.weights[-1])
        return torch.tensor(weights) / (sum(weights) or 1.0)


class ExitHeads(torch.nn.Linear):
    """CTC's output layer, with one of its own for each exit (arXiv 2309.09546).

    It stands in place of the only one and keeps its names, so that every search finds
    it there: the depth that runs says which of them answers.

    Args:
        head: the output layer of the full depth.
        exits: depths that get an output layer too.
        gates: say how deep the encoder runs.
    """

    def __init__(self, head: torch.nn.Linear, exits: Iterable[int], gates: Gates):
        super().__init__(head.in_features, head.out_features)
        self.exits = torch.nn.ModuleDict(
            {
                str(d): torch.nn.Linear(head.in_features, head.out_features)
                for d in exits
            }
        )
        self.gates = (gates,)  # in a tuple, because it is no part of this module

    def at(self, depth: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of a depth: those of the first exit that is not below."""
        head = self._exit_of(depth)
        return super().forward(hidden) if head is None else head(hidden)

    def in_use(self) -> list[torch.nn.Parameter]:
        """Return the weights of the depth that runs."""
        head = self._exit_of(len(self.gates[0].active))
        return [self.weight, self.bias] if head is None else list(head.parameters())

    def _exit_of(self, depth: int) -> Optional[torch.nn.Module]:
        exit_ = min((d for d in map(int, self.exits) if d >= depth), default=None)
        return None if exit_ is None else self.exits[str(exit_)]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits (Batch, Time, Vocab) of the depth that runs."""
        return self.at(len(self.gates[0].active), hidden)
