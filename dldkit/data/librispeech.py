"""LibriSpeech, read by lhotse from $LIBRISPEECH, or downloaded."""

import logging
from collections.abc import Sequence
from pathlib import Path

from dldkit.data.corpus import (
    Places,
    compare,
    downloading,
    fetch,
    find_corpus,
    lines_of,
    md5_sums,
    preparation,
    reading,
    stems,
)
from dldkit.data.from_lhotse import from_lhotse
from dldkit.errors import UserError

SOURCE = "LibriSpeech, real recordings (CC BY 4.0)"
TRAIN = ("train-clean-100", "train-clean-360", "train-other-500")
DEV = ("dev-clean", "dev-other")
TEST = ("test-clean", "test-other")
SUPERB = ("train-clean-100", "dev-clean", "test-clean")
URL = "http://www.openslr.org/resources/12"


def find_librispeech(
    splits: Sequence[str],
    download_dir: str,
    url: str = URL,
    besides: Sequence[str] = (),
    hint: str = "",
) -> Path:
    """Return the LibriSpeech directory, after a download if $LIBRISPEECH is not set.

    Args:
        besides: splits to download, too; a directory that is named may lack them.
        hint: what the recipe's user may do about a split that is lacking.

    Raises:
        UserError: $LIBRISPEECH lacks a split, or the download fails.
    """
    corpus = find_corpus("LIBRISPEECH", "LibriSpeech", splits, hint)
    if corpus is not None:
        return corpus
    from lhotse.recipes.librispeech import download_librispeech

    splits = list(dict.fromkeys([*splits, *besides]))
    target = Path(download_dir)
    missing = [
        split
        for split in splits
        if not (target / "LibriSpeech" / split / ".completed").is_file()
    ]
    with downloading("LibriSpeech", "LIBRISPEECH"):
        sums = md5_sums(f"{url}/md5sum.txt") if missing else {}
        for split in missing:
            name = f"{split}.tar.gz"
            fetch(f"{url}/{name}", target / name, sums.get(name))
        base = url.rpartition("/")[0]
        return download_librispeech(target, splits, base_url=base).absolute()


def prepare(
    sets: dict[str, Sequence[str]], corpus: Path, data_dir: Path, nj: int
) -> None:
    """Write data directories, each from one split or several.

    Raises:
        UserError: a transcript is not UTF-8, an id is there twice, or nothing is left.
    """
    for name, splits in sets.items():
        transcripts = [
            path for s in splits for path in sorted((corpus / s).rglob("*.trans.txt"))
        ]
        audio = stems(path for s in splits for path in (corpus / s).rglob("*.flac"))
        if not transcripts:
            where = ", ".join(str(corpus / split) for split in splits)
            raise UserError(f"{where}: there are no transcripts (*.trans.txt)")
        with preparation(data_dir / name, transcripts, audio.values()) as step:
            if not step.done:
                _prepare(corpus, splits, transcripts, audio, data_dir / name, nj)


def _prepare(
    corpus: Path,
    splits: Sequence[str],
    transcripts: Sequence[Path],
    audio: dict[str, Path],
    directory: Path,
    nj: int,
) -> None:
    from lhotse.recipes import librispeech

    said = Places()
    empty = {}
    for path in transcripts:
        for number, line in enumerate(lines_of(path), 1):
            utt, *words = line.split() or [""]
            if utt:
                said[utt] = f"line {number} of {path}"
                if not words:
                    empty[utt] = f"empty transcript: {said[utt]}"

    def parse(part, line, alignments):  # lhotse ends at a line without words
        return original(part, line, alignments) if len(line.split()) > 1 else None

    original = librispeech.parse_utterance
    with reading(librispeech, parse_utterance=parse):
        manifests = _manifests(librispeech.prepare_librispeech, corpus, splits, nj)
    recordings = [r for split in splits for r in manifests[split]["recordings"]]
    supervisions = [s for split in splits for s in manifests[split]["supervisions"]]
    for supervision in supervisions:
        # one speaker reads each chapter: utterance ids begin with the speaker's
        supervision.speaker = supervision.id.rsplit("-", 1)[0]
    dropped = {**compare(said, audio), **empty}
    from_lhotse(recordings, supervisions, directory, SOURCE, dropped)


def _manifests(prepare_librispeech, corpus: Path, splits: Sequence[str], nj: int):
    try:
        return prepare_librispeech(corpus, dataset_parts=splits, num_jobs=nj)
    except AssertionError as error:  # lhotse's word for nothing that is left
        logging.debug(error)
        where = ", ".join(str(corpus / split) for split in splits)
        raise UserError(
            f"{where}: lhotse finds no utterance with audio and transcript: {error}"
        ) from None
