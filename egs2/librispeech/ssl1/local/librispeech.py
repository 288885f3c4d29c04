#!/usr/bin/env python3
"""LibriSpeech, read by lhotse from $LIBRISPEECH, or downloaded."""

import argparse
import logging
import os
from pathlib import Path
from typing import Optional, Sequence

from lhotse.recipes.librispeech import (
    LIBRISPEECH,
    download_librispeech,
    prepare_librispeech,
)

from dldkit.data.datadir import write_data_dir
from dldkit.errors import UserError, report_user_errors

SOURCE = "LibriSpeech, real recordings (CC BY 4.0)"
SPLITS = "train-clean-100 dev-clean dev-other test-clean test-other".split()
DEV = ("dev-clean", "dev-other")


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--splits", nargs="+", default=SPLITS, help="parts of the corpus"
    )
    parser.add_argument("--data_dir", default="data", help="where the sets go")
    parser.add_argument("--download_dir", default="downloads", help="where corpora go")
    parser.add_argument("--nj", type=int, default=2, help="threads that read headers")
    return parser


def find_corpus(splits: Sequence[str], download_dir: str) -> Path:
    """Return the LibriSpeech directory, after a download if $LIBRISPEECH is not set.

    Raises:
        UserError: $LIBRISPEECH lacks a split, or the download fails.
    """
    home = os.environ.get("LIBRISPEECH")
    if home:
        corpus = Path(home)
        if (corpus / "LibriSpeech").is_dir():
            corpus /= "LibriSpeech"
        missing = [split for split in splits if not (corpus / split).is_dir()]
        if missing:
            raise UserError(
                f"LIBRISPEECH={home} lacks {' '.join(missing)}: complete the corpus, "
                "unset LIBRISPEECH to download it, or choose others with --splits"
            )
        return corpus
    try:
        return download_librispeech(download_dir, splits)
    except OSError as error:
        raise UserError(
            f"LibriSpeech can not be downloaded ({error}): set LIBRISPEECH to a copy"
        ) from error


def prepare(splits: Sequence[str], corpus: Path, data_dir: Path, nj: int) -> None:
    """Write one data directory per split, and `dev` from both development sets.

    Raises:
        UserError: a split has no utterances.
    """
    manifests = prepare_librispeech(corpus, dataset_parts=splits, num_jobs=nj)
    dev: dict[str, dict[str, str]] = {"wav_scp": {}, "text": {}, "utt2spk": {}}
    for split in splits:
        if split not in manifests or not len(manifests[split]["supervisions"]):
            raise UserError(f"{corpus / split} has no transcribed utterances")
        audio = manifests[split]["recordings"]
        tables = {
            "wav_scp": {r.id: str(Path(r.sources[0].source).resolve()) for r in audio},
            "text": {s.recording_id: s.text for s in manifests[split]["supervisions"]},
            # one speaker reads each chapter: utterance ids begin with the speaker's
            "utt2spk": {r.id: r.id.rsplit("-", 1)[0] for r in audio},
        }
        write_data_dir(data_dir / split.replace("-", "_"), SOURCE, **tables)
        logging.info(f"{split}: {len(tables['text'])} utterances")
        if split in DEV:
            for name, table in tables.items():
                dev[name].update(table)
    if dev["text"]:
        write_data_dir(data_dir / "dev", SOURCE, **dev)


@report_user_errors
def main(cmd: Optional[Sequence[str]] = None) -> None:
    """Run the command."""
    logging.basicConfig(
        level="INFO", format="%(asctime)s (%(module)s:%(lineno)d) %(message)s"
    )
    args = get_parser().parse_args(cmd)
    unknown = sorted(set(args.splits) - set(LIBRISPEECH))
    if unknown:
        raise UserError(
            f"--splits {' '.join(unknown)}: choose from {' '.join(LIBRISPEECH)}"
        )
    corpus = find_corpus(args.splits, args.download_dir)
    prepare(args.splits, corpus, Path(args.data_dir), args.nj)


if __name__ == "__main__":
    main()
