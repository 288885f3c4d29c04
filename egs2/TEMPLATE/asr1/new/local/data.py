#!/usr/bin/env python3
"""@NAME@: data/train, data/dev and data/test from the folders in $@VARIABLE@."""

from pathlib import Path

from dldkit.data.corpus import (
    compare,
    corpus_parser,
    describe,
    find_corpus,
    stems,
    whole,
)
from dldkit.data.datadir import read_table
from dldkit.data.from_lhotse import from_lhotse
from dldkit.errors import UserError, report_user_errors
from dldkit.options import parse

SOURCE = "@NAME@"
SETS = ("train", "dev", "test")
AUDIO = (".wav", ".flac", ".sph", ".mp3", ".ogg")


def prepare(corpus: Path, data_dir: Path) -> None:
    """Write a data directory for each set: the part to rewrite for another layout."""
    for name in SETS:
        said = read_table(corpus / name / "text", allow_empty=True)
        files = (corpus / name).rglob("*")
        audio = stems(file for file in files if file.suffix.lower() in AUDIO)
        recordings = [describe(audio[utt], utt) for utt in said if utt in audio]
        supervisions = [
            whole(recording, said[recording.id], recording.id.split("-")[0])
            for recording in recordings
        ]
        dropped = compare(dict.fromkeys(said, "a line of text"), audio)
        from_lhotse(recordings, supervisions, data_dir / name, SOURCE, dropped)


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    args = parse(corpus_parser(__doc__), cmd)
    needed = [f"{name}/text" for name in SETS]
    corpus = find_corpus("@VARIABLE@", ".", needed, download=False)
    if corpus is None:
        raise UserError(
            "set @VARIABLE@ to the directory that holds train, dev and test"
        )
    prepare(corpus, Path(args.data_dir))


if __name__ == "__main__":
    main()
