#!/usr/bin/env python3
"""Print the teacher's own loss on what the student hears: 0, but for rounding."""

import json
from argparse import ArgumentParser
from pathlib import Path

from dldkit.errors import report_user_errors
from dldkit.options import command_parser, parse


def get_parser() -> ArgumentParser:
    """Return the command's options."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--config", required=True, help="config.yaml of a finished training")
    add("--teacher", help="the model; default: the one that the training names")
    add("--output_json", help="file for the numbers")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.sfm.teacher_loss import teacher_loss

    args = parse(get_parser(), cmd, level="WARNING")
    found = teacher_loss(args.config, args.teacher)
    if args.output_json:
        Path(args.output_json).write_text(json.dumps(found, indent=2) + "\n")
    parts = ", ".join(f"{name}={value:.3g}" for name, value in found.items())
    print(f"the teacher's own loss on the student's input: {parts}")


if __name__ == "__main__":
    main()
