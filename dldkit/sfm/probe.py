"""The probe suite: what a linear layer finds in a frozen model's hidden states.

Three tasks on spoken digits: which digit, which speaker, and (with CTC) which string of
digits. It is not SUPERB, whose corpora and scale it lacks, but works like it: a
softmax-weighted sum of all layers and a linear head are trained, the model is not.
"""

import json
import logging
from itertools import groupby
from pathlib import Path
from typing import Any, Mapping, Optional, Sequence, Union

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from dldkit.data.audio import BadAudio, read_audio
from dldkit.data.datadir import Table, read_table
from dldkit.errors import UserError
from dldkit.report.scoring import score_texts
from dldkit.report.tables import markdown, spread
from dldkit.sfm.teacher.opening import open_teacher, teacher_info
from dldkit.step import Step, atomic

PathLike = Union[str, Path]
Pair = tuple[PathLike, PathLike]
States = list[torch.Tensor]

# Adam, with a rate that falls to zero, alike for all models. CTC takes longer: after 40
# epochs, two seeds of one student were 23 points apart, after 160 they were 6.
_EPOCHS, _CTC_EPOCHS, _RATE, _BATCH = 40, 160, 0.01, 16
TASKS = {
    "digit_accuracy": "digit, accuracy %",
    "speaker_accuracy": "speaker, accuracy %",
    "digit_string_wer": "digit strings, WER %",
}


class Probe(torch.nn.Module):
    """Softmax-weighted sum of the layers, then a linear layer."""

    def __init__(self, layers: int, dim: int, classes: int):
        super().__init__()
        self.weights = torch.nn.Parameter(torch.zeros(layers))
        self.linear = torch.nn.Linear(dim, classes)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """Turn (..., Layers, Dim) into (..., Classes)."""
        return self.linear(self.weights.softmax(0) @ states)


def run_probes(
    upstreams: Mapping[str, str],
    digits: Pair,
    strings: Pair,
    output_dir: PathLike,
    seeds: Sequence[int] = (0,),
    device: str = "cpu",
    command: Optional[str] = None,
    cache_dir: Optional[PathLike] = None,
) -> str:
    """Probe models and write `probe.json` and `RESULTS.md`; return the table.

    Hidden states are computed once and kept in `cache_dir` (None = `output_dir`/hidden)
    until the model or the data change. The probes themselves are trained on the CPU:
    they are repeatable.

    Args:
        upstreams: name in the table -> an exported student, or any teacher.
        digits: training and test data directories of single digits, with `text` (one
            word each) and `utt2spk`.
        strings: training and test data directories of digit strings, with `text`.
        seeds: of the probes; more than one give mean and standard deviation.
        device: where the models run.

    Raises:
        UserError: for models that can not be opened, and data that do not fit.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no GPU can be used here: choose cpu")
    output_dir = Path(output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    words = _labels(digits, "text")
    for place, table in zip(digits, words):
        if wrong := [utt for utt, text in table.items() if len(text.split()) != 1]:
            raise UserError(
                f"{place}/text: utterance {wrong[0]} has {len(table[wrong[0]].split())}"
                " words; --digits takes one word each, --strings takes more"
            )
    speakers = _labels(digits, "utt2spk")
    texts = _labels(strings, "text")
    results: dict[str, Any] = {}
    for name, path in upstreams.items():
        cache = Path(cache_dir or output_dir / "hidden") / name
        states = _cached_states(path, digits, strings, cache, device)
        single, string = states[:2], states[2:]
        scores = results[name] = {"path": str(path), **{task: [] for task in TASKS}}
        for seed in seeds:
            scores["digit_accuracy"].append(classify(single, words, seed))
            scores["speaker_accuracy"].append(classify(single, speakers, seed))
            scores["digit_string_wer"].append(transcribe(string, texts, seed))
        reached = (f"{title} {spread(scores[t], 1)}" for t, title in TASKS.items())
        logging.info(f"{name}: {', '.join(reached)}")
    items = {
        "digits": len(words[1]),
        "strings": len(texts[1]),
        "words": sum(len(text.split()) for text in texts[1].values()),
    }
    report = dict(
        command=command, seeds=list(seeds), test_items=items, upstreams=results
    )
    table = _table(results, items, seeds)
    made_by = f"\nMade by `{command}`.\n" if command else ""
    files = {
        "probe.json": json.dumps(report, indent=1) + "\n",
        "RESULTS.md": f"{table}\n{made_by}",
    }
    for file, text in files.items():
        with atomic(output_dir / file) as new:
            new.write_text(text, encoding="utf-8")
    return table


def classify(
    states: Sequence[States], labels: Sequence[Mapping[str, str]], seed: int
) -> float:
    """Train a linear classifier of utterances; return its test accuracy in %.

    SUPERB takes the mean over time after the linear map; here it is taken before, once
    for all epochs: that is the same.

    Args:
        states: of the training and of the test utterances, (Layers, Dim) each, means
            over time.
        labels: of the training and of the test utterances, in the same order.
    """
    classes = sorted(set(labels[0].values()))
    (x, test_x), (y, test_y) = (
        [torch.stack(part) for part in states],
        [torch.tensor([classes.index(c) for c in part.values()]) for part in labels],
    )

    def loss(probe, chosen):
        return F.cross_entropy(probe(x[chosen]), y[chosen])

    probe = _train(x[0].shape, len(classes), len(x), loss, seed)
    return 100 * (probe(test_x).argmax(-1) == test_y).float().mean().item()


def transcribe(
    states: Sequence[States], texts: Sequence[Mapping[str, str]], seed: int
) -> float:
    """Train a linear layer per frame with CTC; return the test WER in % (greedy).

    Args:
        states: of the training and of the test utterances, (Time, Layers, Dim) each.
        texts: of the training and of the test utterances, in the same order.
    """
    words = sorted({word for text in texts[0].values() for word in text.split()})
    y = [
        torch.tensor([1 + words.index(w) for w in t.split()]) for t in texts[0].values()
    ]

    def loss(probe, chosen):
        x, target = [states[0][i].float() for i in chosen], [y[i] for i in chosen]
        logits = probe(pad_sequence(x))
        frames, lengths = ([len(item) for item in part] for part in (x, target))
        return F.ctc_loss(logits.log_softmax(-1), torch.cat(target), frames, lengths)

    shape = states[0][0].shape[1:]
    probe = _train(shape, 1 + len(words), len(y), loss, seed, _CTC_EPOCHS)
    found = {}
    for utt, x in zip(texts[1], states[1]):
        best = probe(x.float()).argmax(-1).tolist()
        found[utt] = " ".join(words[unit - 1] for unit, _ in groupby(best) if unit)
    return 100 * score_texts(dict(texts[1]), found).error_rate


def _train(
    shape, classes: int, items: int, loss, seed: int, epochs: int = _EPOCHS
) -> Probe:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        probe = Probe(*shape, classes)
        order = [torch.randperm(items).split(_BATCH) for _ in range(epochs)]
    batches = [chosen for epoch in order for chosen in epoch]
    optimizer = torch.optim.Adam(probe.parameters(), _RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, len(batches))
    for chosen in batches:
        optimizer.zero_grad()
        value = loss(probe, chosen)
        if not value.isfinite():
            raise UserError(
                "the CTC loss of a digit string is infinite: it has more words than "
                "frames; does its text belong to its audio?"
            )
        value.backward()
        optimizer.step()
        decay.step()
    return probe.requires_grad_(False)


def _labels(directories: Pair, name: str) -> list[Table]:
    """Read a table of the training and of the test directory, sorted by utterance."""
    tables = []
    for directory in directories:
        table, wavs = read_table(Path(directory) / name), _wavs(directory)
        if set(table) != set(wavs) or not table:
            utt = min(set(table) ^ set(wavs), default="none at all")
            raise UserError(
                f"{directory}: {name} and wav.scp have different utterances ({utt})"
            )
        tables.append(dict(sorted(table.items())))
    train, test = ({w for v in t.values() for w in v.split()} for t in tables)
    if unknown := sorted(test - train):
        raise UserError(
            f"{directories[1]}/{name} has {', '.join(unknown[:5])}, which "
            f"{directories[0]} has not: no probe can learn it"
        )
    return tables


def _wavs(directory: PathLike) -> Table:
    return dict(sorted(read_table(Path(directory) / "wav.scp").items()))


def _cached_states(path, digits: Pair, strings: Pair, cache: Path, device: str):
    """Return the states of the four directories: two of single digits, two of strings.

    Those of single digits are means over time.
    """
    files = {f"upstream {file.name}": file for file in _files(path)}
    for i, directory in enumerate((*digits, *strings)):
        files[f"{i} wav.scp"] = Path(directory) / "wav.scp"
    with Step(cache, files, upstream=str(path)) as step:
        if step.done:
            return torch.load(cache / "states.pt", weights_only=True)
        layers = range(teacher_info(path).num_layers + 1)
        upstream = open_teacher(path, layers, device)
        states = []
        for i, directory in enumerate((*digits, *strings)):
            logging.info(f"hidden states of {path} for {directory}")
            outputs = _hidden_states(upstream, directory, device)
            if i < len(digits):
                states.append([output.mean(0) for output in outputs])
            else:
                states.append([output.half() for output in outputs])
        torch.save(states, cache / "states.pt")
        return states


def _files(path: PathLike) -> list[Path]:
    """Return the files of a model; none for one of the hub."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    return [file for file in files if file.is_file() and file.name[0] != "."]


def _hidden_states(upstream, directory: PathLike, device: str):
    """Yield (Time, Layers, Dim) of each utterance, computed without padding.

    Each vector is brought to zero mean and unit variance, as s3prl's Featurizer does
    with its option `normalize`. SUPERB tunes the learning rate for each model instead,
    because their scales differ.
    """
    for utt, file in _wavs(directory).items():
        try:
            samples, rate = read_audio(file)
        except BadAudio as error:
            raise UserError(f"{directory}: utterance {utt}: {error}") from None
        if rate != upstream.info.sampling_rate:
            raise UserError(
                f"{directory}: utterance {utt} has {rate} Hz, but the model takes "
                f"{upstream.info.sampling_rate} Hz: resample the data"
            )
        speech = torch.from_numpy(samples)[None].to(device)
        states, _ = upstream(speech, torch.tensor([len(samples)], device=device))
        vectors = torch.cat(states).transpose(0, 1).cpu()
        yield F.layer_norm(vectors, vectors.shape[-1:])


def _table(results: Mapping[str, Any], items: Mapping[str, int], seeds) -> str:
    lines = [
        f"Probe suite, not SUPERB: {items['digits']} test recordings of single digits; "
        f"{items['strings']} test strings of {items['words']} digits"
        + (f"; mean ± standard deviation of {len(seeds)} probes." * (len(seeds) > 1)),
        "",
        markdown(
            " | ".join(["upstream", *TASKS.values()]),
            (
                [name, *(spread(scores[task], 1) for task in TASKS)]
                for name, scores in results.items()
            ),
        ),
    ]
    return "\n".join(lines)
