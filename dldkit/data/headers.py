"""How much audio a header promises: libsndfile quietly shortens truncated files."""

import os
import re
import struct
from typing import BinaryIO

import soundfile

# A WAV that was streamed declares a size from here up: sox writes this one, ffmpeg and
# others write all ones.
UNKNOWN_SIZE = 0x7FFFF000
# By a file's first bytes: where the numbers are that say how long the rest is, and how
# many bytes they do not count.
SIZES = {
    b"FORM": (">I", 4, 8),  # AIFF
    b".snd": (">II", 4, 0),  # AU
    b"riff": ("<Q", 16, 0),  # W64
    b"RF64": ("<Q", 20, 8),
}
OGG_PAGE, OGG_PAGE_HEADER = 2**16, 27  # bytes, at most and at least


def declared_frames(file: BinaryIO, audio: soundfile.SoundFile) -> int:
    """Return how many samples the header promises.

    libsndfile quietly shortens truncated WAV and NIST SPHERE files to what is there;
    for other formats its own count is the header's, but see `is_cut_off`.
    """
    if audio.format in ("WAV", "WAVEX"):
        block, size = _wav_header(file)
        if block and size is not None and size < UNKNOWN_SIZE:
            return size // block
    elif audio.format == "NIST":
        file.seek(0)
        count = re.search(rb"sample_count -i (\d+)", file.read(1024))
        if count:
            return int(count[1])
    return audio.frames


def is_cut_off(file: BinaryIO) -> bool:
    """Say whether a file of a format that says no count of samples lacks its end.

    libsndfile quietly shortens these, too. A byte that only pads may be missing.
    """
    file.seek(0)
    head = file.read(28).ljust(28, b"\0")
    size = file.seek(0, os.SEEK_END)
    if head[:4] == b"OggS":
        file.seek(max(0, size - OGG_PAGE))
        return not _has_the_last_page(file.read())
    if head[:4] not in SIZES:
        return False
    numbers, place, others = SIZES[head[:4]]
    declared = sum(struct.unpack_from(numbers, head, place)) + others
    unknown = 2**63 if "Q" in numbers else UNKNOWN_SIZE
    return size + 1 < declared < unknown


def _has_the_last_page(end: bytes) -> bool:
    """Say whether an Ogg file's end has, whole, the page that is marked as the last."""
    page = end[max(end.rfind(b"OggS"), 0) :]
    if len(page) < OGG_PAGE_HEADER or not page[5] & 0x04:
        return False
    content = OGG_PAGE_HEADER + page[26]  # behind one byte for each segment's size
    return len(page) >= content + sum(page[OGG_PAGE_HEADER:content])


def _wav_header(file: BinaryIO) -> tuple[int, int | None]:
    """Return the bytes of a frame, and the bytes that the chunk `data` declares."""
    block = 0
    file.seek(0)
    order = ">" if file.read(12)[:4] == b"RIFX" else "<"
    while len(head := file.read(8)) == 8:
        name, size = struct.unpack(f"{order}4sI", head)
        if name == b"data":
            return block, size
        if name == b"fmt ":
            (block,) = struct.unpack_from(f"{order}H", file.read(size), 12)
            size %= 2
        else:
            size += size % 2
        file.seek(size, os.SEEK_CUR)  # chunks begin at even places
    return block, None
