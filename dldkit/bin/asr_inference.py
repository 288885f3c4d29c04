#!/usr/bin/env python3
"""Decode speech at a chosen depth: espnet2.bin.asr_inference with depth options."""

import sys

from dldkit.asr.inference import Speech2Text, get_parser, inference, read_options
from dldkit.errors import report_user_errors

__all__ = ["Speech2Text", "get_parser", "main"]


@report_user_errors
def main(cmd=None):
    """Decode; beam_size 1 is greedy CTC, more is ESPnet's beam search."""
    print(" ".join(sys.argv), file=sys.stderr)
    inference(**read_options(cmd))


if __name__ == "__main__":
    main()
