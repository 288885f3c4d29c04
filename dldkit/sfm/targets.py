"""The teacher's hidden states, written once so that training can read them."""

import argparse
import functools
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Optional, Sequence, Union

import humanfriendly
import kaldiio
import numpy as np
import soundfile
import torch
import yaml

from dldkit.data.audio import BadAudio, read_audio
from dldkit.data.datadir import Table, read_table
from dldkit.data.frames import join_parts, model_digest, utterances_without
from dldkit.errors import UserError
from dldkit.parallel import parallel_map
from dldkit.sfm.teacher import (
    FRAME_SHIFT,
    TARGETS_DESCRIPTION,
    TARGETS_SCP,
    CachedTeacher,
    Teacher,
    TeacherInfo,
    open_teacher,
)
from dldkit.step import Step, atomic

PathLike = Union[str, Path]
UTTERANCES_PER_PART = 200  # what an interrupted job does again


def collect_targets(
    teacher: PathLike,
    layers: Sequence[int],
    data_dirs: Sequence[PathLike],
    output_dir: PathLike,
    nj: int = 1,
    parallel_config: Optional[str] = None,
) -> None:
    """Write a teacher's hidden states of all utterances to Kaldi arks, as float16.

    A finished collection is kept; an interrupted one continues with the parts that
    are missing.

    Args:
        teacher, layers: as `open_teacher` takes them, but no cached targets.
        data_dirs: with wav.scp, and utt2num_samples so that files need not be opened
            to estimate the size.
        nj: number of jobs.

    Raises:
        UserError: for a teacher that can not be opened, audio that it can not take, or
            a disk that is too small.
    """
    output_dir, layers = Path(output_dir), sorted(set(layers))
    opened = open_teacher(teacher, layers)
    if isinstance(opened, CachedTeacher):
        raise UserError(f"{teacher} holds cached targets already: name the model")
    tables = [read_table(Path(data_dir) / "wav.scp") for data_dir in data_dirs]
    _refuse_repeated(tables)

    files = {f"{i} wav.scp": Path(d) / "wav.scp" for i, d in enumerate(data_dirs)}
    made_from = dict(teacher=model_digest(opened.model), info=asdict(opened.info))
    with Step(output_dir, files, layers=layers, **made_from) as step:
        if step.done:
            return
        parts = [
            (i, list(table.items())[first : first + UTTERANCES_PER_PART], first)
            for i, table in enumerate(tables)
            for first in range(0, len(table), UTTERANCES_PER_PART)
        ]
        parts = [(i, utts, output_dir / f"{i}-{first}") for i, utts, first in parts]
        missing = [part for part in parts if not part[2].with_suffix(".scp").is_file()]
        _refuse_small_disk(missing, data_dirs, opened.info, len(layers), output_dir)
        write = functools.partial(_write_part, str(teacher), tuple(layers))
        work = [(utts, path) for _, utts, path in missing]
        parallel_map(write, work, nj, "Collecting targets", parallel_config)

        description = {"teacher": str(teacher), **asdict(opened.info), "layers": layers}
        (output_dir / TARGETS_DESCRIPTION).write_text(
            yaml.safe_dump(description, sort_keys=False), encoding="utf-8"
        )
        scps = [path.with_suffix(".scp") for *_, path in parts]
        join_parts(scps, output_dir / TARGETS_SCP)


def check_target_ids(args: argparse.Namespace) -> None:
    """Refuse training with cached targets that lack some of its utterances.

    Raises:
        UserError: saying how many are missing, the first, and what is to be done.
    """
    scp = Path(args.model_conf.get("teacher") or "") / TARGETS_SCP
    missing, needed = utterances_without(scp, args) if scp.is_file() else ([], 0)
    if missing:
        raise UserError(
            f"{len(missing)} of {needed} utterances have no targets in {scp.parent}, "
            f"the first is {missing[0]}: collect them for all training and validation "
            "data (python -m dldkit.bin.sfm_collect_targets)"
        )


def _refuse_repeated(tables: Sequence[Table]) -> None:
    seen: set[str] = set()
    for table in tables:
        repeated = sorted(seen & set(table))
        if repeated:
            raise UserError(
                f"{len(repeated)} utterance(s) are in two of the data directories, "
                f"first: {repeated[0]}; targets are found by their names"
            )
        seen |= set(table)


def _refuse_small_disk(
    parts, data_dirs: Sequence[PathLike], info: TeacherInfo, layers: int, output: Path
) -> None:
    """Log the size of what is to be written, and refuse it if there is no room."""
    samples = 0
    lengths = {i: _lengths(data_dirs[i]) for i in {part[0] for part in parts}}
    for i, utts, _ in parts:
        for utt, wav in utts:
            samples += lengths[i].get(utt) or _samples_of(utt, wav)
    size = samples // FRAME_SHIFT * layers * info.hidden_size * 2  # bytes
    free = shutil.disk_usage(output).free
    needed = humanfriendly.format_size(size, binary=True)
    message = (
        f"{samples / info.sampling_rate / 3600:.2f} h of speech, {layers} layer(s) of "
        f"{info.hidden_size} values: {needed}"
    )
    if size > free:
        free_size = humanfriendly.format_size(free, binary=True)
        raise UserError(
            f"{message}, but {output} has {free_size} left: ask for fewer layers, "
            "name another disk, or distil from the teacher itself"
        )
    logging.info(f"{output}: {message}")


def _lengths(data_dir: PathLike) -> dict[str, int]:
    path = Path(data_dir) / "utt2num_samples"
    return {u: int(n) for u, n in read_table(path).items()} if path.is_file() else {}


def _samples_of(utt: str, wav: str) -> int:
    try:
        return soundfile.info(wav).frames
    except (soundfile.LibsndfileError, OSError) as error:
        raise UserError(f"utterance {utt}: {error}") from error


@functools.lru_cache(maxsize=1)
def _open(teacher: str, layers: tuple[int, ...]) -> Teacher:
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return open_teacher(teacher, layers, device)


def _write_part(teacher: str, layers: tuple[int, ...], part) -> None:
    utts, path = part
    opened = _open(teacher, layers)
    ark = path.with_suffix(".ark")
    with atomic(path.with_suffix(".scp")) as new:  # it says that the part is complete
        with kaldiio.WriteHelper(f"ark,scp:{ark},{new}", write_function="numpy") as out:
            for utt, wav in utts:  # one at a time: no padding
                out(utt, _targets_of(opened, utt, wav))


def _targets_of(teacher: Teacher, utt: str, wav: str) -> np.ndarray:
    """Return the hidden states of an utterance: (Time, Layers, Dim), float16."""
    try:
        samples, rate = read_audio(wav)
    except BadAudio as error:
        raise UserError(f"utterance {utt}: {error}") from error
    if rate != teacher.info.sampling_rate:
        raise UserError(
            f"utterance {utt} has {rate} Hz, the teacher takes "
            f"{teacher.info.sampling_rate} Hz: format the data with that rate (stage 3)"
        )
    device = next(teacher.model.parameters()).device
    speech = torch.from_numpy(samples).to(device)[None]
    lengths = torch.tensor([speech.size(1)], device=device)
    states, _ = teacher(speech, lengths, [utt])
    targets = torch.stack([state[0] for state in states], 1).half().cpu().numpy()
    if abs(len(targets) - len(samples) // FRAME_SHIFT) > 1:
        raise UserError(
            f"the teacher gives {len(targets)} frames for the {len(samples)} samples "
            f"of utterance {utt}: only frames of {FRAME_SHIFT} samples can be cached"
        )
    if not np.isfinite(targets).all():
        raise UserError(
            f"utterance {utt}: hidden states beyond what float16 holds; distil from "
            "the teacher itself, or choose other layers"
        )
    return targets
