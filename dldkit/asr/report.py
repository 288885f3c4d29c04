"""The depth report: accuracy and cost of each system at each encoder depth."""

import functools
import json
import logging
import platform
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Iterable, Optional, Sequence, Union

import numpy as np

import dldkit
from dldkit.asr.scoring import Score, bootstrap_interval, score_files
from dldkit.data.datadir import read_source
from dldkit.errors import UserError

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
        }


def make_report(
    systems: dict[str, Path],
    data_root: Union[str, Path],
    test_sets: Sequence[str],
    depths: Sequence[int],
    inference_tag: str,
    inference_asr_model: str,
    output_dir: Union[str, Path],
    selector: str = "even",
    depth_profile: Optional[str] = "auto",
    frame_shift: float = 0.01,
    rtf_utts: int = 20,
    rtf_repeats: int = 5,
    bootstrap: int = 1000,
    seed: int = 0,
    command: str = "",
) -> str:
    """Score and measure every decoded depth, and write the report.

    Returns:
        What speech the test sets are made of and the summary table, in Markdown.

    Raises:
        UserError: nothing is decoded, a decoded text does not fit its test set, or a
            model or its test audio can not be read.
    """
    data_root, output_dir = Path(data_root), Path(output_dir)
    results = collect_scores(
        systems, data_root, test_sets, depths, inference_tag, bootstrap, seed
    )
    measure_costs(
        results,
        load_recognisers(systems, inference_asr_model, selector, depth_profile),
        data_root,
        frame_shift,
        rtf_utts,
        rtf_repeats,
    )
    facts = {
        "command": command,
        "environment": environment(),
        "systems": {
            name: {"experiment": str(exp), "model": inference_asr_model}
            for name, exp in systems.items()
        },
        "test_sets": {name: corpus_source(data_root / name) for name in test_sets},
        "inference_tag": inference_tag,
        "notes": notes(rtf_utts, rtf_repeats, bootstrap, seed),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    everything = {**facts, "results": [result.as_json() for result in results]}
    (output_dir / "results.json").write_text(
        json.dumps(everything, indent=2) + "\n", encoding="utf-8"
    )
    plot(results, facts["test_sets"], output_dir / "wer_vs_depth.png")
    (output_dir / "RESULTS.md").write_text(
        render(results, facts), encoding="utf-8"
    )  # last: with it the report is complete
    return f"{speech_lines(facts['test_sets'])}\n\n{summary_table(results)}"


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

    A depth that was not decoded is left out, with a line in the log.

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
                    f"{decoded[0][1]} and at depths {_list(depths)}; decode it first"
                )
            if left_out:
                logging.warning(
                    f"system {system}, {test_set}: not decoded at depth "
                    f"{_list(left_out)}, left out"
                )
            for depth, text in decoded:
                if depth not in left_out:
                    words, characters = score_files(data_root / test_set / "text", text)
                    interval = bootstrap_interval(words, bootstrap, seed)
                    results.append(
                        Result(system, test_set, depth, words, characters, interval)
                    )
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
    from dldkit.asr import cost
    from dldkit.asr.speech import SpeechReader

    seconds = {
        test_set: cost.speech_seconds(data_root / test_set, frame_shift)
        for test_set in _sets(results)
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


def corpus_source(data_dir: Path) -> str:
    """Return the line that says what speech a test set is made of."""
    return read_source(data_dir) or f"not stated (no corpus_source in {data_dir})"


def speech_lines(test_sets: dict[str, str]) -> str:
    """Say what speech each test set is made of, a line each."""
    return "\n".join(
        f"- {name}: speech: {source}" for name, source in test_sets.items()
    )


def environment() -> dict[str, str]:
    """Return the date, and the versions and hardware that the numbers depend on."""
    import torch

    found = {
        "date": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "dldkit": dldkit.__version__,
    }
    for package in ("espnet", "torch", "torchaudio", "numpy", "jiwer"):
        found[package] = version(package)
    found["cpu"] = _cpu_name()
    cuda = torch.cuda.is_available()
    found["gpu"] = torch.cuda.get_device_name(0) if cuda else "none"
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def notes(rtf_utts: int, rtf_repeats: int, bootstrap: int, seed: int) -> list[str]:
    """Say how the columns of the summary table were measured."""
    lines = [
        f"95 % CI: percentile bootstrap over utterances, {bootstrap} samples, seed "
        f"{seed}; it covers the choice of test utterances, not that of the training "
        "seed or of the speakers.",
        "params: parameters that greedy CTC recognition uses at that depth (from the "
        "frontend to the CTC head), without those of skipped layers.",
        "MMACs/s: millions of multiply-accumulates per second of audio, for the "
        "utterance of the test set's median length; matrix products and convolutions "
        "as torch's flop counter counts them, halved (no STFT, norms, activations).",
    ]
    if rtf_utts > 0 and rtf_repeats > 0:
        lines.append(
            "RTF: wall-clock time of greedy CTC decoding over audio time, on one CPU "
            f"core, one utterance at a time, at most {rtf_utts} utterances spread over "
            f"the test set's lengths; median (min-max) of {rtf_repeats} repeats, in "
            "which all depths and systems took turns."
        )
    return lines


def summary_table(results: Sequence[Result]) -> str:
    """Render the table of all systems, test sets and depths."""
    return _table(
        "system | test set | depth | layers | WER % [95 % CI] | CER % | params "
        "| MMACs/s | RTF median (min-max)",
        (
            (
                r.system,
                r.test_set,
                r.depth,
                _slots(r.layers),
                f"{100 * r.words.error_rate:.2f} "
                f"[{100 * r.interval[0]:.2f}, {100 * r.interval[1]:.2f}]",
                f"{100 * r.characters.error_rate:.2f}",
                "-" if r.parameters is None else f"{r.parameters:,}",
                "-" if r.macs_per_second is None else f"{r.macs_per_second / 1e6:.1f}",
                (
                    f"{median(r.rtf):.4f} ({min(r.rtf):.4f}-{max(r.rtf):.4f})"
                    if r.rtf
                    else "-"
                ),
            )
            for r in results
        ),
        text_columns=2,
    )


def render(results: Sequence[Result], facts: dict[str, Any]) -> str:
    """Render RESULTS.md."""
    parts = [
        "# Results",
        f"Made by\n```sh\n{facts['command']}\n```",
        "\n".join(f"- {name}: {value}" for name, value in facts["environment"].items()),
        "## Accuracy and cost at each depth",
        speech_lines(facts["test_sets"]),
        summary_table(results),
        "\n".join(f"- {note}" for note in facts["notes"]),
        "![WER against depth and against MACs](wer_vs_depth.png)",
    ]
    for system, about in facts["systems"].items():
        parts.append(f"## {system}: {about['experiment']} ({about['model']})")
        own = [result for result in results if result.system == system]
        for title, unit in (("WER", "words"), ("CER", "characters")):
            parts.append(f"### {title}")
            parts.append(_espnet_table(own, unit, facts["inference_tag"]))
    return "\n\n".join(parts) + "\n"


def _espnet_table(results: Sequence[Result], unit: str, inference_tag: str) -> str:
    """Render scores as ESPnet's RESULTS.md does: percent of the reference units."""
    rows = []
    for result in results:
        total = getattr(result, unit).totals()
        rows.append(
            [
                f"{inference_tag}/depth{result.depth}/{result.test_set}",
                total["snt"],
                total["wrd"],
                *(
                    f"{100 * total[name] / total['wrd']:.1f}"
                    for name in ("corr", "sub", "del", "ins", "err")
                ),
                f"{100 * total['s_err'] / total['snt']:.1f}",
            ]
        )
    return _table("dataset|Snt|Wrd|Corr|Sub|Del|Ins|Err|S.Err", rows, text_columns=1)


def _table(header: str, rows: Iterable[Sequence[Any]], text_columns: int) -> str:
    """Render a Markdown table that also reads well in a terminal."""
    names = [name.strip() for name in header.split("|")]
    lines = [names, *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    is_text = [i < text_columns for i in range(len(names))]
    padded = [
        [
            cell.ljust(width) if text else cell.rjust(width)
            for cell, width, text in zip(line, widths, is_text)
        ]
        for line in lines
    ]
    rule = [
        "-" * w if text else "-" * (w - 1) + ":" for w, text in zip(widths, is_text)
    ]
    padded.insert(1, rule)
    return "\n".join(f"| {' | '.join(line)} |" for line in padded)


def plot(
    results: Sequence[Result], test_sets: dict[str, str], path: Union[str, Path]
) -> None:
    """Draw WER against depth and against MACs, one line per system, CI as bars.

    Each test set has one row of two panels.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = _sets(results)
    systems = list(dict.fromkeys(result.system for result in results))
    figure, rows = pyplot.subplots(
        len(names),
        2,
        figsize=(11, 0.4 + 4.2 * len(names)),
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for panels, test_set in zip(rows, names):
        here = [result for result in results if result.test_set == test_set]
        for i, system in enumerate(systems):
            points = sorted(
                (r for r in here if r.system == system), key=lambda r: r.depth
            )
            if not points:
                continue
            wer = 100 * np.array([r.words.error_rate for r in points])
            low, high = 100 * np.array([r.interval for r in points]).T
            bars = [np.clip(wer - low, 0, None), np.clip(high - wer, 0, None)]
            x_values = (
                [r.depth for r in points],
                [(r.macs_per_second or np.nan) / 1e6 for r in points],
            )
            for panel, x in zip(panels, x_values):
                panel.errorbar(
                    x,
                    wer,
                    yerr=bars,
                    label=system,
                    color=f"C{i % 10}",
                    marker="osD^vPX*"[i % 8],
                    capsize=3,
                    clip_on=False,  # a WER of 0 lies on the frame
                )
        _scale(panels[0], [100 * r.words.error_rate for r in here])
        panels[0].set_xticks(sorted({r.depth for r in results}))
        panels[0].set_xlabel("encoder layers")
        panels[1].set_xlabel("million MACs per second of audio")
        panels[0].set_title(test_set, loc="left", fontweight="bold")
        panels[1].set_title(f"speech: {test_sets[test_set]}", loc="right", fontsize=8)
        for panel in panels:
            panel.grid(True, alpha=0.3)
        panels[1].legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def _scale(panel: Any, wer: Sequence[float]) -> None:
    """Label the WER axis, in logarithmic steps if a linear one would hide a system."""
    panel.set_ylabel("WER % (95 % CI)")
    above_one = [max(rate, 1.0) for rate in wer]
    if max(above_one) / min(above_one) <= 8:
        panel.set_ylim(bottom=0)
        return
    # A shallow static model is near 100 % where the others differ by a few percent.
    # Below 1 % the axis is linear, so that a WER of zero stays on it.
    panel.set_yscale("symlog", linthresh=1, linscale=0.5)
    ticks = [0, 1, 2, 5, 10, 20, 50, 100]
    panel.set_yticks(ticks, [str(tick) for tick in ticks])
    panel.set_ylim(0, max(110.0, 1.1 * max(wer)))
    panel.set_ylabel("WER % (95 % CI), logarithmic above 1")


def _sets(results: Sequence[Result]) -> list[str]:
    return list(dict.fromkeys(result.test_set for result in results))


def _slots(layers: Sequence[int]) -> str:
    """Write a set of layers shortly: 0-3,7."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run))
        for run in runs
    )


def _list(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
