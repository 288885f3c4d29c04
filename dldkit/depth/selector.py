"""Which layers run at inference: a depth, or a list, turned into slots."""

import math
from typing import Optional, Sequence

from dldkit.errors import UserError


def even(depth: int, num_layers: int) -> tuple[int, ...]:
    """Spread `depth` layers evenly, always keeping the first and the last slot."""
    if depth == 1:
        return (0,)
    step = (num_layers - 1) / (depth - 1)
    return tuple(math.floor(i * step + 0.5) for i in range(depth))


def prefix(depth: int, num_layers: int) -> tuple[int, ...]:
    """Keep the first `depth` layers, as early exit does."""
    return tuple(range(depth))


SELECTORS = {"even": even, "prefix": prefix}


def select_layers(
    num_layers: int,
    depth: Optional[int] = None,
    layers: Optional[Sequence[int]] = None,
    selector: str = "even",
) -> tuple[int, ...]:
    """Return the slots to run, in order; all of them when nothing is asked.

    Raises:
        UserError: for a depth or a layer that the encoder does not have.
    """
    if depth is not None and layers is not None:
        raise UserError("give either a depth or a list of layers, not both")
    if layers is not None:
        chosen = tuple(sorted(layers))
        possible = set(range(num_layers))
        if not chosen or len(set(chosen)) < len(chosen) or not possible >= set(chosen):
            raise UserError(
                f"layers {list(layers)} are impossible: name one or more different "
                f"layers of 0 to {num_layers - 1}"
            )
        return chosen
    if depth is None:
        return tuple(range(num_layers))
    if not 1 <= depth <= num_layers:
        raise UserError(
            f"depth {depth} is impossible: the encoder has {num_layers} layers; "
            f"choose 1 to {num_layers}"
        )
    if selector not in SELECTORS:
        raise UserError(
            f"unknown selector {selector!r}: choose {' or '.join(SELECTORS)}"
        )
    return SELECTORS[selector](depth, num_layers)
