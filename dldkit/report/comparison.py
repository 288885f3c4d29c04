"""Systems compared over seeds: the tables, with intervals of their differences."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dldkit.errors import UserError
from dldkit.report.runs import Run, macs_at, sampler_of, shortest_run
from dldkit.report.tables import markdown, spread

SAMPLES = 5000  # of the bootstrap
BUDGETS = {  # what trainings have in common, and how it is called in the tables
    "steps": "steps",
    "arithmetic": "arithmetic",
    "total": "arithmetic, the reference's included",
}


def difference(
    ours: Sequence[Run], theirs: Sequence[Run], test_set: str, depth: int, other: int
) -> tuple[float, float, float]:
    """Return the difference of two systems' error rates and its 95 % interval, in %.

    Seeds and utterances are drawn again, the same ones for both systems.

    Args:
        depth: of our runs; `other` that of theirs.

    Raises:
        UserError: when the systems have no seed in common.
    """
    by_seed = {run.seed: run for run in theirs}
    pairs = [(run, by_seed[run.seed]) for run in ours if run.seed in by_seed]
    if not pairs:
        raise UserError(
            f"{ours[0].system} and {theirs[0].system} have no seed in common"
        )
    words = np.array(ours[0].words[test_set])
    more_errors = np.array(
        [
            np.subtract(a.errors[test_set][str(depth)], b.errors[test_set][str(other)])
            for a, b in pairs
        ]
    )
    # how often each seed and each utterance is in a sample
    rng = np.random.default_rng(0)
    seeds, utts = (
        rng.multinomial(number, np.full(number, 1 / number), SAMPLES)
        for number in more_errors.shape
    )
    totals = (seeds @ more_errors * utts).sum(1) / len(pairs)
    low, high = np.percentile(100 * totals / (utts @ words), [2.5, 97.5])
    return float(100 * more_errors.mean(0).sum() / words.sum()), float(low), float(high)


class Comparison:
    """Some systems, trained alike.

    Args:
        chosen: the runs of each system, one per seed.
        unit: a run of the deepest static model.
        epochs: of that model, whose cost is 1.
    """

    def __init__(self, chosen: Mapping[str, Sequence[Run]], unit: Run, epochs: int):
        self.runs, self.unit, self.epochs = chosen, unit, epochs
        self.static = {static_depth(s): s for s in chosen if static_depth(s)}
        self.dynamic = [s for s in chosen if not static_depth(s)]
        self.test_sets = list(unit.words)

    def costs(self) -> str:
        """Say what the trainings cost, that of the deepest static model being 1."""
        unit = self.unit
        steps = unit.steps / unit.epochs * self.epochs
        cost_of_unit = steps * macs_at(unit.macs, static_depth(unit.system))
        rows = []
        for system, runs in self.runs.items():
            depth = static_depth(system) or runs[0].depth
            cost = runs[0].steps * macs_at(unit.macs, depth) / cost_of_unit
            # a reference has all layers: the deepest static model, or early exit
            reference = runs[0].conf["model_conf"].get("reference")
            total = cost + (reference not in (None, "self"))
            seeds = " ".join(str(run.seed) for run in runs)
            row = [system, seeds, runs[0].epochs, runs[0].steps, f"{depth:.1f}"]
            rows.append([*row, f"{cost:.2f}", f"{total:.2f}"])
        header = "system | seeds | epochs | steps | mean depth | arithmetic"
        header += " | with the reference's"
        return markdown(header, rows, 2)

    def depths(self, test_set: str) -> list[int]:
        """Return the depths that any system was decoded at, the deepest first."""
        found = {int(d) for s in self.dynamic for d in self._errors(s, test_set)}
        return sorted(found | set(self.static), reverse=True)

    def scores(self, test_set: str) -> str:
        """Return the error rates of one test set."""
        depths = self.depths(test_set)
        rows = [["static, one model per depth"]]
        for depth in depths:
            system = self.static.get(depth)
            rows[0].append(self._spread(system, test_set, depth) if system else "")
        for system in self.dynamic:
            cells = [self._spread(system, test_set, depth) for depth in depths]
            rows.append([system, *cells])
        return markdown(" | ".join(["system", *map("depth {}".format, depths)]), rows)

    def differences(self, ours: str, test_set: str) -> str:
        """Return by how much one system differs from each of the others."""
        depths, seeds = self.depths(test_set), self._seeds(ours)
        rows = [["static"]]
        for depth in depths:
            # who has a smaller model that is better would not ship this one
            rivals = {d: s for d, s in self.static.items() if d <= depth}
            if not rivals:
                rows[0].append("")
                continue
            # the best of single seeds would be best by chance
            complete = [d for d, s in rivals.items() if seeds <= self._seeds(s)]
            best = min(
                complete or rivals, key=lambda d: self._rate(rivals[d], test_set, d)
            )
            rows[0].append(
                self._difference(ours, test_set, depth, rivals[best], best)
                + (f" (static{best})" if best != depth else "")
            )
        for other in self.dynamic:
            if other != ours:
                cells = [self._difference(ours, test_set, d, other, d) for d in depths]
                rows.append([other, *cells])
        header = " | ".join([f"{ours} less", *map("depth {}".format, depths)])
        return markdown(header, rows)

    def _seeds(self, system: str) -> set[int]:
        return {run.seed for run in self.runs[system]}

    def _errors(self, system: str, test_set: str) -> dict[str, list[int]]:
        run = self.runs[system][0]
        errors = run.errors[test_set]
        return {d: found for d, found in errors.items() if run.is_trained_at(int(d))}

    def _rate(self, system: str, test_set: str, depth: int) -> float:
        return float(np.mean(self._rates(system, test_set, depth)))

    def _rates(self, system: str, test_set: str, depth: int) -> list[float]:
        return [run.error_rate(test_set, depth) for run in self.runs[system]]

    def _spread(self, system: str, test_set: str, depth: int) -> str:
        if str(depth) not in self._errors(system, test_set):
            return ""
        return spread(self._rates(system, test_set, depth), 2)

    def _difference(
        self, ours: str, test_set: str, depth: int, other: str, other_depth: int
    ) -> str:
        for system, at in ((ours, depth), (other, other_depth)):
            if str(at) not in self._errors(system, test_set):
                return ""
        seeds = self._seeds(ours) & self._seeds(other)
        if not seeds:
            return "no common seed"
        found = difference(
            self.runs[ours], self.runs[other], test_set, depth, other_depth
        )
        text = "{:+.2f} [{:+.2f}, {:+.2f}]".format(*found)
        if len(seeds) == 1:  # of the spread between seeds, the interval knows nothing
            return f"{text}, one seed"
        return f"**{text}**" if found[1] > 0 or found[2] < 0 else text


def static_depth(system: str) -> int:
    """Return 6 for static6, and 0 for a system of variable depth."""
    digits = system.removeprefix("static")
    return int(digits) if system.startswith("static") and digits.isdigit() else 0


def _trained_as(run: Run) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the options that a run was trained with, but for its reference's path."""
    encoder, model = (dict(run.conf[f"{part}_conf"]) for part in ("encoder", "model"))
    model.pop("reference", None)
    # what is drawn may be written in several ways
    layers = max(map(int, run.macs))
    encoder["depth_sampler"] = sampler_of(encoder).weight_of_each_depth(layers)
    return encoder, model


def _refuse_other_sets(run: Run, unit: Run, first: Run) -> None:
    """Refuse a run that was decoded on other utterances, or at other depths.

    Args:
        unit: whose utterances count.
        first: of the same system, whose depths count.
    """
    name = f"{run.system}, {run.epochs} epochs, seed {run.seed}"
    for test_set in sorted({*run.words, *unit.words}):
        if run.words.get(test_set) != unit.words.get(test_set):
            raise UserError(
                f"{name}: it was decoded on another {test_set} than {unit.system}, "
                f"seed {unit.seed}, or just one of them was; decode both again with "
                "the same data, and move the files of before away"
            )
        depths, others = (sorted(r.errors[test_set], key=int) for r in (run, first))
        if depths != others:
            raise UserError(
                f"{name}: {test_set} was decoded at depth {' '.join(depths)}, with "
                f"seed {first.seed} at {' '.join(others)}; decode it at the same ones"
            )


def tables(
    runs: Sequence[Run],
    systems: Sequence[str],
    budgets: Mapping[str, Mapping[str, int]],
    epochs: int,
) -> str:
    """Return the tables of each budget: costs, then scores and differences by test set.

    Args:
        systems: the deepest static one first, and last the one to compare with all.
        budgets: the epochs of each system, by the name of the budget.
        epochs: of the deepest static model, whose cost is 1, as that of a reference is.

    Raises:
        UserError: when there is no run of the deepest static model, runs of one system
            had other options, or runs were decoded on other data.
    """
    unit = shortest_run(runs, systems[0])  # longer ones are of --budgets total
    parts = []
    for budget, planned in budgets.items():
        chosen = {
            system: [
                r for r in runs if (r.system, r.epochs) == (system, planned[system])
            ]
            for system in systems
        }
        chosen = {system: found for system, found in chosen.items() if found}
        if missing := [
            f"{s} ({planned[s]} epochs)" for s in systems if s not in chosen
        ]:
            logging.warning(f"equal {budget}: no run of {', '.join(missing)}")
        for system, (first, *others) in chosen.items():
            for run in others:
                if _trained_as(run) != _trained_as(first):
                    raise UserError(
                        f"{system}, {run.epochs} epochs: seeds {first.seed} and "
                        f"{run.seed} were trained with other options of encoder or "
                        "model (`conf` in their files): the system was changed in "
                        "between; move the older file away, and train again"
                    )
        for run in sum(chosen.values(), []):
            _refuse_other_sets(run, unit, chosen[run.system][0])
        compared = Comparison(chosen, unit, epochs)
        title = f"equal {BUDGETS[budget]}"
        parts += [f"## {title.capitalize()}", compared.costs()]
        for test_set in compared.test_sets:
            parts += [f"### {test_set}, {title}", compared.scores(test_set)]
            if systems[-1] in compared.dynamic:
                parts.append(compared.differences(systems[-1], test_set))
    return "\n\n".join(parts)
