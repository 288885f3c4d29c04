#!/usr/bin/env python3
"""Cut a formatted data directory into segments, for distillation (stage 4)."""

import argparse

from dldkit.data.format import AUDIO_FORMATS
from dldkit.errors import report_user_errors
from dldkit.options import add_job_options, command_parser, parse, sampling_rate


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("src", help="data directory to read, as stage 4 filtered it")
    add("dst", help="data directory to write")
    add("--max_seconds", type=float, required=True, help="no segment is longer")
    add("--fs", type=sampling_rate, default=16000, help="sampling rate in Hz")
    add("--audio_format", choices=AUDIO_FORMATS, default="flac", help="as format_data")
    add_job_options(parser)
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.data.segments import cut_data

    cut_data(**vars(parse(get_parser(), cmd)))


if __name__ == "__main__":
    main()
