#!/usr/bin/env python3
"""Record the runs of compare.sh, and make its table; see there."""

import argparse
import json
import platform
from datetime import date
from pathlib import Path
from typing import Any, Optional, Sequence

import torch
import yaml
from espnet2.train.reporter import Reporter

from dldkit.errors import UserError, report_user_errors
from dldkit.report.tables import markdown, put_between_marks, spread
from dldkit.sfm.probe import TASKS
from dldkit.step import atomic

MODELS = ("teacher", "untrained")  # rows of no training


def validation(exp: Path) -> dict[str, float]:
    """Return what validation said after the last epoch.

    Raises:
        UserError: the training has no checkpoint, or did not come to its end.
    """
    checkpoint = exp / "checkpoint.pth"
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} is missing: train again")
    reporter = Reporter()
    states = torch.load(checkpoint, map_location="cpu", weights_only=True)
    reporter.load_state_dict(states["reporter"])
    epoch, epochs = reporter.get_epoch(), read_config(exp)["max_epoch"]
    if epoch != epochs:
        raise UserError(f"{exp} ended after {epoch} of {epochs} epochs: train it on")
    last = reporter.stats[epoch]["valid"]
    return {k: float(v) for k, v in last.items() if k.startswith("loss")}


def read_config(exp: Path) -> dict[str, Any]:
    """Return the config of an experiment."""
    return yaml.safe_load((exp / "config.yaml").read_text(encoding="utf-8"))


def grid_losses(expdir: Path, system: str) -> dict[str, float]:
    """Return the validation losses of a system's short trainings, by learning rate."""
    exps = expdir.glob(f"sfm_{system}_lr*_seed*")
    losses = {
        read_config(exp)["optim_conf"]["lr"]: validation(exp)["loss"] for exp in exps
    }
    return {str(rate): losses[rate] for rate in sorted(losses)}


def best_rate(expdir: Path, results: Path, system: str) -> float:
    """Return the learning rate of a system's trainings.

    It is that of those that were recorded, or the one whose short training has the
    lowest validation loss.

    Raises:
        UserError: neither is there.
    """
    for file in results.glob(f"{system}_seed*.json"):
        return read_json(file)["learning_rate"]
    losses = grid_losses(expdir, system)
    if not losses:
        raise UserError(f"{system} was tried at no learning rate: run stage 2")
    return float(min(losses, key=lambda rate: losses[rate]))


def timed_as(config: dict[str, Any]) -> Optional[list[str]]:
    """Return where bench/step_time.py says the time of such steps, None if it does not.

    The two keys lead to the mean time of a step as a ratio to that of full depth.
    """
    usual = yaml.safe_load(Path("conf/train_sfm.yaml").read_text(encoding="utf-8"))
    cnns = [conf["student_conf"].get("conv_dim") for conf in (config, usual)]
    if config["model_conf"].get("exits") or cnns[0] != cnns[1]:
        return None  # their steps are not measured
    if config["trainer"] != "stacking":
        depth = config["student_conf"]["num_hidden_layers"]
        return ["depths", str(depth)]
    is_prop = config["trainer_conf"].get("schedule") == "prop"
    return ["schedules", "prop1" if is_prop else "equal"]


def read_json(path: Path) -> dict:
    """Return what a JSON file holds, or nothing if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def record(expdir: Path, run: str) -> dict[str, Any]:
    """Return what a run gave, or a row of `MODELS`.

    Raises:
        UserError: it was not probed.
    """
    probed = read_json(expdir / "probe" / "probe.json").get("upstreams", {})
    if run not in probed:
        raise UserError(f"{run} has no probe scores: run stage 4 again")

    def scores(name: str) -> dict[str, list[float]]:
        return {score: probed[name][score] for score in TASKS}

    if run in MODELS:
        return {"scores": {"": scores(run)}}
    exp = expdir / f"sfm_{run}"
    config, losses = read_config(exp), validation(exp)
    depth = config["student_conf"]["num_hidden_layers"]
    loss = {depth: losses["loss"]}
    if config["model_conf"].get("exits"):  # then "loss" is the mean over them
        prefix = "loss_depth"
        names = sorted(name for name in losses if name.startswith(prefix))
        loss = {int(name.removeprefix(prefix)): losses[name] for name in names}
    return {
        "epochs": config["max_epoch"],
        "learning_rate": config["optim_conf"]["lr"],
        "short_trainings": grid_losses(expdir, run.rpartition("_seed")[0]),
        "timed_as": timed_as(config),
        "teacher_loss": read_json(exp / "teacher_loss.json").get("loss"),
        "loss": loss,
        "scores": {d: scores(run if d == depth else f"{run}_depth{d}") for d in loss},
    }


def table(results: dict[str, list[dict[str, Any]]], step_times: dict) -> str:
    """Return the table: a row for each system, and one for each of its other depths.

    Args:
        results: of each system, what `record` gave for each seed.
        step_times: what bench/step_time.py wrote.
    """
    heads = ["trainings", "learning rate", "step time", "validation loss"]
    heads += TASKS.values()
    losses = [
        run["teacher_loss"]
        for runs in results.values()
        for run in runs[:1]
        if run.get("teacher_loss") is not None
    ]
    rows = []
    for name, runs in results.items():
        depths = sorted(runs[0]["scores"], key=lambda d: int(d or 0), reverse=True)
        for depth in depths:
            cells = [name, "", "", "", ""]
            if name == "teacher" and losses:
                cells[4] = f"{losses[0]:.1e}"
            if name not in MODELS:
                cells[1:3] = str(len(runs)), str(runs[0]["learning_rate"])
                kind, name_of_steps = runs[0]["timed_as"] or ("", "")
                ratio = step_times.get(kind, {}).get(name_of_steps)
                cells[3] = f"{ratio:.2f}" if ratio else ""
                cells[4] = spread([run["loss"][depth] for run in runs], 4)
            if depth != depths[0]:
                cells[0] = f"{name}, depth {depth}"
                cells[1:4] = [""] * 3
            for score in TASKS:
                values = [v for run in runs for v in run["scores"][depth][score]]
                cells.append(spread(values, 1))
            rows.append(cells)
    return markdown(" | ".join(["system", *heads]), rows)


def grid_table(results: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Return the lines of a table of the short trainings; nothing if there are none."""
    grid = {
        name: losses
        for name, runs in results.items()
        if (losses := runs[0].get("short_trainings"))
    }
    rates = sorted({rate for losses in grid.values() for rate in losses}, key=float)
    if not rates:
        return []
    rows = [
        [name, *(f"{losses[r]:.4f}" if r in losses else "" for r in rates)]
        for name, losses in grid.items()
    ]
    return [
        "The learning rate is the one whose short training has the lowest validation "
        "loss (with exits, the mean over them):",
        "",
        markdown(" | ".join(["learning rate", *rates]), rows),
        "",
    ]


def settings(args: argparse.Namespace) -> None:
    """Note what all runs of a directory share, or compare it with what is noted.

    Raises:
        UserError: they are of another teacher, or of other options.
    """
    file = args.results / "settings.json"
    now = {name: getattr(args, name) for name in ("sfm_args", "run_opts", "teacher")}
    noted = read_json(file)
    for name, value in now.items():
        is_given = value or name != "teacher"  # a table can be made without it
        if noted and is_given and noted[name] != value:
            raise UserError(
                f"{args.results} has runs with {name} {noted[name]!r}, not {value!r}: "
                f"choose another --results and --expdir (or, where both are the same "
                f"thing, correct {file})"
            )
    if not noted:
        args.results.mkdir(exist_ok=True)
        with atomic(file) as new:
            new.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")


def load(results: Path, runs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """Return what is recorded of the systems, and of `MODELS`; others are left out."""
    found: dict[str, list[dict[str, Any]]] = {}
    for run in [*MODELS, *runs]:
        if recorded := read_json(results / f"{run}.json"):
            found.setdefault(run.rpartition("_seed")[0] or run, []).append(recorded)
    return found


def write_table(args: argparse.Namespace) -> None:
    """Put the table between the marks of the README."""
    import espnet

    results = load(args.results, args.runs)
    body = [
        "Mean ± standard deviation: of the loss over the trainings, of the scores over "
        "the trainings and the probe's seeds. Where there is one training, the spread "
        "is the probe's alone. Step time is the ratio to full that bench/step_time.py "
        "measures side by side. The teacher's loss is its own on what the students "
        "hear.",
        "",
        table(results, read_json(args.results / "step_time.json")),
        "",
        *grid_table(results),
        f"Made by `{args.command.strip()}` on {date.today()} with espnet "
        f"{espnet.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, on CPU.",
    ]
    put_between_marks(args.readme, "\n".join(body))
    print("\n".join(body))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="what", required=True)
    for name, text in (
        ("settings", "note what all runs share, or refuse other settings"),
        ("rate", "print the learning rate of a system's trainings"),
        ("record", "write what runs gave to files"),
        ("table", "put the table into a README"),
    ):
        add = commands.add_parser(name, help=text).add_argument
        text = "directory of these files, and of step_time.json"
        add("--results", type=Path, required=True, help=text)
        if name == "settings":
            for option in ("teacher", "sfm_args", "run_opts"):
                add(f"--{option}", required=True, help="of compare.sh")
            continue
        if name != "table":
            add("--expdir", type=Path, required=True, help="directory of all runs")
        if name == "rate":
            add("--system", required=True, help="as full")
            continue
        add("--runs", nargs="+", required=True, help="as full_seed1")
        if name == "table":
            add("--readme", type=Path, required=True)
            add("--command", required=True, help="that made the comparison")
    return parser


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Do what the command says."""
    args = get_parser().parse_args(cmd)
    if args.what == "settings":
        settings(args)
    elif args.what == "rate":
        print(best_rate(args.expdir, args.results, args.system))
    elif args.what == "table":
        write_table(args)
    else:
        args.results.mkdir(exist_ok=True)
        for run in args.runs:
            text = json.dumps(record(args.expdir, run), indent=1)
            with atomic(args.results / f"{run}.json") as file:
                file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
