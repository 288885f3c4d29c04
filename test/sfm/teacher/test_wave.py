"""HuBERT and its like."""

import pytest
import safetensors.torch
import torch
import transformers
from hidden_states import LAYERS, assert_gives, truth

from dldkit.errors import UserError
from dldkit.sfm.teacher.opening import open_teacher, teacher_info
from dldkit.sfm.wave import cnn_features

FAMILIES = ["hubert", "wavlm", "wav2vec2"]
FAMILIES += [f"{family}_stable" for family in FAMILIES]
FAMILIES += ["unispeech_sat", "data2vec_audio"]
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n"


@pytest.mark.parametrize("family", FAMILIES)
def test_wave_models_agree_with_transformers(family, wave_teacher, waveforms):
    model, directory = wave_teacher(family)
    speech, lengths = waveforms
    for n, frames in ((2, [27, 18]), (1, [27])):  # with padding, and without
        states = truth(model, directory, speech[:n], lengths[:n])
        for layers in LAYERS:
            teacher = open_teacher(directory, layers)
            assert_gives(teacher, speech[:n], lengths[:n], states, frames, 5e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_above_the_deepest_are_deleted(family, wave_teacher, waveforms):
    _, directory = wave_teacher(family)
    teacher = open_teacher(directory, [1, 2])
    assert len(teacher.model.encoder.layers) == 2
    assert teacher.info.num_layers == 3


def test_shared_cnn_features_give_the_same(wave_teacher, waveforms):
    _, directory = wave_teacher()
    teacher = open_teacher(directory, [1, 3])
    outputs, _ = teacher(*waveforms)
    features = cnn_features(teacher.model, *waveforms)
    shared, _ = teacher(features, torch.tensor([27, 18]))
    assert all(torch.equal(a, b) for a, b in zip(outputs, shared))


def test_layer_drop_and_masking_are_off(wave_teacher, waveforms):
    masks = dict(mask_time_prob=0.9, mask_time_length=2, mask_feature_prob=0.9)
    options = dict(layerdrop=1.0, hidden_dropout=0.5, **masks)
    model, directory = wave_teacher("wavlm", **options)
    config = model.config
    config.mask_time_prob = config.mask_feature_prob = config.layerdrop = 0.0
    states = truth(model, directory, *waveforms)
    assert_gives(open_teacher(directory, [1, 3]), *waveforms, states, [27, 18])


def test_describes_normalisation_as_the_preprocessor_does(wave_teacher):
    _, directory = wave_teacher("hubert_stable")
    assert teacher_info(directory).normalize


@pytest.mark.parametrize("family", ["hubert", "hubert_stable", "data2vec_audio"])
def test_normalises_as_its_family_without_a_preprocessor_config(
    family, wave_teacher, caplog
):
    """Those whose CNN has layer norms take normalised speech."""
    _, directory = wave_teacher(family)
    (directory / "preprocessor_config.json").unlink()
    assert teacher_info(directory).normalize == (family != "hubert")
    assert "has no preprocessor_config.json: takes" in caplog.text


def test_half_precision_on_disk_is_computed_in_float32(wave_teacher, waveforms):
    model, directory = wave_teacher()
    model.half().save_pretrained(directory)
    states = truth(model.float(), directory, *waveforms)
    assert_gives(open_teacher(directory, [2, 3]), *waveforms, states, [27, 18])


@pytest.mark.parametrize(
    "cls", [transformers.HubertForCTC, transformers.HubertForSequenceClassification]
)
def test_fine_tuned_models_are_teachers_too(cls, wave_teacher, waveforms):
    model, directory = wave_teacher("hubert", cls=cls, vocab_size=7)
    states = truth(model.hubert, directory, *waveforms)
    assert_gives(open_teacher(directory, [2, 3]), *waveforms, states, [27, 18])


def without(directory, *words):
    """Take weights away whose name contains one of the words."""
    file = directory / "model.safetensors"
    states = safetensors.torch.load_file(file)
    kept = {k: v for k, v in states.items() if not any(word in k for word in words)}
    assert len(kept) < len(states)
    safetensors.torch.save_file(kept, file, {"format": "pt"})


def test_the_mask_embedding_may_be_missing(wave_teacher, waveforms):
    _, directory = wave_teacher("hubert", mask_time_prob=0.5)
    (expected,), _ = open_teacher(directory, [3])(*waveforms)
    without(directory, "masked_spec_embed")
    (output,), _ = open_teacher(directory, [3])(*waveforms)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("word", ["layers.2.attention.k_proj.weight", "pos_conv_embed"])
def test_refuses_missing_weights(word, wave_teacher):
    _, directory = wave_teacher()
    without(directory, word)
    with pytest.raises(UserError, match=f"lacks .* weights .*{word}"):
        open_teacher(directory, [1])


def test_refuses_weights_of_another_shape(wave_teacher):
    _, directory = wave_teacher()
    config = directory / "config.json"
    old = '"intermediate_size": 32'
    assert old in config.read_text()
    config.write_text(config.read_text().replace(old, '"intermediate_size": 48'))
    with pytest.raises(UserError, match="can not be loaded"):
        open_teacher(directory, [1])


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("content", [LFS_POINTER, b""], ids=["pointer", "empty"])
def test_refuses_a_file_without_the_weights(file, content, wave_teacher):
    _, directory = wave_teacher()
    (directory / "model.safetensors").unlink()
    (directory / file).write_bytes(content)
    with pytest.raises(UserError, match="weights can not be read.*`git lfs pull`"):
        open_teacher(directory, [1])


def test_refuses_truncated_weights(wave_teacher):
    _, directory = wave_teacher()
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="weights can not be read.*truncated"):
        open_teacher(directory, [1])


def test_refuses_other_models(tmp_path):
    transformers.BertConfig().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="is a bert model: choose one of hubert, wavlm"):
        teacher_info(tmp_path)
