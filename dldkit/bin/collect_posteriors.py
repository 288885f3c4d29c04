#!/usr/bin/env python3
"""Write a reference's CTC posteriors to Kaldi arks, for distillation from a cache."""

import argparse

from dldkit.errors import report_user_errors
from dldkit.options import add_job_options, command_parser, parse


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--reference", required=True, help="experiment directory, checkpoint, or zip")
    add("--data_dirs", nargs="+", required=True, help="training and validation speech")
    add("--output_dir", required=True, help="for posteriors.scp and the arks")
    add("--top_k", type=int, help="keep K tokens per frame; all by default")
    add("--ngpu", type=int, default=0, choices=[0, 1], help="1 = compute on the GPU")
    add_job_options(parser)
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.asr.collection import collect_posteriors

    args = parse(get_parser(), cmd)
    collect_posteriors(**vars(args))


if __name__ == "__main__":
    main()
