"""The reference's posteriors, written once so that training can read them."""

import functools
import logging
import shutil
from pathlib import Path
from typing import Optional, Sequence, Union

import kaldiio
import torch

from dldkit.asr.loading import load_asr_model
from dldkit.asr.reference import POSTERIORS_SCP, Description, pack_posteriors
from dldkit.asr.speech import SpeechReader, speech_source, utterance_ids
from dldkit.depth.profile import fingerprint
from dldkit.errors import UserError
from dldkit.parallel import parallel_map


def collect_posteriors(
    reference: Union[str, Path],
    data_dirs: Sequence[Union[str, Path]],
    output_dir: Union[str, Path],
    top_k: Optional[int] = None,
    nj: int = 1,
    parallel_config: Optional[str] = None,
) -> None:
    """Write the posteriors of all utterances of `data_dirs` to Kaldi arks.

    A finished collection is kept; an interrupted one continues with the parts that
    are missing.

    Args:
        reference: as `open_reference` takes it, but no cached posteriors.
        top_k: keep just the likeliest tokens of each frame, and the rest as one bin.
        nj: number of jobs.

    Raises:
        UserError: for a reference that can not be loaded, or an impossible `top_k`.
    """
    output_dir = Path(output_dir)
    request_file = output_dir / "request"
    if output_dir.exists() and any(output_dir.iterdir()) and not request_file.is_file():
        raise UserError(
            f"{output_dir} holds other files: name a directory for the posteriors alone"
        )
    model, _ = load_asr_model(reference)
    description = Description.of(model)
    _refuse_impossible_top_k(top_k, len(description.token_list))
    description.top_k = top_k

    request = "\n".join(
        [f"{fingerprint(model.state_dict())} {top_k} {nj}"]
        + [f"{path} {_stamp(path)}" for path in data_dirs]
    )
    if not request_file.is_file() or request_file.read_text() != request:
        shutil.rmtree(output_dir, ignore_errors=True)
        output_dir.mkdir(parents=True)
        request_file.write_text(request)
    if (output_dir / POSTERIORS_SCP).is_file():
        logging.info(f"{output_dir} is complete")
        return

    parts = [
        (str(data_dir), utterance_ids(data_dir)[job::nj], output_dir / f"{i}-{job}")
        for i, data_dir in enumerate(data_dirs)
        for job in range(nj)
    ]
    missing = [part for part in parts if not part[2].with_suffix(".scp").is_file()]
    write = functools.partial(_write_part, str(reference), top_k)
    parallel_map(write, missing, nj, "Collecting posteriors", parallel_config)

    description.save(output_dir)
    scp = output_dir / (POSTERIORS_SCP + ".partial")
    lines = [p[2].with_suffix(".scp").read_text().splitlines() for p in parts]
    scp.write_text("\n".join(sorted(sum(lines, []))) + "\n")
    scp.replace(output_dir / POSTERIORS_SCP)


def _stamp(data_dir: Union[str, Path]) -> int:
    """A number that changes when the speech of a data directory does."""
    return Path(speech_source(data_dir)[0]).stat().st_mtime_ns


def _refuse_impossible_top_k(top_k: Optional[int], vocab_size: int) -> None:
    if top_k is not None and not 0 < top_k < vocab_size:
        raise UserError(
            f"top_k {top_k} is impossible: the reference has {vocab_size} tokens"
        )
    if top_k is not None and vocab_size > 2**16:
        raise UserError(f"top_k needs at most {2**16} tokens, not {vocab_size}")


@functools.lru_cache(maxsize=1)
def _load(reference: str):
    torch.set_num_threads(1)
    return load_asr_model(reference)


@torch.no_grad()
def _write_part(reference: str, top_k: Optional[int], part) -> None:
    data_dir, utts, path = part
    model, train_args = _load(reference)
    read = SpeechReader(data_dir, train_args)
    ark = path.with_suffix(".ark")
    partial = path.with_suffix(".scp.partial")
    with kaldiio.WriteHelper(f"ark,scp:{ark},{partial}", write_function="numpy") as out:
        for utt in utts:  # one at a time: no padding
            speech = torch.from_numpy(read(utt))[None]
            encoded, _ = model.encode(speech, torch.tensor([speech.size(1)]))
            if isinstance(encoded, tuple):  # with intermediate outputs
                encoded = encoded[0]
            out(utt, pack_posteriors(model.ctc.log_softmax(encoded)[0], top_k))
    partial.replace(path.with_suffix(".scp"))
