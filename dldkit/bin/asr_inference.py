#!/usr/bin/env python3
"""Decode speech at a chosen depth: espnet2.bin.asr_inference with depth options."""

import re
import sys

from espnet2.bin.asr_inference import get_parser as get_espnet_parser
from espnet2.utils.types import str_or_none

from dldkit.asr.inference import Speech2Text, inference
from dldkit.depth.selector import SELECTORS
from dldkit.errors import report_user_errors

__all__ = ["Speech2Text", "get_parser", "main"]


def layer_list(text: str) -> list[int]:
    """Parse `0,3,7`."""
    return [int(layer) for layer in text.split(",")]


def get_parser():
    """Return ESPnet's parser with the depth options; greedy search is the default."""
    parser = get_espnet_parser()
    for action in parser._actions:  # ESPnet's help has a bare % that stops --help
        action.help = action.help and re.sub(r"%(?![(%])", "%%", action.help)
    group = parser.add_argument_group("Depth related")
    depth = group.add_mutually_exclusive_group()
    depth.add_argument("--depth", type=int, help="Number of encoder layers to run")
    depth.add_argument("--layers", type=layer_list, help="Layers to run, as 0,3,7")
    group.add_argument(
        "--selector",
        choices=list(SELECTORS),
        help="Which layers a depth means; default: as the model was trained",
    )
    group.add_argument(
        "--depth_profile",
        type=str_or_none,
        default="auto",
        help="File of dldkit.bin.calibrate; auto = that of the checkpoint; none",
    )
    parser.set_defaults(beam_size=1, batch_size=16)
    return parser


@report_user_errors
def main(cmd=None):
    """Decode; beam_size 1 is greedy CTC, more is ESPnet's beam search."""
    print(" ".join(sys.argv), file=sys.stderr)
    kwargs = vars(get_parser().parse_args(cmd))
    kwargs.pop("config", None)
    inference(**kwargs)


if __name__ == "__main__":
    main()
