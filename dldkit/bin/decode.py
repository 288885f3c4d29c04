#!/usr/bin/env python3
"""Decode test sets at several depths, and stopping early, in parallel."""

import argparse
import shlex
from pathlib import Path

from dldkit.errors import report_user_errors
from dldkit.options import (
    add_job_options,
    command_parser,
    depth_list,
    exit_thresholds,
    parse,
)


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
    add(
        "--exit_thresholds",
        type=exit_thresholds,
        default="none",
        help='early stopping by confidence, for a model with exits: none, "0.02 0.05", '
        "or auto: those that give mean depths of --depths on --valid_dir; results go "
        "to EXP/TAG/thresholdT/SET",
    )
    add("--valid_dir", help="speech for --exit_thresholds auto: dump/raw/dev")
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
        args.exit_thresholds,
        args.valid_dir,
    )


if __name__ == "__main__":
    main()
