"""Systems compared over seeds: one small file per run, and the tables made of them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Union

import numpy as np
from omegaconf import DictConfig

from dldkit.depth.sampler import build_sampler
from dldkit.errors import UserError
from dldkit.report.report import environment
from dldkit.report.scoring import Score, score_files
from dldkit.report.tables import markdown, spread
from dldkit.step import atomic

SAMPLES = 5000  # of the bootstrap


@dataclass
class Run:
    """One training of one system, and how many errors it makes at which depth.

    Attributes:
        system: its name in the comparison.
        macs: multiply-accumulates per second of audio, by the number of layers.
        depth: mean number of layers over all training steps.
        words: of each utterance, by test set.
        errors: of each utterance, by test set and depth.
        conf: options of encoder and model that it was trained with.
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

    def save(self, path: Path) -> None:
        """Write the run to a file of a few kilobytes."""
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [f"{json.dumps(k)}: {json.dumps(v)}" for k, v in asdict(self).items()]
        with atomic(path) as new:
            new.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")

    @property
    def cost(self) -> float:
        """MACs per second of audio and epoch of the forwards that it was trained by."""
        return macs_at(self.macs, self.depth)

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
        UserError: when it is not trained and decoded yet.
    """
    import torch

    from dldkit.asr.loading import load_asr_model
    from dldkit.report.cost import macs

    errors: dict[str, dict[str, list[int]]] = {}
    words: dict[str, list[int]] = {}
    for text in sorted((exp / inference_tag).glob("depth*/*/text")):
        depth, test_set = text.parts[-3].removeprefix("depth"), text.parts[-2]
        score: Score = score_files(data_root / test_set / "text", text)[0]
        words[test_set] = score.lengths.tolist()
        errors.setdefault(test_set, {})[depth] = score.errors.tolist()
    if not errors:
        raise UserError(f"{exp}/{inference_tag} has no decoded text: run stage 12")
    states = torch.load(exp / "checkpoint.pth", map_location="cpu", weights_only=False)
    epochs = [stats["train"] for stats in states["reporter"]["stats"].values()]
    model, train_args = load_asr_model(exp)
    layers = len(model.encoder.gates)
    found = {}
    silence = np.zeros(10 * train_args.frontend_conf["fs"], np.float32)
    for depth in range(1, layers + 1):
        model.encoder.set_depth(depth)
        found[str(depth)] = macs(model, silence) // 10
    conf = {part: getattr(train_args, part) for part in ("encoder_conf", "model_conf")}
    conf["model_conf"].pop("reference", None)
    return Run(
        system=name,
        seed=seed,
        epochs=len(epochs),
        steps=int(epochs[-1]["total_count"]),
        depth=float(np.mean([float(e.get("depth", layers)) for e in epochs])),
        macs=found,
        words=words,
        errors=errors,
        conf=conf,
        environment=environment(),
    )


def mean_depth(config: Union[DictConfig, Mapping[str, Any]]) -> float:
    """Return how many layers the forwards of a training step run, on average."""
    encoder, model = config["encoder_conf"], config.get("model_conf") or {}
    number = encoder["num_blocks"]
    sampler = build_sampler(
        encoder.get("depth_sampler", "bernoulli"),
        encoder.get("keep_prob", 0.5),
        encoder.get("min_depth", 1),
        encoder.get("layer_choice", "random"),
    )
    weights = np.array(sampler.weights(number), dtype=float)
    weights[: sampler.min_depth - 1] = 0.0
    drawn = float(weights @ np.arange(1, number + 1) / weights.sum())
    sandwich = model.get("sandwich")
    if model.get("reference") == "self" and sandwich is None and not sampler.is_full:
        sandwich = 1
    if sandwich is None:
        return drawn
    if sampler.layer_choice == "prefix":
        return number  # the smaller depths lie on the way
    return number + sampler.min_depth + sandwich * drawn


def epochs_of_equal_cost(runs: Sequence[Run], deepest: str, epochs: int, depth: float):
    """Return how many epochs at a mean depth cost as much as those of a static model.

    Raises:
        UserError: when there is no run of that static model.
    """
    found = [run for run in runs if run.system == deepest]
    if not found:
        raise UserError(f"there is no run of {deepest} yet: run stage 2")
    macs = found[0].macs
    return round(epochs * macs_at(macs, max(map(int, macs))) / macs_at(macs, depth))


# --- tables ---------------------------------------------------------------------------


def difference(
    ours: Sequence[Run], theirs: Sequence[Run], test_set: str, depth: int, other: int
) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two systems' error rates, in %.

    Seeds and utterances are drawn again, the same ones for both systems.

    Args:
        depth: of our runs; `other` that of theirs.
    """
    ours, theirs = _of_common_seeds(ours, theirs)
    words = np.array(ours[0].words[test_set])
    differences = np.array(
        [
            np.subtract(a.errors[test_set][str(depth)], b.errors[test_set][str(other)])
            for a, b in zip(ours, theirs)
        ]
    )
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(SAMPLES):
        utts = rng.integers(len(words), size=len(words))
        seeds = rng.integers(len(ours), size=len(ours))
        total = differences[seeds][:, utts].sum() / len(ours)
        drawn.append(100 * total / words[utts].sum())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return float(low), float(high)


def _of_common_seeds(ours: Sequence[Run], theirs: Sequence[Run]):
    by_seed = {run.seed: run for run in theirs}
    common = [(run, by_seed[run.seed]) for run in ours if run.seed in by_seed]
    if not common:
        raise UserError(
            f"{ours[0].system} and {theirs[0].system} have no seed in common"
        )
    return tuple(zip(*common))


def tables(
    runs: Sequence[Run],
    systems: Sequence[str],
    budgets: Mapping[str, Mapping[str, int]],
) -> str:
    """Return a table of each budget and test set.

    Args:
        systems: their order; static ones share a row.
        budgets: the epochs of each system, by the name of the budget.
    """
    parts = []
    for budget, epochs in budgets.items():
        chosen = {
            system: [
                r for r in runs if (r.system, r.epochs) == (system, epochs[system])
            ]
            for system in systems
        }
        chosen = {system: found for system, found in chosen.items() if found}
        if not chosen:
            continue
        parts.append(f"### Equal {budget}\n")
        parts.append(_costs(chosen, systems[0]))
        some = next(iter(chosen.values()))[0]
        for test_set in some.words:
            parts.append(f"**{test_set}**\n")
            parts.append(_table(chosen, test_set))
    return "\n\n".join(parts)


def _static_depth(system: str) -> int:
    digits = system.removeprefix("static")
    return int(digits) if system.startswith("static") and digits.isdigit() else 0


def _costs(chosen: Mapping[str, Sequence[Run]], deepest: str) -> str:
    """Say what the trainings cost, the deepest static model's being 1."""
    full, *_ = chosen[deepest]
    rows = []
    for system, found in chosen.items():
        run = found[0]
        depth = _static_depth(system) or run.depth
        cost = run.steps * macs_at(full.macs, depth)
        cost /= full.steps * macs_at(full.macs, _static_depth(deepest))
        seeds = " ".join(str(r.seed) for r in found)
        rows.append(
            [system, seeds, run.epochs, run.steps, f"{depth:.1f}", f"{cost:.2f}"]
        )
    return markdown(
        "system | seeds | epochs | steps | mean depth | arithmetic", rows, 2
    )


def _table(chosen: Mapping[str, Sequence[Run]], test_set: str) -> str:
    """Return the error rates of one test set, with marks where systems differ."""
    static = {_static_depth(s): runs for s, runs in chosen.items() if _static_depth(s)}
    others = {s: runs for s, runs in chosen.items() if not _static_depth(s)}
    depths = {d for runs in others.values() for d in map(int, runs[0].errors[test_set])}
    depths = sorted(depths | set(static), reverse=True)

    def rates(runs: Sequence[Run], depth: int) -> list[float]:
        return [run.error_rate(test_set, depth) for run in runs]

    cells = [spread(rates(static[d], d), 2) if d in static else "" for d in depths]
    rows = [["static, one model per depth", *cells]]
    for system, runs in others.items():
        row = [system]
        for depth in depths:
            if str(depth) not in runs[0].errors[test_set]:
                row.append("")
                continue
            cell = spread(rates(runs, depth), 2)
            rivals = [d for d in static if d <= depth]
            if rivals:
                best = min(rivals, key=lambda d: np.mean(rates(static[d], d)))
                low, high = difference(runs, static[best], test_set, depth, best)
                cell += " ▲" if high < 0 else " ▼" if low > 0 else ""
            row.append(cell)
        rows.append(row)
    return markdown(" | ".join(["system", *(f"depth {d}" for d in depths)]), rows)
