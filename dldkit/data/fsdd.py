"""The Free Spoken Digit Dataset (FSDD), from $FSDD, or downloaded."""

import hashlib
import http.client
import logging
import os
import tarfile
import tempfile
import urllib.request
import zlib
from pathlib import Path

from dldkit.data.corpus import DOWNLOADS
from dldkit.errors import UserError

TAKES = range(50)  # recordings of each digit by each speaker

# The last commit of the corpus's own repository. GitHub's archives are not promised to
# stay the same byte for byte, so what is checked is the recordings: this is the
# SHA-256 of the lines that `sha256sum *.wav` prints in sorted order.
COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
URL = f"https://github.com/Jakobovski/free-spoken-digit-dataset/archive/{COMMIT}.tar.gz"
DIGEST = "1801eae019c063377d98f831d3f93574f259475df7332bb0e3d1b080fb5e6959"
SPEAKERS = "george jackson lucas nicolas theo yweweler".split()


class Unreachable(UserError):
    """The corpus can not be downloaded: no network, or it broke off."""


def find_fsdd(directory: Path, origin: str) -> Path:
    """Return the folder of recordings; `origin` says in errors who named `directory`.

    Raises:
        UserError: the folder is missing, or recordings are.
    """
    if not directory.is_dir():
        raise UserError(f"{origin}: {directory} is not a directory")
    nested = directory / "recordings"
    recordings = nested if nested.is_dir() else directory
    names = [f"{d}_{s}_{t}.wav" for s in SPEAKERS for d in range(10) for t in TAKES]
    missing = [name for name in names if not (recordings / name).is_file()]
    if missing:
        raise UserError(
            f"{origin}: {recordings} lacks {len(missing)} of FSDD's {len(names)} "
            f"recordings, first: {' '.join(missing[:3])}"
        )
    return recordings


def digest(recordings: Path) -> str:
    """Return one SHA-256 over names and contents of all recordings."""
    total = hashlib.sha256()
    for path in sorted(recordings.glob("*.wav")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{content}  {path.name}\n".encode())
    return total.hexdigest()


def download_fsdd(directory: Path) -> Path:
    """Fetch and check the pinned corpus; a finished download is kept.

    Raises:
        Unreachable: there is no way to it, or the way broke off.
        UserError: what came is not the pinned corpus.
    """
    if directory.is_dir():
        return find_fsdd(directory, "earlier download (remove it to fetch it again)")
    logging.info(f"downloading {URL}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as part:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                with tarfile.open(fileobj=response, mode="r|gz") as archive:
                    archive.extractall(part, filter="data")
        except (
            OSError,
            EOFError,
            http.client.HTTPException,
            tarfile.TarError,
            zlib.error,
        ) as error:
            raise Unreachable(
                f"FSDD can not be downloaded ({error}): set FSDD to a copy, or use "
                "--source espeak"
            )
        (root,) = Path(part).iterdir()
        if digest(root / "recordings") != DIGEST:
            raise UserError(
                f"{URL}: the recordings are not those of the pinned commit (SHA-256 "
                "differs); try again, or set FSDD to a copy that you trust"
            )
        root.rename(directory)
    return find_fsdd(directory, "download")


def real_recordings(downloads: Path) -> Path:
    """Return FSDD's recordings: those `$FSDD` names, else downloaded ones."""
    named = os.environ.get("FSDD", "")
    if not named or named == DOWNLOADS:
        return download_fsdd(downloads / "free-spoken-digit-dataset")
    recordings = find_fsdd(Path(named), "FSDD (environment or db.sh)")
    if digest(recordings) != DIGEST:
        logging.warning(f"{recordings} differs from the pinned commit {COMMIT[:7]}")
    return recordings
