"""Early stopping: an utterance leaves the encoder where CTC is sure of it."""

import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError

from dldkit.asr.speech import SpeechReader, utterance_ids
from dldkit.depth.thresholds import choose_thresholds
from dldkit.errors import UserError

BATCH_SIZE = 16
NUM_UTTS = 300  # that thresholds are chosen on: they are quantiles, not error rates


@dataclass(frozen=True)
class BestPath:
    """The likeliest token of each frame of an utterance.

    Attributes:
        score: sum of their log-posteriors.
        depth: how many layers gave it; 0 = an encoder of fixed depth.
    """

    tokens: list[int]
    score: float
    depth: int


def best_paths(
    log_probs: torch.Tensor, lengths: torch.Tensor, depth: int
) -> list[BestPath]:
    """Return the best path of each utterance.

    Args:
        log_probs: CTC's (Batch, Time, Vocab).
        lengths: valid frames (Batch,).
    """
    scores, tokens = log_probs.max(-1)
    valid = torch.arange(scores.size(1), device=scores.device) < lengths[:, None]
    totals = scores.masked_fill(~valid, 0).sum(1).tolist()
    return [
        BestPath(path[:length], total, depth)
        for path, total, length in zip(tokens.tolist(), totals, lengths.tolist())
    ]


def entropy(log_probs: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return how unsure CTC is of each utterance (Batch,), from 0 to 1.

    It is the mean entropy over frames (arXiv 2309.09546), as a share of the largest
    possible one, so that thresholds mean the same for any number of tokens.

    Args:
        log_probs: (Batch, Time, Vocab).
        lengths: valid frames (Batch,).
    """
    log_probs = log_probs.float()
    of_frames = -(log_probs.exp() * log_probs).sum(-1)
    valid = torch.arange(of_frames.size(1), device=lengths.device) < lengths[:, None]
    total = of_frames.masked_fill(~valid, 0).sum(1)
    return total / lengths.clamp(min=1) / np.log(log_probs.size(-1))


def refuse_impossible_threshold(threshold: float) -> None:
    """Refuse what no entropy can be compared with.

    Raises:
        UserError: saying what can be written.
    """
    if not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise UserError(f"exit_threshold {threshold!r}: write a number from 0 to 1")


def usable_exits(encoder: torch.nn.Module) -> list[int]:
    """Return the exits that a forward at the layers that run now passes.

    Those whose BatchNorm statistics are others than on the way are left out: what an
    utterance gets by leaving there has to be what that depth gives.

    Raises:
        UserError: for an encoder without exits, or layers that pass none of them.
    """
    exits = getattr(encoder, "exits", [])
    if not exits:
        raise UserError(
            "exit_threshold needs a model with exits: train with encoder_conf: exits "
            "(--system early_exit_half or anytime)"
        )
    layers = encoder.active_layers
    if layers != tuple(range(len(layers))):
        raise UserError(
            f"exit_threshold with layers {list(layers)}: exits are trained after the "
            "first layers; choose a depth and selector prefix"
        )
    passed = [depth for depth in exits if depth < len(layers)]
    return [d for d in passed if encoder.is_passed_by(layers[:d], layers)]


@contextmanager
def stopping(
    model: ESPnetASRModel, exits: Sequence[int], threshold: float
) -> Iterator[dict[int, BestPath]]:
    """Let utterances leave at the first exit whose entropy is below a threshold.

    Yields:
        The best path of each utterance, by its place in the batch, once the model
        encoded one batch in this context.
    """
    encoder, found = model.encoder, {}
    deepest = len(encoder.active_layers)
    here: Optional[Sequence[int]] = None  # the places of those that are still there

    def leave(depth: int, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        nonlocal here
        if here is None:
            here = range(len(hidden))
        log_probs = log_probs_at(model, depth, hidden)
        if depth == deepest:
            leaves = torch.ones_like(lengths, dtype=torch.bool)
        else:
            leaves = entropy(log_probs, lengths) < threshold
        goes = leaves.tolist()
        if any(goes):
            paths = best_paths(log_probs[leaves], lengths[leaves], depth)
            found.update(zip((i for i, left in zip(here, goes) if left), paths))
            here = [i for i, left in zip(here, goes) if not left]
        return leaves

    with encoder.leaving(exits, leave):
        yield found


def log_probs_at(
    model: ESPnetASRModel, depth: int, hidden: torch.Tensor
) -> torch.Tensor:
    """Return CTC's log-posteriors (Batch, Time, Vocab) of the output of a depth."""
    with model.encoder.running(range(depth)):  # it says which exit's head answers
        return model.ctc.log_softmax(hidden)


@torch.no_grad()
def thresholds_on(
    recogniser: Any, data_dir: Union[str, Path], targets: Sequence[int]
) -> dict[float, float]:
    """Choose thresholds on the speech of a data directory, in one pass over it.

    Args:
        recogniser: a `Speech2Text`.
        targets: mean depths.

    Returns:
        The mean depth at each threshold; see `choose_thresholds`.

    Raises:
        UserError: when the model has no exits, or no utterance is long enough.
    """
    model = recogniser.asr_model
    exits = usable_exits(model.encoder)
    if not exits:
        return {}
    utts = utterance_ids(data_dir)
    utts = random.Random(0).sample(utts, min(NUM_UTTS, len(utts)))
    read = SpeechReader(data_dir, recogniser.asr_train_args)
    speech = sorted(map(read, utts), key=len)
    rows: list[torch.Tensor] = []
    for begin in range(0, len(speech), BATCH_SIZE):
        rows += _entropies(recogniser, speech[begin : begin + BATCH_SIZE], exits)
    used = sum(map(len, rows))
    if not used:
        raise UserError(f"{data_dir}: all of {len(utts)} utterances are too short")
    if used < len(utts):
        logging.warning(
            f"{data_dir}: thresholds are chosen on {used} of {len(utts)} utterances: "
            "the others are too short or too long for the encoder"
        )
    deepest = len(model.encoder.active_layers)
    return choose_thresholds(torch.cat(rows).numpy(), exits, deepest, targets)


def _entropies(
    recogniser: Any, speech: Sequence[np.ndarray], exits: Sequence[int]
) -> list[torch.Tensor]:
    """Return each exit's entropy (Batch, Exits), without utterances that do not fit."""
    model = recogniser.asr_model
    try:
        with model.encoder.collected(exits) as outputs:
            _, lengths = model.encode(**recogniser.padded(speech))
    except TooShortUttError:  # or too long: one of them spoils the batch
        if len(speech) == 1:
            return []
        return [row for utt in speech for row in _entropies(recogniser, [utt], exits)]
    log_probs = (log_probs_at(model, *output) for output in outputs.items())
    found = torch.stack([entropy(x, lengths) for x in log_probs], 1)
    return [found[lengths > 0].cpu()]
