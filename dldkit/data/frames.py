"""Frames that are stored for each utterance: posteriors, or a teacher's hidden states.

To a training they are ESPnet data like speech and text. `NAME.scp` lists numpy arrays
in Kaldi arks, and the DataLoader's workers read them by the data type `numpy_ark`, as
ESPnet's own `kaldi_ark` has neither float16 nor three dimensions.
"""

import argparse
import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import kaldiio
import numpy as np
import torch
from espnet2.train.dataset import DATA_TYPES

from dldkit.data.datadir import read_table
from dldkit.errors import UserError
from dldkit.parallel import parallel_map
from dldkit.step import atomic

DATA_TYPE = "numpy_ark"
TOO_SHORT = "too_short"  # ids of utterances that give no frame, one a line
PART = 200  # utterances per ark: what an interruption can lose, and memory holds
BATCH = 16  # utterances

Forward = Callable[[torch.Tensor, list[str]], Optional[Sequence[np.ndarray]]]


def register_data_type() -> None:
    """Let ESPnet's datasets read numpy arrays in Kaldi arks."""
    help = "Numpy arrays of any shape in Kaldi arks, see dldkit.data.frames"
    DATA_TYPES[DATA_TYPE] = dict(func=kaldiio.load_scp, kwargs=[], help=help)


def model_digest(model: torch.nn.Module) -> str:
    """Return a digest of all weights of a model, and of its statistics."""
    found = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(values.cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass
class Part:
    """Some utterances of a data directory, and the ark that holds their frames.

    Args:
        source: number of the data directory.
        utts: their ids.
        path: of the ark, without `.ark`.
    """

    source: int
    utts: list[str]
    path: Path

    @property
    def is_done(self) -> bool:
        """Whether an earlier run wrote all of it."""
        return self.path.with_suffix(".scp").is_file()

    @torch.no_grad()
    def write(self, signals: dict[str, torch.Tensor], forward: Forward) -> None:
        """Write the frames of all utterances.

        Args:
            signals: (Samples,) or (Time, Dim) for each utterance.
            forward: returns the frames of a batch, which has no padding, as that would
                change what comes out; or None if its signals are too short.
        """
        short: list[str] = []
        ark, scp = self.path.with_suffix(".ark"), self.path.with_suffix(".scp")
        with atomic(scp) as new:  # it says that the part is complete
            with kaldiio.WriteHelper(
                f"ark,scp:{ark},{new}", write_function="numpy"
            ) as out:
                for batch in _of_equal_length(signals):
                    stacked = torch.stack([signals[utt] for utt in batch])
                    frames = forward(stacked, batch)
                    if frames is None:
                        short += batch
                        continue
                    for utt, array in zip(batch, frames, strict=True):
                        out(utt, array)
            for utt in short:
                logging.warning(f"{utt} is too short: nothing is stored for it")
            self.path.with_suffix(".short").write_text("".join(f"{u}\n" for u in short))


def _of_equal_length(signals: dict[str, torch.Tensor]) -> list[list[str]]:
    groups: dict[int, list[str]] = defaultdict(list)
    for utt, signal in signals.items():
        groups[len(signal)].append(utt)
    return [
        group[start : start + BATCH]
        for group in groups.values()
        for start in range(0, len(group), BATCH)
    ]


def parts_of(output_dir: Path, utts: Sequence[Sequence[str]]) -> list[Part]:
    """Share out the utterances of each data directory.

    Raises:
        UserError: for an utterance that is in two of them.
    """
    seen: set[str] = set()
    for ids in utts:
        repeated = sorted(seen.intersection(ids))
        if repeated:
            raise UserError(
                f"{len(repeated)} utterance(s) are in two of the data directories, "
                f"first: {repeated[0]}; what is stored is found by their names"
            )
        seen.update(ids)
    return [
        Part(i, list(ids[first : first + PART]), output_dir / f"{i}-{first}")
        for i, ids in enumerate(utts)
        for first in range(0, len(ids), PART)
    ]


def collect(
    output_dir: Path,
    name: str,
    parts: Sequence[Part],
    write: Callable[[Part], None],
    nj: int,
    parallel_config: Optional[str],
) -> None:
    """Write the parts that are missing, and then `name`.scp, which lists them all."""
    missing = [part for part in parts if not part.is_done]
    parallel_map(write, missing, nj, f"Collecting {name}", parallel_config)
    for suffix, whole in ((".short", TOO_SHORT), (".scp", f"{name}.scp")):
        texts = [part.path.with_suffix(suffix).read_text() for part in parts]
        lines = sorted("".join(texts).splitlines())
        with atomic(output_dir / whole) as new:
            new.write_text("".join(f"{line}\n" for line in lines))


def collected_from(directory: Path, name: str) -> Path:
    """Return the file that says from which model and data `name`.scp was collected."""
    done = directory / ".done"  # of the step that collected it
    return done if done.is_file() else directory / f"{name}.scp"


def read_in_training(
    args: argparse.Namespace, directory: Path, name: str, command: str
) -> None:
    """Let a training read what is stored in `directory` beside speech and text.

    Args:
        args: those of the training. An entry with `name` that they have already stays.
        command: what collects it, for messages.

    Raises:
        UserError: some of the training's utterances are missing, saying how many, the
            first, and what is to be done; or what is stored can not be read.
    """
    scp = directory / f"{name}.scp"
    collect_again = (
        "collect them for all training and validation data "
        f"(python -m dldkit.bin.{command})"
    )
    if args.multiple_iterator:
        raise UserError(
            f"{directory}: stored {name} can not be split for multiple_iterator: set "
            "it to false, or distil from the model itself"
        )
    stored = read_table(scp)
    entries = (
        args.train_data_path_and_name_and_type,
        args.valid_data_path_and_name_and_type,
    )
    speech = [path for data in entries for path, key, _ in data if key == "speech"]
    needed = [utt for path in speech for utt in read_table(path)]
    missing = [utt for utt in needed if utt not in stored]
    listed = directory / TOO_SHORT
    known = set(listed.read_text().split()) if listed.is_file() else set()
    short = [utt for utt in missing if utt in known]
    if short:
        raise UserError(
            f"{len(short)} of {len(needed)} utterances are too short and have no {name}"
            f" in {directory}, the first is {short[0]}: leave short ones out (stage 4, "
            "--min_wav_duration)"
        )
    if missing:
        raise UserError(
            f"{len(missing)} of {len(needed)} utterances have no {name} in {directory},"
            f" the first is {missing[0]}: {collect_again}"
        )
    try:
        kaldiio.load_mat(next(iter(stored.values())))
    except (OSError, ValueError, StopIteration) as error:
        raise UserError(f"{scp} can not be read: {error}: {collect_again}") from None
    for data in entries:
        if data and all(key != name for _, key, _ in data):
            data.append((str(scp), name, DATA_TYPE))
