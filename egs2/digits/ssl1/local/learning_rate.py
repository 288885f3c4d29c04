#!/usr/bin/env python3
"""Print the rate whose short training in compare.sh has the lowest validation loss."""

import argparse
from pathlib import Path
from typing import Optional, Sequence

from compare import grid_losses

from dldkit.errors import UserError, report_user_errors


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("expdir", help="directory of all runs")
    parser.add_argument("system", help="as full")
    return parser


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Print it."""
    args = get_parser().parse_args(cmd)
    losses = grid_losses(Path(args.expdir), args.system)
    if not losses:
        raise UserError(f"{args.system} was tried at no learning rate: run stage 2")
    print(min(losses, key=lambda rate: losses[rate]))


if __name__ == "__main__":
    main()
