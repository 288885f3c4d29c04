"""How a stack of layers grows while it trains: copy maps, schedules, the growth itself.

A copy map says for each position of the deeper stack which position of the shallower
one it copies: (0, 0, 1, 1, 2, 2) clones each of three layers in place. The first copy
of a position is the original, the others are clones.
"""

import itertools
from typing import Callable, Optional, Sequence

import torch

from dldkit.depth.layers import Gates
from dldkit.errors import UserError

CopyMap = tuple[int, ...]


def interleave(start: int, old: int, new: int) -> CopyMap:
    """Clone each layer right after its original (interleaved stacking, 2606.11766).

    [1 2 3] -> [1 1 2 2 3 3] -> [1 1 1 2 2 2 3 3 3]. Each of the first stage's layers
    leads a group of clones, and all groups are equally large. Where a group of g
    layers gets fewer than g clones, its last layers are cloned.

    Args:
        start: depth of the first stage.
        old: depth before growth, a multiple of `start`.
        new: depth after growth.

    Raises:
        UserError: when `new` is no multiple of `start`.
    """
    _refuse_unless(new % start == 0, "interleave", old, new, _multiples(start, old))
    have, want = old // start, new // start
    copies, more = divmod(want, have)
    group = [
        member
        for member in range(have)
        for _ in range(copies + (member >= have - more))
    ]
    return tuple(first + member for first in range(0, old, have) for member in group)


def stack(start: int, old: int, new: int) -> CopyMap:
    """Put the stack on top of itself: [1..L, 1..L] (StackBERT, Gong et al. 2019).

    Where fewer than L layers are added, they are copies of its lowest ones.

    Raises:
        UserError: when `new` is no multiple of `start`.
    """
    _refuse_unless(new % start == 0, "stack", old, new, _multiples(start, old))
    return tuple(position % old for position in range(new))


def gradstack(start: int, old: int, new: int) -> CopyMap:
    """Append a copy of the last `new - old` layers (gradual stacking, 2309.16870).

    Raises:
        UserError: when the stack has fewer layers than are added.
    """
    block = new - old
    _refuse_unless(block <= old, "gradstack", old, new, range(old + 1, 2 * old + 1))
    return (*range(old), *range(old - block, old))


def midas(start: int, old: int, new: int) -> CopyMap:
    """Insert a copy of the middle block of `new - old` layers after it (2409.19044).

    Of an even number of blocks, the lower middle one is taken.

    Raises:
        UserError: when the stack does not divide into blocks of that size.
    """
    block = new - old
    fitting = [old + size for size in range(1, old + 1) if old % size == 0]
    _refuse_unless(new in fitting, "midas", old, new, fitting)
    end = ((old // block - 1) // 2 + 1) * block
    return (*range(end), *range(end - block, old))


COPY_MAPS: dict[str, Callable[[int, int, int], CopyMap]] = {
    "interleave": interleave,
    "stack": stack,
    "gradstack": gradstack,
    "midas": midas,
}


def _multiples(start: int, old: int) -> list[int]:
    return [old + start, old + 2 * start]


def _refuse_unless(
    fits: bool, method: str, old: int, new: int, fitting: Sequence[int]
) -> None:
    if not fits:
        raise UserError(
            f"method {method} can not grow a stack of {old} layers to {new}: "
            f"{' or '.join(map(str, fitting))} would fit"
        )


def copy_maps(method: str, depths: Sequence[int]) -> list[CopyMap]:
    """Return the copy map of each growth between two of `depths`.

    Raises:
        UserError: for an unknown method, or depths that do not grow or do not fit.
    """
    if method not in COPY_MAPS:
        raise UserError(f"unknown method {method!r}: choose {', '.join(COPY_MAPS)}")
    if (
        not depths
        or depths[0] < 1
        or any(a >= b for a, b in itertools.pairwise(depths))
    ):
        raise UserError(f"depths {list(depths)} have to grow, from at least 1 layer")
    return [
        COPY_MAPS[method](depths[0], old, new)
        for old, new in itertools.pairwise(depths)
    ]


def last_copies(method: str, depths: Sequence[int]) -> dict[int, list[int]]:
    """Return where the last copy of each layer of the first stage is, at each depth.

    Args:
        method, depths: as `copy_maps` takes them.

    Returns:
        Positions from 1, one for each layer of the first stage.
    """
    origins = list(range(depths[0]))  # of each position: a layer of the first stage
    found = {depths[0]: [layer + 1 for layer in origins]}
    for copy_map in copy_maps(method, depths):
        origins = [origins[source] for source in copy_map]
        last = {origin: place for place, origin in enumerate(origins, 1)}
        found[len(origins)] = [last[layer] for layer in range(depths[0])]
    return found


def boundaries(
    total_steps: int,
    stages: int,
    schedule: str = "equal",
    alpha: float = 1.0,
    fractions: Optional[Sequence[float]] = None,
) -> list[int]:
    """Return after how many optimiser steps each stage but the first begins.

    Args:
        total_steps: optimiser steps of the whole training.
        schedule: `equal` stages (EQL), `prop` (PROP-alpha: the i-th stage takes a
            share proportional to i ** alpha), or explicit `fractions`.
        fractions: the share of each stage; they sum to 1.

    Raises:
        UserError: for fractions that do not fit, or a stage without a step.
    """
    shares = [float(share) for share in fractions or ()]
    if fractions and schedule != "fractions":
        raise UserError(f"fractions {shares} need schedule: fractions, not {schedule}")
    if schedule == "equal":
        shares = [1.0] * stages
    elif schedule == "prop":
        shares = [float(stage**alpha) for stage in range(1, stages + 1)]
    elif schedule != "fractions":
        raise UserError(
            f"unknown schedule {schedule!r}: choose equal, prop or fractions"
        )
    elif len(shares) != stages or abs(sum(shares) - 1) > 1e-6 or min(shares) <= 0:
        raise UserError(
            f"fractions {shares} do not fit: {stages} numbers above 0 that sum to 1, "
            "one for each of the depths"
        )
    ends = [round(total_steps * s / sum(shares)) for s in itertools.accumulate(shares)]
    if any(a >= b for a, b in itertools.pairwise([0, *ends])):
        raise UserError(
            f"{total_steps} optimiser steps are too few for {stages} stages "
            f"({schedule}): they would end after steps {ends}"
        )
    return ends[:-1]


@torch.no_grad()
def grow(
    layers: Gates,
    copy_map: CopyMap,
    optimizer: torch.optim.Optimizer,
    optimizer_state: str = "copy",
) -> None:
    """Make the first `len(copy_map)` slots run, with weights copied as it says.

    Nothing in the module tree changes: state-dict keys stay as they are.

    Args:
        layers: of which the first slots run so far.
        optimizer: its state follows the weights of the originals.
        optimizer_state: clones `copy` their original's state, or begin at `zero`.
    """
    slots = list(layers.children())
    states = [_clone(layer.state_dict()) for layer in slots]
    moments = [
        {name: _clone(optimizer.state.get(p, {})) for name, p in m.named_parameters()}
        for m in slots
    ]
    for position, source in enumerate(copy_map):
        slots[position].load_state_dict(states[source])
        is_clone = source in copy_map[:position]
        for name, parameter in slots[position].named_parameters():
            moved = moments[source][name]
            if not moved or (is_clone and optimizer_state == "zero"):
                optimizer.state.pop(parameter, None)
            else:
                optimizer.state[parameter] = _clone(moved)
    layers.select(range(len(copy_map)))


def _clone(state: dict) -> dict:
    return {
        key: value.clone() if isinstance(value, torch.Tensor) else value
        for key, value in state.items()
    }
