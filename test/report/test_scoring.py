import functools
import random

import numpy as np
import pytest

from dldkit.errors import UserError
from dldkit.report import scoring
from dldkit.report.scoring import (
    bootstrap_interval,
    read_text,
    score_files,
    score_texts,
    symbols_of,
)


def edit_distance(ref, hyp):
    """Fewest edits by plain recursion over all alignments."""

    @functools.cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(
            distance(i - 1, j) + 1,
            distance(i, j - 1) + 1,
            distance(i - 1, j - 1) + (ref[i - 1] != hyp[j - 1]),
        )

    return distance(len(ref), len(hyp))


def random_texts(number, seed, least=1):
    rng = random.Random(seed)
    return {
        f"utt{i:03}": " ".join(rng.choices(["a", "bb", "c"], k=rng.randint(least, 8)))
        for i in range(number)
    }


def test_counts_are_those_found_by_hand():
    refs = {
        "u1": "one two three four",
        "u2": "five six",
        "u3": "seven",
        "u4": "eight nine",
        "u5": "zero",
    }
    hyps = {
        "u5": "zero",  # correct
        "u4": "",  # two deletions
        "u3": "seven seven oh",  # two insertions
        "u2": "five sick",  # a substitution
        "u1": "one too three",  # a substitution and a deletion
    }
    score = score_texts(refs, hyps)
    assert score.utt_ids == ("u1", "u2", "u3", "u4", "u5")
    assert score.correct.tolist() == [2, 1, 1, 0, 1]
    assert score.substitutions.tolist() == [1, 1, 0, 0, 0]
    assert score.deletions.tolist() == [1, 0, 0, 2, 0]
    assert score.insertions.tolist() == [0, 0, 2, 0, 0]
    assert score.totals() == {
        "snt": 5,
        "wrd": 10,
        "corr": 5,
        "sub": 2,
        "del": 3,
        "ins": 2,
        "err": 7,
        "s_err": 4,
    }
    assert score.error_rate == 0.7


def test_characters_include_the_space_between_words():
    score = score_texts({"u": "ab cd"}, {"u": "abcx"}, unit="character")
    assert score.totals() == {
        "snt": 1,
        "wrd": 5,
        "corr": 3,
        "sub": 1,
        "del": 1,
        "ins": 0,
        "err": 2,
        "s_err": 1,
    }


@pytest.mark.parametrize("unit", ["word", "character"])
def test_errors_are_the_fewest_edits(unit):
    refs, hyps = random_texts(60, seed=1), random_texts(60, seed=2, least=0)
    score = score_texts(refs, hyps, unit)
    split = str.split if unit == "word" else tuple
    for i, utt_id in enumerate(score.utt_ids):
        ref, hyp = tuple(split(refs[utt_id])), tuple(split(hyps[utt_id]))
        assert score.errors[i] == edit_distance(ref, hyp)
        assert score.lengths[i] == len(ref)
        said = score.correct[i] + score.substitutions[i] + score.insertions[i]
        assert said == len(hyp)


def test_interval_equals_a_plain_loop(monkeypatch):
    score = score_texts(random_texts(37, seed=3), random_texts(37, seed=4))
    rng = np.random.default_rng(7)
    rates = []
    for _ in range(200):
        drawn = rng.integers(37, size=37)
        errors = sum(int(score.errors[i]) for i in drawn)
        rates.append(errors / sum(int(score.lengths[i]) for i in drawn))
    expected = (np.percentile(rates, 2.5), np.percentile(rates, 97.5))
    assert bootstrap_interval(score, 200, seed=7) == pytest.approx(expected, abs=1e-12)
    assert expected[0] < score.error_rate < expected[1]

    monkeypatch.setattr(scoring, "_CHUNK", 100)  # several blocks draw the same
    assert bootstrap_interval(score, 200, seed=7) == pytest.approx(expected, abs=1e-12)
    assert bootstrap_interval(score, 200, seed=8) != pytest.approx(expected, abs=1e-12)


def test_no_error_in_1500_words_does_not_mean_that_there_is_none():
    """By hand: the rate at which 1,500 correct words have a chance of 2.5 %."""
    texts = {f"u{i}": "a b c d e" for i in range(300)}
    low, high = bootstrap_interval(score_texts(texts, texts), 1000, seed=0)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 1500), rel=1e-6)
    assert f"{100 * high:.2f}" == "0.25"


def test_of_a_single_utterance_the_samples_are_all_the_same():
    one = score_texts({"u": "a b c d"}, {"u": "a b x"})
    assert bootstrap_interval(one, 1000, seed=0) == (0.5, 0.5)


def test_interval_covers_the_true_rate_about_95_times_in_100():
    rng = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        errors = rng.binomial(5, 0.1, size=150)
        zero = np.zeros_like(errors)
        score = scoring.Score(
            tuple(map(str, range(150))), 5 - errors, errors, zero, zero
        )
        low, high = bootstrap_interval(score, 300, seed=trial)
        covered += low <= 0.1 <= high
    assert 0.90 < covered / 300 < 0.985


def test_read_text_keeps_empty_hypotheses(tmp_path):
    path = tmp_path / "text"
    path.write_text("u1 one  two \nu2\nu3 \n", encoding="utf-8")
    assert read_text(path) == {"u1": "one two", "u2": "", "u3": ""}


@pytest.mark.parametrize(
    "ref, hyp, message",
    [
        ("u1 a\nu2 b\nu3 c\n", "u2 b\n", "2 utterances \\(u1, u3\\)"),
        ("u1 a\n", "u1 a\nu9 b\n", "1 utterance \\(u9\\) not in"),
        ("u1 a\nu2\n", "u1 a\nu2 a\n", "1 utterance \\(u2\\) without words"),
        ("u1 a\n", "u1 a\nu1 b\n", "hyp, line 2: u1 is there twice"),
        ("", "", "ref: no utterance to score"),
        ("u1 a\n", None, "hyp does not exist"),
    ],
)
def test_unfit_texts_are_refused_by_name(tmp_path, ref, hyp, message):
    (tmp_path / "ref").write_text(ref)
    if hyp is not None:
        (tmp_path / "hyp").write_text(hyp)
    with pytest.raises(UserError, match=message) as error:
        score_files(tmp_path / "ref", tmp_path / "hyp")
    assert str(tmp_path) in str(error.value)


def test_score_files_scores_words_and_characters(tmp_path):
    (tmp_path / "ref").write_text("u1 one two\nu2 six\n")
    (tmp_path / "hyp").write_text("u2 six\nu1 one\n")
    words, characters = score_files(tmp_path / "ref", tmp_path / "hyp")
    assert words.error_rate == 1 / 3
    assert characters.error_rate == 4 / 10  # " two" of "one two" and "six"


def test_symbols_that_are_no_words_are_not_scored(tmp_path):
    """On neither side; `[unk]` alone is no utterance."""
    (tmp_path / "ref").write_text("u1 [unk] one two\nu2 [unk]\nu3 six [NOISE]\n")
    (tmp_path / "hyp").write_text("u1 one two\nu2 one\nu3 six\n")
    (tmp_path / "nlsyms.txt").write_text("[unk]\n[NOISE]\n")
    files, symbols = (tmp_path / "ref", tmp_path / "hyp"), symbols_of(tmp_path)
    words, characters = score_files(*files, symbols)
    assert words.utt_ids == ("u1", "u3")
    assert words.error_rate == characters.error_rate == 0
    assert score_files(*files)[0].error_rate == 3 / 6
    assert symbols_of(tmp_path / "elsewhere") == []
