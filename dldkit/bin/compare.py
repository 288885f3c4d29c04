#!/usr/bin/env python3
"""Record runs of a comparison of systems, and make its tables; see compare.sh."""

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Optional

from omegaconf import DictConfig, OmegaConf

from dldkit.config_files import merge_files
from dldkit.errors import report_user_errors
from dldkit.options import command_parser, parse, positive
from dldkit.recipe.asr import reference_system
from dldkit.recipe.config import files_of_system, is_open
from dldkit.report.comparison import BUDGETS, SAMPLES, static_depth, tables
from dldkit.report.runs import (
    Run,
    epochs_of_equal_cost,
    load_runs,
    mean_depth,
    record,
    refuse_other_training,
)
from dldkit.step import atomic

LEGEND = (
    "Word error rate in %, mean ± standard deviation over the seeds. Differences have "
    "95 % intervals, from a paired bootstrap over seeds and utterances "
    f"({SAMPLES} samples); those that leave out zero are bold, unless they are of one "
    "seed, whose interval knows of utterances alone. A negative one is in favour of "
    "the system that heads the table. `static` is the model trained at "
    "that depth, or a smaller one where that is better; models that lack a seed are "
    "left out where another one has all. A system with exits has no entry at depths "
    "that have none and that it never draws. Arithmetic: of the forwards in training, "
    "the deepest static model's being 1. The last column adds the training of the "
    "reference: early exit for a system that begins with its weights (anytime), the "
    "deepest static model for others."
)


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    add = commands.add_parser(
        "record", help="write what a run gave to a file"
    ).add_argument
    add("--exp", type=Path, required=True, help="experiment directory")
    add("--inference_tag", required=True, help="results are in EXP/TAG/depthN/SET")
    add("--name", required=True, help="of the system in the comparison")
    add("--seed", type=int, required=True, help="of its training")
    add("--data_root", type=Path, required=True, help="where the test sets lie")
    add("--output", type=Path, required=True, help="the file")
    add = commands.add_parser(
        "epochs",
        help="print `SYSTEM EPOCHS` of each budget and system, a line each",
    ).add_argument
    add("--systems", required=True, help="each is staticN, or a file of conf/systems")
    _add_common(add)
    add("--deepest", required=True, help="name of the deepest static model")
    add = commands.add_parser(
        "reference",
        help="print the reference of each system, an empty line where it has none",
    ).add_argument
    add("--systems", required=True, help="each is staticN, or a file of conf/systems")
    add("--deepest", required=True, help="name of the deepest static model")
    _add_configs(add)
    add = commands.add_parser("table", help="write the tables to a file").add_argument
    _add_common(add)
    add(
        "--systems",
        required=True,
        help="the deepest static one first; the last one is compared with all others",
    )
    add("--output", type=Path, required=True, help="the file, in Markdown")
    add("--command", required=True, help="that made the comparison")
    return parser


def _budgets(text: str) -> list[str]:
    words = text.split()
    if not words or set(words) - set(BUDGETS):
        raise argparse.ArgumentTypeError(f"{text!r}: write some of {' '.join(BUDGETS)}")
    return words


def _add_common(add) -> None:
    add("--results", type=Path, required=True, help="directory of the runs' files")
    add("--epochs", type=positive, required=True, help="of the deepest static model")
    add("--budgets", type=_budgets, required=True, help="what is equal")
    _add_configs(add)


def _add_configs(add) -> None:
    add("--configs", nargs="+", type=Path, required=True, help="config, directories")


def _config(args: argparse.Namespace, system: str) -> DictConfig:
    """Return the training config of a system; its depth apart, if it is static."""
    config, *directories = args.configs
    if static_depth(system):
        return merge_files([str(config)])
    return merge_files([str(config), *files_of_system("system", system, directories)])


def _reference(args: argparse.Namespace, system: str, deepest: str) -> str:
    if static_depth(system):
        return ""
    config = _config(args, system)
    if not is_open(config, "model_conf.reference"):
        return ""
    reference = reference_system(config)
    return deepest if reference == "static" else reference


def _epochs(
    args: argparse.Namespace,
    runs: Sequence[Run],
    system: str,
    deepest: str,
    budget: str,
) -> int:
    epochs = args.epochs
    if budget == "steps":
        return epochs
    if budget == "total" and not _reference(args, system, deepest):
        epochs *= 2  # others have a reference, which costs as much as the deepest model
    if system == deepest:
        return epochs
    depth: float = static_depth(system)
    if not depth:
        depth = mean_depth(_config(args, system))
    return epochs_of_equal_cost(runs, deepest, epochs, depth)


def _machine(run: Run) -> str:
    names = ("espnet", "torch", "python", "gpu", "cpu")
    return ", ".join(f"{name} {run.environment[name]}" for name in names)


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run one of the commands."""
    args = parse(get_parser(), cmd)
    if args.what == "record":
        run = record(args.exp, args.inference_tag, args.name, args.seed, args.data_root)
        run.save(args.output)
        return
    systems = args.systems.split()
    if args.what == "reference":
        for system in systems:
            print(_reference(args, system, args.deepest))
        return
    runs = load_runs(args.results)
    for system in systems:
        config = OmegaConf.to_container(_config(args, system))
        refuse_other_training(runs, system, config)
    if args.what == "epochs":
        for budget in args.budgets:
            for system in systems:
                print(system, _epochs(args, runs, system, args.deepest, budget))
    else:
        budgets = {
            budget: {s: _epochs(args, runs, s, systems[0], budget) for s in systems}
            for budget in args.budgets
        }
        machines = "; ".join(sorted({_machine(run) for run in runs}))
        made = f"Made by `{args.command.strip()}` on {date.today()}. Runs: {machines}."
        body = tables(runs, systems, budgets, args.epochs)
        text = "\n\n".join(["# Systems compared", LEGEND, body, made])
        with atomic(args.output) as new:
            new.write_text(f"{text}\n", encoding="utf-8")
        print(text)


if __name__ == "__main__":
    main()
