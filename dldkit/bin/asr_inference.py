#!/usr/bin/env python3
"""Decode speech at a chosen depth: espnet2.bin.asr_inference with depth options."""

import sys

import yaml

from dldkit.asr.inference import Speech2Text, get_parser, inference
from dldkit.errors import UserError, report_user_errors

__all__ = ["Speech2Text", "get_parser", "main"]


@report_user_errors
def main(cmd=None):
    """Decode; beam_size 1 is greedy CTC, more is ESPnet's beam search."""
    print(" ".join(sys.argv), file=sys.stderr)
    try:
        kwargs = vars(get_parser().parse_args(cmd))
    except yaml.YAMLError as error:
        where = " ".join(str(error).split())
        raise UserError(f"--config is no YAML file: {where}") from None
    kwargs.pop("config", None)
    inference(**kwargs)


if __name__ == "__main__":
    main()
