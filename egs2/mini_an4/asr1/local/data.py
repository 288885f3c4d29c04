#!/usr/bin/env python3
"""The eight real AN4 recordings that the espnet package carries: a smoke test.

The corpus has six recordings in its training part and two in its test part. The two of
one training speaker (mwhw) make the development set, so the three sets are disjoint,
in recordings and in speakers.
"""

import importlib.util
import logging
import tarfile
from pathlib import Path

from dldkit.data.an4 import read_transcripts
from dldkit.data.corpus import corpus_parser
from dldkit.data.datadir import write_data_dir
from dldkit.errors import UserError, report_user_errors
from dldkit.options import parse

ARCHIVE = "egs3/mini_an4/esp2_asr/downloads.tar.gz"
SOURCE = "AN4 (CMU), eight real recordings"
DEV_SPEAKER = "mwhw"
# The archive has this recording, but not its line of AN4's an4_train.transcription.
LEFT_OUT = {"cen7-fash-b": "TWO SIX EIGHT FOUR FOUR ONE EIGHT"}


def find_archive() -> Path:
    """Return the archive inside the installed espnet package.

    Raises:
        UserError: espnet is not installed, or carries no archive.
    """
    package = ARCHIVE.split("/")[0]
    spec = importlib.util.find_spec(package)
    for place in (spec.submodule_search_locations or []) if spec else []:
        path = Path(place).parent / ARCHIVE
        if path.is_file():
            return path
    raise UserError(f"the installed espnet lacks {ARCHIVE}: pip install espnet==202611")


def prepare(download_dir: Path, data_dir: Path) -> None:
    """Unpack the recordings and write the three data directories."""
    top = "downloads/"
    with tarfile.open(find_archive()) as archive:
        members = [
            member.replace(name=member.name.removeprefix(top))
            for member in archive
            if member.name.startswith(f"{top}an4/")
        ]
        archive.extractall(download_dir, members, filter="data")
    root = download_dir / "an4"
    sets: dict[str, dict[str, dict[str, str]]] = {}
    for part, folder in (("train", "an4_clstk"), ("test", "an4test_clstk")):
        transcripts = read_transcripts(root / "etc" / f"an4_{part}.transcription")
        if part == "train":
            transcripts.update(LEFT_OUT)
        for name, words in transcripts.items():
            (path,) = (root / "wav" / folder).glob(f"*/{name}.sph")
            speaker = path.parent.name
            dev = "train_dev" if speaker == DEV_SPEAKER else "train_nodev"
            tables = sets.setdefault("test" if part == "test" else dev, {})
            utt = f"{speaker}-{name}"
            for table, value in zip(
                ("wav_scp", "text", "utt2spk"), (str(path), words, speaker)
            ):
                tables.setdefault(table, {})[utt] = value
    for name, tables in sets.items():
        write_data_dir(data_dir / name, SOURCE, **tables)
        logging.info(f"{name}: {len(tables['text'])} utterances")


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    args = parse(corpus_parser(__doc__), cmd)
    prepare(Path(args.download_dir), Path(args.data_dir))


if __name__ == "__main__":
    main()
