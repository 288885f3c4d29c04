#!/usr/bin/env python3
"""Decode test sets at several depths, in parallel."""

import argparse
import shlex
from pathlib import Path

from dldkit.errors import report_user_errors
from dldkit.options import add_job_options, command_parser, depth_list, parse


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--asr_exp", required=True, help="experiment directory")
    add("--inference_asr_model", required=True, help="checkpoint in it")
    add("--data_dirs", nargs="+", required=True, help="dump/raw/test_a dump/raw/test_b")
    add(
        "--depths",
        type=depth_list,
        required=True,
        help='numbers of layers: "12 10 8 6 4 2"',
    )
    add("--inference_tag", required=True, help="results go to EXP/TAG/depthN/SET")
    add("--inference_args", default="", help="options of dldkit.bin.asr_inference")
    add_job_options(parser)
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.asr.decode import decode_depths

    args = parse(get_parser(), cmd)
    decode_depths(
        Path(args.asr_exp) / args.inference_asr_model,
        args.data_dirs,
        args.depths,
        Path(args.asr_exp) / args.inference_tag,
        shlex.split(args.inference_args),
        args.nj,
        args.parallel_config,
    )


if __name__ == "__main__":
    main()
