"""Small randomly initialised teachers, as their own libraries save them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from espnet2.utils.yaml_no_alias_safe_dump import yaml_no_alias_safe_dump

from dldkit.tasks.sfm import SFMDistillTask

SIZES: dict[str, Any] = dict(
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=2,
    intermediate_size=32,
    conv_dim=[8] * 7,
    num_conv_pos_embeddings=16,
    num_conv_pos_embedding_groups=2,
)
STABLE = dict(
    do_stable_layer_norm=True, feat_extract_norm="layer", feat_proj_layer_norm=True
)
FAMILIES = dict(
    hubert=(transformers.HubertModel, {}),
    hubert_stable=(transformers.HubertModel, STABLE),
    wavlm=(transformers.WavLMModel, {}),
    wavlm_stable=(transformers.WavLMModel, STABLE),
    wav2vec2=(transformers.Wav2Vec2Model, dict(add_adapter=True)),
    wav2vec2_stable=(transformers.Wav2Vec2Model, STABLE),
    unispeech_sat=(transformers.UniSpeechSatModel, {}),
    data2vec_audio=(transformers.Data2VecAudioModel, {}),
)


@pytest.fixture
def wave_teacher(tmp_path):
    """Return a function that saves a model of a family, and returns it and its path.

    "stable" ones normalise the waveform, as their published models do.
    """

    def saved(family: str = "hubert", seed: int = 0, cls=None, **options: Any):
        base, changes = FAMILIES[family]
        cls = cls or base
        torch.manual_seed(seed)
        config = cls.config_class(**{**SIZES, **changes, **options})
        model = cls(config).eval()
        directory = tmp_path / family
        model.save_pretrained(directory)
        stable = family.endswith("stable")
        extractor = transformers.Wav2Vec2FeatureExtractor(
            do_normalize=stable, return_attention_mask=stable
        )
        extractor.save_pretrained(directory)
        return model, directory

    return saved


@pytest.fixture
def whisper_teacher(tmp_path):
    """Return a function that saves a Whisper encoder, alone or in its model.

    It takes so many seconds of speech: a short window is fast, 30 s is the real one.
    """

    def saved(cls: type, seconds: int = 1) -> tuple[torch.nn.Module, Path]:
        torch.manual_seed(0)
        config = transformers.WhisperConfig(
            d_model=16,
            encoder_layers=3,
            encoder_attention_heads=2,
            encoder_ffn_dim=32,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=32,
            max_source_positions=50 * seconds,
            vocab_size=9,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=0,
            encoder_layerdrop=0.5,
            dropout=0.5,
        )
        model = cls(config).eval()
        model.save_pretrained(tmp_path / "whisper")
        extractor = transformers.WhisperFeatureExtractor(chunk_length=seconds)
        extractor.save_pretrained(tmp_path / "whisper")
        return model, tmp_path / "whisper"

    return saved


@pytest.fixture
def waveforms() -> tuple[torch.Tensor, torch.Tensor]:
    """Two utterances (Batch, Samples) of unequal lengths; zeros pad the second."""
    generator = torch.Generator().manual_seed(1)
    speech = 0.1 * torch.randn(2, 9000, generator=generator) + 0.05
    lengths = torch.tensor([9000, 6010])
    speech[1, 6010:] = 0
    return speech, lengths


@pytest.fixture
def student_conf() -> dict[str, Any]:
    """A small student, as a config describes it."""
    return {**SIZES, "hidden_size": 12, "num_hidden_layers": 4}


@pytest.fixture
def save_training(tmp_path):
    """Return a function that saves what a training leaves, whose teacher then goes."""

    def save(student_conf, teacher, **model_conf):
        parser = SFMDistillTask.get_parser()
        args = parser.parse_args(["--output_dir", str(tmp_path / "exp")])
        args.student_conf = student_conf
        args.model_conf = {"teacher": str(teacher), **model_conf}
        torch.manual_seed(1)
        model = SFMDistillTask.build_model(args).eval()
        checkpoint = tmp_path / "exp" / "valid.loss.ave.pth"
        checkpoint.parent.mkdir()
        torch.save(model.state_dict(), checkpoint)
        with open(checkpoint.parent / "config.yaml", "w") as file:
            yaml_no_alias_safe_dump(vars(args), file)
        shutil.rmtree(teacher)  # export does without it
        return checkpoint, model

    return save
