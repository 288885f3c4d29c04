#!/usr/bin/env python3
"""Compare speech models by linear probes of their hidden states on spoken digits.

It is a probe suite, not SUPERB; see dldkit.bin.sfm_superb for that.
"""

import argparse
import shlex
import sys
from typing import Optional, Sequence

from dldkit.errors import report_user_errors
from dldkit.options import command_parser, named_paths, parse, seed_list


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
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
    add("--output_dir", required=True, help="for RESULTS.md and probe.json")
    add("--cache_dir", help="for hidden states; default: OUTPUT_DIR/hidden")
    add(
        "--seeds",
        type=seed_list,
        default="0",
        help='of the probes; "0 1 2" adds their spread',
    )
    add(
        "--device",
        default="cpu",
        choices=["cpu", "cuda"],
        help="where the models run",
    )
    return parser


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    args = vars(parse(get_parser(), cmd))
    argv = sys.argv[1:] if cmd is None else cmd
    args.update(
        upstreams=named_paths("--upstream", args.pop("upstream")),
        command=shlex.join(["python3", "-m", "dldkit.bin.sfm_probe", *argv]),
    )
    from dldkit.sfm.probe import run_probes

    print(run_probes(**args))


if __name__ == "__main__":
    main()
