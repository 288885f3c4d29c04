#!/usr/bin/env python3
"""Merge training configs: each file, then each key=value, over those before it."""

import argparse
import sys
from typing import Optional, Sequence

from omegaconf import OmegaConf

from dldkit.config_files import merge_configs
from dldkit.errors import report_user_errors
from dldkit.options import command_parser


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(f"{__doc__} Writes YAML to standard output.")
    parser.add_argument(
        "configs", nargs="+", help="YAML files and key=value, as model_conf.x=3"
    )
    parser.add_argument(
        "--select", nargs="+", help="print just these values, one to a line"
    )
    return parser


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    args = get_parser().parse_args(cmd)
    merged = merge_configs(args.configs)
    if args.select is None:
        sys.stdout.write(OmegaConf.to_yaml(merged, resolve=True))
    else:
        for key in args.select:
            value = OmegaConf.select(merged, key)
            plain = OmegaConf.is_config(value)
            print(OmegaConf.to_container(value, resolve=True) if plain else value)


if __name__ == "__main__":
    main()
