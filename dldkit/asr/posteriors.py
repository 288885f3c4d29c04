"""The reference's posteriors, written once so that training can read them."""

import functools
import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

import kaldiio
import torch
from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError

from dldkit.asr.loading import load_asr_model
from dldkit.asr.reference import (
    POSTERIORS_SCP,
    TOO_SHORT,
    Description,
    pack_posteriors,
)
from dldkit.asr.speech import SpeechReader, speech_source, utterance_ids
from dldkit.data.frames import join_parts, model_digest
from dldkit.errors import UserError
from dldkit.parallel import parallel_map
from dldkit.step import Step, atomic

PART = 200  # utterances per ark: what an interruption can lose, and memory holds
BATCH = 16  # utterances


def collect_posteriors(
    reference: Union[str, Path],
    data_dirs: Sequence[Union[str, Path]],
    output_dir: Union[str, Path],
    top_k: Optional[int] = None,
    nj: int = 1,
    parallel_config: Optional[str] = None,
    ngpu: int = 0,
) -> None:
    """Write the posteriors of all utterances of `data_dirs` to Kaldi arks.

    A finished collection is kept; an interrupted one continues with the parts that
    are missing. Utterances that are too short for the encoder are left out, with a
    warning, and listed in `too_short`.

    Args:
        reference: as `open_reference` takes it, but no cached posteriors.
        top_k: keep just the likeliest tokens of each frame, and the rest as one bin.
        nj: number of jobs.
        ngpu: 1 = the jobs compute on the GPU, 0 = on the CPU.

    Raises:
        UserError: for a reference that can not be loaded, an impossible `top_k`, or a
            GPU that is not there.
    """
    if ngpu and not torch.cuda.is_available():
        raise UserError(f"ngpu {ngpu}: no GPU can be used here: set it to 0")
    output_dir = Path(output_dir)
    model, _ = load_asr_model(reference)
    description = Description.of(model)
    _refuse_impossible_top_k(top_k, len(description.token_list))
    description.top_k = top_k
    sources = [Path(speech_source(data_dir)[0]) for data_dir in data_dirs]
    files = {f"{i} {path.name}": path for i, path in enumerate(sources)}
    with Step(output_dir, files, reference=model_digest(model), top_k=top_k) as step:
        if step.done:
            return
        parts = []
        for i, data_dir in enumerate(data_dirs):
            utts = utterance_ids(data_dir)
            parts += [
                (str(data_dir), utts[start : start + PART], output_dir / f"{i}-{start}")
                for start in range(0, len(utts), PART)
            ]
        missing = [part for part in parts if not part[2].with_suffix(".scp").is_file()]
        write = functools.partial(_write_part, str(reference), top_k, bool(ngpu))
        parallel_map(write, missing, nj, "Collecting posteriors", parallel_config)

        description.save(output_dir)
        join_parts(
            [path.with_suffix(".short") for *_, path in parts], output_dir / TOO_SHORT
        )
        # it comes last: what looks for posteriors looks for this file
        join_parts(
            [path.with_suffix(".scp") for *_, path in parts],
            output_dir / POSTERIORS_SCP,
        )


def _refuse_impossible_top_k(top_k: Optional[int], vocab_size: int) -> None:
    if top_k is not None and not 0 < top_k < vocab_size:
        raise UserError(
            f"top_k {top_k} is impossible: the reference has {vocab_size} tokens"
        )
    if top_k is not None and vocab_size > 2**16:
        raise UserError(f"top_k needs at most {2**16} tokens, not {vocab_size}")


@functools.lru_cache(maxsize=1)
def _load(reference: str, gpu: bool):
    torch.set_num_threads(1)
    model, train_args = load_asr_model(reference)
    return model.to("cuda" if gpu else "cpu"), train_args


@torch.no_grad()
def _write_part(reference: str, top_k: Optional[int], gpu: bool, part) -> None:
    data_dir, utts, path = part
    model, train_args = _load(reference, gpu)
    device = next(model.parameters()).device
    read = SpeechReader(data_dir, train_args)
    speech = {utt: torch.from_numpy(read(utt)) for utt in utts}
    short: list[str] = []
    ark, scp = path.with_suffix(".ark"), path.with_suffix(".scp")
    with atomic(scp) as new:  # it says that the part is complete
        with kaldiio.WriteHelper(f"ark,scp:{ark},{new}", write_function="numpy") as out:
            for batch in _batches(speech):
                stacked = torch.stack([speech[utt] for utt in batch]).to(device)
                lengths = torch.full((len(batch),), stacked.size(1), device=device)
                try:
                    encoded, _ = model.encode(stacked, lengths)
                except TooShortUttError:  # all of them, being of one length
                    short += batch
                    continue
                if isinstance(encoded, tuple):  # with intermediate outputs
                    encoded = encoded[0]
                for utt, log_probs in zip(batch, model.ctc.log_softmax(encoded)):
                    out(utt, pack_posteriors(log_probs, top_k))
        for utt in short:
            logging.warning(f"{utt} is too short for the encoder: no posteriors")
        path.with_suffix(".short").write_text("".join(f"{utt}\n" for utt in short))


def _batches(speech: dict[str, torch.Tensor]) -> list[list[str]]:
    """Group utterances of equal length: padding would change what comes out."""
    groups: dict[int, list[str]] = defaultdict(list)
    for utt, samples in speech.items():
        groups[len(samples)].append(utt)
    return [
        group[start : start + BATCH]
        for group in groups.values()
        for start in range(0, len(group), BATCH)
    ]
