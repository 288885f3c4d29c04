"""Stage 4: no utterance that is too short or too long to train on."""

import logging
from pathlib import Path

from dldkit.data.datadir import (
    empty_transcripts,
    lengths_in,
    read_table,
    report_dropped,
    step_of,
    subset_data_dir,
    utterances,
    write_table,
)
from dldkit.errors import UserError


def filter_data(
    src: str,
    dst: str,
    min_length: float,
    max_length: float,
    fs: int,
    text: bool = True,
) -> None:
    """Write `dst` with the utterances of formatted `src` of a suitable length.

    Args:
        min_length, max_length: inclusive bounds in seconds (audio) or frames
            (features).
        fs: sampling rate in Hz.
        text: whether every utterance must have a transcript.

    Raises:
        UserError: the bounds are none, a length is no number, or nothing is left.
    """
    if not 0 <= min_length <= max_length:  # nan, too
        raise UserError(
            f"min_length {min_length} and max_length {max_length}: choose two numbers "
            "from 0, the greater one for max_length"
        )
    utts = utterances(src, text)
    options = dict(min_length=min_length, max_length=max_length, fs=fs, text=text)
    with step_of(src, dst, **options) as step:
        if not step.done:
            _filter(src, dst, utts, **options)


def _filter(
    src: str,
    dst: str,
    utts: list[str],
    min_length: float,
    max_length: float,
    fs: int,
    text: bool,
) -> None:
    directory = Path(src)
    raw = (directory / "utt2num_samples").is_file()
    scp, sizes = ("wav.scp", "utt2num_samples") if raw else ("feats.scp", "feats_shape")
    entries, size = read_table(directory / scp), read_table(directory / sizes)
    lengths = lengths_in(size, directory / sizes)
    silent = empty_transcripts(src) if text else set()
    scale, unit = (fs, "s") if raw else (1, "frames")
    dropped = {}
    for utt in utts:
        length = lengths[utt] / scale
        if utt in silent:
            dropped[utt] = "empty transcript"
        elif length < min_length:
            dropped[utt] = f"{length:g} {unit}, shorter than {min_length:g}"
        elif length > max_length:
            dropped[utt] = f"{length:g} {unit}, longer than {max_length:g}"
    kept = [utt for utt in utts if utt not in dropped]
    report_dropped(dst, dropped, len(utts))
    subset_data_dir(src, dst, kept)
    write_table(Path(dst) / scp, {utt: entries[utt] for utt in kept})
    write_table(Path(dst) / sizes, {utt: size[utt] for utt in kept})
    for name in ("feats_type", "feats_dim"):
        if (directory / name).is_file():
            (Path(dst) / name).write_text((directory / name).read_text())
    logging.info(f"{dst}: kept {len(kept)} of {len(utts)} utterances")
