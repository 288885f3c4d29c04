#!/usr/bin/env python3
"""LibriSpeech to distil on: train_960 (or other splits put together) and dev."""

import argparse
import logging
from pathlib import Path
from typing import Optional, Sequence

from librispeech import DEV, SOURCE, find_corpus, prepare

from dldkit.data.datadir import read_table, write_data_dir
from dldkit.errors import UserError, report_user_errors

SPLITS = "train-clean-100 train-clean-360 train-other-500".split()


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--splits", nargs="+", choices=SPLITS, default=SPLITS, help="to train on"
    )
    parser.add_argument("--name", default="train_960", help="what they are together")
    parser.add_argument("--data_dir", default="data", help="where the sets go")
    parser.add_argument("--download_dir", default="downloads", help="where corpora go")
    parser.add_argument("--nj", type=int, default=2, help="threads that read headers")
    return parser


def combine(sets: Sequence[Path], dst: Path) -> None:
    """Write one data directory from several.

    Raises:
        UserError: they share an utterance.
    """
    tables: dict[str, dict[str, str]] = {"wav_scp": {}, "text": {}, "utt2spk": {}}
    total = 0
    for directory in sets:
        for name, table in tables.items():
            table.update(read_table(directory / name.replace("_scp", ".scp")))
        total += len(read_table(directory / "utt2spk"))
    if len(tables["utt2spk"]) < total:
        raise UserError(f"{', '.join(map(str, sets))} share utterances")
    write_data_dir(dst, SOURCE, **tables)
    logging.info(f"{dst.name}: {total} utterances")


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    logging.basicConfig(
        level="INFO", format="%(asctime)s (%(module)s:%(lineno)d) %(message)s"
    )
    args = get_parser().parse_args(cmd)
    splits = [*args.splits, *DEV]
    data_dir = Path(args.data_dir)
    prepare(splits, find_corpus(splits, args.download_dir), data_dir, args.nj)
    combine([data_dir / s.replace("-", "_") for s in args.splits], data_dir / args.name)


if __name__ == "__main__":
    main()
