#!/usr/bin/env python3
"""Run tasks of SUPERB on a frozen model with s3prl; print the table row."""

import argparse
import os
import shlex
from typing import Optional, Sequence

from dldkit.errors import report_user_errors
from dldkit.options import command_parser, fold_list, learning_rates, parse, positive
from dldkit.sfm.superb.tasks import CORPORA, TASKS


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(
        f"{__doc__} Finished tasks are kept, interrupted ones go on."
    )
    add = parser.add_argument
    runnable = " ".join(name for name, task in TASKS.items() if task.problem)
    add(
        "--upstream",
        required=True,
        help="directory from sfm_export or of another Hugging Face model on waveforms, "
        "name of one (microsoft/wavlm-base-plus), or an upstream of s3prl "
        "(wavlm_base_plus, distilhubert)",
    )
    add("--upstream_name", required=True, help="its name in the table")
    add("--output_dir", required=True, help="for the tasks' directories and the table")
    add(
        "--tasks",
        default="",
        help=f"which to run, of: {runnable}; empty: those whose corpora are named",
    )
    for name, corpus in CORPORA.items():
        add(
            f"--{name}",
            default=os.environ.get(name.upper()),
            help=f"directory with {', '.join(corpus.holds)}: {corpus.source}",
        )
    add(
        "--dscore",
        default=os.environ.get("DSCORE"),
        help="clone of https://github.com/nryant/dscore, for SD",
    )
    add(
        "--list_dir",
        default="downloads/superb",
        help="where splits and lexicons lie; missing ones are downloaded into it",
    )
    add("--task_args", default="", help='s3prl\'s options: "--train.total_steps 2"')
    add(
        "--lr",
        type=learning_rates,
        default="",
        help="learning rates by task, as pr=5e-4,sid=1e-2:1e-3; of several, the one "
        "that is best on the dev set counts; s3prl's own for the others",
    )
    add(
        "--er_folds",
        type=fold_list,
        default="0 1 2 3 4",
        help="folds of ER; SUPERB's ER is all five",
    )
    add("--device", default="cpu", choices=["cpu", "cuda"], help="for all tasks")
    add("--nj", type=positive, default=4, help="processes that load speech")
    return parser


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    args = parse(get_parser(), cmd)

    # not at the top: transformers takes seconds, and sfm.sh wants the parser alone
    from dldkit.sfm.superb.results import collect
    from dldkit.sfm.superb.run import run

    run(
        args.tasks.split(),
        args.upstream,
        args.output_dir,
        {name: getattr(args, name) for name in CORPORA},
        args.list_dir,
        shlex.split(args.task_args),
        args.lr,
        args.er_folds,
        args.device,
        args.nj,
        args.dscore,
    )
    print(collect(args.output_dir, args.upstream_name))


if __name__ == "__main__":
    main()
