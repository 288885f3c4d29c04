"""Word error rate against depth, and against cost."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, Union

import numpy as np

from dldkit.report.results import Result, test_sets_of


def plot(
    results: Sequence[Result], test_sets: dict[str, str], path: Union[str, Path]
) -> None:
    """Draw WER against depth and against MACs, one line per system, CI as bars.

    Early stopping has a dashed line of its own, with hollow marks, against the mean
    depth. Each test set has one row of two panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = test_sets_of(results)
    systems = list(dict.fromkeys(result.system for result in results))
    figure, rows = pyplot.subplots(
        len(names),
        2,
        figsize=(11, 0.4 + 4.2 * len(names)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for panels, test_set in zip(rows, names):
        here = [result for result in results if result.test_set == test_set]
        for i, (system, stops) in enumerate(product(systems, (False, True))):
            points = sorted(
                (
                    r
                    for r in here
                    if r.system == system and (r.threshold is not None) == stops
                ),
                key=lambda r: r.depth,
            )
            if not points:
                continue
            wer = 100 * np.array([r.words.error_rate for r in points])
            low, high = 100 * np.array([r.interval for r in points]).T
            bars = [np.clip(wer - low, 0, None), np.clip(high - wer, 0, None)]
            x_values = (
                [r.depth for r in points],
                [(r.macs_per_second or np.nan) / 1e6 for r in points],
            )
            style = dict(linestyle="--", markerfacecolor="white") if stops else {}
            for panel, x in zip(panels, x_values):
                panel.errorbar(
                    x,
                    wer,
                    yerr=bars,
                    label=f"{system}, early stopping" if stops else system,
                    color=f"C{i // 2 % 10}",
                    marker="osD^vPX*"[i // 2 % 8],
                    capsize=3,
                    clip_on=False,  # a WER of 0 lies on the frame
                    **style,
                )
        _scale(panels[0], [100 * r.words.error_rate for r in here])
        panels[0].set_xticks(sorted({r.depth for r in results if r.threshold is None}))
        panels[0].set_xlabel("encoder layers")
        panels[1].set_xlabel("million MACs per second of audio")
        panels[0].set_title(test_set, loc="left", fontweight="bold")
        panels[1].set_title(f"speech: {test_sets[test_set]}", loc="right", fontsize=8)
        for panel in panels:
            panel.grid(True, alpha=0.3)
        panels[1].legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _scale(panel: Any, wer: Sequence[float]) -> None:
    """Label the WER axis, in logarithmic steps if a linear one would hide a system."""
    panel.set_ylabel("WER % (95 % CI)")
    above_one = [max(rate, 1.0) for rate in wer]
    if max(above_one) / min(above_one) <= 8:
        panel.set_ylim(bottom=0)
        return
    # A shallow static model is near 100 % where the others differ by a few percent.
    # Below 1 % the axis is linear, so that a WER of zero stays on it.
    panel.set_yscale("symlog", linthresh=1, linscale=0.5)
    ticks = [0, 1, 2, 5, 10, 20, 50, 100]
    panel.set_yticks(ticks, [str(tick) for tick in ticks])
    panel.set_ylim(0, max(110.0, 1.1 * max(wer)))
    panel.set_ylabel("WER % (95 % CI), logarithmic above 1")
