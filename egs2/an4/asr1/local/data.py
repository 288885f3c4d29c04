#!/usr/bin/env python3
"""AN4, letters, digits and names: train_nodev, train_dev and test, as in ESPnet."""

from pathlib import Path

from dldkit.data.an4 import read_transcripts
from dldkit.data.corpus import (
    compare,
    corpus_parser,
    describe,
    downloading,
    fetch,
    find_corpus,
    preparation,
    stems,
    unpack,
    whole,
)
from dldkit.data.from_lhotse import from_lhotse
from dldkit.errors import UserError, report_user_errors
from dldkit.options import parse

SOURCE = "AN4 (CMU), spelt letters, digits and names"
URL = "http://www.speech.cs.cmu.edu/databases/an4/an4_sphere.tar.gz"
PARTS = {"train": "an4_clstk", "test": "an4test_clstk"}
DEV = 100  # utterances, the first of the training part in the order of their names


def find_an4(download_dir: str, url: str = URL) -> Path:
    """Return the corpus's directory, after a download if $AN4 is not set."""
    needed = [f"etc/an4_{part}.transcription" for part in PARTS]
    needed += [f"wav/{folder}" for folder in PARTS.values()]
    corpus = find_corpus("AN4", "an4", needed)
    if corpus is not None:
        return corpus
    target = Path(download_dir).absolute()
    with downloading("AN4", "AN4"):
        if not (target / "an4" / ".completed").is_file():
            archive = target / "an4_sphere.tar.gz"
            fetch(url, archive)
            unpack(archive, target / "an4")
    return target / "an4"


def utterance_id(file: str) -> str:
    """Return ESPnet's name of `an251-fash-b`: `fash-an251-b`, the speaker first."""
    try:
        session, speaker, last = file.split("-")
    except ValueError:
        raise UserError(f"{file}: expected a name like an251-fash-b") from None
    return f"{speaker}-{session}-{last}"


def prepare(corpus: Path, data_dir: Path) -> None:
    """Write train_nodev, train_dev and test.

    Raises:
        UserError: a transcript is malformed, or a set would be empty.
    """
    for part, folder in PARTS.items():
        path = corpus / "etc" / f"an4_{part}.transcription"
        audio = stems((corpus / "wav" / folder).rglob("*.sph"))
        said = read_transcripts(path)
        dropped = compare(dict.fromkeys(said, f"a line of {path}"), audio)
        ids = {utterance_id(file): file for file in said if file in audio}
        names = sorted(ids)
        sets = {"train_dev": names[:DEV], "train_nodev": names[DEV:]}
        if part == "test":
            sets = {"test": names}
        for name, utts in sets.items():
            if not utts:
                raise UserError(
                    f"{corpus}: {len(names)} utterances of the {part} part have audio "
                    f"and transcript, and none of them is left for {name}"
                )
            directory = data_dir / name
            with preparation(directory, [path], audio.values(), dev=DEV) as step:
                if step.done:
                    continue
                recordings = [describe(audio[ids[utt]], utt) for utt in utts]
                supervisions = [
                    whole(
                        recording, said[ids[recording.id]], recording.id.split("-")[0]
                    )
                    for recording in recordings
                ]
                # what is single is listed once, with the larger set
                listed = {} if name == "train_dev" else dropped
                from_lhotse(recordings, supervisions, directory, SOURCE, listed)


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    args = parse(corpus_parser(__doc__), cmd)
    prepare(find_an4(args.download_dir), Path(args.data_dir))


if __name__ == "__main__":
    main()
