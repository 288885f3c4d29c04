#!/usr/bin/env python3
"""Connected digits from the Free Spoken Digit Dataset, or from espeak-ng.

Each utterance strings 3 to 7 single-digit recordings of one speaker together, with
short random gaps. No recording is shared between training, dev and test sets, and
one speaker is kept out of training altogether (`test_unseen`). The noisy sets say other
strings of the same recordings, or for tests the same strings, in rooms full of babble.
"""

import argparse
import hashlib
import http.client
import logging
import os
import shutil
import tarfile
import tempfile
import urllib.request
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import soundfile
from espeak import Espeak
from noise import spoil

from dldkit.data.datadir import write_data_dir
from dldkit.errors import UserError, report_user_errors
from dldkit.step import Step

FS = 8000
WORDS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
TAKES = range(50)  # recordings of each digit by each speaker
TEST, DEV, TRAIN = TAKES[:10], TAKES[10:15], TAKES[15:]  # FSDD's own test set is 0-4

# The last commit of the corpus's own repository. GitHub's archives are not promised to
# stay the same byte for byte, so what is checked is the recordings: this is the
# SHA-256 of the lines that `sha256sum *.wav` prints in sorted order.
COMMIT = "26eb9aaf76e81b692f806f9140c2d2777410d7a1"
URL = f"https://github.com/Jakobovski/free-spoken-digit-dataset/archive/{COMMIT}.tar.gz"
DIGEST = "1801eae019c063377d98f831d3f93574f259475df7332bb0e3d1b080fb5e6959"
FSDD_SPEAKERS = "george jackson lucas nicolas theo yweweler".split()

# Synthetic "speakers": espeak-ng voice, words per minute, pitch. None has breath.
ESPEAK_SPEAKERS = {
    "amy": ("en-us+linda", 165, 60),
    "bob": ("en-us+m3", 150, 40),
    "cat": ("en-gb-x-rp+f4", 175, 55),
    "dan": ("en-gb-scotland+m1", 160, 35),
    "eve": ("en-029+f1", 150, 65),
    "fred": ("en-us-nyc+m7", 180, 50),
}


class Unreachable(UserError):
    """The corpus can not be downloaded: no network, or it broke off."""


class Corpus(NamedTuple):
    """Recordings of single digits, `<digit>_<speaker>_<take>.wav`.

    Attributes:
        unseen: the speaker kept out of training unless another is asked for. Some are
            far harder than others: a small network trained on the other five takes
            every second digit of FSDD's george for another one, and every sixth of
            theo's, which tells models apart better.
        source: the line that names the corpus in logs and tables.
    """

    recordings: Path
    speakers: list[str]
    unseen: str
    source: str


# --- real recordings ------------------------------------------------------------------
def find_fsdd(directory: Path, origin: str) -> Path:
    """Return the folder of recordings; `origin` says in errors who named `directory`.

    Raises:
        UserError: the folder is missing, or recordings are.
    """
    if not directory.is_dir():
        raise UserError(f"{origin}: {directory} is not a directory")
    nested = directory / "recordings"
    recordings = nested if nested.is_dir() else directory
    names = [
        f"{d}_{s}_{t}.wav" for s in FSDD_SPEAKERS for d in range(10) for t in TAKES
    ]
    missing = [name for name in names if not (recordings / name).is_file()]
    if missing:
        raise UserError(
            f"{origin}: {recordings} lacks {len(missing)} of FSDD's {len(names)} "
            f"recordings, first: {' '.join(missing[:3])}"
        )
    return recordings


def digest(recordings: Path) -> str:
    """Return one SHA-256 over names and contents of all recordings."""
    total = hashlib.sha256()
    for path in sorted(recordings.glob("*.wav")):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        total.update(f"{content}  {path.name}\n".encode())
    return total.hexdigest()


def download_fsdd(directory: Path) -> Path:
    """Fetch and check the pinned corpus; a finished download is kept.

    Raises:
        Unreachable: there is no way to it, or the way broke off.
        UserError: what came is not the pinned corpus.
    """
    if directory.is_dir():
        return find_fsdd(directory, "earlier download (remove it to fetch it again)")
    logging.info(f"downloading {URL}")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as part:
        try:
            with urllib.request.urlopen(URL, timeout=30) as response:
                with tarfile.open(fileobj=response, mode="r|gz") as archive:
                    archive.extractall(part, filter="data")
        except (
            OSError,
            EOFError,
            http.client.HTTPException,
            tarfile.TarError,
            zlib.error,
        ) as error:
            raise Unreachable(
                f"FSDD can not be downloaded ({error}): set FSDD to a copy, or use "
                "--source espeak"
            )
        (root,) = Path(part).iterdir()
        if digest(root / "recordings") != DIGEST:
            raise UserError(
                f"{URL}: the recordings are not those of the pinned commit (SHA-256 "
                "differs); try again, or set FSDD to a copy that you trust"
            )
        root.rename(directory)
    return find_fsdd(directory, "download")


def real_recordings(downloads: Path) -> Path:
    """Return FSDD's recordings: those `$FSDD` names, else downloaded ones."""
    named = os.environ.get("FSDD", "")
    if not named or named == "downloads":
        return download_fsdd(downloads / "free-spoken-digit-dataset")
    recordings = find_fsdd(Path(named), "FSDD (environment or db.sh)")
    if digest(recordings) != DIGEST:
        logging.warning(f"{recordings} differs from the pinned commit {COMMIT[:7]}")
    return recordings


# --- synthesised recordings -----------------------------------------------------------
def synthesise(directory: Path) -> Path:
    """Write recordings named as FSDD names them; finished ones are kept."""
    with Step(directory, {}, speakers=ESPEAK_SPEAKERS, takes=list(TAKES)) as step:
        if not step.done:
            _speak(directory)
    return directory


def _speak(directory: Path) -> None:
    espeak = Espeak()
    rng = np.random.default_rng(0)
    logging.info(f"synthesising {len(ESPEAK_SPEAKERS) * 10 * len(TAKES)} recordings")
    for speaker, (voice, rate, pitch) in ESPEAK_SPEAKERS.items():
        for digit, word in enumerate(WORDS):
            for take in TAKES:
                takes_rate = rate + int(rng.integers(-25, 26))
                takes_pitch = pitch + int(rng.integers(-15, 16))
                signal = espeak(word.lower(), voice, takes_rate, takes_pitch, FS)
                path = directory / f"{digit}_{speaker}_{take}.wav"
                soundfile.write(path, signal, FS, subtype="PCM_16")


# --- connected digits -----------------------------------------------------------------
def find_corpus(source: str, downloads: Path) -> Corpus:
    """Return real recordings where they can be had, as far as `source` allows.

    Raises:
        UserError: `source` is fsdd and it can not be had, or `$FSDD` is incomplete.
    """
    if source != "espeak":
        try:
            line = "FSDD, real recordings (CC BY-SA 4.0)"
            return Corpus(real_recordings(downloads), FSDD_SPEAKERS, "theo", line)
        except Unreachable as error:
            if source == "fsdd":
                raise
            logging.warning(f"{error}; using synthesised speech instead")
    recordings = synthesise(downloads / "espeak_digits")
    line = "espeak-ng, synthesised speech"
    return Corpus(recordings, list(ESPEAK_SPEAKERS), "eve", line)


def read_recording(path: Path) -> np.ndarray:
    """Read one digit (Time,), float32 in [-1, 1]."""
    try:
        signal, fs = soundfile.read(path, dtype="float32")
    except soundfile.LibsndfileError as error:
        raise UserError(f"{path} can not be read: {error}")
    if fs != FS or signal.ndim != 1 or not len(signal):
        raise UserError(f"{path}: expected {FS} Hz mono speech, got {fs} Hz")
    return signal


def deal(names: list[str], rng: np.random.Generator) -> Iterator[str]:
    """Deal `names` in random order for ever: all of them before any comes again."""
    while True:
        yield from rng.permutation(names)


class DigitSet(NamedTuple):
    """What a data directory is made of.

    Attributes:
        takes: of each digit by each of the speakers.
        size: utterances.
        seed: sets that share it say the same strings, if all else is the same.
        snr: of speech to babble in dB, least and most; None = clean.
        noisy: share of the utterances that are spoilt.
        babble: speakers and takes of the babble.
    """

    name: str
    speakers: list[str]
    takes: range
    size: int
    seed: int
    snr: Optional[tuple[float, float]] = None
    noisy: float = 1.0
    babble: tuple[list[str], range] = ([], range(0))


def write_set(
    made: DigitSet,
    corpus: Corpus,
    digits: tuple[int, int],
    seed: int,
    data_dir: Path,
) -> None:
    """Write a data directory of utterances that are strung together.

    Args:
        digits: fewest and most digits in an utterance.
    """
    name, speakers = made.name, made.speakers
    wav_dir = data_dir / "local" / "wav" / name
    shutil.rmtree(wav_dir, ignore_errors=True)
    wav_dir.mkdir(parents=True)
    # so that the text depends on no audio, and what is said not on the noise
    text_rng, audio_rng, noise_rng = np.random.default_rng([seed, made.seed]).spawn(3)
    signals = read_recordings(corpus, speakers, made.takes)
    others = read_recordings(corpus, *made.babble)
    decks = {speaker: deal(list(signals[speaker]), text_rng) for speaker in speakers}

    names = ("wav_scp", "text", "utt2spk", "utt2recordings")
    tables: dict[str, dict[str, str]] = {table: {} for table in names}
    for number in range(made.size):
        speaker = speakers[number % len(speakers)]
        utt = f"{speaker}-{name}-{number:05d}"
        count = text_rng.integers(digits[0], digits[1] + 1)
        used = [next(decks[speaker]) for _ in range(count)]
        path = wav_dir / f"{utt}.wav"
        signal = connect([signals[speaker][recording] for recording in used], audio_rng)
        if made.snr is not None and noise_rng.random() < made.noisy:
            pool = [r for s in others if s != speaker for r in others[s].values()]
            signal = spoil(signal, pool, noise_rng.uniform(*made.snr), noise_rng, FS)
        soundfile.write(path, signal, FS, subtype="PCM_16")
        tables["wav_scp"][utt] = str(path)
        tables["text"][utt] = " ".join(WORDS[int(recording[0])] for recording in used)
        tables["utt2spk"][utt] = speaker
        tables["utt2recordings"][utt] = " ".join(used)
    source = corpus.source + (", in simulated rooms with babble" if made.snr else "")
    write_data_dir(data_dir / name, source, **tables)
    logging.info(
        f"{name}: {made.size} utterances of {', '.join(speakers)}, "
        f"from {len(speakers) * len(made.takes) * 10} recordings"
    )


def read_recordings(
    corpus: Corpus, speakers: list[str], takes: range
) -> dict[str, dict[str, np.ndarray]]:
    """Return the recordings (Time,) of each speaker, by their names."""
    return {
        speaker: {
            name: read_recording(corpus.recordings / f"{name}.wav")
            for name in (f"{d}_{speaker}_{take}" for d in range(10) for take in takes)
        }
        for speaker in speakers
    }


def connect(digits: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """Join digits with gaps of 30 to 200 ms over a faint noise floor (-66 dB)."""
    gaps = rng.integers(FS * 30 // 1000, FS * 200 // 1000, len(digits) + 1)
    length = sum(len(digit) for digit in digits) + int(gaps.sum())
    signal = rng.normal(0, 5e-4, length).astype(np.float32)
    start = 0
    for gap, digit in zip(gaps, digits):
        start += gap
        signal[start : start + len(digit)] += digit
        start += len(digit)
    return np.clip(signal, -1, 1)


def prepare(args: argparse.Namespace) -> None:
    """Write the data directories.

    Raises:
        UserError: an option makes no sense, or the corpus can not be had.
    """
    digits = (args.min_digits, args.max_digits)
    if not 1 <= digits[0] <= digits[1]:
        raise UserError(
            "expected 1 <= --min_digits <= --max_digits, got %d, %d" % digits
        )
    corpus = find_corpus(args.source, Path(args.download_dir))
    logging.info(f"corpus: {corpus.source}, {corpus.recordings}")
    unseen = args.unseen_speaker or corpus.unseen
    if unseen not in corpus.speakers:
        choices = " ".join(corpus.speakers)
        raise UserError(f"--unseen_speaker {unseen}: choose from {choices}")
    seen = [speaker for speaker in corpus.speakers if speaker != unseen]
    for made in _sets(args, seen, unseen):
        if made.size < 1:
            raise UserError(f"--num_{made.name} must be at least 1, got {made.size}")
        write_set(made, corpus, digits, args.seed, Path(args.data_dir))


def _sets(args: argparse.Namespace, seen: list[str], unseen: str) -> Iterator[DigitSet]:
    # Nothing of the unseen speaker is trained on, so all takes may be tested on.
    train, dev = ("train", seen, TRAIN), ("dev", seen, DEV)
    tests = ("test_seen", seen, TEST), ("test_unseen", [unseen], TAKES)
    yield DigitSet(*train, args.num_train, 0)
    yield DigitSet(*dev, args.num_dev, 1)
    yield DigitSet(*tests[0], args.num_test_seen, 2)
    yield DigitSet(*tests[1], args.num_test_unseen, 3)
    mixed = dict(snr=(0.0, 20.0), noisy=0.5)
    for (name, *of), size, seed in (
        (train, 2 * args.num_train, 4),
        (dev, args.num_dev, 5),
    ):
        yield DigitSet(f"{name}_noisy", *of, size, seed, **mixed, babble=tuple(of))
    for snr in (20, 10, 5):
        of, level = tests[0][1:], dict(snr=(snr, snr), babble=(seen, TEST))
        yield DigitSet(f"test_seen_{snr}db", *of, args.num_test_seen, 2, **level)
        of = tests[1][1:]
        yield DigitSet(f"test_unseen_{snr}db", *of, args.num_test_unseen, 3, **level)


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--source",
        choices=("auto", "fsdd", "espeak"),
        default="auto",
        help="fsdd: real recordings, from $FSDD or downloaded; espeak: synthesised; "
        "auto: real ones where they can be had",
    )
    parser.add_argument(
        "--unseen_speaker",
        help="kept out of training; default: theo (fsdd), eve (espeak)",
    )
    parser.add_argument("--num_train", type=int, default=1500, help="utterances")
    parser.add_argument("--num_dev", type=int, default=150, help="utterances")
    parser.add_argument("--num_test_seen", type=int, default=300, help="utterances")
    parser.add_argument("--num_test_unseen", type=int, default=300, help="utterances")
    parser.add_argument("--min_digits", type=int, default=3, help="per utterance")
    parser.add_argument("--max_digits", type=int, default=7, help="per utterance")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same corpus")
    parser.add_argument("--data_dir", default="data", help="where the sets go")
    parser.add_argument("--download_dir", default="downloads", help="where corpora go")
    return parser


@report_user_errors
def main(cmd=None) -> None:
    """Run stage 1 of the recipe."""
    logging.basicConfig(
        level="INFO", format="%(asctime)s (%(module)s:%(lineno)d) %(message)s"
    )
    prepare(get_parser().parse_args(cmd))


if __name__ == "__main__":
    main()
