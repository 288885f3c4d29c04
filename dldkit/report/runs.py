"""Trainings that are compared: one small file each, and what they cost."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Union

import numpy as np
from omegaconf import DictConfig

from dldkit.data.datadir import test_set_dir
from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError
from dldkit.report.report import environment
from dldkit.report.results import refuse_older
from dldkit.report.scoring import Score, score_files, symbols_of
from dldkit.step import atomic

TRAINING = "optim optim_conf scheduler scheduler_conf accum_grad grad_clip"
TRAINING += " batch_type batch_size batch_bins"


@dataclass
class Run:
    """One training of one system, and how many errors it makes at which depth.

    Attributes:
        system: its name in the comparison.
        macs: multiply-accumulates per second of audio, by the number of layers.
        depth: mean number of layers that the forwards of a training step run.
        words: of each utterance, by test set.
        errors: of each utterance, by test set and depth.
        conf: options of encoder and model that it was trained with.
        training: options of its optimiser and batches; files from before there was
            this have none.
    """

    system: str
    seed: int
    epochs: int
    steps: int
    depth: float
    macs: dict[str, int]
    words: dict[str, list[int]]
    errors: dict[str, dict[str, list[int]]]
    conf: dict[str, Any]
    environment: dict[str, str]
    training: dict[str, Any] = field(default_factory=dict)

    def save(self, path: Path) -> None:
        """Write the run to a file of a few kilobytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        short = (",", ":")
        lines = [
            f"{json.dumps(name)}:{json.dumps(value, separators=short)}"
            for name, value in asdict(self).items()
        ]
        with atomic(path) as new:
            new.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    def is_trained_at(self, depth: int) -> bool:
        """Say whether a depth is one that the model is trained at."""
        encoder, layers = self.conf["encoder_conf"], max(map(int, self.macs))
        return sampler_of(encoder).trains(depth, layers)

    def error_rate(self, test_set: str, depth: int) -> float:
        """Return the word error rate in %."""
        errors = self.errors[test_set][str(depth)]
        return 100 * sum(errors) / sum(self.words[test_set])


def macs_at(macs: Mapping[str, int], depth: float) -> float:
    """Return what a forward costs at any depth: layers cost alike."""
    deepest = max(map(int, macs))
    layer = (macs[str(deepest)] - macs["1"]) / max(deepest - 1, 1)
    return macs["1"] + (depth - 1) * layer


def load_runs(directory: Path) -> list[Run]:
    """Read all runs in a directory.

    Raises:
        UserError: for a file that holds none.
    """
    runs = []
    for path in sorted(directory.glob("*.json")):
        try:
            runs.append(Run(**json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is no run of a comparison ({error}): remove it")
    return runs


def record(exp: Path, inference_tag: str, name: str, seed: int, data_root: Path) -> Run:
    """Return what a trained and decoded experiment gave.

    Raises:
        UserError: when it is not decoded yet, or its encoder has no run-time depth.
    """
    import torch

    from dldkit.asr.loading import load_asr_model
    from dldkit.report.cost import macs

    errors: dict[str, dict[str, list[int]]] = {}
    words: dict[str, list[int]] = {}
    symbols = symbols_of(exp)
    for text in sorted((exp / inference_tag).glob("depth*/*/text")):
        depth, test_set = text.parts[-3].removeprefix("depth"), text.parts[-2]
        data_dir = test_set_dir(data_root, test_set)
        score: Score = score_files(data_dir / "text", text, symbols)[0]
        words[test_set] = score.lengths.tolist()
        errors.setdefault(test_set, {})[depth] = score.errors.tolist()
    if not errors:
        raise UserError(f"{exp}/{inference_tag} has no decoded text: run stage 12")
    depths = sorted({int(depth) for by_depth in errors.values() for depth in by_depth})
    refuse_older(exp, inference_tag, "valid.loss_ctc.ave.pth", list(words), depths)
    states = torch.load(exp / "checkpoint.pth", map_location="cpu", weights_only=False)
    epochs = [stats["train"] for stats in states["reporter"]["stats"].values()]
    model, train_args = load_asr_model(exp)
    if not hasattr(model.encoder, "set_depth"):
        raise UserError(f"{exp}: compare models of an ld_* encoder")
    layers = len(model.encoder.gates)
    found = {}
    silence = np.zeros(10 * train_args.frontend_conf.get("fs", 16000), np.float32)
    for depth in range(1, layers + 1):
        model.encoder.gates.select(tuple(range(depth)))  # all layers cost alike
        found[str(depth)] = macs(model, silence) // 10
    conf = {part: getattr(train_args, part) for part in ("encoder_conf", "model_conf")}
    # no path of this machine
    reference = conf["model_conf"].get("reference")
    if reference not in (None, "self"):
        conf["model_conf"]["reference"] = os.path.relpath(reference, exp.parent)
    pretrained = conf["encoder_conf"].get("model")
    if pretrained and os.path.isabs(pretrained):
        conf["encoder_conf"]["model"] = os.path.basename(pretrained)
    return Run(
        system=name,
        seed=seed,
        epochs=len(epochs),
        steps=int(epochs[-1]["total_count"]),
        depth=float(np.mean([_layers_of_step(e, layers) for e in epochs])),
        macs=found,
        words=words,
        errors=errors,
        conf=conf,
        environment=environment(),
        training={name: getattr(train_args, name) for name in TRAINING.split()},
    )


def refuse_other_training(
    runs: Sequence[Run], system: str, config: Mapping[str, Any]
) -> None:
    """Refuse runs of a system that another training config made.

    Raises:
        UserError: naming the run, and what differs.
    """
    for run in (run for run in runs if run.system == system):
        for name in TRAINING.split():
            found, wanted = run.training.get(name), config.get(name)
            if None in (found, wanted):
                continue
            if isinstance(wanted, Mapping):  # ESPnet adds the defaults of the others
                found = {key: found.get(key) for key in wanted}
            if found != wanted:
                raise UserError(
                    f"{system}, {run.epochs} epochs, seed {run.seed}: it was trained "
                    f"with {name} {found}, and --asr_config has {wanted}: choose "
                    "another --results"
                )


def _layers_of_step(epoch: Mapping[str, Any], layers: int) -> float:
    """Return how many layers an epoch's steps ran; a static model reports none.

    A training from before there was `layers_run` has `depth`, the mean of a step's
    forwards, which are one but with a sandwich.
    """
    return float(epoch.get("layers_run", epoch.get("depth", layers)))


def sampler_of(encoder: Mapping[str, Any]) -> DepthSampler:
    """Build the sampler of an `encoder_conf`."""
    name = encoder.get("depth_sampler", "bernoulli")
    if isinstance(name, Mapping):  # JSON's keys are strings
        name = {int(depth): weight for depth, weight in name.items()}
    options = "keep_prob", "min_depth", "layer_choice", "exits"
    return DepthSampler(
        name, **{key: encoder[key] for key in options if key in encoder}
    )


def mean_depth(config: Union[DictConfig, Mapping[str, Any]]) -> float:
    """Return how many layers the forwards of a training step run, on average."""
    encoder, model = config["encoder_conf"], config.get("model_conf") or {}
    number = encoder["num_blocks"]
    sampler = sampler_of(encoder)
    weights = sampler.weight_of_each_depth(number)
    drawn = float(np.average(list(weights), weights=list(weights.values())))
    sandwich = model.get("sandwich")
    if model.get("reference") == "self" and sandwich is None and not sampler.is_full:
        sandwich = 1
    if sandwich is None:
        return drawn
    if sampler.layer_choice == "prefix":
        return number  # the smaller depths lie on the way
    return number + sampler.smallest(number) + sandwich * drawn


def shortest_run(runs: Sequence[Run], system: str) -> Run:
    """Return the run of a system that has the fewest epochs.

    Raises:
        UserError: when there is none.
    """
    found = [run for run in runs if run.system == system]
    if not found:
        raise UserError(f"there is no run of {system} yet: run stage 2")
    return min(found, key=lambda run: run.epochs)


def epochs_of_equal_cost(
    runs: Sequence[Run], deepest: str, epochs: int, depth: float
) -> int:
    """Return how many epochs at a mean depth cost as much as those of a static model.

    Raises:
        UserError: when there is no run of that static model.
    """
    macs = shortest_run(runs, deepest).macs
    return round(epochs * macs_at(macs, max(map(int, macs))) / macs_at(macs, depth))
