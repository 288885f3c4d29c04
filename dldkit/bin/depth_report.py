#!/usr/bin/env python3
"""Report WER, CER, parameters, MACs and RTF of each system at each encoder depth."""

import argparse
import shlex
import sys
from pathlib import Path
from typing import Optional, Sequence

from espnet2.utils.types import str_or_none

from dldkit.data.datadir import test_set_dir
from dldkit.depth.selector import SELECTORS
from dldkit.depth.thresholds import FILE
from dldkit.errors import UserError, report_user_errors
from dldkit.options import command_parser, depth_list, named_paths, parse
from dldkit.report.report import make_report
from dldkit.step import Step


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser(__doc__)
    add = parser.add_argument
    add(
        "--system",
        nargs="+",
        action="extend",
        required=True,
        metavar="NAME=EXP",
        help="systems to compare: the name in the table, and the experiment directory",
    )
    add("--data_root", required=True, help="where the test sets lie: dump/raw")
    add("--test_sets", required=True, help='names of test sets: "a b"')
    add("--depths", required=True, type=depth_list, help='layers: "12 10 8 6 4 2"')
    add(
        "--inference_tag",
        required=True,
        help="results are in EXP/TAG/depthN/SET and, of early stopping, thresholdT/SET",
    )
    add("--inference_asr_model", required=True, help="the model file in EXP")
    add("--output_dir", required=True, help="for RESULTS.md, results.json and the plot")
    add("--selector", choices=list(SELECTORS), help="as in decoding")
    add(
        "--depth_profile",
        type=str_or_none,
        default="auto",
        help="auto = the one beside the model, or none; as in decoding",
    )
    add("--frame_shift", type=float, default=0.01, help="seconds, for feats.scp")
    add("--rtf_utts", type=int, default=20, help="utterances to time; 0: no RTF")
    add("--seed", type=int, default=0, help="of the bootstrap samples")
    return parser


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    # Not INFO: a line for every utterance would be timed with it.
    args = vars(parse(get_parser(), cmd, "WARNING"))
    if not args["test_sets"].split():
        raise UserError('--test_sets "": name at least one test set')
    if args["rtf_utts"] < 0:
        raise UserError(f"--rtf_utts {args['rtf_utts']}: it can not be less than 0")
    argv = sys.argv[1:] if cmd is None else cmd
    systems = named_paths("--system", args.pop("system"))
    output_dir = Path(args["output_dir"])
    files = {
        f"{name} {file.relative_to(exp)}": file
        for name, exp in systems.items()
        for pattern in (
            f"{args['inference_tag']}/*/*/text",
            f"{args['inference_tag']}/*/*/depth",
            f"{args['inference_tag']}/{FILE}",
            args["inference_asr_model"],
        )
        for file in sorted(exp.glob(pattern))
    }
    for test_set in args["test_sets"].split():
        for file in test_set_dir(args["data_root"], test_set).glob("*text"):
            files[f"{test_set} {file.name}"] = file
    record = output_dir / ".depth_report"
    with Step(record, files, keep=True, argv=list(argv)) as step:
        if step.done and (output_dir / "RESULTS.md").is_file():
            return
        args.update(
            systems=systems,
            test_sets=args["test_sets"].split(),
            command=shlex.join(["python3", "-m", "dldkit.bin.depth_report", *argv]),
        )
        print(make_report(**args))
    print(f"\nwritten: {output_dir / 'RESULTS.md'}")


if __name__ == "__main__":
    main()
