"""Thresholds of early stopping: chosen for mean depths, and noted for the report.

It needs no torch, so that the report's --help is quick.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

FILE = Path("exit_thresholds", "thresholds.json")  # in the decoding directory


def threshold_name(threshold: float) -> str:
    """Return the name of the directory of what was decoded with a threshold."""
    return f"threshold{threshold:g}"


def read_thresholds(decoding_dir: Path) -> list[float]:
    """Return the thresholds that were decoded with; [] if there were none."""
    path = decoding_dir / FILE
    return json.loads(path.read_text()) if path.is_file() else []


def choose_thresholds(
    entropies: np.ndarray, exits: Sequence[int], deepest: int, targets: Sequence[int]
) -> dict[float, float]:
    """Return the threshold that comes nearest to each mean depth, and that depth.

    Args:
        entropies: of each utterance at each exit (Utterances, Exits).
        exits: their depths, ascending.
        deepest: where the others leave.
        targets: the mean depths that are wanted; those outside the exits have none,
            and where none of several is inside, it is the middle.
    """
    if not (exits and len(entropies)):
        return {}
    wanted: list[float] = [d for d in targets if exits[0] < d < deepest]
    if not wanted and len(targets) > 1:
        wanted = [(exits[0] + deepest) / 2]
    # rounded first, because a threshold is a name as well
    candidates = sorted({float(f"{value:.3g}") for value in entropies.flatten()})
    means = {t: mean_depth(entropies, exits, deepest, t) for t in candidates}
    chosen = {}
    for target in wanted:
        best = min(means, key=lambda t: abs(means[t] - target))
        chosen[best] = means[best]
    return chosen


def mean_depth(
    entropies: np.ndarray, exits: Sequence[int], deepest: int, threshold: float
) -> float:
    """Return the mean depth that utterances leave at; see `choose_thresholds`."""
    leaves = np.pad(entropies < threshold, ((0, 0), (0, 1)), constant_values=True)
    return float(np.array([*exits, deepest])[leaves.argmax(1)].mean())
