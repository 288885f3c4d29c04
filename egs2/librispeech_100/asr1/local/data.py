#!/usr/bin/env python3
"""LibriSpeech, 100 hours: a set for each split, and dev from both development sets."""

from pathlib import Path

from dldkit.data.corpus import corpus_parser
from dldkit.data.librispeech import DEV, TEST, TRAIN, find_librispeech, prepare
from dldkit.errors import report_user_errors
from dldkit.options import parse

SPLITS = [TRAIN[0], *DEV, *TEST]


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    parser = corpus_parser(__doc__, nj=2)
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=[*TRAIN, *DEV, *TEST],
        default=SPLITS,
        help="parts of the corpus",
    )
    args = parse(parser, cmd)
    hint = ", choose others with --splits"
    corpus = find_librispeech(args.splits, args.download_dir, hint=hint)
    sets = {split.replace("-", "_"): [split] for split in args.splits}
    if dev := [split for split in DEV if split in args.splits]:
        sets["dev"] = dev
    prepare(sets, corpus, Path(args.data_dir), args.nj)


if __name__ == "__main__":
    main()
