"""Read, check and convert single utterances of audio."""

import functools
import io
import re
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from dldkit.data.headers import UNKNOWN_SIZE, declared_frames, is_cut_off
from dldkit.data.mp3 import with_length

PathLike = str | Path
UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's count for a FLAC that was written to a pipe
BLOCK = 2**16  # samples that are read at a time, where there is no count
ARK = re.compile(r"(.+):(\d+)")  # an archive of Kaldi's, and the place in it
# What `lhotse kaldi export` writes for files that Kaldi can not read: they are decoded
# by these programs, whole, and are not changed otherwise.
LHOTSE_PIPES = (
    re.compile(
        r"ffmpeg -threads 1 -i (?P<path>.+) -ar (?P<rate>\d+) "
        r"-map_channel 0\.0\.(?P<channel>\d+) +-f wav -threads 1 pipe:1 \|"
    ),
    re.compile(
        r"sph2pipe (?P<path>.+) -f wav -c (?P<number>\d+) -p \| "
        r"ffmpeg -threads 1 -i pipe:0 -ar (?P<rate>\d+) -f wav -threads 1 pipe:1 \|"
    ),
)


class BadAudio(ValueError):
    """An utterance that can not be used; the message is the reason."""


class FromStartToEnd(soundfile.SoundFile):
    """A file that is read without a seek, which would fail at an unknown end."""

    def seekable(self) -> bool:
        """Say what keeps soundfile from it."""
        return False


def read_audio(path: str) -> tuple[np.ndarray, int]:
    """Read one recording, with its channels mixed to one; see `read_channels`.

    Returns:
        samples (Time,), float32 in [-1, 1], and the sampling rate in Hz.
    """
    samples, fs = read_channels(path)
    return samples.mean(1), fs


def read_channels(
    path: str, start: float = 0.0, end: float | None = None
) -> tuple[np.ndarray, int]:
    """Read one utterance of an entry of `wav.scp`.

    Args:
        path: a file that libsndfile knows (wav, flac, sph, mp3 ...), a place in an
            archive (`a.ark:123`), or a command that ends with `|` and writes such a
            file to its output.
        start, end: the part to read, in seconds; `end=None` reads to the end.

    Returns:
        samples (Time, Channel), float32 in [-1, 1], and the sampling rate in Hz.

    Raises:
        BadAudio: missing, unreadable, truncated, empty, or without the channel that a
            command names; a command that failed.
    """
    channel = None
    if path.endswith("|"):
        path, channel = _without_lhotse_s_pipe(path)
    with _failures_as_bad_audio():
        if path.endswith("|"):
            with io.BytesIO(_output_of(path)) as output:
                return _read(output, "its output", start, end, channel)
        with _stored(path) as file:
            return _read(file, path, start, end, channel)


def is_in_archive(path: str) -> bool:
    """Say whether an entry of `wav.scp` is a place in an archive, as `a.ark:123`."""
    return bool(ARK.fullmatch(path)) and not Path(path).is_file()


def _stored(path: str) -> BinaryIO:
    """Open a file, or what is at a place in an archive."""
    if is_in_archive(path):
        ark, _, place = path.rpartition(":")
        return io.BytesIO(_from_ark(ark, int(place)))
    if not Path(path).is_file():
        raise BadAudio(f"no such file: {path}")
    return open(path, "rb")


def _read(
    file: BinaryIO, name: str, start: float, end: float | None, channel: int | None
) -> tuple[np.ndarray, int]:
    if is_cut_off(file):
        raise BadAudio("truncated: its end is missing")
    with _opened(file) as audio:
        fs = audio.samplerate
        if channel is not None and not 0 <= channel < audio.channels:
            raise BadAudio(f"no channel {channel}: it has {audio.channels}, from 0")
        declared = declared_frames(file, audio)
        if declared > audio.frames:
            raise BadAudio(f"truncated: {audio.frames} of {declared} samples")
        if not audio.frames:
            raise BadAudio("no samples")
        first = round(start * fs)
        last = audio.frames if end is None else round(end * fs)
        # Corpora round the times of segments: 50 ms too many are forgiven.
        if audio.frames < last <= audio.frames + fs // 20:
            last = audio.frames
        if not 0 <= first < last <= audio.frames:
            raise BadAudio(
                f"segment {start}-{end} s is empty, or not inside the "
                f"{audio.frames / fs:.2f} s of {name}"
            )
        audio.seek(first)
        samples = audio.read(last - first, dtype="float32", always_2d=True)
    if len(samples) < last - first:
        raise BadAudio(f"truncated: {len(samples)} of {last - first} samples")
    if channel is not None:
        samples = samples[:, channel : channel + 1]
    if not np.isfinite(samples).all():
        raise BadAudio("samples that are not finite")
    return samples, fs


def _opened(file: BinaryIO) -> soundfile.SoundFile:
    """Open a file by its content, or by its name where libsndfile needs that."""
    file.seek(0)
    if file.read(1) in (b"I", b"\xff"):  # an ID3 tag, or the frame of an MP3
        file.seek(0)
        if (mp3 := with_length(file.read())) is not None:
            return soundfile.SoundFile(io.BytesIO(mp3))
    file.seek(0)
    name = getattr(file, "name", None)
    audio = soundfile.SoundFile(name if name is not None else file)
    if audio.frames != UNKNOWN_FRAMES:
        return audio
    audio.close()
    file.seek(0)
    return soundfile.SoundFile(io.BytesIO(_flac_with_length(file.read())))


def _flac_with_length(content: bytes) -> bytes:
    """Return a FLAC that says its length, from one that does not."""
    frames = 0
    with FromStartToEnd(io.BytesIO(content)) as audio:
        while block := len(audio.read(BLOCK, dtype="int32")):
            frames += block
    if not frames:
        raise BadAudio("no samples")
    place = content.index(b"fLaC") + 18  # of 8 bytes, of which 36 bits are the length
    (others,) = struct.unpack_from(">Q", content, place)
    said = struct.pack(">Q", others | frames)
    return content[:place] + said + content[place + len(said) :]


@contextmanager
def _failures_as_bad_audio() -> Iterator[None]:
    """Let nothing that one file makes soundfile or numpy raise lose the other files."""
    try:
        yield
    except BadAudio:
        raise
    except (
        soundfile.LibsndfileError,
        struct.error,
        OSError,
        ValueError,
        MemoryError,
    ) as error:
        raise BadAudio(f"unreadable: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Return what libsndfile says, without the place in memory of what it read."""
    text = getattr(error, "error_string", None)
    return text or str(error) or type(error).__name__


def declared_length(path: PathLike) -> tuple[int, int, int]:
    """Return how many samples, at which rate, and channels the header promises.

    Args:
        path: a file, or a place in an archive.

    Raises:
        BadAudio: there is no readable header, or no samples.
    """
    with _failures_as_bad_audio(), _stored(str(path)) as file, _opened(file) as audio:
        length = max(audio.frames, declared_frames(file, audio))
        if not length:
            raise BadAudio("no samples")
        return length, audio.samplerate, audio.channels


@functools.lru_cache(maxsize=1)  # the segments of a recording come one after another
def _output_of(command: str) -> bytes:
    """Run a command of `wav.scp`, as Kaldi does; return what it writes."""
    shell = ["bash", "-o", "pipefail", "-c", command.strip()[:-1]]
    try:
        process = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True)
    except OSError as error:
        raise BadAudio(f"command failed: {error}: {command}") from None
    if process.returncode:
        said = process.stderr.decode(errors="replace").strip().splitlines()
        reason = said[-1] if said else f"status {process.returncode}"
        raise BadAudio(f"command failed: {reason}: {command}")
    if not process.stdout:
        raise BadAudio(f"command wrote nothing: {command}")
    return process.stdout


@functools.lru_cache(maxsize=1)  # it opens the file
def _without_lhotse_s_pipe(command: str) -> tuple[str, int | None]:
    """Return the file that a command of `lhotse kaldi export` decodes, and the channel.

    That is None where the file has one alone.

    libsndfile decodes most of these files itself, faster, and without a program that
    may be missing. Any other command, or one that resamples, is returned as it is.
    """
    for pattern in LHOTSE_PIPES:
        if match := pattern.fullmatch(command):
            groups = match.groupdict()
            try:
                _, rate, channels = declared_length(groups["path"])
            except BadAudio:
                if not Path(groups["path"]).is_file() or _is_known(groups["path"]):
                    return groups["path"], None  # reading it says what is wrong
                return command, None
            if rate == int(groups["rate"]):
                named = int(groups.get("channel") or int(groups.get("number") or 1) - 1)
                return groups["path"], named if channels > 1 else None
    return command, None


def _is_known(path: str) -> bool:
    """Say whether libsndfile reads files with such a name."""
    return Path(path).suffix[1:].upper() in {*soundfile.available_formats(), "SPH"}


@functools.lru_cache(maxsize=1)
def _from_ark(ark: str, place: int) -> bytes:
    """Return the audio file that begins at a place in an archive of Kaldi's.

    A WAV lies there as it is; before other files, as in ESPnet's flac.ark, stand a mark
    and the length.
    """
    with open(ark, "rb") as archive:
        archive.seek(place)
        head = archive.read(8)
        if head[:4] in (b"RIFF", b"RIFX"):
            (size,) = struct.unpack(f"{'<' if head[3:4] == b'F' else '>'}I", head[4:])
            return head + archive.read(size if size < UNKNOWN_SIZE else -1)
        if head[:5] == b"AUDIO":
            archive.seek(place + 5)
            digits = int.from_bytes(archive.read(1))  # how many bytes the length has
            size = int.from_bytes(archive.read(digits), "little")
            audio = archive.read(size)
            if len(audio) < size:
                raise BadAudio(f"truncated: {ark} ends inside of {ark}:{place}")
            return audio
    raise BadAudio(f"no audio at {ark}:{place}")


def convert(
    samples: np.ndarray, fs: int, target: int, speed: float = 1.0
) -> np.ndarray:
    """Change speed (and pitch with it, as sox does) and sampling rate.

    Args:
        samples: (Time,) at `fs` Hz.
        target: the wanted sampling rate in Hz.

    Returns:
        (Time * target / fs / speed,) at `target` Hz.

    Raises:
        BadAudio: nothing is left.
    """
    if speed == 1.0 and fs == target:
        return samples
    from lhotse.augmentation import Resample, Speed  # slow to import

    signal = samples[None]
    if speed != 1.0:
        signal = Speed(speed)(signal, fs)
    if fs != target:
        signal = Resample(fs, target)(signal, fs)
    if not signal.size:
        raise BadAudio(f"too short to convert: {len(samples)} samples")
    return signal[0]


def write_audio(path: PathLike, samples: np.ndarray, fs: int) -> None:
    """Write (Time,) as 16 bit; what was 16 bit before comes out bit for bit."""
    soundfile.write(path, as_16_bit(samples), fs, subtype="PCM_16")


def as_16_bit(samples: np.ndarray) -> np.ndarray:
    """Return samples in [-1, 1] as integers."""
    # soundfile alone would scale by 32767 what it read by 1 / 32768.
    return np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
