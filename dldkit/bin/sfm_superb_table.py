#!/usr/bin/env python3
"""Print one table of SUPERB for several models, with published rows and their sources.

The SUPERB score is over the tasks that all of these models have finished.
"""

from argparse import ArgumentParser

from dldkit.errors import report_user_errors
from dldkit.options import command_parser, parse
from dldkit.sfm.superb.results import collect_all


def get_parser() -> ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    parser.add_argument(
        "directories", nargs="+", help="exp/superb_NAME, an --output_dir of sfm_superb"
    )
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    print(collect_all(parse(get_parser(), cmd, level="WARNING").directories))


if __name__ == "__main__":
    main()
