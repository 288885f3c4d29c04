#!/usr/bin/env python3
"""AISHELL-1: train, dev and test, in characters without spaces."""

from pathlib import Path

from dldkit.data.corpus import (
    Places,
    compare,
    corpus_parser,
    downloading,
    find_corpus,
    lines_of,
    preparation,
    reading,
    stems,
)
from dldkit.data.from_lhotse import from_lhotse
from dldkit.errors import UserError, report_user_errors
from dldkit.options import parse

SOURCE = "AISHELL-1, Mandarin read speech (Apache 2.0)"
SETS = ("train", "dev", "test")
TRANSCRIPT = Path("data_aishell", "transcript", "aishell_transcript_v0.8.txt")


def find_aishell(download_dir: str) -> Path:
    """Return the directory of data_aishell, after a download if $AISHELL is not set."""
    needed = [str(TRANSCRIPT), *(f"data_aishell/wav/{name}" for name in SETS)]
    corpus = find_corpus("AISHELL", "aishell", needed)
    if corpus is not None:
        return corpus
    from lhotse.recipes.aishell import download_aishell

    with downloading("AISHELL-1", "AISHELL"):
        return download_aishell(download_dir).absolute()


def read_transcript(path: Path) -> Places:
    """Return where each utterance's line is.

    Raises:
        UserError: a line is empty, or an utterance is there twice.
    """
    said = Places()
    for number, line in enumerate(lines_of(path), 1):
        if not line.split():
            raise UserError(f"{path}, line {number}: it is empty; remove it")
        said[line.split()[0]] = f"line {number} of {path}"
    return said


def prepare(corpus: Path, data_dir: Path) -> None:
    """Write train, dev and test.

    Raises:
        UserError: the transcript is malformed, or a set is empty.
    """
    transcript = corpus / TRANSCRIPT
    wavs = {n: stems((corpus / "data_aishell/wav" / n).rglob("*.wav")) for n in SETS}
    said = read_transcript(transcript)
    for name, audio in wavs.items():
        if not said.keys() & audio.keys():
            raise UserError(f"{corpus}: {name} has no recording with a transcript")
    steps = {
        name: preparation(data_dir / name, [transcript], audio.values())
        for name, audio in wavs.items()
    }
    if all(step.is_done() for step in steps.values()):
        return
    from lhotse.recipes import aishell

    with reading(aishell):
        manifests = aishell.prepare_aishell(corpus)
    everywhere = {id_ for audio in wavs.values() for id_ in audio}
    for name, step in steps.items():
        dropped = compare(said, wavs[name])
        dropped = {id_: why for id_, why in dropped.items() if id_ in wavs[name]}
        if name == "train":  # the transcript does not say to which set a line belongs
            dropped |= compare(
                {i: p for i, p in said.items() if i not in everywhere}, ()
            )
        with step:
            if not step.done:
                part = manifests[name]
                from_lhotse(
                    part["recordings"],
                    part["supervisions"],
                    data_dir / name,
                    SOURCE,
                    dropped,
                )


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    args = parse(corpus_parser(__doc__), cmd)
    prepare(find_aishell(args.download_dir), Path(args.data_dir))


if __name__ == "__main__":
    main()
