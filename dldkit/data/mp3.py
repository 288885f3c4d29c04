"""MP3 without a header that says the length: the frames are counted.

libsndfile guesses that length from the size of the file, and reads no further.
"""

import struct

SAME = 0xFFFE0C00  # the bits that are the same in all frames: version, layer and rate
MPEG_1 = 3
SLOWER = {MPEG_1: 0, 2: 1, 0: 2}  # by version: how often the rate is halved
RATES = (44100, 48000, 32000)
KBITS = {  # by whether it is MPEG 1
    True: (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320),
    False: (8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128, 144, 160),
}
WITH_LENGTH = b"Xing", b"Info", b"VBRI"  # marks of a first frame that says the length


def with_length(content: bytes) -> bytes | None:
    """Return an MP3 behind a frame that says how many there are.

    Args:
        content: any file's.

    Returns:
        None if it is no MP3, or says its length itself.
    """
    begin = _after_tags(content, 0)
    header, size = _frame(content, begin)
    first = content[begin : begin + size]
    if not size or any(mark in first for mark in WITH_LENGTH):
        return None
    return _info_frame(header, _count(content, begin)) + content[begin:]


def _after_tags(content: bytes, at: int) -> int:
    """Return where the ID3v2 tags at a place end; the size is in 7 bits of a byte."""
    while content[at : at + 3] == b"ID3" and len(content) >= at + 10:
        a, b, c, d = content[at + 6 : at + 10]
        at += 10 + (a << 21 | b << 14 | c << 7 | d)
    return at


def _frame(content: bytes, at: int) -> tuple[int, int]:
    """Return header and size of the frame of layer III at a place; 0, 0 without one."""
    if not 0 <= at <= len(content) - 4:
        return 0, 0
    (header,) = struct.unpack_from(">I", content, at)
    version, layer = header >> 19 & 3, header >> 17 & 3
    bitrate, rate = header >> 12 & 15, header >> 10 & 3
    if header >> 21 != 0x7FF or version == 1 or layer != 1:
        return 0, 0
    if bitrate in (0, 15) or rate == 3:
        return 0, 0
    kbits = KBITS[version == MPEG_1][bitrate - 1]
    samples = 1152 if version == MPEG_1 else 576
    hertz, padding = RATES[rate] >> SLOWER[version], header >> 9 & 1
    return header, samples // 8 * kbits * 1000 // hertz + padding


def _count(content: bytes, at: int) -> int:
    """Return how many frames there are; one that was cut off counts.

    Tags and damage between frames are passed over, to where two frames are in a row.
    """
    same = _frame(content, at)[0] & SAME
    count, lost = 0, False
    while at >= 0:
        header, size = _frame(content, at)
        if header & SAME == same and (
            not lost or _frame(content, at + size)[0] & SAME == same
        ):
            count, lost = count + 1, False
            at += size
        else:
            lost = True
            at = content.find(b"\xff", at + 1)
    return count


def _info_frame(header: int, count: int) -> bytes:
    """Return a silent frame that says how many others follow it."""
    # Of a bitrate that leaves room for it, without padding and checksum
    header = header & ~0xF200 | 0x19000
    frame = bytearray(_frame(struct.pack(">I", header), 0)[1])
    mono = header >> 6 & 3 == 3
    if header >> 19 & 3 == MPEG_1:
        side = 17 if mono else 32
    else:
        side = 9 if mono else 17
    struct.pack_into(">I", frame, 0, header)
    struct.pack_into(">4sII", frame, 4 + side, b"Xing", 1, count)
    return bytes(frame)
