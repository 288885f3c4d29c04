#!/usr/bin/env python3
"""Bring a data directory's audio or features into one format (stage 3)."""

import argparse

from dldkit.data.format import AUDIO_FORMATS, Format, format_data
from dldkit.errors import report_user_errors
from dldkit.options import (
    add_job_options,
    command_parser,
    parse,
    positive,
    sampling_rate,
)


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = command_parser(__doc__)
    parser.add_argument("src", help="data directory to read")
    parser.add_argument("dst", help="data directory to write")
    parser.add_argument(
        "--feats_type",
        choices=("raw", "fbank", "extracted"),
        default="raw",
        help="audio files; log mel energies; the directory's own feats.scp",
    )
    parser.add_argument(
        "--fs", type=sampling_rate, default=16000, help="sampling rate in Hz"
    )
    parser.add_argument(
        "--audio_format",
        choices=AUDIO_FORMATS,
        default="flac",
        help="for raw: a file each, or arks of many",
    )
    parser.add_argument(
        "--n_mels", type=positive, default=80, help="dimension of fbank"
    )
    add_job_options(parser)
    parser.add_argument(
        "--no_text", action="store_true", help="take data without transcripts"
    )
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Write the formatted directory."""
    args = parse(get_parser(), cmd)
    form = Format(args.feats_type, args.fs, args.audio_format, args.n_mels)
    format_data(
        args.src,
        args.dst,
        form,
        args.nj,
        args.parallel_config,
        text=not args.no_text,
    )


if __name__ == "__main__":
    main()
