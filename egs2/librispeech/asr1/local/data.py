#!/usr/bin/env python3
"""LibriSpeech, 960 hours: train_960 from the three training splits, dev, and tests."""

from pathlib import Path

from dldkit.data.corpus import corpus_parser
from dldkit.data.librispeech import DEV, TEST, TRAIN, find_librispeech, prepare
from dldkit.errors import report_user_errors
from dldkit.options import parse

SETS = {
    "train_960": TRAIN,
    "dev": DEV,
    **{split.replace("-", "_"): (split,) for split in (*DEV, *TEST)},
}


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    args = parse(corpus_parser(__doc__, nj=2), cmd)
    corpus = find_librispeech([*TRAIN, *DEV, *TEST], args.download_dir)
    prepare(SETS, corpus, Path(args.data_dir), args.nj)


if __name__ == "__main__":
    main()
