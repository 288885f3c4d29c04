#!/usr/bin/env python3
"""Write a reference's CTC posteriors to Kaldi arks, for distillation from a cache."""

import argparse
import logging

from dldkit.errors import report_user_errors
from dldkit.options import positive


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--reference", required=True, help="experiment directory, checkpoint, or zip")
    add("--data_dirs", nargs="+", required=True, help="training and validation speech")
    add("--output_dir", required=True, help="for posteriors.scp and the arks")
    add("--top_k", type=int, help="keep K tokens per frame; all by default")
    add("--nj", type=positive, default=1, help="number of jobs")
    add("--ngpu", type=int, default=0, choices=[0, 1], help="1 = compute on the GPU")
    add("--parallel_config", help="YAML of a cluster, see dldkit.parallel")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.asr.collection import collect_posteriors

    args = get_parser().parse_args(cmd)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s: %(message)s")
    collect_posteriors(**vars(args))


if __name__ == "__main__":
    main()
