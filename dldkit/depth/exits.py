"""Exits: depths below the full one whose output is trained as well."""

from collections.abc import Sequence
from typing import Union

from dldkit.errors import UserError


def listed(exits: Union[int, Sequence[int], None], num_layers: int) -> Sequence[int]:
    """Return the depths that an option names: a number stands for every so many."""
    if isinstance(exits, int):
        return range(exits, num_layers, exits)
    return exits or ()


def depths_of_exits(
    exits: Union[int, Sequence[int], None], num_layers: int, layer_choice: str
) -> list[int]:
    """Return the depths of the exits below the last layer, in order.

    Args:
        exits: the depths; a number stands for every so many layers; None = no exit.
        layer_choice: which layers a drawn depth means, see `DepthSampler`.

    Raises:
        UserError: for an exit that does not exist, or exits that mean no depth.
    """
    is_number = isinstance(exits, int) and exits >= 1
    if not (exits is None or is_number or isinstance(exits, Sequence)):
        raise UserError(f"exits: {exits}: write a number above 0, or depths")
    exits = listed(exits, num_layers)
    for depth in exits:
        if not isinstance(depth, int) or not 1 <= depth < num_layers:
            raise UserError(
                f"exits {list(exits)}: {depth!r} is no depth below the {num_layers} "
                "layers that there are"
            )
    if exits and layer_choice != "prefix":
        raise UserError(
            f"exits {list(exits)} with layer_choice: {layer_choice}: what layer n "
            "gives is the output of depth n just where a depth means the first layers; "
            "set layer_choice: prefix"
        )
    return sorted(set(exits))
