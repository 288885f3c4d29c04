"""Read, check and convert single utterances of audio."""

import os
import re
import struct
from pathlib import Path

import numpy as np
import soundfile

PathLike = str | Path
UNKNOWN_SIZE = 0x7FFFFFFF  # a WAV that was streamed declares a size from here up


class BadAudio(ValueError):
    """An utterance that can not be used; the message is the reason."""


def read_audio(
    path: str,
    start: float = 0.0,
    end: float | None = None,
    channel: int | None = None,
) -> tuple[np.ndarray, int]:
    """Read one utterance of a file that libsndfile knows (wav, flac, sph ...).

    Args:
        start, end: the part to read, in seconds; `end=None` reads to the end.
        channel: the one to read, from 0; None = all of them, mixed to one.

    Returns:
        samples (Time,), float32 in [-1, 1], and the sampling rate in Hz.

    Raises:
        BadAudio: missing, unreadable, truncated, empty, or without that channel.
    """
    if not Path(path).is_file():
        raise BadAudio(f"no such file: {path}")
    try:
        with soundfile.SoundFile(path) as audio:
            fs = audio.samplerate
            if channel is not None and not 0 <= channel < audio.channels:
                raise BadAudio(f"no channel {channel}: it has {audio.channels}, from 0")
            declared = _declared_frames(path, audio)
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
                    f"{audio.frames / fs:.2f} s of {path}"
                )
            audio.seek(first)
            samples = audio.read(last - first, dtype="float32", always_2d=True)
    except (soundfile.LibsndfileError, OSError) as error:
        raise BadAudio(f"unreadable: {error}")
    if len(samples) < last - first:
        raise BadAudio(f"truncated: {len(samples)} of {last - first} samples")
    samples = samples.mean(1) if channel is None else samples[:, channel]
    if not np.isfinite(samples).all():
        raise BadAudio("samples that are not finite")
    return samples, fs


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
    # soundfile alone would scale by 32767 what it read by 1 / 32768.
    integers = np.clip(np.round(samples * 32768), -32768, 32767).astype(np.int16)
    soundfile.write(path, integers, fs, subtype="PCM_16")


def _declared_frames(path: str, audio: soundfile.SoundFile) -> int:
    """Return how many samples the header promises.

    libsndfile quietly shortens truncated WAV and NIST SPHERE files to what is there;
    for other formats its own count is the header's.
    """
    if audio.format in ("WAV", "WAVEX"):
        block, size = _wav_header(path)
        if block and size is not None and size < UNKNOWN_SIZE:
            return size // block
    elif audio.format == "NIST":
        with open(path, "rb") as raw:
            count = re.search(rb"sample_count -i (\d+)", raw.read(1024))
        if count:
            return int(count[1])
    return audio.frames


def _wav_header(path: str) -> tuple[int, int | None]:
    """Return the bytes of a frame, and the bytes that the chunk `data` declares."""
    block = 0
    with open(path, "rb") as raw:
        order = ">" if raw.read(12)[:4] == b"RIFX" else "<"
        while len(head := raw.read(8)) == 8:
            name, size = struct.unpack(f"{order}4sI", head)
            if name == b"data":
                return block, size
            if name == b"fmt ":
                (block,) = struct.unpack_from(f"{order}H", raw.read(size), 12)
                size %= 2
            else:
                size += size % 2
            raw.seek(size, os.SEEK_CUR)  # chunks begin at even places
    return block, None
