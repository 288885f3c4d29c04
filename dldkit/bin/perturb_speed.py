#!/usr/bin/env python3
"""Add copies of a data directory's utterances at other speeds (stage 2)."""

import argparse

from dldkit.data.speed import perturb_speed
from dldkit.errors import report_user_errors
from dldkit.options import command_parser, parse


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = command_parser(__doc__)
    parser.add_argument("src", help="data directory to read")
    parser.add_argument("dst", help="data directory to write")
    parser.add_argument(
        "--factors", default="0.9 1.0 1.1", help="speeds, separated by spaces"
    )
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Write the perturbed directory."""
    args = parse(get_parser(), cmd)
    perturb_speed(args.src, args.dst, args.factors.split())


if __name__ == "__main__":
    main()
