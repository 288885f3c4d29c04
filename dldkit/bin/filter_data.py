#!/usr/bin/env python3
"""Keep a formatted directory's utterances of suitable length (stage 4)."""

import argparse

from dldkit.data.length import filter_data
from dldkit.errors import report_user_errors
from dldkit.options import command_parser, parse, sampling_rate


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = command_parser(__doc__)
    parser.add_argument("src", help="data directory to read")
    parser.add_argument("dst", help="data directory to write")
    parser.add_argument(
        "--min_length",
        type=float,
        default=0.1,
        help="seconds of audio, or frames of features",
    )
    parser.add_argument("--max_length", type=float, default=20.0, help="as min_length")
    parser.add_argument(
        "--fs", type=sampling_rate, required=True, help="sampling rate in Hz"
    )
    parser.add_argument(
        "--no_text", action="store_true", help="take data without transcripts"
    )
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Write the filtered directory."""
    args = parse(get_parser(), cmd)
    filter_data(
        args.src,
        args.dst,
        args.min_length,
        args.max_length,
        args.fs,
        text=not args.no_text,
    )


if __name__ == "__main__":
    main()
