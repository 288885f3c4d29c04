"""The depth report: accuracy and cost of each system at each encoder depth."""

import json
import platform
from collections.abc import Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Optional, Union

import dldkit
from dldkit.data.datadir import read_source, test_set_dir
from dldkit.report.plot import plot
from dldkit.report.results import (
    Result,
    collect_scores,
    collect_stopped,
    load_recognisers,
    measure_costs,
    refuse_older,
)
from dldkit.report.scoring import BOOTSTRAP_SAMPLES
from dldkit.report.tables import (
    espnet_table,
    not_decoded_lines,
    stopping_table,
    summary_table,
)

STOPPING = (
    "- An utterance leaves the encoder at the first exit where the entropy of CTC's "
    "posteriors, the mean over its frames as a share of the largest possible one, is "
    "below the threshold. Depth: mean over the utterances. MMACs/s: as above, the mean "
    "over the depths that they left at, with the output layers of the exits passed."
)


def make_report(
    systems: dict[str, Path],
    data_root: Union[str, Path],
    test_sets: Sequence[str],
    depths: Sequence[int],
    inference_tag: str,
    inference_asr_model: str,
    output_dir: Union[str, Path],
    selector: Optional[str],
    depth_profile: Optional[str],
    frame_shift: float,
    rtf_utts: int,
    seed: int,
    command: str,
) -> str:
    """Score and measure every decoded depth, and write the report.

    Returns:
        What speech the test sets are made of and the summary table, in Markdown.

    Raises:
        UserError: nothing is decoded, a decoded text does not fit its test set, or a
            model or its test audio can not be read.
    """
    data_root, output_dir = Path(data_root), Path(output_dir)
    for exp in systems.values():
        refuse_older(exp, inference_tag, inference_asr_model, test_sets, depths)
    results = collect_scores(systems, data_root, test_sets, depths, inference_tag, seed)
    stopped = collect_stopped(systems, data_root, test_sets, inference_tag, seed)
    measure_costs(
        [*results, *stopped],
        load_recognisers(systems, inference_asr_model, selector, depth_profile),
        data_root,
        frame_shift,
        rtf_utts,
    )
    facts = {
        "command": command,
        "environment": environment(),
        "systems": {
            name: {"experiment": str(exp), "model": inference_asr_model}
            for name, exp in systems.items()
        },
        "test_sets": {
            name: corpus_source(test_set_dir(data_root, name)) for name in test_sets
        },
        "inference_tag": inference_tag,
        "notes": notes(rtf_utts, seed),
    }
    output_dir.mkdir(parents=True, exist_ok=True)
    everything = {
        **facts,
        "results": [result.as_json() for result in results],
        "early_stopping": [result.as_json() for result in stopped],
    }
    (output_dir / "results.json").write_text(
        json.dumps(everything, indent=2) + "\n", encoding="utf-8"
    )
    plot([*results, *stopped], facts["test_sets"], output_dir / "wer_vs_depth.png")
    (output_dir / "RESULTS.md").write_text(
        render(results, stopped, facts), encoding="utf-8"
    )  # last: with it the report is complete
    printed = [speech_lines(facts["test_sets"]), summary_table(results)]
    return "\n\n".join(printed + ([stopping_table(stopped)] if stopped else []))


def render(
    results: Sequence[Result], stopped: Sequence[Result], facts: dict[str, Any]
) -> str:
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
    if stopped:
        parts += ["## Early stopping", stopping_table(stopped), STOPPING]
    if lost := not_decoded_lines(results):
        parts += ["## Not decoded, counted as deletions", lost]
    for system, about in facts["systems"].items():
        parts.append(f"## {system}: {about['experiment']} ({about['model']})")
        own = [r for r in [*results, *stopped] if r.system == system]
        for title, unit in (("WER", "words"), ("CER", "characters")):
            parts.append(f"### {title}")
            parts.append(espnet_table(own, unit, facts["inference_tag"]))
    return "\n\n".join(parts) + "\n"


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


def notes(rtf_utts: int, seed: int) -> list[str]:
    """Say how the columns of the summary table were measured."""
    from dldkit.report.cost import REPEATS

    lines = [
        f"95 % CI: percentile bootstrap over utterances, {BOOTSTRAP_SAMPLES} samples, "
        f"seed {seed}; it covers the choice of test utterances, not that of the "
        "training seed or of the speakers.",
        "params: parameters that greedy CTC recognition uses at that depth (from the "
        "frontend to the CTC head), without those of skipped layers.",
        "MMACs/s: millions of multiply-accumulates per second of audio, for the "
        "utterance of the test set's median length; matrix products and convolutions "
        "as torch's flop counter counts them, halved (no STFT, norms, activations).",
    ]
    if rtf_utts > 0:
        lines.append(
            "RTF: wall-clock time of greedy CTC decoding over audio time, on one CPU "
            f"core, one utterance at a time, at most {rtf_utts} utterances spread over "
            f"the test set's lengths; median (min-max) of {REPEATS} repeats, in "
            "which all depths and systems took turns."
        )
    return lines
