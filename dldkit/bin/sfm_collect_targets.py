#!/usr/bin/env python3
"""Write a teacher's hidden states to Kaldi arks, for distillation from a cache."""

import argparse
import logging

from dldkit.errors import report_user_errors
from dldkit.options import layer_list, positive


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--teacher", required=True, help="Hugging Face model, or ESPnet SSL experiment")
    add(
        "--layers", required=True, type=layer_list, help='as in "2 3 4"; 0 is the input'
    )
    add("--data_dirs", nargs="+", required=True, help="training and validation speech")
    add("--output_dir", required=True, help="for targets.scp and the arks")
    add("--nj", type=positive, default=1, help="number of jobs")
    add("--ngpu", type=int, default=0, choices=[0, 1], help="1 = compute on the GPU")
    add("--parallel_config", help="YAML of a cluster, see dldkit.parallel")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run the command."""
    from dldkit.sfm.targets import collect_targets

    args = get_parser().parse_args(cmd)
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s: %(message)s")
    collect_targets(**vars(args))


if __name__ == "__main__":
    main()
