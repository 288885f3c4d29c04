#!/usr/bin/env python3
"""Pack a trained model into a zip, and load it from there as a stranger would."""

import argparse
from collections.abc import Sequence

from dldkit.errors import report_user_errors
from dldkit.options import parse


def get_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="kind", required=True)
    for kind, what in (("asr", "speech recogniser"), ("ssl", "distilled student")):
        add = commands.add_parser(kind, help=what, description=__doc__).add_argument
        add("--model_file", required=True, help="checkpoint, beside its config.yaml")
        add("--outpath", required=True, help="the zip, in a directory for it alone")
        if kind == "asr":
            add("--data_dir", required=True, help="speech to try it on: dump/raw/test")
        else:
            add("--exports", nargs="*", default=[], help="directories to add: hf")
    return parser


@report_user_errors
def main(cmd: Sequence[str] | None = None) -> None:
    """Run the command."""
    from dldkit.pack import pack_asr, pack_ssl

    args = vars(parse(get_parser(), cmd, "WARNING"))
    pack = {"asr": pack_asr, "ssl": pack_ssl}[args.pop("kind")]
    pack(**args)


if __name__ == "__main__":
    main()
