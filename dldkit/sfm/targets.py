"""The teacher's hidden states, written once so that training can read them."""

import functools
import logging
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Callable, NamedTuple, Optional, Sequence, Union

import humanfriendly
import numpy as np
import torch
import yaml

from dldkit.data.audio import BadAudio, declared_length, read_audio
from dldkit.data.datadir import Table, read_lengths, read_table
from dldkit.data.frames import Part, collect, model_digest, parts_of
from dldkit.data.segments import FRAME, SHORTEST
from dldkit.errors import UserError
from dldkit.parallel import refuse_missing_gpu
from dldkit.sfm.data import FEATURES, TARGETS
from dldkit.sfm.int8 import pack
from dldkit.sfm.options import usual_layers
from dldkit.sfm.teacher.cached import CNN, TARGETS_DESCRIPTION, CachedTeacher
from dldkit.sfm.teacher.opening import open_teacher, teacher_info
from dldkit.sfm.teacher.protocol import Teacher
from dldkit.sfm.teacher.wave import WaveTeacher
from dldkit.step import Step, atomic

PathLike = Union[str, Path]
BYTES = {"float16": 2, "int8": 1}  # of a value


def collect_targets(
    teacher: PathLike,
    layers: Optional[Sequence[int]],
    data_dirs: Sequence[PathLike],
    output_dir: PathLike,
    nj: int = 1,
    parallel_config: Optional[str] = None,
    ngpu: int = 0,
    dtype: str = "float16",
    features: bool = False,
) -> None:
    """Write a teacher's hidden states of all utterances to Kaldi arks.

    They are (Time, Layers, Dim), computed in float32. Its CNN is written beside them,
    for students that take it over. A finished collection is kept; an interrupted one
    continues with the parts that are missing. Utterances that are too short to learn
    from are left out, with a warning, and listed in `too_short`.

    Args:
        teacher, layers: as `open_teacher` takes them, but no cached targets; layers
            None = `usual_layers`.
        data_dirs: with wav.scp, and utt2num_samples so that files need not be opened
            to estimate the size.
        nj: number of jobs.
        ngpu: 1 = the jobs compute on the GPU, 0 = on the CPU.
        dtype: `float16`, or `int8`, see `dldkit.sfm.int8`.
        features: write what the teacher's CNN makes of the utterances as well (Time,
            Channels), in float16, to the directory `features` in `output_dir`.

    Raises:
        UserError: for a teacher that can not be opened, audio that it can not take, a
            disk that is too small, a GPU that is not there, or an `output_dir` with a
            finished collection of something else.
    """
    if dtype not in BYTES:
        raise UserError(f"unknown dtype {dtype!r}: choose {' or '.join(BYTES)}")
    refuse_missing_gpu(ngpu, parallel_config)
    output_dir = Path(output_dir)
    layers = sorted(set(layers or usual_layers(teacher_info(teacher))))
    opened = open_teacher(teacher, layers)
    if isinstance(opened, CachedTeacher):
        raise UserError(f"{teacher} holds cached targets already: name the model")
    tables = [read_table(Path(data_dir) / "wav.scp") for data_dir in data_dirs]
    utts = [list(table) for table in tables]
    parts = parts_of(output_dir, utts)
    feature_parts = parts_of(output_dir / FEATURES, utts) if features else []
    if features and not isinstance(opened, WaveTeacher):
        raise UserError(
            f"{teacher} has no CNN on waveforms whose features could be written: leave "
            "--features out (of sfm.sh: --targets cached)"
        )

    files = {f"{i} wav.scp": Path(d) / "wav.scp" for i, d in enumerate(data_dirs)}
    made_from = dict(teacher=model_digest(opened.model), info=asdict(opened.info))
    # What took days to collect is not cleared for another request.
    options = dict(layers=layers, dtype=dtype, **made_from)
    bound = dict(bound_by=TARGETS_DESCRIPTION, binding=options)
    with Step(output_dir, files, **bound, **options) as step:
        size = opened.info.hidden_size
        wanted = [
            _Wanted(parts, f"{len(layers)} layer(s)", len(layers), size, BYTES[dtype])
        ]
        if features:
            channels = opened.model.config.conv_dim[-1]
            wanted.append(_Wanted(feature_parts, "CNN features", 1, channels, 2))
        lengths = [_lengths(data_dir) for data_dir in data_dirs]
        _refuse_small_disk(
            wanted, tables, lengths, opened.info.sampling_rate, output_dir
        )
        job = str(teacher), tuple(layers), bool(ngpu), tables
        if not step.done:
            write = functools.partial(_write, _hidden_states, dtype, *job)
            collect(output_dir, TARGETS, parts, write, nj, parallel_config)
            if isinstance(opened, WaveTeacher):
                opened.save_cnn(output_dir / CNN)
            # it comes last: what looks for cached targets looks for this file
            about = {"teacher": str(teacher), **asdict(opened.info), "layers": layers}
            with atomic(output_dir / TARGETS_DESCRIPTION) as new:
                text = yaml.safe_dump(about, sort_keys=False, allow_unicode=True)
                new.write_text(text, encoding="utf-8")
        if not features:
            return
        with Step(output_dir / FEATURES, files, **made_from) as step_of_features:
            if not step_of_features.done:
                write = functools.partial(_write, _cnn_features, "float16", *job)
                collect(
                    output_dir / FEATURES,
                    FEATURES,
                    feature_parts,
                    write,
                    nj,
                    parallel_config,
                )


class _Wanted(NamedTuple):
    """What is to be written."""

    parts: Sequence[Part]
    name: str
    arrays: int  # for each frame
    size: int  # of such an array
    bytes: int  # of a value


def _refuse_small_disk(
    wanted: Sequence[_Wanted],
    tables: Sequence[Table],
    lengths: Sequence[dict[str, int]],
    rate: int,
    output: Path,
) -> None:
    """Log the size of what is not there yet, and refuse it if there is no room."""
    total, messages = 0, []
    for parts, name, arrays, size, bytes_ in wanted:
        missing = [part for part in parts if not part.is_done]
        if not missing:
            continue
        samples = 0
        for part in missing:
            table, known = tables[part.source], lengths[part.source]
            samples += sum(known.get(u) or _samples_of(u, table[u]) for u in part.utts)
        needed = samples // FRAME * arrays * size * bytes_
        total += needed
        messages.append(
            f"{samples / rate / 3600:.2f} h of speech, {name} of {size} values: "
            f"{humanfriendly.format_size(needed, binary=True)}"
        )
    message = "; ".join(messages)
    free = shutil.disk_usage(output).free
    if total > free:
        free_size = humanfriendly.format_size(free, binary=True)
        raise UserError(
            f"{message}, but {output} has {free_size} left: ask for fewer layers, "
            "name another disk, or distil from the teacher itself"
        )
    if messages:
        logging.info(f"{output}: {message}")


def _lengths(data_dir: PathLike) -> dict[str, int]:
    path = Path(data_dir) / "utt2num_samples"
    return read_lengths(path) if path.is_file() else {}


def _samples_of(utt: str, wav: str) -> int:
    try:
        return declared_length(wav)[0]
    except BadAudio as error:
        raise UserError(f"utterance {utt}: {error}") from error


@functools.lru_cache(maxsize=1)
def _open(teacher: str, layers: tuple[int, ...], gpu: bool) -> Teacher:
    refuse_missing_gpu(gpu)
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # float32, as in a training on the CPU
    return open_teacher(teacher, layers, "cuda" if gpu else "cpu")


def _hidden_states(
    opened: Teacher, speech: torch.Tensor, lengths: torch.Tensor, utts: list[str]
) -> torch.Tensor:
    """Return them for speech without padding: (Batch, Time, Layers, Dim)."""
    states, _ = opened(speech, lengths, utts)
    return torch.stack(states, 2)


def _cnn_features(
    opened: WaveTeacher, speech: torch.Tensor, lengths: torch.Tensor, utts: list[str]
) -> torch.Tensor:
    """Return them for speech without padding: (Batch, Time, Channels)."""
    return opened.cnn_features(speech, lengths)


def _write(
    compute: Callable[..., torch.Tensor],
    dtype: str,
    teacher: str,
    layers: tuple[int, ...],
    gpu: bool,
    tables: Sequence[Table],
    part: Part,
) -> None:
    opened = _open(teacher, layers, gpu)
    device = next(opened.model.parameters()).device

    def forward(speech: torch.Tensor, utts: list[str]):
        samples = speech.size(1)
        if samples < SHORTEST:
            return None
        lengths = torch.full((len(utts),), samples)
        found = compute(opened, speech.to(device), lengths, utts).cpu()
        halves = found.half().numpy()
        for utt, array in zip(utts, halves):
            _refuse_unfit(utt, array, samples)
        return halves if dtype == "float16" else [pack(a) for a in found.numpy()]

    table, rate = tables[part.source], opened.info.sampling_rate
    part.write({utt: _read(utt, table[utt], rate) for utt in part.utts}, forward)


def _read(utt: str, wav: str, rate: int) -> torch.Tensor:
    try:
        samples, found = read_audio(wav)
    except BadAudio as error:
        raise UserError(f"utterance {utt}: {error}") from error
    if found != rate:
        raise UserError(
            f"utterance {utt} has {found} Hz, the teacher takes {rate} Hz: format the "
            "data with that rate (stage 3)"
        )
    return torch.from_numpy(samples)


def _refuse_unfit(utt: str, targets: np.ndarray, samples: int) -> None:
    if abs(len(targets) - samples // FRAME) > 1:
        raise UserError(
            f"the teacher gives {len(targets)} frames for the {samples} samples of "
            f"utterance {utt}: only frames of {FRAME} samples can be cached"
        )
    if not np.isfinite(targets).all():
        raise UserError(
            f"utterance {utt}: hidden states beyond what float16 holds; distil from "
            "the teacher itself, or choose other layers"
        )
