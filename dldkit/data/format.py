"""Stage 3: bring every utterance of a data directory into one format."""

import hashlib
import json
import logging
import math
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import quote

import numpy as np

from dldkit.data.audio import (
    BadAudio,
    as_16_bit,
    convert,
    read_channels,
    write_audio,
)
from dldkit.data.datadir import (
    DROPPED_TEXT,
    Table,
    empty_transcripts,
    read_table,
    report_dropped,
    step_of,
    subset_data_dir,
    utterances,
    write_table,
)
from dldkit.errors import UserError
from dldkit.parallel import parallel_map
from dldkit.step import atomic

CHUNK = 500  # utterances per job, and per ark
NEW = "data.new"  # where files are until all of them are there
WINDOW = 0.025  # seconds, of Kaldi's log mel energies
AUDIO_FORMATS = "flac", "wav", "flac.ark", "wav.ark"


@dataclass(frozen=True)
class Format:
    """What stage 3 makes.

    Attributes:
        feats_type: `raw` (audio files), `fbank` (log mel energies in Kaldi arks) or
            `extracted` (the `feats.scp` that the directory has, as it is).
        fs: sampling rate in Hz of `raw`, and of the audio behind `fbank`.
        audio_format: `flac` or `wav`, 16 bit, a file each; or `flac.ark` or `wav.ark`,
            the same in Kaldi arks.
        n_mels: dimension of `fbank`.
    """

    feats_type: str = "raw"
    fs: int = 16000
    audio_format: str = "flac"
    n_mels: int = 80


@dataclass(frozen=True)
class Utterance:
    """Where an utterance comes from; times in seconds.

    Attributes:
        path: as in `wav.scp`: a file, a place in an archive, or a command.
        channel: if the recording has several, from 0; None = all of them, mixed.
    """

    id: str
    path: str
    start: float = 0.0
    end: float | None = None
    speed: float = 1.0
    channel: int | None = None


@dataclass
class Outcome:
    """What came of some utterances: lines of tables, and what was dropped and why."""

    entries: Table = field(default_factory=dict)  # for wav.scp or feats.scp
    sizes: Table = field(default_factory=dict)  # for utt2num_samples or feats_shape
    dropped: Table = field(default_factory=dict)
    rates: dict[str, int] = field(default_factory=dict)  # Hz, before resampling
    channels: dict[str, int] = field(default_factory=dict)  # before mixing, if several
    digests: Table = field(default_factory=dict)  # of the samples that are written

    def update(self, other: "Outcome") -> None:
        """Take over all lines of `other`."""
        for name, table in vars(other).items():
            getattr(self, name).update(table)


def format_data(
    src: str,
    dst: str,
    form: Format,
    nj: int = 1,
    parallel_config: str | None = None,
    text: bool = True,
) -> None:
    """Write `dst` from `src`; a finished `dst` is kept, an interrupted one goes on.

    A finished one is made again, too, if something that it dropped can be used now.
    Utterances whose audio or features are missing, corrupt or empty, and those with an
    empty transcript, are dropped: `dst/dropped.txt` lists them with the reason, and
    `dst/dropped_text` holds what was said.

    Args:
        text: whether every utterance must have a transcript.

    Raises:
        UserError: `src` is inconsistent, or nothing in it can be used.
    """
    utts = utterances(src, text)
    with step_of(src, dst, **asdict(form), text=text) as step:
        if step.done and (mended := _mended(src, Path(dst), form, text)):
            logging.warning(f"{dst}: made again, as {mended} can be used now")
            step.reopen()
        if not step.done:
            _format(src, dst, utts, form, nj, parallel_config, text)


def _mended(src: str, dst: Path, form: Format, text: bool) -> str | None:
    """Return an utterance that a finished `dst` lacks, but could have now."""
    silent = empty_transcripts(src) if text else set()
    dropped = [utt for utt in read_table(dst / "dropped.txt") if utt not in silent]
    if not dropped:
        return None
    if form.feats_type == "extracted":
        return next(iter(_check_extracted(src, dropped).entries), None)
    loaded = _load(read_utterances(src, dropped), form, Outcome())
    return next((utt for utt, _ in loaded), None)


def _format(
    src: str,
    dst: str,
    utts: list[str],
    form: Format,
    nj: int,
    parallel_config: str | None,
    text: bool,
) -> None:
    logging.info(f"formatting {src} -> {dst}: {form.feats_type}")
    silent = empty_transcripts(src) if text else set()
    spoken = [utt for utt in utts if utt not in silent]
    if form.feats_type == "extracted":
        outcome = _check_extracted(src, spoken)
    else:
        entries = read_utterances(src, spoken)
        chunks = [entries[i : i + CHUNK] for i in range(0, len(entries), CHUNK)]
        work = partial(_format_chunk, dst=dst, form=form)
        jobs, name = list(enumerate(chunks)), Path(src).name
        outcome = Outcome()
        for part in parallel_map(work, jobs, nj, f"format {name}", parallel_config):
            outcome.update(part)
    if text:
        _keep_what_was_said(src, Path(dst), outcome.dropped)
    outcome.dropped.update((utt, "empty transcript") for utt in silent)
    report_dropped(dst, outcome.dropped, len(utts))
    _log_changes(src, outcome, form.fs)
    shutil.rmtree(Path(dst) / "chunks", ignore_errors=True)
    if form.feats_type != "extracted":
        _name_by_content(Path(dst), form, outcome)
    _write_tables(src, Path(dst), form, outcome)


def _name_by_content(dst: Path, form: Format, outcome: Outcome) -> None:
    """Give other audio other paths: what is made from it looks at the tables alone."""
    content = json.dumps([asdict(form), sorted(outcome.digests.items())])
    name = hashlib.sha256(content.encode()).hexdigest()[:8]
    new, files = dst / NEW, dst / "data" / name
    shutil.rmtree(files.parent, ignore_errors=True)
    files.parent.mkdir()
    new.rename(files)
    for utt, path in outcome.entries.items():
        outcome.entries[utt] = str(files) + path.removeprefix(str(new))


def _log_changes(src: str, outcome: Outcome, fs: int) -> None:
    """Say how many utterances were resampled and mixed."""
    for rate, count in sorted(Counter(outcome.rates.values()).items()):
        if rate != fs:
            logging.info(
                f"{src}: {count} utterance(s) resampled from {rate} Hz to {fs} Hz"
            )
    for channels, count in sorted(Counter(outcome.channels.values()).items()):
        first = min(utt for utt, n in outcome.channels.items() if n == channels)
        logging.info(
            f"{src}: {count} utterance(s) with {channels} channels, mixed to one, "
            f"first: {first}"
        )


def _keep_what_was_said(src: str, dst: Path, dropped: Table) -> None:
    """Write `dropped_text`: of a test set, scoring counts it as deletions."""
    (dst / DROPPED_TEXT).unlink(missing_ok=True)
    if dropped:
        texts = read_table(Path(src) / "text", allow_empty=True)
        write_table(dst / DROPPED_TEXT, {utt: texts[utt] for utt in dropped})


def read_utterances(src: str, utts: list[str]) -> list[Utterance]:
    """Join the tables of a directory that say where its utterances are.

    These are `wav.scp`, `segments`, `reco2file_and_channel` and `utt2speed`.

    Raises:
        UserError: a number is malformed.
    """
    directory = Path(src)
    wavs = read_table(directory / "wav.scp")
    segments = _read_optional(directory / "segments")
    speeds = _read_optional(directory / "utt2speed")
    sides = _read_optional(directory / "reco2file_and_channel")
    if len({side.split()[-1] for side in sides.values()}) == 1:
        sides = {}  # many write one letter for all, which says nothing
    entries = []
    for utt in utts:
        try:
            speed = float(speeds.get(utt, 1.0))
            recording, start, end, channel = _segment(segments.get(utt, utt))
            if channel is None and recording in sides:
                channel = _channel(sides[recording].split()[-1], first=1)
        except ValueError as error:
            raise UserError(
                f"{directory}, segments, reco2file_and_channel or utt2speed of {utt}: "
                f"{error}"
            )
        entries.append(Utterance(utt, wavs[recording], start, end, speed, channel))
    return entries


def _segment(line: str) -> tuple[str, float, float | None, int | None]:
    """Return recording, start, end and channel of a line of `segments`."""
    recording, *times = line.split()
    if not times:
        return recording, 0.0, None, None
    if len(times) not in (2, 3):
        raise ValueError(f"write `recording start end [channel]` in place of {line!r}")
    start, end = map(float, times[:2])
    if not math.isfinite(start) or not math.isfinite(end):
        raise ValueError(f"{line!r}: write times in seconds; -1 is the end")
    channel = _channel(times[2], first=0) if len(times) == 3 else None
    # Kaldi's -1 means the end of the recording
    return recording, start, None if end < 0 else end, channel


def _channel(name: str, first: int) -> int:
    """Return the number, from 0, of a channel named A or B, or counted from `first`."""
    if name in ("A", "B"):
        return "AB".index(name)
    if not name.isdecimal() or int(name) < first:
        raise ValueError(f"channel {name}: write A, B or a number from {first}")
    return int(name) - first


def _read_optional(path: Path) -> Table:
    return read_table(path) if path.is_file() else {}


def _format_chunk(job: tuple[int, list[Utterance]], dst: str, form: Format) -> Outcome:
    """Write one chunk, and keep what came of it: a resumed run need not do it again.

    A chunk that dropped something is not kept: its audio may have been mended when an
    interrupted run goes on; `_mended` looks for that after a finished one.
    """
    index, chunk = job
    result = Path(dst) / "chunks" / f"{index}.json"
    if result.is_file():  # an interrupted run got this far
        return Outcome(**json.loads(result.read_text()))
    write = _write_fbank if form.feats_type == "fbank" else _write_raw
    if form.feats_type == "raw" and form.audio_format.endswith(".ark"):
        write = _write_arks
    outcome = write(chunk, Path(dst) / NEW / f"{index:05d}", form)
    if not outcome.dropped:
        result.parent.mkdir(exist_ok=True)
        with atomic(result) as part:
            part.write_text(json.dumps(asdict(outcome)))
    return outcome


def _read(utt: Utterance) -> tuple[np.ndarray, int]:
    """Read an utterance; its channel counts where the recording has several.

    Kaldi's directories name a side of recordings that a command has taken apart, too.
    """
    audio, rate = read_channels(utt.path, utt.start, utt.end)
    channels = audio.shape[1]
    if utt.channel is None or channels == 1:
        return audio, rate
    if utt.channel >= channels:
        raise BadAudio(f"no channel {utt.channel}: it has {channels}, from 0")
    return audio[:, [utt.channel]], rate


def _load(
    chunk: list[Utterance], form: Format, outcome: Outcome
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield what is usable, as (id, samples (Time,) at `form.fs` Hz); note the rest."""
    for utt in chunk:
        try:
            audio, rate = _read(utt)
            mixed = audio.mean(1)
            samples = convert(mixed, rate, form.fs, utt.speed)
            # What is written counts. But at the ends of a constant, another rate leaves
            # ripples, and these are silent, too.
            written = as_16_bit(samples)
            if not np.ptp(written) or not np.ptp(mixed):
                raise BadAudio(
                    f"silent: its {len(mixed)} samples are all the same in 16 bits"
                )
            if form.feats_type == "fbank" and len(samples) < WINDOW * form.fs:
                raise BadAudio(f"shorter than a window of {WINDOW} s")
            digest = hashlib.blake2b(written.tobytes(), digest_size=8)
            outcome.digests[utt.id] = digest.hexdigest()
            outcome.rates[utt.id] = rate
            if audio.shape[1] > 1:
                outcome.channels[utt.id] = audio.shape[1]
            yield utt.id, samples
        except BadAudio as error:
            outcome.dropped[utt.id] = str(error)


def _write_raw(chunk: list[Utterance], directory: Path, form: Format) -> Outcome:
    outcome = Outcome()
    directory.mkdir(parents=True, exist_ok=True)
    for utt, samples in _load(chunk, form, outcome):
        path = directory / f"{file_name(utt)}.{form.audio_format}"
        write_audio(path, samples, form.fs)
        outcome.entries[utt] = str(path)
        outcome.sizes[utt] = str(len(samples))
    return outcome


def _write_arks(chunk: list[Utterance], directory: Path, form: Format) -> Outcome:
    """Write the files into one ark, as ESPnet's own stage 3 does."""
    import kaldiio

    outcome = Outcome()
    directory.mkdir(parents=True, exist_ok=True)
    ark, scp = directory / "wav.ark", directory / "wav.scp"
    for path in (ark, scp):
        path.unlink(missing_ok=True)  # of an interrupted run
    encoding = dict(format=form.audio_format.removesuffix(".ark"), subtype="PCM_16")
    for utt, samples in _load(chunk, form, outcome):
        kaldiio.save_ark(
            str(ark),
            {utt: (form.fs, as_16_bit(samples))},
            scp=str(scp),
            append=True,
            write_function="soundfile",
            write_kwargs=encoding,
        )
        outcome.sizes[utt] = str(len(samples))
    outcome.entries = _read_optional(scp)
    return outcome


def file_name(utt: str) -> str:
    """Return a name for an utterance's file that no other utterance has.

    Ids may hold slashes, and may be longer than a file's name may be.
    """
    name = quote(utt, safe=" !#$&'()+,;=@[]^`{}~")
    if len(name) > 200:
        return f"{name[:100]}%{hashlib.sha256(utt.encode()).hexdigest()}"
    return name


def _write_fbank(chunk: list[Utterance], directory: Path, form: Format) -> Outcome:
    """Write Kaldi's log mel energies, by lhotse: 25 ms windows every 10 ms."""
    import kaldiio
    from lhotse import Fbank, FbankConfig

    outcome = Outcome()
    directory.mkdir(parents=True, exist_ok=True)
    extractor = Fbank(FbankConfig(sampling_rate=form.fs, num_mel_bins=form.n_mels))
    ark, scp = directory / "feats.ark", directory / "feats.scp"
    with kaldiio.WriteHelper(f"ark,scp:{ark},{scp}") as writer:
        for utt, samples in _load(chunk, form, outcome):
            # Kaldi's scale is that of 16 bit integers. At a scale of 1, the floor of
            # the logarithm would hide the quiet parts of speech.
            feats = extractor.extract(samples * 32768, form.fs)
            writer(utt, feats)
            outcome.sizes[utt] = f"{feats.shape[0]},{feats.shape[1]}"
    outcome.entries = read_table(scp)
    return outcome


def _check_extracted(src: str, utts: list[str]) -> Outcome:
    """Read the user's own features once, to check them and to learn their shapes."""
    import kaldiio
    from tqdm import tqdm

    path = Path(src) / "feats.scp"
    table = read_table(path)
    speeds = _read_optional(path.with_name("utt2speed"))
    for utt, speed in speeds.items():
        if not re.fullmatch(r"1(\.0*)?", speed):
            raise UserError(
                f"{src}: utt2speed of {utt} is {speed}, and extracted features can not "
                "be speed-perturbed: remove utt2speed"
            )
    outcome = Outcome()
    dims: dict[int, str] = {}
    for utt in tqdm(utts, desc=f"check {Path(src).name}"):
        try:
            feats = kaldiio.load_mat(table[utt])
        except Exception as error:  # kaldiio raises whatever the bytes lead to
            outcome.dropped[utt] = f"unreadable: {error}"
            continue
        if not isinstance(feats, np.ndarray) or feats.ndim != 2 or not feats.size:
            outcome.dropped[utt] = "empty, or not a matrix of (frames, dim)"
        elif not np.isfinite(feats).all():
            outcome.dropped[utt] = "values that are not finite"
        else:
            dims.setdefault(feats.shape[1], utt)
            outcome.entries[utt] = table[utt]
            outcome.sizes[utt] = f"{feats.shape[0]},{feats.shape[1]}"
    if len(dims) > 1:
        found = ", ".join(f"{dim} ({utt})" for dim, utt in dims.items())
        raise UserError(f"{path}: features of different dimensions: {found}")
    return outcome


def _write_tables(src: str, dst: Path, form: Format, outcome: Outcome) -> None:
    subset_data_dir(src, dst, outcome.entries)
    if form.feats_type == "raw":
        write_table(dst / "wav.scp", outcome.entries)
        write_table(dst / "utt2num_samples", outcome.sizes)
    else:
        write_table(dst / "feats.scp", outcome.entries)
        write_table(dst / "feats_shape", outcome.sizes)
        dim = next(iter(outcome.sizes.values())).split(",")[1]
        (dst / "feats_dim").write_text(f"{dim}\n")
    (dst / "feats_type").write_text(f"{form.feats_type}\n")
