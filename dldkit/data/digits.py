"""Connected digits from the Free Spoken Digit Dataset, or from espeak-ng.

An utterance strings single-digit recordings of one speaker together, with short random
gaps; it may be spoilt by a room full of babble.
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, Optional

import numpy as np
import soundfile

from dldkit.data import fsdd
from dldkit.data.datadir import write_data_dir
from dldkit.data.espeak import Espeak
from dldkit.data.fsdd import TAKES
from dldkit.data.noise import spoil
from dldkit.errors import UserError
from dldkit.step import Step

FS = 8000
WORDS = "ZERO ONE TWO THREE FOUR FIVE SIX SEVEN EIGHT NINE".split()
TEST, DEV, TRAIN = TAKES[:10], TAKES[10:15], TAKES[15:]  # FSDD's own test set is 0-4

# Synthetic "speakers": espeak-ng voice, words per minute, pitch. None has breath.
ESPEAK_SPEAKERS = {
    "amy": ("en-us+linda", 165, 60),
    "bob": ("en-us+m3", 150, 40),
    "cat": ("en-gb-x-rp+f4", 175, 55),
    "dan": ("en-gb-scotland+m1", 160, 35),
    "eve": ("en-029+f1", 150, 65),
    "fred": ("en-us-nyc+m7", 180, 50),
}


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
def find_digits(source: str, downloads: Path) -> Corpus:
    """Return real recordings where they can be had, as far as `source` allows.

    Raises:
        UserError: `source` is fsdd and it can not be had, or `$FSDD` is incomplete.
    """
    if source != "espeak":
        try:
            line = "FSDD, real recordings (CC BY-SA 4.0)"
            return Corpus(fsdd.real_recordings(downloads), fsdd.SPEAKERS, "theo", line)
        except fsdd.Unreachable as error:
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

    Their audio is kept where it was made already.

    Args:
        digits: fewest and most digits in an utterance.
    """
    name, speakers = made.name, made.speakers
    # so that the text depends on no audio, and what is said not on the noise
    text_rng, audio_rng, noise_rng = np.random.default_rng([seed, made.seed]).spawn(3)
    names = {speaker: recordings_of(speaker, made.takes) for speaker in speakers}
    decks = {speaker: deal(names[speaker], text_rng) for speaker in speakers}
    strings: dict[str, list[str]] = {}
    for number in range(made.size):
        speaker = speakers[number % len(speakers)]
        count = text_rng.integers(digits[0], digits[1] + 1)
        said = [next(decks[speaker]) for _ in range(count)]
        strings[f"{speaker}-{name}-{number:05d}"] = said

    directory = data_dir / "local" / "strings" / name
    files = {
        recording: corpus.recordings / f"{recording}.wav"
        for heard, takes in ((speakers, made.takes), made.babble)
        for speaker in heard
        for recording in recordings_of(speaker, takes)
    }
    made_from = {**made._asdict(), "digits": digits, "seed_of_all": seed}
    with Step(directory, files, **made_from) as step:
        # other strings have other paths: stage 3 looks at the tables alone
        paths = {utt: directory / step.identity / f"{utt}.wav" for utt in strings}
        if not step.done:
            (directory / step.identity).mkdir(exist_ok=True)
            _write_audio(strings, paths, made, corpus, audio_rng, noise_rng)
    source = corpus.source + (", in simulated rooms with babble" if made.snr else "")
    write_data_dir(
        data_dir / name,
        source,
        wav_scp={utt: str(path) for utt, path in paths.items()},
        text={
            utt: " ".join(WORDS[int(recording[0])] for recording in said)
            for utt, said in strings.items()
        },
        utt2spk={utt: utt.split("-")[0] for utt in strings},
        utt2recordings={utt: " ".join(said) for utt, said in strings.items()},
    )
    logging.info(
        f"{name}: {made.size} utterances of {', '.join(speakers)}, "
        f"from {len(speakers) * len(made.takes) * 10} recordings"
    )


def _write_audio(
    strings: dict[str, list[str]],
    paths: dict[str, Path],
    made: DigitSet,
    corpus: Corpus,
    audio_rng: np.random.Generator,
    noise_rng: np.random.Generator,
) -> None:
    signals = read_recordings(corpus, made.speakers, made.takes)
    others = read_recordings(corpus, *made.babble)
    for utt, said in strings.items():
        speaker = utt.split("-")[0]
        signal = connect([signals[speaker][name] for name in said], audio_rng)
        if made.snr is not None and noise_rng.random() < made.noisy:
            pool = [r for s in others if s != speaker for r in others[s].values()]
            signal = spoil(signal, pool, noise_rng.uniform(*made.snr), noise_rng, FS)
        soundfile.write(paths[utt], signal, FS, subtype="PCM_16")


def recordings_of(speaker: str, takes: range) -> list[str]:
    """Return the names of a speaker's recordings of all digits."""
    return [f"{digit}_{speaker}_{take}" for digit in range(10) for take in takes]


def read_recordings(
    corpus: Corpus, speakers: list[str], takes: range
) -> dict[str, dict[str, np.ndarray]]:
    """Return the recordings (Time,) of each speaker, by their names."""
    return {
        speaker: {
            name: read_recording(corpus.recordings / f"{name}.wav")
            for name in recordings_of(speaker, takes)
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
