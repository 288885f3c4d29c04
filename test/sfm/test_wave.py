import numpy as np
import pytest
import torch
from transformers import HubertConfig, HubertModel, Wav2Vec2FeatureExtractor

from dldkit.sfm.wave import (
    cnn_features,
    frame_lengths,
    frame_mask,
    hidden_states,
    normalize_speech,
)

NORMS = [dict(), dict(do_stable_layer_norm=True, feat_extract_norm="layer")]


def model_of(conf, **options) -> HubertModel:
    torch.manual_seed(0)
    return HubertModel(HubertConfig(**{**conf, **options})).eval()


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_speech_is_normalised_as_the_feature_extractor_does(waveforms):
    speech, lengths = waveforms
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor(
        [s[:n].numpy() for s, n in zip(speech, lengths)],
        sampling_rate=16000,
        padding=True,
        return_tensors="pt",
    ).input_values
    found = normalize_speech(speech, lengths)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, speech, atol=0.1)
    # what lies in the padding is not looked at, and silence stays finite
    speech[1, 6010:] = 7.0
    assert torch.equal(normalize_speech(speech, lengths), found)
    assert not normalize_speech(torch.zeros(1, 9), torch.tensor([9])).any()


def test_frame_mask():
    mask = frame_mask(torch.tensor([3, 0, 1]), 3)
    assert mask.tolist() == [[True] * 3, [False] * 3, [True, False, False]]


def test_frame_lengths_are_those_of_the_features(student_conf):
    model = model_of(student_conf)
    for samples in (400, 719, 720, 799, 800, 1039, 1040, 4000):
        features = cnn_features(model, torch.randn(1, samples))
        assert frame_lengths(model, torch.tensor([samples])).tolist() == [
            features.size(1)
        ]
        assert features.size(2) == 8


@torch.no_grad()
@pytest.mark.parametrize("norm", NORMS, ids=["base", "large"])
def test_padding_changes_no_valid_frame(norm, student_conf, waveforms):
    model, lengths = model_of(student_conf, **norm), torch.tensor([27, 18])
    features = cnn_features(model, waveforms[0])
    states = hidden_states(model, features, lengths)
    features[1, 18:] = 100.0
    again = hidden_states(model, features, lengths)
    alone = hidden_states(model, features[1:, :18], lengths[1:])
    assert len(states) == 5
    for a, b, c in zip(states, again, alone):
        assert torch.equal(a[0], b[0]) and torch.equal(a[1, :18], b[1, :18])
        assert torch.allclose(a[1, :18], c[0], atol=1e-5)


@torch.no_grad()
def test_spans_of_the_input_are_masked_in_training_alone(student_conf, waveforms):
    """Those that transformers' own forward masks."""
    options = dict(mask_time_prob=0.9, mask_time_length=2, mask_feature_prob=0.0)
    dropouts = ("hidden", "activation", "attention", "feat_proj")
    options.update({f"{name}_dropout": 0.0 for name in dropouts}, layerdrop=0.0)
    model = model_of(student_conf, **options)
    features, lengths = cnn_features(model, waveforms[0]), torch.tensor([27, 27])
    whole = hidden_states(model, features, lengths)
    np.random.seed(0)
    masked = hidden_states(model.train(), features, lengths)
    np.random.seed(0)
    theirs = model(waveforms[0]).last_hidden_state
    assert torch.allclose(masked[-1], theirs, atol=1e-5)
    assert not torch.allclose(masked[-1], whole[-1], atol=0.1)


def test_nothing_stays_attached_to_the_model(student_conf):
    model = model_of(student_conf)
    before = hooks(model)
    hidden_states(model, torch.randn(1, 9, 8), torch.tensor([9]))
    assert hooks(model) == before
    with pytest.raises(RuntimeError):
        hidden_states(model, torch.randn(1, 9, 5), torch.tensor([9]))
    model.encoder.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        hidden_states(model, torch.randn(1, 9, 8), torch.tensor([9]))
    assert hooks(model) == before
