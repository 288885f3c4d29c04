"""Scores and costs of each system on each test set at each depth."""

import functools
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, Optional

from dldkit.data.datadir import read_table, test_set_dir
from dldkit.depth.thresholds import read_thresholds, threshold_name
from dldkit.errors import UserError
from dldkit.report.scoring import (
    BOOTSTRAP_SAMPLES,
    Score,
    bootstrap_interval,
    not_decoded,
    score_files,
    symbols_of,
)
from dldkit.step import digest

# espnet and torch are imported by what measures costs, so that --help is quick.


@dataclass
class Result:
    """One system on one test set at one depth; error rates are fractions.

    Attributes:
        depth: number of layers; with early stopping the mean over utterances.
        threshold: of early stopping; None = all utterances ran at the depth.
        depths: how many layers each utterance took, with early stopping.
    """

    system: str
    test_set: str
    depth: float
    words: Score
    characters: Score
    interval: tuple[float, float]
    not_decoded: dict[str, str] = field(default_factory=dict)  # utterance, why
    layers: tuple[int, ...] = ()
    parameters: Optional[int] = None
    macs_per_second: Optional[float] = None
    rtf: list[float] = field(default_factory=list)
    threshold: Optional[float] = None
    depths: list[int] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The directory of what was decoded: depth6, or threshold0.02."""
        if self.threshold is None:
            return f"depth{self.depth}"
        return threshold_name(self.threshold)

    def as_json(self) -> dict[str, Any]:
        """What results.json holds; error rates in percent, as in the tables."""
        return {
            "system": self.system,
            "test_set": self.test_set,
            "depth": self.depth,
            "layers": list(self.layers),
            "wer": 100 * self.words.error_rate,
            "wer_interval": [100 * bound for bound in self.interval],
            "cer": 100 * self.characters.error_rate,
            "words": self.words.totals(),
            "characters": self.characters.totals(),
            "parameters": self.parameters,
            "macs_per_second": self.macs_per_second,
            "rtf_median": median(self.rtf) if self.rtf else None,
            "rtf": self.rtf,
            "not_decoded": self.not_decoded,
            **({} if self.threshold is None else {"threshold": self.threshold}),
        }


def refuse_older(
    exp: Path,
    inference_tag: str,
    inference_asr_model: str,
    test_sets: Sequence[str],
    depths: Sequence[int],
) -> None:
    """Refuse text that an earlier checkpoint of the same name decoded.

    Raises:
        UserError: naming the text, and what to do.
    """
    decoded, model = Path(exp) / inference_tag, Path(exp) / inference_asr_model
    if not model.is_file():
        return
    content = digest(model)
    names = [f"depth{depth}" for depth in depths]
    names += [threshold_name(threshold) for threshold in read_thresholds(decoded)]
    for name, test_set in product(names, test_sets):
        done = decoded / name / test_set / ".done"
        if not done.is_file():
            continue
        inputs = json.loads(done.read_text(encoding="utf-8"))["files"]
        if inputs.get("asr_model_file", content) != content:
            raise UserError(
                f"{done.with_name('text')} is of another model than {model} is now: "
                "decode again (stage 12; a reference in stage 8)"
            )


def collect_scores(
    systems: dict[str, Path],
    data_root: Path,
    test_sets: Sequence[str],
    depths: Sequence[int],
    inference_tag: str,
    seed: int,
) -> list[Result]:
    """Score ``EXP/TAG/depthN/SET/text`` against ``text`` of `test_set_dir`.

    A depth that a system was not decoded at is left out; where that is so for all
    systems, with a line in the log.

    Raises:
        UserError: a system has no decoded depth, or a text does not fit its test set.
    """
    results = []
    for test_set in test_sets:
        data_dir = test_set_dir(data_root, test_set)
        for system, exp in systems.items():
            decoded = [
                (depth, Path(exp) / inference_tag / f"depth{depth}" / test_set / "text")
                for depth in depths
            ]
            left_out = [depth for depth, text in decoded if not text.is_file()]
            if len(left_out) == len(depths):
                raise UserError(
                    f"system {system}: nothing is decoded on {test_set}; looked for "
                    f"{decoded[0][1]} and at depths {' '.join(map(str, depths))}; "
                    "decode it first"
                )
            for depth, text in decoded:
                if depth not in left_out:
                    scores = _scores(exp, data_dir, text, seed)
                    results.append(Result(system, test_set, depth, *scores))
    if missing := [str(d) for d in depths if d not in {r.depth for r in results}]:
        logging.warning(f"nothing is decoded at depth {' '.join(missing)}: left out")
    return results


def collect_stopped(
    systems: dict[str, Path],
    data_root: Path,
    test_sets: Sequence[str],
    inference_tag: str,
    seed: int,
) -> list[Result]:
    """Score what was decoded with early stopping; see `collect_scores`."""
    results = []
    for test_set in test_sets:
        data_dir = test_set_dir(data_root, test_set)
        for system, exp in systems.items():
            decoded = Path(exp) / inference_tag
            for threshold in read_thresholds(decoded):
                text = decoded / threshold_name(threshold) / test_set / "text"
                if not text.is_file():
                    logging.warning(f"{text} does not exist, left out")
                    continue
                depths = read_table(text.with_name("depth"))
                depths = [int(depth) for depth in depths.values()]
                scores = _scores(exp, data_dir, text, seed)
                result = Result(system, test_set, mean(depths), *scores)
                result.threshold, result.depths = threshold, depths
                results.append(result)
    return results


def _scores(exp: Path, data_dir: Path, text: Path, seed: int):
    """Return the scores of a decoded text, the interval, and what is not decoded."""
    words, characters = score_files(data_dir / "text", text, symbols_of(exp))
    interval = bootstrap_interval(words, BOOTSTRAP_SAMPLES, seed)
    return words, characters, interval, not_decoded(data_dir, text.parent)


def load_recognisers(
    systems: dict[str, Path],
    inference_asr_model: str,
    selector: Optional[str],
    depth_profile: Optional[str],
) -> dict[str, Any]:
    """Load each system as a greedy CTC recogniser on the CPU.

    Raises:
        UserError: an experiment directory lacks its config or model.
    """
    for system, exp in systems.items():
        for name in ("config.yaml", inference_asr_model):
            if not (Path(exp) / name).is_file():
                raise UserError(f"system {system}: {Path(exp) / name} does not exist")

    from dldkit.asr.inference import Speech2Text
    from dldkit.asr.loading import without_espnets_news

    with without_espnets_news():
        return {
            system: Speech2Text(
                asr_train_config=str(Path(exp) / "config.yaml"),
                asr_model_file=str(Path(exp) / inference_asr_model),
                selector=selector,
                depth_profile=depth_profile,
                beam_size=1,
            )
            for system, exp in systems.items()
        }


def measure_costs(
    results: Sequence[Result],
    recognisers: dict[str, Any],
    data_root: Path,
    frame_shift: float,
    rtf_utts: int,
) -> None:
    """Add layers, parameters, MACs and real-time factors to `results`."""
    from dldkit.asr.speech import SpeechReader
    from dldkit.report import cost

    seconds = {
        test_set: cost.speech_seconds(test_set_dir(data_root, test_set), frame_shift)
        for test_set in test_sets_of(results)
    }

    @functools.cache
    def load(system: str, test_set: str, number: int) -> list[cost.Utterance]:
        data_dir = test_set_dir(data_root, test_set)
        read = SpeechReader(data_dir, recognisers[system].asr_train_args)
        utt_ids = cost.evenly_spaced(list(seconds[test_set]), number)
        return [cost.Utterance(read(u), seconds[test_set][u]) for u in utt_ids]

    @functools.cache  # thresholds share the depths at which utterances leave
    def macs_of_leaving(system: str, test_set: str, depth: int) -> int:
        (utterance,) = load(system, test_set, 1)
        return cost.macs_of_leaving(recognisers[system], utterance.speech, depth)

    timed = []
    for result in results:
        recogniser = recognisers[result.system]
        (utterance,) = load(result.system, result.test_set, 1)
        utterances = load(result.system, result.test_set, rtf_utts)
        if result.threshold is None:
            at_depth = functools.partial(recogniser.set_depth, depth=result.depth)
            at_depth()
            model = recogniser.asr_model
            result.layers = model.encoder.active_layers
            result.parameters = cost.parameters_in_use(model)
            macs = cost.macs(model, utterance.speech)
            timed.append(cost.TimedDecoder(at_depth, recogniser, utterances))
        else:
            leave = functools.partial(macs_of_leaving, result.system, result.test_set)
            macs = sum(map(leave, result.depths)) / len(result.depths)
            decode = functools.partial(recogniser, exit_threshold=result.threshold)
            timed.append(cost.TimedDecoder(recogniser.set_depth, decode, utterances))
        result.macs_per_second = macs / utterance.seconds
    if rtf_utts > 0:
        factors = cost.real_time_factors(timed, cost.REPEATS)
        for result, measured in zip(results, factors):
            result.rtf = measured


def test_sets_of(results: Sequence[Result]) -> list[str]:
    """Return the names of the test sets, in the order of the results."""
    return list(dict.fromkeys(result.test_set for result in results))
