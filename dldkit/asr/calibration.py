"""A trained model's depth profile, from its training speech."""

import argparse
import logging
import math
import random
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Optional, Sequence, Union

import numpy as np
import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError
from espnet2.tasks.asr import ASRTask
from espnet2.train.dataset import ESPnetDataset
from scipy import stats
from tqdm import tqdm

from dldkit.asr.loading import load_asr_model
from dldkit.asr.speech import readable_speech, speech_source, utterance_ids
from dldkit.depth.profile import (
    CalibratedDepth,
    DepthProfile,
    fingerprint,
    profile_path,
)
from dldkit.depth.statistics import batch_norms, estimate
from dldkit.errors import UserError
from dldkit.patches import patched
from dldkit.step import Lock, digest

HELD_BACK = (
    30  # transcribed utterances that decide whether statistics are an improvement
)
WORSE = 0.05  # p value at which they are not


@dataclass
class Utterance:
    """Speech as (Samples,) or (Time, Dim), and token indices if it has a transcript."""

    speech: np.ndarray
    text: Optional[np.ndarray] = None


Batch = tuple[torch.Tensor, torch.Tensor]
"""Speech (Batch, Samples) or features (Batch, Time, Dim), and lengths (Batch,)."""


def write_depth_profile(
    asr_model_file: Union[str, Path],
    data_dir: Union[str, Path],
    depths: Sequence[int],
    selector: Optional[str] = None,
    num_utts: int = 300,
    batch_size: int = 20,
    seed: int = 0,
) -> None:
    """Calibrate a model for some depths and add them to its depth profile.

    A model without BatchNorm gets none. What was calibrated before from the same data
    with the same options is kept. Where there are transcripts, statistics that make
    CTC's loss worse on held-back utterances are refused: the depth goes on with the
    checkpoint's own.

    Args:
        asr_model_file: a checkpoint beside its config.yaml.
        data_dir: training speech, with transcripts or without.
        depths: numbers of layers; those that the encoder does not have are left out.
        selector: which layers a depth means; None = as the model was trained.
        num_utts: utterances to calibrate on, drawn at random.
        batch_size: utterances of similar length, cut to the shortest: no padding.

    Raises:
        UserError: when the model has no run-time depth, or no depth fits.
    """
    model, train_args = load_asr_model(asr_model_file)
    encoder = model.encoder
    if not hasattr(encoder, "set_depth"):
        raise UserError(
            f"{asr_model_file}: {type(encoder).__name__} has no run-time depth: train "
            "with encoder: ld_conformer, or another ld_* encoder"
        )
    if not batch_norms(encoder):
        logging.info(f"{asr_model_file} has no BatchNorm: it needs no depth profile")
        return
    num_layers = len(encoder.gates)
    wanted = {
        depth: encoder.choose_layers(depth, selector=selector)
        for depth in depths
        if depth <= num_layers
    }
    if not wanted:
        raise UserError(f"none of the depths {list(depths)} fits {num_layers} layers")

    path = profile_path(asr_model_file)
    made_from = {
        "data": digest(speech_source(data_dir)[0]),
        "num_utts": num_utts,
        "batch_size": batch_size,
        "seed": seed,
    }
    with Lock(path.with_name(f".{path.name}.lock")):
        profile = _existing(path, fingerprint(encoder.state_dict()))
        missing = [
            layers
            for layers in wanted.values()
            if layers not in profile.depths
            or profile.depths[layers].made_from != made_from
        ]
        if not missing:
            logging.info(f"{path} is up to date")
            return
        read = partial(_read, data_dir, train_args, model)
        sample, held_back = _draw(data_dir, num_utts, seed)
        sample = _unpadded_batches(read(sample), batch_size)
        batches = [_features(model, batch) for batch in sample]
        judges = [
            (_features(model, _batch([utt.speech])), utt.text)
            for utt in read(held_back)
            if utt.text is not None
        ]
        for layers in tqdm(missing, desc="Calibrating depths"):
            depth = CalibratedDepth(
                layers,
                estimate(encoder, layers, batches, partial(_encode, model)),
                selector or encoder.selector,
                made_from,
            )
            profile.add(_judged(depth, model, judges))
        profile.save(path)
    logging.info(f"Depths {sorted(wanted)} of {asr_model_file} written to {path}")


def _existing(path: Path, checkpoint: str) -> DepthProfile:
    """The profile to add to: that of these weights, else an empty one."""
    try:
        profile = DepthProfile.load(path)
    except UserError:
        return DepthProfile([], checkpoint)
    if profile.checkpoint == checkpoint:
        return profile
    logging.warning(f"{path} was made for other weights: it is begun anew")
    return DepthProfile([], checkpoint)


def _draw(
    data_dir: Union[str, Path], num_utts: int, seed: int
) -> tuple[list[str], list[str]]:
    """Return utterances to calibrate on, and others to judge the result on."""
    utts = utterance_ids(data_dir)
    rng = random.Random(seed)
    sample = rng.sample(utts, min(num_utts, len(utts)))
    rest = sorted(set(utts) - set(sample))
    if len(rest) > 1:  # one alone can not judge
        return sample, rng.sample(rest, min(HELD_BACK, len(rest)))
    # All that there is: a tenth of it judges.
    held_back = min(HELD_BACK, len(sample) // 10)
    return sample[held_back:], sample[:held_back]


def _read(
    data_dir: Union[str, Path],
    train_args: argparse.Namespace,
    model: ESPnetASRModel,
    utts: Sequence[str],
) -> list[Utterance]:
    """Return utterances as training preprocesses them, shortest first.

    Those that are too short for the encoder are left out.
    """
    sources = [readable_speech(data_dir)]
    if (Path(data_dir) / "text").is_file():
        sources.append((str(Path(data_dir) / "text"), "text", "text"))
    preprocess = ASRTask.build_preprocess_fn(train_args, False)
    dataset = ESPnetDataset(sources, preprocess=preprocess)
    data = {utt: dataset[utt][1] for utt in utts}
    by_length = sorted(sorted(utts), key=lambda utt: len(data[utt]["speech"]))
    short = list(
        takewhile(lambda utt: _is_short(model, data[utt]["speech"]), by_length)
    )
    if short:
        logging.warning(f"{data_dir}: too short for the encoder, left out: {short}")
    if utts and len(short) == len(utts):
        raise UserError(f"{data_dir}: all of {len(utts)} utterances are too short")
    return [
        Utterance(data[utt]["speech"], data[utt].get("text"))
        for utt in by_length[len(short) :]
    ]


@torch.no_grad()
def _is_short(model: ESPnetASRModel, speech: np.ndarray) -> bool:
    try:
        model.encode(*_batch([speech]))
    except TooShortUttError:
        return True
    return False


def _batch(arrays: Sequence[np.ndarray]) -> Batch:
    """Batch arrays, cut to the shortest of them."""
    length = min(map(len, arrays))
    speech = torch.stack([torch.from_numpy(a[:length]) for a in arrays])
    return speech, torch.full((len(arrays),), length)


def _unpadded_batches(utts: Sequence[Utterance], batch_size: int) -> list[Batch]:
    """Batch utterances of similar length; they come shortest first."""
    arrays = [utt.speech for utt in utts]
    starts = range(0, len(arrays), batch_size)
    return [_batch(arrays[start : start + batch_size]) for start in starts]


@torch.no_grad()
def _features(model: ESPnetASRModel, batch: Batch) -> Batch:
    """Return what enters the layers: it is the same at any depth."""
    features = model._extract_feats(*batch)
    return features if model.normalize is None else model.normalize(*features)


def _encode(model: ESPnetASRModel, features: Batch) -> Batch:
    """Encode what `_features` returned."""
    with patched(model, "frontend", None), patched(model, "normalize", None):
        return model.encode(*features)


def _judged(
    depth: CalibratedDepth,
    model: ESPnetASRModel,
    utts: Sequence[tuple[Batch, np.ndarray]],
) -> CalibratedDepth:
    """Compare CTC's loss with and without the statistics, and drop them if it is worse.

    Worse by chance does not count: a paired t-test over utterances decides.
    """
    if model.ctc is None or len(utts) < 2:
        return depth
    encoder, losses = model.encoder, []
    for profile in (None, DepthProfile([depth], "")):
        encoder.attach_depth_profile(profile)
        with encoder.running(depth.layers):
            losses.append(np.array([_ctc_loss(model, *utt) for utt in utts]))
    encoder.attach_depth_profile(None)
    finite = np.isfinite(losses).all(0)  # a transcript may be too long for its speech
    if finite.sum() < 2:
        logging.warning(
            f"depth {len(depth.layers)}: the estimated statistics are not judged, as "
            "fewer than two held-back utterances have a transcript that fits them"
        )
        return depth
    before, after = (values[finite] for values in losses)
    depth.ctc_loss = (float(before.mean()), float(after.mean()))
    message = (
        f"depth {len(depth.layers)}: CTC loss {depth.ctc_loss[0]:.3f} -> "
        f"{depth.ctc_loss[1]:.3f} on {len(before)} held-back utterances"
    )
    if stats.ttest_rel(after, before, alternative="greater").pvalue < WORSE:
        logging.warning(
            f"{message}: the estimated statistics make the model worse and are "
            "refused; this depth runs with the checkpoint's own"
        )
        depth.statistics = {}
    else:
        logging.info(message)
    return depth


@torch.no_grad()
def _ctc_loss(model: ESPnetASRModel, features: Batch, transcript: np.ndarray) -> float:
    encoded, lengths = _encode(model, features)
    if isinstance(encoded, tuple):  # with intermediate outputs
        encoded = encoded[0]
    text = torch.from_numpy(transcript)[None]
    loss = model.ctc(encoded, lengths, text, torch.tensor([text.size(1)]))
    # zero_infinity, ESPnet's default, says 0 where a transcript is too long
    return float(loss) if loss > 0 and loss.isfinite() else math.inf
