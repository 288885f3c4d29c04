"""Scores and costs of each system on each test set at each depth."""

import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Optional

from dldkit.errors import UserError
from dldkit.report.scoring import Score, bootstrap_interval, not_decoded, score_files

# espnet and torch are imported by what measures costs, so that --help is quick.


@dataclass
class Result:
    """One system on one test set at one depth; error rates are fractions."""

    system: str
    test_set: str
    depth: int
    words: Score
    characters: Score
    interval: tuple[float, float]
    layers: tuple[int, ...] = ()
    parameters: Optional[int] = None
    macs_per_second: Optional[float] = None
    rtf: list[float] = field(default_factory=list)
    not_decoded: dict[str, str] = field(default_factory=dict)  # utterance, why

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
        }


def collect_scores(
    systems: dict[str, Path],
    data_root: Path,
    test_sets: Sequence[str],
    depths: Sequence[int],
    inference_tag: str,
    bootstrap: int = 1000,
    seed: int = 0,
) -> list[Result]:
    """Score ``EXP/TAG/depthN/SET/text`` against ``DATA_ROOT/SET/text``.

    A depth that a system was not decoded at is left out; where that is so for all
    systems, with a line in the log.

    Raises:
        UserError: a system has no decoded depth, or a text does not fit its test set.
    """
    results = []
    for test_set in test_sets:
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
                    words, characters = score_files(data_root / test_set / "text", text)
                    interval = bootstrap_interval(words, bootstrap, seed)
                    results.append(
                        Result(
                            system,
                            test_set,
                            depth,
                            words,
                            characters,
                            interval,
                            not_decoded=not_decoded(data_root / test_set, text.parent),
                        )
                    )
    if missing := [str(d) for d in depths if d not in {r.depth for r in results}]:
        logging.warning(f"nothing is decoded at depth {' '.join(missing)}: left out")
    return results


def load_recognisers(
    systems: dict[str, Path],
    inference_asr_model: str,
    selector: str = "even",
    depth_profile: Optional[str] = "auto",
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
    frame_shift: float = 0.01,
    rtf_utts: int = 20,
    rtf_repeats: int = 5,
) -> None:
    """Add layers, parameters, MACs and real-time factors to `results`."""
    from dldkit.asr.speech import SpeechReader
    from dldkit.report import cost

    seconds = {
        test_set: cost.speech_seconds(data_root / test_set, frame_shift)
        for test_set in test_sets_of(results)
    }

    @functools.cache
    def load(system: str, test_set: str, number: int) -> list[cost.Utterance]:
        read = SpeechReader(data_root / test_set, recognisers[system].asr_train_args)
        utt_ids = cost.evenly_spaced(list(seconds[test_set]), number)
        return [cost.Utterance(read(u), seconds[test_set][u]) for u in utt_ids]

    timed = []
    for result in results:
        recogniser = recognisers[result.system]
        at_depth = functools.partial(recogniser.set_depth, depth=result.depth)
        at_depth()
        model = recogniser.asr_model
        result.layers = model.encoder.active_layers
        result.parameters = cost.parameters_in_use(model)
        (utterance,) = load(result.system, result.test_set, 1)
        macs = cost.macs(model, utterance.speech)
        result.macs_per_second = macs / utterance.seconds
        utterances = load(result.system, result.test_set, rtf_utts)
        timed.append(cost.TimedDecoder(at_depth, recogniser, utterances))
    if rtf_utts > 0 and rtf_repeats > 0:
        for result, factors in zip(results, cost.real_time_factors(timed, rtf_repeats)):
            result.rtf = factors


def test_sets_of(results: Sequence[Result]) -> list[str]:
    """Return the names of the test sets, in the order of the results."""
    return list(dict.fromkeys(result.test_set for result in results))
