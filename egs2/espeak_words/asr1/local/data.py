#!/usr/bin/env python3
"""Sentences of 2,000 words, drawn at random and spoken by many voices of espeak-ng.

Words are drawn one by one, frequent and rare ones as in a language (Zipf), so that a
sentence has no meaning and no grammar. `test_seen` has new sentences of the training
voices, `test_unseen` has voices that are not in training.
"""

import argparse
import logging
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from dldkit.data.datadir import write_data_dir
from dldkit.data.espeak import Espeak
from dldkit.errors import UserError, report_user_errors
from dldkit.options import positive
from dldkit.step import Step

FS = 8000
NUM_WORDS = 2000
ZIPF_SHIFT = 20  # a word's frequency is 1 / (rank + this): the first has 1 % of all
# These sound like another word of the list in one of the accents.
HOMOPHONES = set("hair heart high ill old pear piece where write".split())

# Variants of espeak-ng's voice that do not clip and have no breath, see
# dldkit.data.espeak. Each one of SEEN speaks in two of the accents, so that all accents
# are heard in training.
ACCENTS = (
    "en-us en en-gb-x-rp en-gb-scotland en-gb-x-gbclan en-gb-x-gbcwmd en-029 en-us-nyc"
).split()
SEEN = (
    "m1 m3 m4 m7 f1 f4 linda Andy Annie Denis "
    "Diogo Lee Mario Michael Mike aunty belinda pablo quincy rob"
).split()
UNSEEN = "m8 steph robert Alex boris max travis shelby".split()
RATE, PITCH = (130, 190), (30, 70)  # of each sentence: words per minute, 0-100
SENTENCES = 1500  # that one process speaks: other numbers make other samples


class SentenceSet(NamedTuple):
    """What a data directory is made of: each set draws from a seed of its own."""

    name: str
    voices: list[str]
    size: int
    seed: int


class Sentence(NamedTuple):
    """What one utterance says, and how."""

    voice: str
    text: str
    rate: int
    pitch: int


def voices_of(variants: list[str], accents_each: int) -> list[str]:
    """Return voices, each accent equally often."""
    return [
        f"{ACCENTS[(i + 3 * k) % len(ACCENTS)]}+{variant}"
        for i, variant in enumerate(variants)
        for k in range(accents_each)
    ]


def vocabulary(seed: int) -> tuple[list[str], np.ndarray]:
    """Return the words and how probable they are, most frequent first.

    The words are those of BIP-39, a standard's list of plain English words; which ones
    are frequent is drawn at random, how frequent is Zipf's law as Mandelbrot has it.

    Raises:
        UserError: the package with the words is not installed.
    """
    try:
        from mnemonic import Mnemonic
    except ImportError:
        raise UserError("the words are those of a package: pip install mnemonic")
    words = [w for w in Mnemonic("english").wordlist if w not in HOMOPHONES]
    words = list(np.random.default_rng(seed).permutation(words)[:NUM_WORDS])
    weights = 1 / (np.arange(NUM_WORDS) + ZIPF_SHIFT)
    return words, weights / weights.sum()


def draw(made: SentenceSet, lengths: tuple[int, int], seed: int) -> dict[str, Sentence]:
    """Draw the sentences of a set, by utterance.

    Args:
        lengths: fewest and most words of a sentence.
    """
    words, probabilities = vocabulary(seed)
    rng = np.random.default_rng([seed, made.seed])
    sentences = {}
    for number in range(made.size):
        voice = made.voices[number % len(made.voices)]
        count = rng.integers(lengths[0], lengths[1] + 1)
        text = " ".join(rng.choice(words, count, p=probabilities))
        rate, pitch = int(rng.integers(*RATE)), int(rng.integers(*PITCH))
        speaker = voice.replace("-", "_").replace("+", "_")
        utt = f"{speaker}-{made.name}-{number:05d}"
        sentences[utt] = Sentence(voice, text, rate, pitch)
    return sentences


def speak(sentences: dict[str, Sentence], directory: Path, seed: list[int]) -> None:
    """Write what is said; in a process of its own, see dldkit.data.espeak."""
    espeak, rng = Espeak(), np.random.default_rng(seed)
    for utt, (voice, text, rate, pitch) in sentences.items():
        signal = espeak(text, voice, rate, pitch, FS)
        around = rng.integers(FS // 10, FS // 4, 2)  # before and after
        signal = np.pad(0.5 * signal / np.abs(signal).max(), around)
        signal += rng.normal(0, 5e-4, len(signal))  # no microphone is silent
        soundfile.write(directory / f"{utt}.wav", signal, FS, subtype="PCM_16")


def write_set(
    made: SentenceSet, lengths: tuple[int, int], seed: int, data_dir: Path, nj: int
) -> None:
    """Write a data directory."""
    sentences = draw(made, lengths, seed)
    wav_dir = data_dir / "local" / "wav" / made.name
    with Step(wav_dir, {}, sentences=sentences, seed=seed) as step:
        if not step.done:
            logging.info(f"{made.name}: synthesising {made.size} sentences")
            utts = sorted(sentences)
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(nj, context, max_tasks_per_child=1) as pool:
                jobs = []
                parts = -(-made.size // SENTENCES)
                for part in range(parts):
                    said = {utt: sentences[utt] for utt in utts[part::parts]}
                    job = (said, wav_dir, [seed, made.seed, part])
                    jobs.append(pool.submit(speak, *job))
                for job in jobs:
                    job.result()
    write_data_dir(
        data_dir / made.name,
        "espeak-ng, synthesised speech",
        wav_scp={utt: str(wav_dir / f"{utt}.wav") for utt in sentences},
        text={utt: sentence.text.upper() for utt, sentence in sentences.items()},
        utt2spk={utt: utt.split("-")[0] for utt in sentences},
    )
    logging.info(f"{made.name}: {made.size} utterances of {len(made.voices)} voices")


def prepare(args: argparse.Namespace) -> None:
    """Write the data directories.

    Raises:
        UserError: an option makes no sense, or a package is missing.
    """
    lengths = (args.min_words, args.max_words)
    if lengths[0] > lengths[1]:
        raise UserError("expected --min_words <= --max_words, got %d, %d" % lengths)
    data_dir = Path(args.data_dir)
    seen, unseen = voices_of(SEEN, 2), voices_of(UNSEEN, 1)
    for made in (
        SentenceSet("train", seen, args.num_train, 0),
        SentenceSet("dev", seen, args.num_dev, 1),
        SentenceSet("test_seen", seen, args.num_test_seen, 2),
        SentenceSet("test_unseen", unseen, args.num_test_unseen, 3),
    ):
        write_set(made, lengths, args.seed, data_dir, args.nj)


def get_parser() -> argparse.ArgumentParser:
    """Return the command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--num_train", type=positive, default=6000, help="utterances")
    add("--num_dev", type=positive, default=200, help="utterances")
    add("--num_test_seen", type=positive, default=400, help="utterances")
    add("--num_test_unseen", type=positive, default=400, help="utterances")
    add("--min_words", type=positive, default=4, help="of a sentence")
    add("--max_words", type=positive, default=10, help="of a sentence")
    add("--seed", type=int, default=0, help="same seed, same corpus")
    jobs = os.environ.get("DLDKIT_NJ", 2)  # as run.sh says
    add("--nj", type=positive, default=jobs, help="processes that speak at a time")
    add("--data_dir", default="data", help="where the sets go")
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
