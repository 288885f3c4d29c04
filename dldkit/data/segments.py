"""The corpus in segments: what teacher and student hear alone, in every epoch."""

import logging
from pathlib import Path
from typing import Optional

from dldkit.data.datadir import read_lengths, read_table, write_data_dir
from dldkit.data.format import Format, format_data
from dldkit.errors import UserError
from dldkit.step import Lock

# In samples. Segments and crops keep to frames of HuBERT, WavLM, wav2vec2 and Whisper.
FRAME = 320
SHORTEST = 2 * FRAME
GRID = 5 * FRAME  # lengths within one cell of it count as equal


def longest(max_seconds: float, fs: int) -> float:
    """Return the samples of `max_seconds` at `fs` Hz.

    Raises:
        UserError: nothing can be learnt from so few.
    """
    if not max_seconds * fs >= SHORTEST:  # nan, too
        raise UserError(
            f"max_seconds {max_seconds} is too short to learn from: choose "
            f"{SHORTEST / fs} or more"
        )
    return max_seconds * fs


def segments_of(samples: int, most: float) -> list[tuple[int, int]]:
    """Cut into equal segments of at most `most` samples; return their begins and ends.

    Their length is a multiple of `GRID`, so that batches of equally long ones can be
    had; what is left of each, less than `GRID`, is lost.
    """
    parts = max(1, -int(-samples // most))
    share = samples // parts
    kept = share // GRID * GRID or share
    return [(i * share, i * share + kept) for i in range(parts)]


def cut_data(
    src: str,
    dst: str,
    max_seconds: float,
    fs: int,
    audio_format: str = "flac",
    nj: int = 1,
    parallel_config: Optional[str] = None,
) -> None:
    """Write a formatted data directory in segments; a finished `dst` is kept.

    Args:
        src: with wav.scp and utt2num_samples; text is left out.
        max_seconds: no segment is longer.
        fs: sampling rate in Hz.
        nj: number of jobs.

    Raises:
        UserError: `max_seconds` is too short, or `src` is no formatted directory.
    """
    most = longest(max_seconds, fs)
    wavs = read_table(Path(src) / "wav.scp")
    lengths = read_lengths(Path(src) / "utt2num_samples")
    whole = sum(lengths.values())
    if not whole:
        raise UserError(
            f"{src}/utt2num_samples lists no samples: remove {src}, and run "
            "stages 3 and 4"
        )
    file = Path(src) / "utt2spk"
    speaker_of = read_table(file) if file.is_file() else {}
    segments, speakers, kept = {}, {}, 0
    for utt, samples in lengths.items():
        for i, (begin, end) in enumerate(segments_of(samples, most)):
            segments[f"{utt}-{i:03d}"] = f"{utt} {begin / fs} {end / fs}"
            speakers[f"{utt}-{i:03d}"] = speaker_of.get(utt, utt)
            kept += end - begin
    logging.info(
        f"{src} -> {dst}: {len(segments)} segments of {len(wavs)} "
        f"utterances, {kept / whole:.1%} of {whole / fs / 3600:.2f} h"
    )
    plan = Path(f"{dst}.plan")
    form = Format(fs=fs, audio_format=audio_format)
    with Lock(plan / ".lock"):
        write_data_dir(plan, wav_scp=wavs, utt2spk=speakers, segments=segments)
        format_data(str(plan), dst, form, nj, parallel_config, text=False)
