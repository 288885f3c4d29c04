"""What is stored for each frame of an utterance: posteriors, or a teacher's states."""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

import torch

from dldkit.data.datadir import read_table
from dldkit.step import atomic


def model_digest(model: torch.nn.Module) -> str:
    """Return a digest of all weights of a model, and of its statistics."""
    found = hashlib.sha256()
    for name, values in sorted(model.state_dict().items()):
        found.update(name.encode())
        found.update(values.cpu().float().contiguous().numpy().tobytes())
    return found.hexdigest()


def join_parts(parts: Sequence[Path], whole: Path) -> None:
    """Write the lines of all parts, sorted; `whole` appears when it is complete."""
    lines = [line for path in parts for line in path.read_text().splitlines()]
    with atomic(whole) as new:
        new.write_text("".join(f"{line}\n" for line in sorted(lines)))


def utterances_without(scp: Path, args: argparse.Namespace) -> tuple[list[str], int]:
    """Return training's utterances that `scp` lacks, and how many there are in all."""
    stored = read_table(scp).keys()
    data = [
        *args.train_data_path_and_name_and_type,
        *args.valid_data_path_and_name_and_type,
    ]
    needed = [u for path, name, _ in data if name == "speech" for u in read_table(path)]
    return [utt for utt in needed if utt not in stored], len(needed)
