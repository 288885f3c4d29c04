#!/usr/bin/env python3
"""Compare speech models by linear probes of their hidden states on spoken digits.

It is a probe suite, not SUPERB; see egs2/TEMPLATE/ssl1/superb.sh for that.
"""

import argparse
import logging
import shlex
import sys
from pathlib import Path
from typing import Optional, Sequence

from dldkit.errors import UserError, report_user_errors


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add(
        "--upstream",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=PATH",
        help="models to compare: the name in the table, and a directory that "
        "sfm_export wrote, or a teacher",
    )
    for name, what in (
        ("digits", "single digits: wav.scp, text (one word), utt2spk"),
        ("strings", "digit strings: wav.scp, text"),
    ):
        add(f"--{name}", nargs=2, required=True, metavar=("TRAIN", "TEST"), help=what)
    add("--output_dir", required=True, help="for RESULTS.md, probe.json and the cache")
    add("--seeds", default="0", help='of the probes; "0 1 2" adds their spread')
    add("--device", default="cpu", help="where the models run: cpu or cuda")
    return parser


def parse_upstreams(upstreams: Sequence[str]) -> dict[str, str]:
    """Split NAME=PATH.

    Raises:
        UserError: no name or no path, a name that is no file name, or one given twice.
    """
    pairs: dict[str, str] = {}
    for upstream in upstreams:
        name, _, path = upstream.partition("=")
        if not name or not path or Path(name).name != name:
            raise UserError(
                f"--upstream {upstream}: write NAME=PATH, such as full=exp/sfm_full/hf"
            )
        if name in pairs:
            raise UserError(f"--upstream: the name {name} stands there twice")
        pairs[name] = path
    return pairs


def parse_seeds(seeds: str) -> list[int]:
    """Split "0 1 2".

    Raises:
        UserError: something that is not a number, or no seed.
    """
    try:
        numbers = [int(seed) for seed in seeds.split()]
    except ValueError:
        numbers = []
    if not numbers:
        raise UserError(f'--seeds "{seeds}": write numbers, such as "0 1 2"')
    return list(dict.fromkeys(numbers))


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    args = vars(get_parser().parse_args(cmd))
    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s: %(message)s")
    argv = sys.argv[1:] if cmd is None else cmd
    args.update(
        upstreams=parse_upstreams(args.pop("upstream")),
        seeds=parse_seeds(args["seeds"]),
        command=shlex.join(["python3", "-m", "dldkit.bin.sfm_probe", *argv]),
    )
    from dldkit.sfm.probe import run_probes

    print(run_probes(**args))


if __name__ == "__main__":
    main()
