"""Stage 2: the same utterances at other speeds."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path

from dldkit.data.datadir import (
    Table,
    read_source,
    read_table,
    step_of,
    utterances,
    write_data_dir,
)
from dldkit.errors import UserError


def perturb_speed(src: str, dst: str, factors: Sequence[str]) -> None:
    """Write `dst` with every utterance once per speed factor; once made, it is kept.

    Nothing is computed here: `utt2speed` tells stage 3 what to do. Utterances and
    speakers at another speed than 1 are new ones, with the prefix `sp<factor>-`.

    Raises:
        UserError: a factor is not a positive number, or the directory has no audio.
    """
    utts = utterances(src)
    if not (Path(src) / "wav.scp").is_file():
        raise UserError(f"{src} has no wav.scp: only audio can be speed-perturbed")
    for factor in factors:
        try:
            speed = float(factor)
        except ValueError:
            speed = 0.0
        if not 0 < speed < math.inf:
            raise UserError(f"speed factor {factor!r} is not a positive number")
    with step_of(src, dst, factors=factors) as step:
        if not step.done:
            _perturb(Path(src), dst, utts, factors)


def _perturb(
    directory: Path, dst: str, utts: Sequence[str], factors: Sequence[str]
) -> None:
    by_recording = ["wav.scp"]
    if (directory / "reco2file_and_channel").is_file():
        by_recording.append("reco2file_and_channel")
    segmented = (directory / "segments").is_file()
    names = ["text", "utt2spk", *(["segments"] if segmented else by_recording)]
    old = {name: read_table(directory / name, allow_empty=True) for name in names}
    new: dict[str, Table] = {name: {} for name in [*names, "utt2speed"]}
    for factor in factors:
        speed = float(factor)
        prefix = "" if speed == 1 else f"sp{factor}-"
        for utt in utts:
            for name in names:
                if utt in old[name]:  # reco2file_and_channel may name a few only
                    value = old[name][utt]
                    new[name][prefix + utt] = prefix * (name == "utt2spk") + value
            new["utt2speed"][prefix + utt] = str(speed)
    if segmented:
        new.update((name, read_table(directory / name)) for name in by_recording)
    write_data_dir(dst, read_source(directory), **new)
    logging.info(f"{dst}: {len(utts)} utterances at speeds {' '.join(factors)}")
