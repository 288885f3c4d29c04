"""A tiny upstream, and what a finished task leaves."""

from pathlib import Path

import pytest
import torch
import yaml
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from dldkit.step import Step


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Path:
    """A tiny student as sfm_export writes it."""
    directory = tmp_path_factory.mktemp("hf")
    config = HubertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(8,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
    )
    torch.manual_seed(0)
    HubertModel(config).save_pretrained(directory)
    Wav2Vec2FeatureExtractor().save_pretrained(directory)
    return directory


@pytest.fixture
def finished():
    """Return a function that writes what a finished task leaves.

    `options` are the step's, `dev` are scores of the dev set.
    """

    def write(directory: Path, result: str, args=(), options={}, dev={}, **scores):
        path = directory / result
        path.parent.mkdir(parents=True)
        path.write_text(yaml.safe_dump(scores))
        stats = directory / "train" / "valid_best" / "training_stats.yaml"
        stats.parent.mkdir(parents=True)
        stats.write_text(yaml.safe_dump({"valid_best_metrics": dev}))
        settings = {"upstream": "x", "args": list(args), **options}
        with Step(directory, {}, keep=True, **settings):
            pass

    return write
