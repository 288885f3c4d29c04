#!/usr/bin/env python3
"""Make the token list, and the BPE model it needs beside it (stage 5)."""

import argparse

from dldkit.data.tokens import make_token_list
from dldkit.errors import report_user_errors
from dldkit.options import command_parser, parse, positive


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = command_parser(__doc__)
    parser.add_argument("--token_type", choices=("char", "bpe", "word"), default="bpe")
    parser.add_argument("--text", required=True, help="table: utterance, transcript")
    parser.add_argument("--output", required=True, help="token list to write")
    parser.add_argument("--nlsyms", help="file of symbols that are one token each")
    parser.add_argument(
        "--nbpe", type=positive, default=256, help="number of BPE units"
    )
    parser.add_argument("--bpe_mode", choices=("unigram", "bpe"), default="unigram")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Write the token list."""
    args = parse(get_parser(), cmd)
    make_token_list(**vars(args))


if __name__ == "__main__":
    main()
