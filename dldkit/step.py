"""What is done, from what, and who is doing it: for each directory that we write.

A step makes one directory. `.part` in it says what the step was begun with, `.done`
what it was finished with: the options, and a digest of each file that counts. So a
finished step is skipped, an interrupted one goes on, and one with other input is made
anew. A touched file, or another number of jobs, changes nothing. `.lock` keeps a second
process away while the first one works.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
import socket
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from dldkit.errors import UserError

PathLike = str | Path

HEARTBEAT = 10  # seconds between two signs of life of a lock's holder
STALE = 180  # seconds without one: longer than NFS keeps a file's attributes cached


@contextmanager
def atomic(path: PathLike) -> Iterator[Path]:
    """Yield the name to write to; `path` appears in one step when it is complete."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    yield part
    part.replace(path)


def digest(path: PathLike) -> str:
    """Return the SHA-256 of a file's content.

    Raises:
        UserError: no such file.
    """
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} can not be read: {error.strerror}") from None


class Step:
    """A directory, and what it is made from.

        with Step(dst, {"text": src / "text"}, fs=16000) as step:
            if not step.done:
                ...  # make it

    Entering waits for the lock. Leaving without an exception marks it as finished.

    Args:
        directory: what the step writes.
        files: the input, by a name that stays the same wherever the files lie.
        keep: whether what is there stays when the input has changed; if not, the step
            begins with an empty directory.
        bound_by: a file that, once it is there, binds the directory to its input
            files: options may change, but they may not.
        binding: options that bind it as the files do.
        options: what else decides the result; anything that JSON can hold.

    Raises:
        UserError: an input is missing, the directory holds files that no step wrote,
            or it is bound to other input files.
    """

    def __init__(
        self,
        directory: PathLike,
        files: Mapping[str, PathLike],
        keep: bool = False,
        bound_by: str | None = None,
        binding: Collection[str] = (),
        **options,
    ):
        self.directory, self.keep = Path(directory), keep
        self.bound_by, self.binding = bound_by, binding
        digests = {name: digest(path) for name, path in files.items()}
        # what is compared is what was read back: no tuples, no integers as keys
        text = json.dumps({"options": options, "files": digests}, default=str)
        self.description = json.loads(text)
        self.lock = Lock(self.directory / ".lock")
        self.done = False

    @property
    def identity(self) -> str:
        """What it is made from in a few letters, for names that change with it."""
        text = json.dumps(self.description, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8]

    def is_done(self) -> bool:
        """Say whether it is finished with these very inputs; takes no lock."""
        return self.read(".done") == self.description

    def read(self, name: str) -> dict | None:
        """Return what `.part` or `.done` says; None if it is not there, or not ours."""
        try:
            return json.loads((self.directory / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def changes(self, kind: str) -> list[str]:
        """Say which `options`, or `files`, differ from those of before, and how."""
        before = self.read(".part") or self.read(".done")
        if not isinstance(before, dict) or kind not in before:
            return []
        old, new = before[kind], self.description[kind]
        names = [
            name for name in sorted({*old, *new}) if old.get(name) != new.get(name)
        ]
        if kind == "files":
            return names
        return [f"{name}: {old.get(name)} -> {new.get(name)}" for name in names]

    def reopen(self) -> None:
        """Begin again what is done: something changed that is not among its inputs."""
        (self.directory / ".done").replace(self.directory / ".part")
        self.done = False

    def __enter__(self) -> "Step":
        _refuse_file(self.directory)
        self.lock.__enter__()
        try:
            self.done = self.is_done()
            if self.done:
                logging.info(f"{self.directory} is finished already, kept")
            else:
                self._start()
        except BaseException:
            self.lock.__exit__()
            raise
        return self

    def __exit__(self, kind, *error) -> None:
        if kind is None and not self.done:
            (self.directory / ".part").replace(self.directory / ".done")
        self.lock.__exit__()

    def _start(self) -> None:
        done, part = self.directory / ".done", self.directory / ".part"
        if self.read(".part") != self.description:
            files, options = self.changes("files"), self.changes("options")
            if self.bound_by and (self.directory / self.bound_by).exists():
                before = self.read(".part") or self.read(".done") or {}
                # what was not noted down before can not have changed, if all is kept
                noted = before.get("files", ())
                others = [name for name in files if name in noted or not self.keep]
                for name in sorted(set(self.binding) & set(before.get("options", ()))):
                    if before["options"][name] != self.description["options"].get(name):
                        others.append(name)
                if others:
                    raise UserError(
                        f"{self.directory} was begun with other input: {_few(others)}. "
                        "Remove it, or choose another directory"
                    )
            if files or options:
                logging.warning(f"{self.directory}: changed: {_few(files + options)}")
            if not self.keep:
                self._clear()
            text = json.dumps(self.description, indent=1, sort_keys=True)
            with atomic(part) as new:
                new.write_text(text + "\n", encoding="utf-8")
        done.unlink(missing_ok=True)

    def _is_ours(self) -> bool:
        """Say whether a step of this kind wrote here: it has the same options."""
        marks = [self.read(name) for name in (".part", ".done")]
        names = set(self.description["options"])
        return any(m and set(m.get("options", ())) == names for m in marks)

    def _clear(self) -> None:
        found = [p for p in self.directory.iterdir() if not p.name.startswith(".lock")]
        if found and not self._is_ours():
            raise UserError(
                f"{self.directory} holds other files, which this step did not write "
                f"({found[0].name}): remove it, or choose another destination"
            )
        # the marks go last: a kill in between must not leave a directory of strangers
        for path in sorted(found, key=lambda path: path.name in (".done", ".part")):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")


def _refuse_file(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(
            f"{directory} can not be a directory: it, or a part of it, is a file"
        ) from None
    except OSError as error:
        raise UserError(f"{directory} can not be made: {error.strerror}") from None


class Lock:
    """A file that names its holder, for processes of one or many machines.

    It is created exclusively, which works over NFS as well. Its holder touches it every
    `HEARTBEAT` seconds. Whoever waits takes it over when it was not touched for `STALE`
    seconds of the waiting one's own clock (clocks of machines differ), or at once when
    the holder was a process of this machine that is gone.

    Args:
        wait: whether to wait for another holder that is alive; if not, its first
            heartbeat is an error. A job that was requeued elsewhere thus goes on.

    Raises:
        UserError: another process that is alive holds it, and `wait` is false.
    """

    def __init__(self, path: PathLike, wait: bool = True):
        self.path, self.wait = Path(path), wait
        self.token = uuid.uuid4().hex
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Lock":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        watched, told = None, None
        while not self._create():
            holder, touched = self._holder(), self._touched()
            if (holder, touched) != watched:
                if watched and holder and not self.wait:
                    raise UserError(
                        f"{self.path.parent} is in use by {_name(holder)}: "
                        "start again when that has ended"
                    )
                watched, since = (holder, touched), time.monotonic()
            if _is_gone(holder) or time.monotonic() - since > STALE:
                self._break(holder)
                continue
            if told != holder and holder:
                told = holder
                logging.warning(
                    f"{self.path.parent} is in use by {_name(holder)}: waiting for it"
                )
            time.sleep(min(HEARTBEAT, 1))
        self._stop.clear()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error) -> None:
        self._stop.set()
        self._thread.join()
        if self._is_ours():
            self.path.unlink(missing_ok=True)

    def _create(self) -> bool:
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(json.dumps({**_identity(), "token": self.token}) + "\n")
        except FileExistsError:
            return False
        except OSError as error:
            raise UserError(f"{self.path} can not be written: {error.strerror}")
        return True

    def _holder(self) -> dict:
        try:
            return json.loads(self.path.read_text())
        except (OSError, ValueError):  # just released, or not yet written
            return {}

    def _touched(self) -> int | None:
        try:
            return self.path.stat().st_mtime_ns
        except OSError:
            return None

    def _is_ours(self) -> bool:
        return self._holder().get("token") == self.token

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            holder = self._holder()
            if holder.get("token") == self.token:
                with suppress(OSError):  # a disk that is away for a moment
                    os.utime(self.path)
            elif not holder:  # removed by mistake, or the disk is away for a moment
                with suppress(UserError):
                    self._create()
            else:
                # This machine slept, or could not reach the disk, for so long that
                # another one took over. Two must not write here.
                logging.error(f"{self.path} was taken over by {_name(holder)}: stop")
                os.kill(os.getpid(), signal.SIGTERM)

    def _break(self, stale: dict) -> None:
        """Remove a stale lock; of several who want to, one does."""
        logging.warning(f"{self.path} is left over from {_name(stale)}: removed")
        breaking = self.path.with_name(self.path.name + ".breaking")
        try:
            breaking.touch(exist_ok=False)
        except FileExistsError:  # by another one, or left over from one that was killed
            time.sleep(2 * HEARTBEAT)
            breaking.unlink(missing_ok=True)
            return
        if self._holder() == stale:
            self.path.unlink(missing_ok=True)
        breaking.unlink(missing_ok=True)


def _identity() -> dict:
    """This process, in words that no other process shares."""
    return {
        "host": socket.gethostname(),
        "machine": _machine(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _machine() -> str:
    """This boot of this machine, and this container: in it, a pid is one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # no Linux: only the heartbeat tells
        return uuid.uuid4().hex


def _started(pid: int) -> str | None:
    """When a process started, in ticks since boot; None if it is gone."""
    try:
        # the second field, its name, may hold spaces and parentheses
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]  # a zombie holds nothing


def _is_gone(holder: dict) -> bool:
    return (
        holder.get("machine") == _machine()
        and _started(holder["pid"]) != holder["started"]
    )


def _name(holder: dict) -> str:
    if not holder:
        return "an unknown process"
    return f"process {holder['pid']} on {holder['host']} since {holder['since']}"
