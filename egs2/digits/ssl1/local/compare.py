#!/usr/bin/env python3
"""Put the comparison table of compare.sh between two marks of the README."""

import argparse
import json
import platform
import statistics
from datetime import date
from pathlib import Path
from typing import NamedTuple, Optional, Sequence

import torch
import yaml
from espnet2.train.reporter import Reporter

from dldkit.errors import UserError, report_user_errors
from dldkit.report.tables import markdown, put_between_marks, spread

SCORES = {
    "digit_accuracy": "digits, accuracy %",
    "speaker_accuracy": "speakers, accuracy %",
    "digit_string_wer": "digit strings, WER %",
}


class Training(NamedTuple):
    """What a finished training took and reached."""

    seconds: float  # of its training steps; an interruption does not count
    loss: float  # of validation, after the last epoch; with exits, the mean over them
    loss_at: dict[int, float]  # the same at each depth, if there are exits

    @property
    def loss_at_full_depth(self) -> float:
        return self.loss_at[max(self.loss_at)] if self.loss_at else self.loss


def read_training(exp: Path) -> Training:
    """Read it from the experiment's checkpoint.

    Raises:
        UserError: there is none.
    """
    checkpoint = exp / "checkpoint.pth"
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint} is missing: run stage 3 again")
    reporter = Reporter()
    states = torch.load(checkpoint, map_location="cpu", weights_only=True)
    reporter.load_state_dict(states["reporter"])
    seconds = sum(
        epoch["train"]["time"].total_seconds() for epoch in reporter.stats.values()
    )
    valid = reporter.stats[reporter.get_epoch()]["valid"]
    prefix = "loss_depth"
    loss_at = {
        int(name.removeprefix(prefix)): float(value)
        for name, value in valid.items()
        if name.startswith(prefix)
    }
    return Training(seconds, float(valid["loss"]), loss_at)


def learning_rate(exp: Path) -> float:
    """Return the peak rate of an experiment."""
    config = yaml.safe_load((exp / "config.yaml").read_text(encoding="utf-8"))
    return config["optim_conf"]["lr"]


def grid_losses(expdir: Path, system: str) -> dict[float, float]:
    """Return the validation losses of a system's short trainings, by learning rate."""
    exps = expdir.glob(f"sfm_{system}_lr*_seed*")
    return {
        rate: loss
        for rate, loss in sorted(
            (learning_rate(exp), read_training(exp).loss) for exp in exps
        )
    }


def step_time(exp: Path, measured: dict) -> Optional[float]:
    """Return the mean time of a step as a ratio to full depth's, as measured alone.

    Args:
        measured: what bench/step_time.py wrote.
    """
    config = yaml.safe_load((exp / "config.yaml").read_text(encoding="utf-8"))
    usual = yaml.safe_load(Path("conf/train_sfm.yaml").read_text(encoding="utf-8"))
    cnns = [conf["student_conf"].get("conv_dim") for conf in (config, usual)]
    if config["model_conf"].get("exits") or cnns[0] != cnns[1]:
        return None  # their steps are not measured
    if config["trainer"] != "stacking":
        depth = config["student_conf"]["num_hidden_layers"]
        return measured.get("depths", {}).get(str(depth))
    is_prop = config["trainer_conf"].get("schedule") == "prop"
    return measured.get("schedules", {}).get("prop1" if is_prop else "equal")


def read_json(path: Path) -> dict:
    """Return what a JSON file holds, or nothing if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(
    trainings: dict[str, list[Training]],
    losses: dict[str, list[float]],
    rates: dict[str, float],
    step_times: dict[str, Optional[float]],
    scores: dict[str, list[dict[str, list[float]]]],
    teacher_loss: Optional[float] = None,
) -> str:
    """Return the table.

    Args:
        trainings: of each system, one for each seed.
        losses: of each row that was trained, one for each seed.
        rates: of each system, the learning rate.
        step_times: of each system, the ratio to `full`, if it was measured.
        scores: of each row's upstreams, each score with every seed of the probe.
        teacher_loss: its own loss on the student's input.
    """
    heads = ["trainings", "learning rate", "time of training (s)", "ratio to full"]
    heads += ["step time", "validation loss", *SCORES.values()]
    rows = []
    full = trainings.get("full")
    for name, upstreams in scores.items():
        cells = [""] * 6
        if name == "teacher" and teacher_loss is not None:
            cells[5] = f"{teacher_loss:.1e}"
        if name in trainings:
            runs = trainings[name]
            seconds = [run.seconds for run in runs]
            cells[:3] = str(len(runs)), str(rates[name]), spread(seconds, 0)
            if full:
                reference = statistics.mean(run.seconds for run in full)
                cells[3] = f"{statistics.mean(seconds) / reference:.2f}"
            if step_times[name] is not None:
                cells[4] = f"{step_times[name]:.2f}"
        if name in losses:
            cells[5] = spread(losses[name], 4)
        for score in SCORES:
            values = [value for upstream in upstreams for value in upstream[score]]
            cells.append(spread(values, 1))
        rows.append([name, *cells])
    return markdown(" | ".join(["system", *heads]), rows)


def grid_table(losses: dict[str, dict[float, float]]) -> list[str]:
    """Return the lines of a table of the short trainings; nothing if there are none.

    Args:
        losses: of each system, by learning rate.
    """
    rates = sorted({rate for row in losses.values() for rate in row})
    if not rates:
        return []
    rows = [
        [system, *(f"{row[rate]:.4f}" if rate in row else "" for rate in rates)]
        for system, row in losses.items()
    ]
    heads = " | ".join(["learning rate", *map(str, rates)])
    text = (
        "The learning rate is the one with the lowest validation loss in trainings of "
    )
    return [
        f"{text}fewer epochs (with exits, the mean over them):",
        "",
        markdown(heads, rows),
        "",
    ]


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--expdir", required=True)
    add("--runs", nargs="+", required=True, help="as full_seed1")
    add("--step_times", required=True, help="JSON that bench/step_time.py wrote")
    add("--readme", required=True)
    add("--command", required=True)
    return parser


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Write the table to the README, and its numbers beside the runs."""
    args = get_parser().parse_args(cmd)
    import espnet

    expdir = Path(args.expdir)
    probed = read_json(expdir / "probe" / "probe.json").get("upstreams", {})
    measured = read_json(Path(args.step_times))
    trainings: dict[str, list[Training]] = {}
    losses: dict[str, list[float]] = {}
    rates: dict[str, float] = {}
    step_times: dict[str, Optional[float]] = {}
    scores = {
        name: [probed[name]] for name in ("teacher", "untrained") if name in probed
    }
    for run in args.runs:
        if run not in probed:
            raise UserError(f"{run} has no probe scores: run stage 4 again")
        system = run.rpartition("_seed")[0]
        exp = expdir / f"sfm_{run}"
        training = read_training(exp)
        trainings.setdefault(system, []).append(training)
        step_times[system] = step_time(exp, measured)
        rates[system] = learning_rate(exp)
        losses.setdefault(system, []).append(training.loss_at_full_depth)
        scores.setdefault(system, []).append(probed[run])
        for name in probed:
            if name.startswith(f"{run}_depth"):
                depth = int(name.removeprefix(f"{run}_depth"))
                row = f"{system}, depth {depth}"
                if depth in training.loss_at:
                    losses.setdefault(row, []).append(training.loss_at[depth])
                scores.setdefault(row, []).append(probed[name])
    first = expdir / f"sfm_{args.runs[0]}" / "teacher_loss.json"
    teacher_loss = read_json(first).get("loss")
    body = [
        "Mean ± standard deviation: of time and loss over the trainings, of the scores "
        "over the trainings and the probe's seeds. Where there is one training, the "
        "spread is the probe's alone. Time is that of all training steps; step time is "
        "the ratio to full that bench/step_time.py measures side by side. The "
        "teacher's loss is its own on what the students hear.",
        "",
        table(trainings, losses, rates, step_times, scores, teacher_loss),
        "",
        *grid_table({system: grid_losses(expdir, system) for system in trainings}),
        f"Made by `{args.command.strip()}` on {date.today()} with espnet "
        f"{espnet.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, on CPU.",
    ]
    numbers = {
        name: {
            "trainings": [run._asdict() for run in trainings.get(name, [])],
            "learning_rates": grid_losses(expdir, name),
            "scores": scores[name],
        }
        for name in scores
    }
    results = expdir / "comparison.json"
    results.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    put_between_marks(Path(args.readme), "\n".join(body))
    print("\n".join(body))


if __name__ == "__main__":
    main()
