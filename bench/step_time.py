#!/usr/bin/env python3
"""What a distillation step takes, by depth and by what does not run in it.

All steps are measured side by side in one process, on random audio: the medians of
rounds of one step of each. They differ in the student's depth, and in what else runs:

    live             the teacher runs, and the student trains a CNN of its own
    cached           the student trains a CNN of its own; targets are given
    frozen           the teacher runs; its CNN runs once for both, and is not trained
    frozen cached    the student runs the teacher's CNN; targets are given
    features         targets and the output of the teacher's CNN are given

Arithmetic is that of matrix products and convolutions, forward and backward, in GFLOP
for a second of audio (two for a multiply-accumulate). Reading what is given is not in
the time: the DataLoader's workers do it. The JSON has `depths` (time of a step over
that at full depth) and `schedules` (the same for all steps of a growing run) for cached
targets, and both under the other names for the other steps.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import torch
import yaml
from steps import times_in_turns, trace, training_step
from tabulate import tabulate
from transformers import HubertConfig, HubertModel

from dldkit.depth.growth import boundaries
from dldkit.errors import UserError, report_user_errors
from dldkit.report.cost import counted_macs
from dldkit.sfm.model import SFMDistillModel
from dldkit.sfm.options import complete
from dldkit.sfm.teacher.protocol import Targets, Teacher

ROOT = Path(__file__).parents[1]
STUDENTS = dict(
    small=ROOT / "egs2/digits/ssl1/conf/train_sfm.yaml",
    paper=ROOT / "egs2/librispeech/ssl1/conf/train_sfm.yaml",  # of arXiv 2606.11766
)
NARROW = dict(hidden_size=384, intermediate_size=1536, num_attention_heads=6)
TEACHERS = dict(small=dict(NARROW, num_hidden_layers=4), base={})  # HuBERT-base
SCHEDULES = dict(equal=dict(schedule="equal"), prop1=dict(schedule="prop", alpha=1.0))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--student", default="small", choices=STUDENTS, help="of digits, or the paper")
    add("--teacher", help="the model of the live teacher; none: a random HuBERT")
    add(
        "--teacher_size", default="small", choices=TEACHERS, help="of the random HuBERT"
    )
    add("--depths", default="3 6 9 12", help="stages of growth; the last one is full")
    add("--batch_size", type=int, help="utterances; none: as the config")
    add("--seconds", type=float, help="of each utterance; none: as the config")
    add("--rounds", type=int, default=7, help="steps at each depth, after a first one")
    add("--num_threads", type=int, default=2, help="on CPU")
    add("--trace", action="store_true", help="print which operations take the time")
    add("--output_json", help="file for the ratios")
    return parser


def random_teacher(directory: str, size: str, student_conf: dict[str, Any]) -> str:
    """Save a HuBERT of this size, with a CNN as the student's."""
    cnn = {k: v for k, v in student_conf.items() if k.startswith(("conv_", "feat_e"))}
    HubertModel(HubertConfig(**TEACHERS[size], **cnn)).save_pretrained(directory)
    return directory


class Case:
    """A student, and what a step of it computes.

    Args:
        speech: (Batch, Samples), or features (Batch, Time, Channels).
        teacher: returns the targets.
    """

    def __init__(
        self,
        model: SFMDistillModel,
        speech: torch.Tensor,
        teacher: Callable[..., Targets],
    ):
        self.model, self.speech, self.teacher = model.train(), speech, teacher
        size = speech.size(1)
        self.lengths = torch.full((len(speech),), size)
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def loss(self) -> torch.Tensor:
        """Run a forward; on a GPU in lower precision, as the recipe trains."""
        kind = self.speech.device.type
        with torch.autocast(kind, enabled=kind == "cuda"):
            return self.model(self.speech, self.lengths)[0]

    def step(self, depth: int) -> None:
        """Run a training step of a depth."""
        self.model._teacher = self.teacher
        self.model.student.encoder.layers.select(range(depth))
        training_step(self.loss, self.optimizer)


def build_cases(
    student_conf: dict[str, Any], model_conf: dict[str, Any], speech: torch.Tensor
) -> dict[str, Case]:
    """Return the kinds of steps by their names; those that the CNNs allow."""
    lengths = torch.full((len(speech),), speech.size(1))

    def build(**options: Any) -> tuple[SFMDistillModel, Teacher]:
        torch.manual_seed(0)
        conf = complete({**model_conf, **options})
        model = SFMDistillModel(student_conf, **conf).to(speech.device)
        return model, model.open_teacher(speech.device)

    model, live = build()
    targets = live(speech, lengths)
    cases = dict(
        live=Case(model, speech, live), cached=Case(model, speech, lambda *_: targets)
    )
    try:
        frozen, live = build(cnn_init="teacher", freeze_cnn=True)
    except UserError as error:
        print(f"no steps with the teacher's CNN: {error}")
        return cases
    features, _ = frozen.cnn_features(speech, lengths)
    return {
        **cases,
        "frozen": Case(frozen, speech, live),
        "frozen cached": Case(frozen, speech, lambda *_: targets),
        "features": Case(frozen, features, lambda *_: targets),
    }


def measure(
    steps: dict[str, dict[int, Callable[[], None]]], rounds: int
) -> dict[str, dict[int, float]]:
    """Return the median seconds of each step, measured in turns."""
    flat = {
        (c, d): step for c, by_depth in steps.items() for d, step in by_depth.items()
    }
    times = times_in_turns(flat, rounds)
    return {
        case: {depth: statistics.median(times[case, depth]) for depth in by_depth}
        for case, by_depth in steps.items()
    }


def ratios(seconds: dict[int, float]) -> dict[str, dict[str, float]]:
    """Return the ratios of steps and of whole runs to those at full depth."""
    depths = sorted(seconds)
    of_depth = {str(d): seconds[d] / seconds[depths[-1]] for d in depths}
    of_schedule = {}
    for name, options in SCHEDULES.items():
        ends = [0, *boundaries(10**6, len(depths), **options), 10**6]
        steps = [end - begin for begin, end in itertools.pairwise(ends)]
        time_ = sum(n * ratio for n, ratio in zip(steps, of_depth.values()))
        of_schedule[name] = time_ / 10**6
    return {"depths": of_depth, "schedules": of_schedule}


def table(
    seconds: dict[str, dict[int, float]], arithmetic: dict[str, dict[int, float]]
) -> str:
    """Return the table of all cases; stages of growth are equal.

    Args:
        seconds, arithmetic: of a step by case and depth; the latter in GFLOP for a
            second of audio.
    """
    depths = sorted(seconds["live"])
    full = depths[-1]
    rows = []
    for name, times in seconds.items():
        row = [name, *(f"{times[depth]:.2f}" for depth in depths)]
        for of in (seconds, arithmetic):
            mean = statistics.fmean(of[name].values())
            if of is arithmetic:
                row.append(f"{of[name][full]:.1f}")
            row += [f"{mean:.2f}", f"{of['live'][full] / mean:.2f}"]
        rows.append(row)
    faster = f"live {full} / it"
    head = ["step", *(f"{depth} (s)" for depth in depths), "equal (s)", faster]
    head += [f"{full} (GFLOP)", "equal (GFLOP)", faster]
    align = ["left", *["right"] * (len(head) - 1)]
    return tabulate(rows, head, "github", colalign=align, disable_numparse=True)


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Measure, print a table, and write the ratios."""
    args = get_parser().parse_args(cmd)
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = yaml.safe_load(STUDENTS[args.student].read_text())
    seconds = args.seconds or config["collate_fn_conf"]["max_seconds"]
    batch_size = args.batch_size or config["batch_size"]
    depths = [int(depth) for depth in args.depths.split()]
    student_conf = config["student_conf"]
    if max(depths) != (layers := student_conf["num_hidden_layers"]):
        raise UserError(f"--depths end at {max(depths)}: {layers} in the student")

    speech = torch.randn(batch_size, int(seconds * 16000), device=device)
    with tempfile.TemporaryDirectory() as directory:
        teacher = args.teacher or random_teacher(
            directory, args.teacher_size, student_conf
        )
        conf = {**config["model_conf"], "teacher": teacher}
        cases = build_cases(student_conf, conf, speech)
    steps = {
        name: {depth: partial(case.step, depth) for depth in depths}
        for name, case in cases.items()
    }
    audio = batch_size * seconds
    arithmetic = {
        name: {depth: 2e-9 * counted_macs(step) / audio for depth, step in of.items()}
        for name, of in steps.items()
    }
    measured = measure(steps, args.rounds)
    print(f"{batch_size} x {seconds} s, median of {args.rounds} steps, {device}")
    print(table(measured, arithmetic))
    found = {name: ratios(times) for name, times in measured.items()}
    for name, ratio in found.items():
        of_full = ", ".join(f"{s} {r:.2f}" for s, r in ratio["schedules"].items())
        print(f"{name}: time of a growing run over one of full depth: {of_full}")
    if args.trace:
        print(trace({name: of[max(depths)] for name, of in steps.items()}))
    if args.output_json:
        result = {**found.pop("cached"), **found, "arithmetic": arithmetic}
        Path(args.output_json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
