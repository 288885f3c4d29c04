#!/usr/bin/env python3
"""Bring a data directory's audio or features into one format (stage 3)."""

import argparse
import logging

from dldkit.data.format import Format, format_data
from dldkit.errors import report_user_errors
from dldkit.options import positive, sampling_rate


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
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
        "--audio_format", choices=("flac", "wav"), default="flac", help="for raw"
    )
    parser.add_argument(
        "--n_mels", type=positive, default=80, help="dimension of fbank"
    )
    parser.add_argument(
        "--channel", type=int, help="to read, from 0; default: all of them, mixed"
    )
    parser.add_argument("--nj", type=positive, default=1, help="number of processes")
    parser.add_argument(
        "--parallel_config", help="YAML file that names a cluster, instead of --nj"
    )
    parser.add_argument(
        "--no_text", action="store_true", help="take data without transcripts"
    )
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Write the formatted directory."""
    logging.basicConfig(
        level="INFO", format="%(asctime)s (%(module)s:%(lineno)d) %(message)s"
    )
    args = get_parser().parse_args(cmd)
    form = Format(
        args.feats_type, args.fs, args.audio_format, args.n_mels, args.channel
    )
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
