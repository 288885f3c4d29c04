#!/usr/bin/env python3
"""Prepare a training of variable depth that starts from a trained model."""

import argparse
from collections.abc import Sequence

from omegaconf import OmegaConf

from dldkit.config_files import merge_files
from dldkit.errors import report_user_errors
from dldkit.options import command_parser, parse


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("model", help="experiment directory, checkpoint, packed zip or Hub name")
    add("--asr_config", required=True, help="training config: optimiser, batches")
    add(
        "--outpath",
        required=True,
        help="checkpoint to write; its config, files and student.yaml go beside it",
    )
    return parser


@report_user_errors
def main(cmd: Sequence[str] | None = None) -> None:
    """Run the command."""
    from dldkit.asr.conversion import convert

    args = parse(get_parser(), cmd)
    recipe = OmegaConf.to_container(merge_files([args.asr_config]))
    convert(args.model, recipe, args.outpath)


if __name__ == "__main__":
    main()
