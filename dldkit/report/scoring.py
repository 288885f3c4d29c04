"""Word and character error rates with bootstrap intervals.

The counts come from jiwer's alignment (least number of edits, every edit costs 1).
They are kept per utterance, because the interval resamples utterances.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Collection, Sequence, Union

import numpy as np
from scipy.stats import binomtest, bootstrap

from dldkit.config_files import BARE_NAMES
from dldkit.data.datadir import DROPPED_TEXT, read_table
from dldkit.errors import UserError

BOOTSTRAP_SAMPLES = 1000  # of a report's intervals
# Resampled utterances held in memory at a time by bootstrap_interval.
_CHUNK = 4_000_000
# Scores that say why there is no text: only a sum of no logarithms is 0, and -inf is
# what `dldkit.asr.inference` writes. Beam search has `tensor(-9.5)`, and never these.
UNHEARD = {"0.0": "too short for the encoder", "-inf": "too long for the encoder"}


@dataclass(frozen=True)
class Score:
    """Edit counts of a test set, per utterance.

    All arrays are integers of shape ``(Utterance,)`` in the order of ``utt_ids``;
    the unit is a word or a character.
    """

    utt_ids: tuple[str, ...]
    correct: np.ndarray
    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray

    @property
    def errors(self) -> np.ndarray:
        """Edits per utterance, ``(Utterance,)``."""
        return self.substitutions + self.deletions + self.insertions

    @property
    def lengths(self) -> np.ndarray:
        """Reference units per utterance, ``(Utterance,)``."""
        return self.correct + self.substitutions + self.deletions

    @property
    def error_rate(self) -> float:
        """All edits over all reference units, as a fraction (may exceed 1)."""
        return float(self.errors.sum() / self.lengths.sum())

    def totals(self) -> dict[str, int]:
        """Counts over the whole set, named as the columns of ESPnet's tables."""
        return {
            "snt": len(self.utt_ids),
            "wrd": int(self.lengths.sum()),
            "corr": int(self.correct.sum()),
            "sub": int(self.substitutions.sum()),
            "del": int(self.deletions.sum()),
            "ins": int(self.insertions.sum()),
            "err": int(self.errors.sum()),
            "s_err": int((self.errors > 0).sum()),
        }


def read_text(path: Union[str, Path]) -> dict[str, str]:
    """Read a ``text`` file, ``utt word word ...`` per line; a bare ``utt`` is empty.

    White space is collapsed to single spaces.

    Raises:
        UserError: the file is missing, or an utterance stands in it twice.
    """
    table = read_table(path, allow_empty=True)
    return {utt_id: " ".join(text.split()) for utt_id, text in table.items()}


def check_keys(
    references: dict[str, str],
    hypotheses: dict[str, str],
    reference_file: Union[str, Path],
    hypothesis_file: Union[str, Path],
) -> None:
    """Check that both texts can be scored against each other.

    Raises:
        UserError: no reference at all, a reference without words, an utterance
            without a hypothesis, or a hypothesis of an unknown utterance.
    """
    if not references:
        raise UserError(f"{reference_file}: no utterance to score")
    empty = [utt_id for utt_id, text in references.items() if not text]
    if empty:
        raise UserError(
            f"{reference_file}: {_name(empty)} without words; an error rate needs "
            "a reference, drop them from the test set"
        )
    missing = [utt_id for utt_id in references if utt_id not in hypotheses]
    if missing:
        raise UserError(
            f"{hypothesis_file}: no hypothesis for {_name(missing)} of "
            f"{reference_file}; decode again, an unfinished test set is not scored"
        )
    unknown = [utt_id for utt_id in hypotheses if utt_id not in references]
    if unknown:
        raise UserError(
            f"{hypothesis_file}: {_name(unknown)} not in {reference_file}; "
            "it was decoded from another version of the test set, decode again"
        )


def score_texts(
    references: dict[str, str], hypotheses: dict[str, str], unit: str = "word"
) -> Score:
    """Align the hypothesis of every reference, as words or as characters.

    The space between words counts as a character, as in ESPnet's CER.
    """
    # Not at the top: a command should print its --help without loading jiwer.
    import jiwer

    process = {"word": jiwer.process_words, "character": jiwer.process_characters}
    # Sorted, so that equal test sets draw equal bootstrap samples and systems are
    # compared on the same resampled utterances.
    utt_ids = tuple(sorted(references))
    output = process[unit](
        [references[utt_id] for utt_id in utt_ids],
        [hypotheses[utt_id] for utt_id in utt_ids],
    )
    kinds = ("equal", "substitute", "delete", "insert")
    counts = np.zeros((len(kinds), len(utt_ids)), dtype=np.int64)
    for i, chunks in enumerate(output.alignments):
        for chunk in chunks:
            # An insertion is empty on the reference side, the others never are.
            n = max(
                chunk.ref_end_idx - chunk.ref_start_idx,
                chunk.hyp_end_idx - chunk.hyp_start_idx,
            )
            counts[kinds.index(chunk.type), i] += n
    return Score(utt_ids, *counts)


def symbols_of(exp: Union[str, Path]) -> list[str]:
    """Return the non-linguistic symbols that an experiment was trained with."""
    file = Path(exp) / BARE_NAMES["non_linguistic_symbols"]
    return file.read_text(encoding="utf-8").split() if file.is_file() else []


def score_files(
    reference_file: Union[str, Path],
    hypothesis_file: Union[str, Path],
    symbols: Collection[str] = (),
) -> tuple[Score, Score]:
    """Score a decoded ``text`` against the reference ``text``: (words, characters).

    Utterances that stage 3 dropped (``dropped_text`` beside the reference) count as
    deletions: a system that can not read a recording does not get it for nothing.

    Args:
        symbols: what is no word, and left out on both sides, as in ESPnet's scoring;
            and with it an utterance that has nothing else.

    Raises:
        UserError: see `read_text` and `check_keys`.
    """
    references, hypotheses = read_text(reference_file), read_text(hypothesis_file)
    check_keys(references, hypotheses, reference_file, hypothesis_file)
    dropped = Path(reference_file).with_name(DROPPED_TEXT)
    if dropped.is_file():
        texts = read_text(dropped)
        references.update(texts)
        hypotheses.update(dict.fromkeys(texts, ""))
    if symbols:
        references, hypotheses = (
            {
                utt: " ".join(word for word in text.split() if word not in symbols)
                for utt, text in texts.items()
            }
            for texts in (references, hypotheses)
        )
        references = {utt: text for utt, text in references.items() if text}
        hypotheses = {utt: hypotheses[utt] for utt in references}
    return (
        score_texts(references, hypotheses, "word"),
        score_texts(references, hypotheses, "character"),
    )


def not_decoded(data_dir: Path, decoded_dir: Path) -> dict[str, str]:
    """Return the utterances of a test set that gave no text at all, and why.

    Args:
        data_dir: of the test set.
        decoded_dir: with ``text`` and ``score``.
    """
    found = {}
    if (data_dir / DROPPED_TEXT).is_file():
        reasons = read_table(data_dir / "dropped.txt")
        found = {
            utt_id: reasons[utt_id] for utt_id in read_text(data_dir / DROPPED_TEXT)
        }
    if (decoded_dir / "score").is_file():
        scores = read_table(decoded_dir / "score")
        for utt_id, text in read_text(decoded_dir / "text").items():
            if not text and scores[utt_id] in UNHEARD:
                found[utt_id] = UNHEARD[scores[utt_id]]
    return found


def bootstrap_interval(score: Score, samples: int, seed: int) -> tuple[float, float]:
    """95% percentile interval of the error rate, resampling utterances.

    Without any error there is nothing to resample: then it is the exact binomial
    interval of as many correct units, which ends above zero.

    Args:
        samples: How many sets of ``len(score.utt_ids)`` utterances are drawn.
    """
    if not score.errors.any():
        exact = binomtest(0, int(score.lengths.sum())).proportion_ci(0.95)
        return float(exact.low), float(exact.high)
    if len(score.utt_ids) == 1:  # which all samples consist of
        return score.error_rate, score.error_rate
    drawn = bootstrap(
        (score.errors, score.lengths),
        lambda errors, lengths, axis: errors.sum(axis) / lengths.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=samples,
        batch=max(1, _CHUNK // len(score.utt_ids)),
        confidence_level=0.95,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    interval = drawn.confidence_interval
    return float(interval.low), float(interval.high)


def _name(utt_ids: Sequence[str]) -> str:
    """How many utterances, and the first few by name."""
    names = ", ".join(sorted(utt_ids)[:5])
    more = ", ..." if len(utt_ids) > 5 else ""
    return f"{len(utt_ids)} utterance{'s'[: len(utt_ids) > 1]} ({names}{more})"
