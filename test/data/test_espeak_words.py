"""The espeak_words recipe: a handful of sentences."""

import ctypes
import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from dldkit.data.datadir import read_table, utterances
from dldkit.data.espeak import Espeak

pytestmark = pytest.mark.integration

REPO = Path(__file__).resolve().parents[2]
SIZES = dict(train=40, dev=4, test_seen=6, test_unseen=8)


@pytest.fixture(scope="module")
def words(recipe):
    return recipe("espeak_words")


def make(words, root: Path, *options: str) -> Path:
    """Run stage 1 as a user does: the processes that speak import the script again."""
    sizes = [f"--num_{name}={size}" for name, size in SIZES.items()]
    command = [sys.executable, words.__file__, f"--data_dir={root}/data", *sizes]
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    subprocess.run([*command, *options], check=True, env=env)
    return root / "data"


@pytest.fixture(scope="module")
def corpus(words, tmp_path_factory) -> Path:
    return make(words, tmp_path_factory.mktemp("words"))


def audio_of(directory: Path) -> dict[str, np.ndarray]:
    wavs = read_table(directory / "wav.scp")
    return {utt: soundfile.read(path)[0] for utt, path in wavs.items()}


def checksums(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(
            path.read_bytes().replace(str(root).encode(), b"")
        ).hexdigest()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_sets_are_complete_and_named_for_what_they_are(corpus):
    for name, size in SIZES.items():
        assert len(utterances(corpus / name)) == size
        source = (corpus / name / "corpus_source").read_text()
        assert "espeak-ng, synthesised speech" in source


def test_unseen_voices_are_not_in_training(corpus):
    speakers = {n: set(read_table(corpus / n / "utt2spk").values()) for n in SIZES}
    assert len(speakers["train"]) == 40 and len(speakers["test_unseen"]) == 8
    assert speakers["test_seen"] < speakers["train"]
    variants = [
        {s.split("_")[-1] for s in speakers[n]} for n in ("train", "test_unseen")
    ]
    assert not variants[0] & variants[1]


def test_no_sentence_is_said_in_two_sets(corpus):
    said = [s for n in SIZES for s in read_table(corpus / n / "text").values()]
    assert len(set(said)) == len(said)
    assert {len(s.split()) for s in said} == set(range(4, 11))


def test_words_are_drawn_as_zipf_says(words):
    """Of 2,000 words, and the counts fall as the law has it."""
    made = words.SentenceSet("train", ["en-us+m1"], 8000, 0)
    sentences = words.draw(made, (4, 10), 0).values()
    counts = Counter(word for s in sentences for word in s.text.split())
    assert len(counts) == 2000
    total = sum(counts.values())
    ranked = [count for _, count in counts.most_common()]
    harmonic = sum(1 / rank for rank in range(20, 2020))
    for rank in (0, 10, 100, 1000):
        share = np.mean(ranked[rank : rank + 10 + rank // 5]) / total
        law = np.mean([1 / (r + 20) for r in range(rank, rank + 10 + rank // 5)])
        assert share == pytest.approx(law / harmonic, rel=0.15)


def test_no_two_words_sound_alike(words):
    """In no accent, by espeak-ng's own phonemes."""
    espeak = Espeak()
    phonemes = espeak.lib.espeak_TextToPhonemes
    phonemes.restype = ctypes.c_char_p
    chosen, _ = words.vocabulary(0)
    for accent in words.ACCENTS:
        assert espeak.lib.espeak_SetVoiceByName(accent.encode()) == 0
        sounds = {}
        for word in chosen:
            text = ctypes.c_char_p(word.encode())
            sound = phonemes(ctypes.byref(text), 1, 0)
            assert sound and sounds.setdefault(sound, word) == word, accent


def test_every_voice_speaks_and_none_clips(corpus):
    for name in ("train", "test_unseen"):
        text = read_table(corpus / name / "text")
        for utt, audio in audio_of(corpus / name).items():
            assert np.abs(audio).max() == pytest.approx(0.5, abs=0.01)
            per_word = len(audio) / 8000 / len(text[utt].split())
            assert 0.25 < per_word < 0.9, utt
            edges = np.concatenate([audio[:400], audio[-400:]])
            assert np.abs(edges).max() < 0.01  # a pause at both ends


def test_same_seed_same_bytes(corpus, words, tmp_path):
    again = make(words, tmp_path, "--nj=1")
    assert checksums(again) == checksums(corpus)
    written = (again / "local/wav/train/.done").stat().st_mtime_ns
    make(words, tmp_path)  # over itself: what is finished is kept
    assert checksums(again) == checksums(corpus)
    assert (again / "local/wav/train/.done").stat().st_mtime_ns == written


def test_another_seed_is_another_corpus(corpus, words):
    made = words.SentenceSet("train", ["en-us+m1"], 5, 0)
    assert words.draw(made, (4, 10), 0) == words.draw(made, (4, 10), 0)
    assert words.draw(made, (4, 10), 0) != words.draw(made, (4, 10), 1)
