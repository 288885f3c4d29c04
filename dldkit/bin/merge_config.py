#!/usr/bin/env python3
"""Merge training configs: each file, then each key=value, over those before it."""

import argparse
import sys
from pathlib import Path
from typing import Optional, Sequence

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dldkit.errors import UserError, report_user_errors
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


def merge_files(configs: Sequence[str]) -> DictConfig:
    """Merge YAML files and key=value settings, nested dictionaries key by key.

    Raises:
        UserError: a file is missing or no YAML dictionary.
    """
    merged = OmegaConf.create()
    for config in configs:
        try:
            if Path(config).is_file():
                part = OmegaConf.load(config)
            elif "=" in config:
                part = OmegaConf.from_dotlist([config])
            else:
                raise UserError(f"the config {config} does not exist")
            merged = OmegaConf.merge(merged, part)
        except (OmegaConfBaseException, YAMLError, TypeError, ValueError) as error:
            raise UserError(f"{config} can not be merged: {error}") from error
    return merged


def merge_configs(configs: Sequence[str]) -> DictConfig:
    """Merge as `merge_files` does.

    Raises:
        UserError: as well where a value that a file marks with ??? was not given.
    """
    merged = merge_files(configs)
    missing = OmegaConf.missing_keys(merged)
    if missing:
        raise UserError(
            f"{' '.join(configs)}: give {'=..., '.join(sorted(missing))}=..."
        )
    return merged


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
