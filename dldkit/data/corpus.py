"""What the preparations of corpora share: finding, downloading, checking, lhotse."""

import argparse
import hashlib
import logging
import os
import shutil
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dldkit.data.audio import BadAudio, declared_length
from dldkit.data.datadir import Table
from dldkit.errors import UserError
from dldkit.options import command_parser, positive
from dldkit.patches import patched
from dldkit.step import Step

if TYPE_CHECKING:  # importing lhotse takes seconds
    from lhotse import Recording, SupervisionSegment

PathLike = str | Path

DOWNLOADS = "downloads"  # as the value of a variable: the recipe downloads the corpus

# What a recording that can not be read is said to be, so that lhotse keeps what was
# said in it, and stage 3 drops it by name: longer than any segment's end.
UNREADABLE_RATE, UNREADABLE_SECONDS = 16000, 360_000


def corpus_parser(
    description: str | None, nj: int | None = None
) -> argparse.ArgumentParser:
    """Return a parser with the options that all preparations have.

    Args:
        nj: default of `--nj` outside of a recipe, if the preparation reads headers in
            threads.
    """
    parser = command_parser(description)
    parser.add_argument("--data_dir", default="data", help="where the sets go")
    parser.add_argument("--download_dir", default="downloads", help="where corpora go")
    if nj is not None:
        jobs = os.environ.get("DLDKIT_NJ", nj)  # as run.sh says
        parser.add_argument(
            "--nj", type=positive, default=jobs, help="threads that read headers"
        )
    return parser


# ---------------------------------------------------------------- where the corpus is


def find_corpus(
    variable: str,
    nested: str,
    needed: Iterable[str],
    hint: str = "",
    download: bool = True,
) -> Path | None:
    """Return the directory that a variable names; None if it is empty or `DOWNLOADS`.

    Args:
        nested: the corpus's own directory; the variable may name the one around it.
        needed: what must be in it.
        hint: what else may be done about missing parts.
        download: whether the recipe can download the corpus.

    Raises:
        UserError: something is missing.
    """
    home = os.environ.get(variable)
    if not home or home == DOWNLOADS:
        return None
    corpus = Path(home).absolute()
    if not corpus.is_dir():
        raise UserError(f"{variable}={home} is not a directory")
    if (corpus / nested).is_dir():
        corpus /= nested
    missing = [name for name in needed if not (corpus / name).exists()]
    if missing:
        if download:
            hint += f", or unset {variable} to download it"
        raise UserError(
            f"{variable}={home} lacks {' '.join(missing)}: complete the corpus{hint}"
        )
    return corpus


@contextmanager
def downloading(name: str, variable: str) -> Iterator[None]:
    """Turn what can go wrong in a download into an error that says what to do."""
    try:
        yield
    except (tarfile.TarError, zlib.error, EOFError) as error:
        raise UserError(
            f"{name}: a downloaded archive can not be unpacked ({error}): remove it and"
            f" start again, or set {variable} to a copy of the corpus"
        ) from error
    except OSError as error:
        raise UserError(
            f"{name} can not be downloaded ({error}): start again to go on with it, or "
            f"set {variable} to a copy of the corpus"
        ) from error


def fetch(url: str, archive: Path, md5: str | None = None) -> None:
    """Download an archive, or go on with a download that broke off, and check it.

    Raises:
        OSError: there is no way to it.
        UserError: it is not the file that it should be; it is removed.
    """
    from lhotse.utils import resumable_download

    archive.parent.mkdir(parents=True, exist_ok=True)
    logging.info(f"downloading {url}")
    resumable_download(url, filename=archive)
    if md5 is None:
        return
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "md5").hexdigest()
    if found != md5:
        archive.unlink()
        raise UserError(
            f"{archive} from {url} has the MD5 sum {found} in place of {md5}: it was "
            "removed; start again to download it anew"
        )


def md5_sums(url: str) -> dict[str, str]:
    """Return `file name -> sum` of a list that md5sum wrote."""
    with urllib.request.urlopen(url, timeout=60) as response:
        lines = response.read().decode().splitlines()
    pairs = (line.split() for line in lines if line.strip())
    return {name.lstrip("*"): md5 for md5, name in pairs}


def unpack(archive: Path, made: Path) -> None:
    """Unpack an archive that holds the directory `made`; an unpacked one is kept."""
    done = made / ".completed"  # lhotse's own mark
    if done.is_file():
        return
    logging.info(f"unpacking {archive}")
    shutil.rmtree(made, ignore_errors=True)
    with tarfile.open(archive) as tar:
        tar.extractall(made.parent, filter="data")
    if not made.is_dir():
        raise UserError(f"{archive} does not hold {made.name}")
    done.touch()


# ---------------------------------------------------------------- what is in it


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file, without their ends.

    Raises:
        UserError: it is missing, or not UTF-8, naming the line.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} can not be read: {error.strerror}") from None
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: it is not UTF-8 ({error.reason}): convert the file, "
            "for example by iconv -f latin1 -t utf-8"
        ) from None
    lines = text.replace("\r\n", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def compare(said: Mapping[str, str], audio: Iterable[str]) -> Table:
    """Return which ids have a transcript only, or audio only, and which.

    Args:
        said: where each transcript is, by id.
    """
    audio = set(audio)
    dropped = {id_: f"no audio for {said[id_]}" for id_ in said.keys() - audio}
    dropped.update(dict.fromkeys(audio - said.keys(), "no transcript"))
    return dropped


class Places(dict[str, str]):
    """Where each id is; an id that is there twice is refused."""

    def __setitem__(self, id_: str, place: str) -> None:
        if id_ in self:
            raise UserError(
                f"{id_} is there twice: {self[id_]} and {place}; remove one of them"
            )
        super().__setitem__(id_, place)


def stems(paths: Iterable[Path]) -> dict[str, Path]:
    """Return `name without suffix -> path`.

    Raises:
        UserError: two files have the same name.
    """
    found: dict[str, Path] = {}
    places = Places()
    for path in sorted(paths):
        places[path.stem] = str(path)
        found[path.stem] = path
    return found


def preparation(
    directory: PathLike,
    transcripts: Iterable[Path],
    audio: Iterable[PathLike],
    **options: object,
) -> Step:
    """Return the step that makes a set: done again if its transcripts or files change.

    Args:
        transcripts: the files that say what was said.
        audio: the names of the files to use; their contents are stage 3's matter.
        options: what else decides the result.
    """
    names = "\n".join(sorted(map(str, audio)))
    listing = hashlib.sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    files = {str(path): path for path in transcripts}
    return Step(directory, files, keep=True, audio=listing, **options)


# ---------------------------------------------------------------- lhotse's recipes


def describe(
    path: PathLike, recording_id: Any = None, *_: object, **__: object
) -> "Recording":
    """Return a recording as `Recording.from_file` does, whatever the file is like.

    libsndfile reads NIST SPHERE, for which lhotse needs sph2pipe, and one that can not
    be read stays in the corpus for stage 3, which drops it and says why.
    """
    from lhotse import Recording
    from lhotse.audio import AudioSource

    path = Path(path)
    try:
        length, rate, channels = declared_length(path)
    except BadAudio:
        rate, channels = UNREADABLE_RATE, 1
        length = rate * UNREADABLE_SECONDS
    if callable(recording_id):
        recording_id = recording_id(path)
    return Recording(
        id=recording_id or path.stem,
        sources=[AudioSource("file", list(range(channels)), str(path))],
        sampling_rate=rate,
        num_samples=length,
        duration=length / rate,
    )


def whole(recording: "Recording", text: str, speaker: str) -> "SupervisionSegment":
    """Return the utterance that a recording is, from its beginning to its end."""
    from lhotse import SupervisionSegment

    return SupervisionSegment(
        id=recording.id,
        recording_id=recording.id,
        start=0.0,
        duration=recording.duration,
        text=text,
        speaker=speaker,
    )


@contextmanager
def reading(recipe: ModuleType, **functions: Callable) -> Iterator[None]:
    """Let one of lhotse's recipes read a corpus in which files may be bad.

    Args:
        recipe: its module.
        functions: to stand in for functions of that module.
    """
    from lhotse import Recording

    with ExitStack() as stack:
        stack.enter_context(patched(Recording, "from_file", staticmethod(describe)))
        for name, function in functions.items():
            stack.enter_context(patched(recipe, name, function))
        yield
