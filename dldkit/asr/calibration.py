"""A trained model's depth profile, from unlabelled speech."""

import logging
import random
from pathlib import Path
from typing import Sequence, Union

import numpy as np
import torch
from tqdm import tqdm

from dldkit.asr.loading import load_asr_model
from dldkit.asr.speech import SpeechReader, utterance_ids
from dldkit.depth.profile import DepthProfile, batch_norms, calibrate, fingerprint
from dldkit.depth.selector import select_layers
from dldkit.errors import UserError


def write_depth_profile(
    asr_model_file: Union[str, Path],
    data_dir: Union[str, Path],
    depths: Sequence[int],
    output: Union[str, Path],
    selector: str = "even",
    num_utts: int = 300,
    batch_size: int = 20,
    seed: int = 0,
) -> None:
    """Calibrate a model for each depth and write its depth profile.

    A model without BatchNorm gets none. A profile that is there already is kept if it
    belongs to this model and lists the same depths and layers.

    Args:
        asr_model_file: a checkpoint beside its config.yaml.
        data_dir: training speech; transcripts are not read.
        depths: numbers of layers; those that the encoder does not have are left out.
        num_utts: utterances to calibrate on, drawn at random.
        batch_size: utterances of similar length, cut to the shortest: no padding.

    Raises:
        UserError: when the model has no run-time depth, or no depth fits.
    """
    model, train_args = load_asr_model(asr_model_file)
    encoder = model.encoder
    if not hasattr(encoder, "set_depth"):
        raise UserError(
            f"{asr_model_file}: {type(encoder).__name__} has no depth to set"
        )
    if not batch_norms(encoder):
        logging.info(f"{asr_model_file} has no BatchNorm: it needs no depth profile")
        return
    num_layers = len(encoder.encoders)
    layers = {
        depth: select_layers(num_layers, depth, selector=selector)
        for depth in depths
        if depth <= num_layers
    }
    if not layers:
        raise UserError(f"none of the depths {list(depths)} fits {num_layers} layers")
    if _is_up_to_date(output, encoder, layers):
        logging.info(f"{output} is up to date")
        return

    batches = _unpadded_batches(
        _read_sample(SpeechReader(data_dir, train_args), data_dir, num_utts, seed),
        batch_size,
    )
    calibrated = {}
    for depth, chosen in tqdm(layers.items(), desc="Calibrating depths"):
        calibrated[depth] = calibrate(
            encoder, chosen, batches, lambda batch: model.encode(*batch)
        )
    encoder.set_depth()
    DepthProfile(calibrated, fingerprint(encoder.state_dict())).save(output)
    logging.info(f"Depths {sorted(layers)} of {asr_model_file} written to {output}")


def _is_up_to_date(output, encoder, layers) -> bool:
    try:
        profile = DepthProfile.load(output)
    except UserError:
        return False
    return profile.checkpoint == fingerprint(encoder.state_dict()) and layers == {
        depth: calibrated.layers for depth, calibrated in profile.depths.items()
    }


def _read_sample(read, data_dir, num_utts, seed) -> list[np.ndarray]:
    utts = utterance_ids(data_dir)
    chosen = random.Random(seed).sample(utts, min(num_utts, len(utts)))
    return [read(utt) for utt in sorted(chosen)]


def _unpadded_batches(
    arrays: Sequence[np.ndarray], batch_size: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batch utterances of similar length, cut to the shortest of their batch."""
    arrays = sorted(arrays, key=len)
    batches = []
    for start in range(0, len(arrays), batch_size):
        batch = arrays[start : start + batch_size]
        length = len(batch[0])
        speech = torch.stack([torch.from_numpy(a[:length]) for a in batch])
        batches.append((speech, torch.full((len(batch),), length)))
    return batches
