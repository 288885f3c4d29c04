#!/usr/bin/env python3
"""LibriSpeech to distil on: train_960 (or other splits put together) and dev."""

from pathlib import Path

from dldkit.data.corpus import corpus_parser
from dldkit.data.librispeech import DEV, SUPERB, TRAIN, find_librispeech, prepare
from dldkit.errors import report_user_errors
from dldkit.options import parse


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    parser = corpus_parser(__doc__, nj=2)
    parser.add_argument(
        "--splits", nargs="+", choices=TRAIN, default=list(TRAIN), help="to train on"
    )
    parser.add_argument("--name", default="train_960", help="what they are together")
    args = parse(parser, cmd)
    splits = [*args.splits, *DEV]
    # stage 13 trains and tests SUPERB's tasks on the others
    hint = ", choose others with --splits"
    corpus = find_librispeech(splits, args.download_dir, besides=SUPERB, hint=hint)
    sets = {args.name: args.splits, "dev": DEV}
    prepare(sets, corpus, Path(args.data_dir), args.nj)


if __name__ == "__main__":
    main()
