"""Pretrained models of transformers, loaded with a check of their weights."""

import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Union

import torch
import transformers
from safetensors import SafetensorError
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from dldkit.errors import UserError

PathLike = Union[str, Path]


def load_pretrained(
    cls: type, path: PathLike, role: str, **options: Any
) -> torch.nn.Module:
    """Load a model in float32, and check that its weights arrived.

    Args:
        cls: of transformers, with `from_pretrained`.
        path: name on the Hub, or a directory.
        role: what the model is for, in messages: `teacher`.

    Raises:
        UserError: when it can not be loaded, or lacks weights.
    """
    try:
        model, loading = cls.from_pretrained(
            path, dtype=torch.float32, output_loading_info=True, **options
        )
    except (SafetensorError, UnpicklingError, EOFError) as error:
        raise UserError(
            f"the {role} {path} can not be loaded: its weights can not be read. The "
            "file may be truncated, or a pointer of Git LFS: download it again, or run "
            "`git lfs pull` there"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"the {role} {path} can not be loaded: {error}") from error
    missing = sorted(set(loading["missing_keys"]) - {"masked_spec_embed"})
    if missing:
        raise UserError(
            f"the {role} {path} lacks {len(missing)} of the weights of its config.json"
            f" ({', '.join(missing[:3])} ...)"
        )
    return model


def load_whisper_encoder(
    path: PathLike, role: str, config: transformers.WhisperConfig
) -> WhisperEncoder:
    """Load Whisper's encoder, which is the whole of a checkpoint or a part of it.

    Raises:
        UserError: as `load_pretrained`.
    """
    # AutoModel would quietly build a random WhisperModel around a lone encoder
    if config.architectures == ["WhisperEncoder"]:
        return load_pretrained(WhisperEncoder, path, role, config=config)
    model = load_pretrained(transformers.WhisperModel, path, role, config=config)
    return model.encoder


def expected_speech(path: PathLike) -> tuple[int, bool]:
    """Return the sampling rate of a model on waveforms, and whether it normalises them.

    That is whether it takes waveforms of zero mean and unit variance. Without a
    preprocessor config, the model's family says so: those whose CNN has layer norms do.
    """
    try:
        extractor = transformers.AutoFeatureExtractor.from_pretrained(path)
        return extractor.sampling_rate, bool(extractor.do_normalize)
    except (OSError, ValueError):
        config = transformers.AutoConfig.from_pretrained(path)
        norm = getattr(config, "feat_extract_norm", "layer")  # data2vec has no other
        kind = "normalised" if norm == "layer" else "raw"
        logging.warning(
            f"{path} has no preprocessor_config.json: takes {kind} 16 kHz, as models "
            f"with feat_extract_norm: {norm} do"
        )
        return 16000, norm == "layer"
