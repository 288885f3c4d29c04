#!/usr/bin/env python3
"""Collect lengths and statistics of training data (stages 6 and 10).

Takes every option of the training command as well, of which --output_dir says where the
statistics go.
"""

import argparse

from dldkit.errors import report_user_errors
from dldkit.options import add_job_options, command_parser, positive


def get_parser() -> argparse.ArgumentParser:
    """Return the command's own options."""
    parser = command_parser(__doc__)
    parser.allow_abbrev = False  # of the training's options
    parser.add_argument("task", choices=("asr", "sfm"), help="what will be trained")
    parser.add_argument(
        "--stats_utts",
        type=positive,
        default=20000,
        help="utterances of each set to compute features for, drawn with a fixed seed",
    )
    add_job_options(parser)
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Write the statistics."""
    own, options = get_parser().parse_known_args(cmd)
    if own.task == "asr":
        from dldkit.tasks.asr import DLDASRTask as task
    else:
        from dldkit.tasks.sfm import SFMDistillTask as task
    from dldkit.train.statistics import collect_stats

    args = task.parse(options)
    collect_stats(task, args, own.stats_utts, own.nj, own.parallel_config)


if __name__ == "__main__":
    main()
