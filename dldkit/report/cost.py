"""What recognition costs: parameters in use, MACs per second, real-time factor."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Sequence, Union

import numpy as np
import torch
from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError
from espnet2.train.abs_espnet_model import AbsESPnetModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from dldkit.asr.exits import ExitHeads
from dldkit.asr.speech import speech_source
from dldkit.data.audio import BadAudio, declared_length
from dldkit.data.datadir import read_table
from dldkit.errors import UserError

REPEATS = 5  # how often a report times each depth


def parameters_in_use(model: AbsESPnetModel) -> int:
    """Count the parameters that greedy CTC recognition uses at the current depth.

    They are those from the frontend to the CTC head, without skipped layers (but for
    what is used of them: the final LayerNorm with `keep_final_norm`, WavLM's position
    bias) and without the decoder.
    """
    path = ("frontend", "normalize", "preencoder", "encoder", "postencoder", "ctc")
    modules = [getattr(model, name, None) for name in path]
    used = {p for module in modules if module is not None for p in module.parameters()}
    if hasattr(model.encoder, "active_layers"):
        slots = model.encoder.gates
        running: set[torch.nn.Parameter] = set()
        for slot, layer in enumerate(slots.children()):
            used.difference_update(layer.parameters())
            if slot in slots.active:
                running.update(layer.parameters())
            else:
                running.update(slots.kept_parameters(layer))
        used |= running  # at the end: layers may share parameters
    head = getattr(model.ctc, "ctc_lo", None)
    if isinstance(head, ExitHeads):
        used.difference_update(head.parameters())
        used.update(head.in_use())
    return sum(p.numel() for p in used)


def counted_macs(run: Callable[[], Any]) -> int:
    """Run a function, and count the multiply-accumulates in it.

    Torch's counter sees matrix products and convolutions. Two floating-point operations
    are one MAC.
    """
    # the counter does not know the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


@torch.no_grad()
def macs(model: AbsESPnetModel, speech: np.ndarray) -> int:
    """Count the multiply-accumulates of one utterance, from the input to CTC.

    See `counted_macs`: the STFT, normalisation and activations are left out.

    Args:
        speech: samples ``(Time,)`` or features ``(Time, Dim)``.

    Raises:
        UserError: the utterance is too short for the encoder's subsampling.
    """
    parameter = next(model.parameters())
    batch = torch.as_tensor(speech, dtype=parameter.dtype, device=parameter.device)
    lengths = torch.tensor([len(batch)], device=parameter.device)

    def recognise() -> None:
        encoded, _ = model.encode(batch[None], lengths)
        if isinstance(encoded, tuple):  # with intermediate CTC outputs
            encoded = encoded[0]
        model.ctc.argmax(encoded)

    try:
        return counted_macs(recognise)
    except TooShortUttError as error:
        raise UserError(
            f"MACs are counted on an utterance of the test set's median length, but "
            f"that one {error}"
        )


def macs_of_leaving(recogniser: Any, speech: np.ndarray, depth: int) -> int:
    """Count the multiply-accumulates of an utterance that leaves at a depth.

    The output layers of the exits that it passes are counted as well.

    Args:
        recogniser: a `Speech2Text` of a model with exits.
    """
    with recogniser.running(depth):
        return counted_macs(lambda: recogniser(speech, exit_threshold=0.0))


def speech_seconds(data_dir: Union[str, Path], frame_shift: float) -> dict[str, float]:
    """Return the duration of each utterance of a formatted directory, in order of it.

    Args:
        frame_shift: Seconds per frame, if the directory holds features.

    Raises:
        UserError: there is no speech, or its length can not be read.
    """
    scp, _, _ = speech_source(data_dir)
    seconds = {}
    if Path(scp).name == "feats.scp":
        for utt_id, shape in read_table(Path(data_dir) / "feats_shape").items():
            seconds[utt_id] = int(shape.split(",")[0]) * frame_shift
    else:
        for utt_id, path in read_table(scp).items():
            try:
                length, fs, _ = declared_length(path)
                seconds[utt_id] = length / fs
            except BadAudio as error:
                raise UserError(f"{scp}: can not read {utt_id}: {error}")
    if not seconds:
        raise UserError(f"{data_dir} has no utterance")
    return dict(sorted(seconds.items(), key=lambda item: (item[1], item[0])))


def evenly_spaced(utt_ids: Sequence[str], number: int) -> list[str]:
    """Pick `number` of the utterances, the middle of as many equal parts each.

    Of utterances in order of length, one is that of median length, and more stand for
    all lengths.
    """
    number = min(number, len(utt_ids))
    return [utt_ids[(2 * i + 1) * len(utt_ids) // (2 * number)] for i in range(number)]


@dataclass(frozen=True)
class Utterance:
    """Speech in memory, samples ``(Time,)`` or features ``(Time, Dim)``."""

    speech: np.ndarray
    seconds: float


@dataclass(frozen=True)
class TimedDecoder:
    """A recogniser at one depth, to be timed on some utterances.

    `prepare` sets the depth and is not timed; `decode` recognises one utterance.
    """

    prepare: Callable[[], object]
    decode: Callable[[np.ndarray], object]
    utterances: Sequence[Utterance]


def real_time_factors(
    decoders: Sequence[TimedDecoder], repeats: int
) -> list[list[float]]:
    """Measure decoding time over audio time on one core, one utterance at a time.

    All decoders take turns within each repeat, so that a drift of the machine's speed
    hits them alike. A round over one utterance each warms up.

    Returns:
        For each decoder, `repeats` real-time factors in the order of measurement.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for decoder in decoders:
            decoder.prepare()
            middle = len(decoder.utterances) // 2
            _time(decoder.decode, decoder.utterances[middle : middle + 1])
        factors: list[list[float]] = [[] for _ in decoders]
        with tqdm(total=repeats * len(decoders), desc="real-time factor") as bar:
            for _ in range(repeats):
                for decoder, measured in zip(decoders, factors):
                    decoder.prepare()
                    wall = _time(decoder.decode, decoder.utterances)
                    audio = sum(u.seconds for u in decoder.utterances)
                    measured.append(wall / audio)
                    bar.update()
        return factors
    finally:
        torch.set_num_threads(threads)


def _time(decode: Callable, utterances: Sequence[Utterance]) -> float:
    start = time.perf_counter()
    for utterance in utterances:
        try:
            decode(utterance.speech)
        except TooShortUttError:
            pass  # decoding writes an empty hypothesis for it
    return time.perf_counter() - start
