#!/usr/bin/env python3
"""Refuse data directories whose tables do not agree."""

import argparse
import logging

from dldkit.data.datadir import utterances
from dldkit.errors import report_user_errors
from dldkit.options import command_parser, parse


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = command_parser(__doc__)
    parser.add_argument("directories", nargs="+", help="data directories")
    parser.add_argument(
        "--no_text", action="store_true", help="take data without transcripts"
    )
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Check each directory; the first bad one ends with an error."""
    args = parse(get_parser(), cmd)
    for directory in args.directories:
        count = len(utterances(directory, text=not args.no_text))
        logging.info(f"{directory}: {count} utterances")


if __name__ == "__main__":
    main()
