"""Trained ASR models, loaded with a check that their weights really arrived."""

import argparse
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Mapping, Optional, Union

import torch
from espnet2.asr.espnet_model import ESPnetASRModel
from espnet2.main_funcs.pack_funcs import unpack
from espnet2.torch_utils.safe_torch_load import safe_torch_load

from dldkit.depth.profile import find_profile
from dldkit.errors import UserError


def load_asr_model(
    path: Union[str, Path],
) -> tuple[ESPnetASRModel, argparse.Namespace]:
    """Load a trained ESPnet ASR model; return it in eval mode, and its config.

    Args:
        path: a checkpoint beside its config.yaml, an experiment directory, or a zip
            that `espnet2.bin.pack asr` wrote.

    Raises:
        UserError: when there is no such model, or its weights do not fit its config.
    """
    path = Path(path)
    if path.suffix == ".zip" and path.is_file():
        with tempfile.TemporaryDirectory() as directory:
            return _build(*files_of_asr(path, unpacked(path, directory)))
    checkpoint = find_checkpoint(path) if path.is_dir() else path
    config = checkpoint.parent / "config.yaml"
    for needed in (checkpoint, config):
        if not needed.is_file():
            raise UserError(
                f"no {needed}: name a trained experiment directory, one of its "
                "checkpoints, or a packed zip"
            )
    return _build(config, checkpoint)


def unpacked(path: Path, directory: str) -> dict[str, str]:
    """Unpack a zip of ESPnet's into a directory; return its files by their names.

    Raises:
        UserError: when it is none.
    """
    # not through espnet_model_zoo: its cache serves a re-packed zip's old content
    try:
        return unpack(path, directory)
    except Exception as error:
        raise UserError(f"{path} is no packed model: {error}") from error


def files_of_asr(
    source: Union[str, Path], found: Mapping[str, str]
) -> tuple[Path, Path]:
    """Return the config and the checkpoint of an unpacked model.

    Raises:
        UserError: when `source` holds no model of speech recognition.
    """
    try:
        return Path(found["asr_train_config"]), Path(found["asr_model_file"])
    except KeyError:
        raise UserError(f"{source} holds no model of ESPnet's ASR") from None


def find_checkpoint(directory: Path) -> Path:
    """Return the averaged model of an experiment directory, else its best one.

    Raises:
        UserError: when there is none, or more than one to choose from.
    """
    for pattern in ("*.ave.pth", "*.best.pth"):
        found = sorted(directory.glob(pattern))
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(
                f"{directory} holds several models, name one of them: "
                + ", ".join(str(f) for f in found)
            )
    raise UserError(f"no trained model (*.ave.pth, *.best.pth) in {directory}")


def read_checkpoint(checkpoint: Union[str, Path]) -> dict[str, torch.Tensor]:
    """Return the state dict of a trained model.

    Raises:
        UserError: when there is no such file, or it holds something else.
    """
    try:
        states = safe_torch_load(checkpoint, map_location="cpu")
        if not all(isinstance(value, torch.Tensor) for value in states.values()):
            raise ValueError("it holds more than a model's weights")
        return states
    except FileNotFoundError:
        raise UserError(f"no checkpoint {checkpoint}") from None
    except Exception as error:
        raise UserError(
            f"{checkpoint} is no model of ESPnet ({error}): name an epoch's model or "
            "an average, such as valid.loss_ctc.ave.pth"
        ) from error


def encoder_states(states: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the encoder's part of a model's state dict."""
    prefix = "encoder."
    return {k[len(prefix) :]: v for k, v in states.items() if k.startswith(prefix)}


def profile_of(checkpoint: Union[str, Path]) -> Optional[Path]:
    """Return the depth profile that decoding with a checkpoint takes, if any."""
    return find_profile(checkpoint, encoder_states(read_checkpoint(checkpoint)))


def check_weights(
    model: torch.nn.Module,
    states: Mapping[str, torch.Tensor],
    checkpoint: Union[str, Path],
) -> None:
    """Refuse a checkpoint that left weights of `model` untouched, or has more layers.

    ESPnet loads with strict=False, so a checkpoint that fits nothing loads silently.

    Raises:
        UserError: naming the weights that the checkpoint, or the model, lacks.
    """
    known = set(model.state_dict())
    missing = sorted(known - set(states))
    if missing:
        raise UserError(
            f"{checkpoint} lacks {len(missing)} of the model's weights "
            f"({', '.join(missing[:3])} ...): it belongs to another config.yaml"
        )
    extra = sorted(name for name in set(states) - known if name.startswith("encoder."))
    if extra:
        raise UserError(
            f"{checkpoint} has {len(extra)} encoder weights that the config does not "
            f"know ({', '.join(extra[:3])} ...): it belongs to another config.yaml"
        )


@contextmanager
def without_espnets_news() -> Iterator[None]:
    """Build a model without what ESPnet logs each time: that it has no decoder."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _build(config, checkpoint) -> tuple[ESPnetASRModel, argparse.Namespace]:
    from dldkit.tasks.asr import DLDASRTask

    states = read_checkpoint(checkpoint)
    try:
        with without_espnets_news():
            model, train_args = DLDASRTask.build_model_from_file(config, checkpoint)
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not fit {config}: {error}") from error
    check_weights(model, states, checkpoint)
    return model.eval(), train_args
