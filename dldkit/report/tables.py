"""Tables of results, in Markdown that also reads well in a terminal."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from tabulate import tabulate

from dldkit.errors import UserError
from dldkit.report.results import Result

BEGIN, END = "<!-- comparison: begin -->", "<!-- comparison: end -->"
SHOWN = 10  # utterances of a test set without text that a report names


def summary_table(results: Sequence[Result]) -> str:
    """Render the table of all systems, test sets and depths."""
    return markdown(
        "system | test set | depth | layers | WER % [95 % CI] | CER % | params "
        "| MMACs/s | RTF median (min-max)",
        (
            (
                r.system,
                r.test_set,
                r.depth,
                _slots(r.layers),
                *_error_rates(r),
                "-" if r.parameters is None else f"{r.parameters:,}",
                *_costs(r),
            )
            for r in results
        ),
        text_columns=2,
    )


def stopping_table(results: Sequence[Result]) -> str:
    """Render the table of early stopping: systems, test sets and thresholds."""
    return markdown(
        "early stopping | test set | threshold | mean depth | WER % [95 % CI] | CER % "
        "| MMACs/s | RTF median (min-max)",
        (
            (
                r.system,
                r.test_set,
                f"{r.threshold:g}",
                f"{r.depth:.1f}",
                *_error_rates(r),
                *_costs(r),
            )
            for r in results
        ),
        text_columns=2,
    )


def _error_rates(result: Result) -> tuple[str, str]:
    low, high = (100 * bound for bound in result.interval)
    return (
        f"{100 * result.words.error_rate:.2f} [{low:.2f}, {high:.2f}]",
        f"{100 * result.characters.error_rate:.2f}",
    )


def _costs(result: Result) -> tuple[str, str]:
    macs, rtf = result.macs_per_second, result.rtf
    return (
        "-" if macs is None else f"{macs / 1e6:.1f}",
        f"{median(rtf):.4f} ({min(rtf):.4f}-{max(rtf):.4f})" if rtf else "-",
    )


def espnet_table(results: Sequence[Result], unit: str, inference_tag: str) -> str:
    """Render scores as ESPnet's RESULTS.md does: percent of the reference units."""
    rows = []
    for result in results:
        total = getattr(result, unit).totals()
        rows.append(
            [
                f"{inference_tag}/{result.kind}/{result.test_set}",
                total["snt"],
                total["wrd"],
                *(
                    f"{100 * total[name] / total['wrd']:.1f}"
                    for name in ("corr", "sub", "del", "ins", "err")
                ),
                f"{100 * total['s_err'] / total['snt']:.1f}",
            ]
        )
    return markdown("dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err", rows, text_columns=1)


def not_decoded_lines(results: Sequence[Result]) -> str:
    """List the utterances of each test set that gave no text, and why, a line each."""
    lines = []
    for result in results:
        lost = result.not_decoded
        some = [f"{utt} ({lost[utt]})" for utt in sorted(lost)[:SHOWN]]
        more = [f"and {len(lost) - SHOWN} more, see results.json"] * (len(lost) > SHOWN)
        if lost:
            where = f"{result.system}, {result.test_set}, depth {result.depth}"
            lines.append(f"- {where}: {', '.join(some + more)}")
    return "\n".join(lines)


def markdown(header: str, rows: Iterable[Sequence[Any]], text_columns: int = 1) -> str:
    """Render a table.

    Args:
        header: names of the columns, between bars.
        text_columns: how many of them are text, the others are numbers.
    """
    names = [name.strip() for name in header.split("|")]
    aligned = ["left"] * text_columns + ["right"] * (len(names) - text_columns)
    return tabulate(
        [list(map(str, row)) for row in rows],
        names,
        tablefmt="pipe",
        disable_numparse=True,
        colalign=aligned,
    )


def spread(values: Sequence[float], digits: int) -> str:
    """Write mean ± standard deviation; of one value, that value alone."""
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{mean(values):.{digits}f} ± {stdev(values):.{digits}f}"


def put_between_marks(readme: Path, body: str) -> None:
    """Replace what stands between the two marks of a comparison in a README.

    Raises:
        UserError: it lacks a mark.
    """
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise UserError(f"{readme} lacks the marks {BEGIN} and {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    readme.write_text(f"{before}{BEGIN}\n{body}\n{END}{after}", encoding="utf-8")


def _slots(layers: Sequence[int]) -> str:
    """Write a set of layers shortly: 0-3,7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run))
        for run in runs
    )
