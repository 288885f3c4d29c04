#!/usr/bin/env python3
"""Decode test sets at several depths, in parallel."""

import argparse
import logging
import shlex
from pathlib import Path

from dldkit.errors import report_user_errors
from dldkit.options import depth_list, positive


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
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
    add("--nj", type=positive, default=1, help="number of jobs")
    add("--parallel_config", help="YAML of a cluster, see dldkit.parallel")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.asr.decode import decode_depths

    args = get_parser().parse_args(cmd)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s: %(message)s")
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
