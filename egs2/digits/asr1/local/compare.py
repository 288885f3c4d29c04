#!/usr/bin/env python3
"""Put the comparison table of compare.sh between two marks of the README."""

import argparse
import json
import platform
from datetime import date
from pathlib import Path

from dldkit.data.datadir import read_source
from dldkit.errors import UserError, report_user_errors
from dldkit.report.scoring import score_files
from dldkit.report.tables import markdown, put_between_marks, spread

TAGS = {"uncalibrated": "no", "calibrated": "yes"}


def word_error_rates(args, test_set: str) -> dict[tuple[str, str, int], list[float]]:
    """Return WER in % of each seed, by (system, tag, depth)."""
    rates: dict[tuple[str, str, int], list[float]] = {}
    for system in args.systems.split():
        for tag in TAGS:
            for depth in map(int, args.depths.split()):
                files = [
                    Path(args.expdir)
                    / f"asr_{system}_seed{seed}/{tag}/depth{depth}/{test_set}/text"
                    for seed in args.seeds.split()
                ]
                found = [f for f in files if f.is_file()]
                if found and len(found) < len(files):
                    raise UserError(f"{set(files) - set(found)} are missing: run again")
                reference = Path(args.data_root) / test_set / "text"
                values = [100 * score_files(reference, f)[0].error_rate for f in found]
                if values:
                    rates[system, tag, depth] = values
    if not rates:
        raise UserError(f"nothing is decoded in {args.expdir}: run stages 1 to 3")
    return rates


def table(args, test_set: str) -> tuple[list[str], dict]:
    """Return the lines of the table of one test set, and its numbers."""
    depths = [int(d) for d in args.depths.split()]
    rates = word_error_rates(args, test_set)
    rows = []
    systems = list(dict.fromkeys(_row(s) for s in args.systems.split()))
    for system in systems:
        for tag, calibrated in TAGS.items():
            names = [f"static{d}" if system == "static" else system for d in depths]
            values = [rates.get((n, tag, d)) for n, d in zip(names, depths)]
            cells = ["" if v is None else spread(v, 2) for v in values]
            rows.append([_title(system), calibrated, *cells])
    lines = [
        f"**{test_set}**: {read_source(Path(args.data_root) / test_set)}",
        "",
        markdown(
            " | ".join(["system", "calibrated", *(f"depth {d}" for d in depths)]),
            rows,
            text_columns=2,
        ),
    ]
    numbers = [
        {"test_set": test_set, "system": s, "tag": t, "depth": d, "wer": values}
        for (s, t, d), values in rates.items()
    ]
    return lines + [""], numbers


def _row(system: str) -> str:
    return "static" if system.startswith("static") else system


def _title(system: str) -> str:
    return "static, one model per depth" if system == "static" else system


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("expdir", "systems", "seeds", "depths", "data_root", "test_sets"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--readme", required=True)
    parser.add_argument("--command", required=True)
    return parser


@report_user_errors
def main() -> None:
    """Write the table to the README, and its numbers beside the runs."""
    args = get_parser().parse_args()
    import espnet
    import torch

    body = [
        "Word error rate in %, mean ± standard deviation over the seeds "
        f"{args.seeds.replace(' ', ', ')}.",
        "",
    ]
    numbers = []
    for test_set in args.test_sets.split():
        lines, values = table(args, test_set)
        body += lines
        numbers += values
    body += [
        f"Made by `{args.command.strip()}` on {date.today()} with espnet "
        f"{espnet.__version__}, torch {torch.__version__}, Python "
        f"{platform.python_version()}, on CPU.",
    ]
    results = Path(args.expdir) / "comparison.json"
    results.write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    put_between_marks(Path(args.readme), "\n".join(body))
    print("\n".join(body))


if __name__ == "__main__":
    main()
