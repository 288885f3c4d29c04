#!/usr/bin/env python3
"""Check the options of a recipe; print shell assignments of those to change."""

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from dldkit.errors import report_user_errors


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", choices=("asr", "sfm"), help="asr.sh or sfm.sh")
    parser.add_argument("systems", type=Path, help="directory of the systems' configs")
    parser.add_argument("options", nargs="*", help="all of them, as name=value")
    return parser


@report_user_errors
def main(cmd: Sequence[str] | None = None) -> None:
    """Run the command."""
    from dldkit.recipe.asr import check_asr
    from dldkit.recipe.sfm import check_sfm

    args = get_parser().parse_args(cmd)
    options = {o.partition("=")[0]: o.partition("=")[2] for o in args.options}
    check = check_asr if args.recipe == "asr" else check_sfm
    for name, value in check(options, args.systems).items():
        print(f"{name}={shlex.quote(value)}")


if __name__ == "__main__":
    main()
