"""The reference's posteriors, written once so that training can read them."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Optional, Union

import torch
from espnet2.legacy.nets.pytorch_backend.transformer.subsampling import TooShortUttError

from dldkit.asr.hf_encoder import TooLongUttError
from dldkit.asr.loading import load_asr_model
from dldkit.asr.posteriors import pack, refuse_impossible_top_k
from dldkit.asr.reference import POSTERIORS, Description
from dldkit.asr.speech import SpeechReader, speech_source, utterance_ids
from dldkit.data.frames import Part, collect, model_digest, parts_of
from dldkit.parallel import refuse_missing_gpu
from dldkit.step import Step


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
    refuse_missing_gpu(ngpu, parallel_config)
    output_dir = Path(output_dir)
    model, _ = load_asr_model(reference)
    description = Description.of(model)
    refuse_impossible_top_k(top_k, len(description.token_list))
    description.top_k = top_k
    parts = parts_of(output_dir, [utterance_ids(data_dir) for data_dir in data_dirs])
    sources = [Path(speech_source(data_dir)[0]) for data_dir in data_dirs]
    files = {f"{i} {path.name}": path for i, path in enumerate(sources)}
    with Step(output_dir, files, reference=model_digest(model), top_k=top_k) as step:
        if step.done:
            return
        description.save(output_dir)
        write = functools.partial(
            _write, str(reference), top_k, bool(ngpu), [str(d) for d in data_dirs]
        )
        collect(output_dir, POSTERIORS, parts, write, nj, parallel_config)


@functools.lru_cache(maxsize=1)
def _load(reference: str, gpu: bool):
    refuse_missing_gpu(gpu)
    torch.set_num_threads(1)
    model, train_args = load_asr_model(reference)
    return model.to("cuda" if gpu else "cpu"), train_args


def _write(
    reference: str, top_k: Optional[int], gpu: bool, data_dirs: list[str], part: Part
) -> None:
    model, train_args = _load(reference, gpu)
    device = next(model.parameters()).device
    read = SpeechReader(data_dirs[part.source], train_args)

    def forward(speech: torch.Tensor, utts: list[str]):
        lengths = torch.full((len(utts),), speech.size(1), device=device)
        try:
            encoded, _ = model.encode(speech.to(device), lengths)
        except TooLongUttError:  # a training refuses it, whatever is stored
            raise
        except TooShortUttError:
            return None
        if isinstance(encoded, tuple):  # with intermediate outputs
            encoded = encoded[0]
        return [pack(frames, top_k) for frames in model.ctc.log_softmax(encoded)]

    speech = {utt: torch.from_numpy(read(utt)) for utt in part.utts}
    part.write(speech, forward)
