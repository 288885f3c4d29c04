#!/usr/bin/env python3
"""How the time of a distillation step falls with the student's depth, as ratios.

All depths are measured side by side in one process, on random audio: the medians of
rounds of one step at each. The JSON has `depths` (time of a step over that at full
depth) and `schedules` (the same for all steps of a growing run) for cached targets, and
both under `live` for a teacher that runs in each step.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path
from typing import Callable, Optional, Sequence

import torch
import yaml
from steps import times_in_turns, training_step
from transformers import HubertConfig, HubertModel

from dldkit.depth.growth import boundaries
from dldkit.errors import UserError, report_user_errors
from dldkit.sfm.model import SFMDistillModel
from dldkit.sfm.options import complete

SMALL = Path(__file__).parents[1] / "egs2/digits/ssl1/conf/train_sfm.yaml"
SCHEDULES = dict(equal=dict(schedule="equal"), prop1=dict(schedule="prop", alpha=1.0))


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default=str(SMALL), help="config of sfm_distill_train")
    add("--teacher", help="the model of the live teacher; none: a small random HuBERT")
    add("--teacher_depth", type=int, default=4, help="layers of the random HuBERT")
    add("--depths", default="3 6 9 12", help="stages of growth; the last one is full")
    add("--batch_size", type=int, help="utterances; none: as the config")
    add("--seconds", type=float, help="of each utterance; none: as the config")
    add("--rounds", type=int, default=7, help="steps at each depth, after a first one")
    add("--num_threads", type=int, default=2, help="on CPU")
    add("--output_json", help="file for the ratios")
    return parser


def random_teacher(directory: str, num_layers: int) -> str:
    """Save a HuBERT of narrow layers."""
    config = HubertConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_attention_heads=6,
        num_hidden_layers=num_layers,
        conv_dim=[64] * 7,
    )
    HubertModel(config).save_pretrained(directory)
    return directory


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


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Measure, print a table, and write the ratios."""
    args = get_parser().parse_args(cmd)
    torch.set_num_threads(args.num_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = yaml.safe_load(Path(args.config).read_text())
    conf = config.get("model_conf", {})
    seconds = args.seconds or config.get("collate_fn_conf", {}).get("max_seconds", 15.6)
    batch_size = args.batch_size or config.get("batch_size", 16)
    depths = [int(depth) for depth in args.depths.split()]

    with tempfile.TemporaryDirectory() as directory:
        teacher = args.teacher or random_teacher(directory, args.teacher_depth)
        torch.manual_seed(0)
        model = SFMDistillModel(
            config["student_conf"], **complete({**conf, "teacher": teacher})
        ).to(device)
        live = model.open_teacher(device)
    layers = model.student.encoder.layers
    if max(depths) != len(layers):
        raise UserError(f"--depths end at {max(depths)}: {len(layers)} in the student")
    samples = int(seconds * 16000)
    speech = torch.randn(batch_size, samples, device=device)
    lengths = torch.full((batch_size,), samples, device=device)
    targets = live(speech, lengths)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step_of(teacher, shares_cnn: bool, depth: int) -> Callable[[], None]:
        def step() -> None:
            model._teacher, model._shares_cnn = teacher, shares_cnn
            layers.select(range(depth))
            training_step(lambda: model(speech, lengths)[0], optimizer)

        return step

    model.train()
    cases = {"cached": (lambda *_: targets, False), "live": (live, model._shares_cnn)}
    measured = measure(
        {c: {d: step_of(*how, d) for d in depths} for c, how in cases.items()},
        args.rounds,
    )
    found = {case: ratios(times) for case, times in measured.items()}
    print(f"{batch_size} x {seconds} s, median of {args.rounds} steps, {device}")
    for case, ratio in found.items():
        for depth, time_ in measured[case].items():
            of_full = ratio["depths"][str(depth)]
            print(f"{case:7} depth {depth:2}: {time_:8.3f} s, {of_full:.2f} of full")
        for name, of_full in ratio["schedules"].items():
            print(f"{case:7} schedule {name}: {of_full:.2f} of full")
    if args.output_json:
        result = {**found["cached"], "live": found["live"]}
        Path(args.output_json).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
