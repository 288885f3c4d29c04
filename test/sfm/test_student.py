import numpy as np
import pytest
import torch
from transformers import HubertConfig, HubertModel

from dldkit.depth.sampler import DepthSampler
from dldkit.errors import UserError
from dldkit.sfm.student import build_student
from dldkit.sfm.wave import cnn_features, frame_lengths, frame_mask, hidden_states

NO_MASKS = dict(layerdrop=0.0, mask_time_prob=0.0, mask_feature_prob=0.0)
NORMS = [
    dict(),
    dict(
        do_stable_layer_norm=True, feat_extract_norm="layer", feat_proj_layer_norm=True
    ),
]


@pytest.fixture(params=NORMS, ids=["base", "large"])
def conf(request, student_conf):
    """Of models whose LayerNorms follow (base) or precede (large) their blocks."""
    return {**student_conf, **request.param}


def build(conf, sampler=None):
    torch.manual_seed(0)
    student = build_student(conf, sampler or DepthSampler("full")).eval()
    with torch.no_grad():
        for weight in student.parameters():  # no bias zero, no norm one
            weight.add_(0.1 * torch.randn_like(weight))
    return student


def plain(student, conf, layers) -> HubertModel:
    """transformers' own model of some layers of a student."""
    model = HubertModel(
        HubertConfig(**{**conf, **NO_MASKS, "num_hidden_layers": len(layers)})
    )
    states = student.state_dict()
    for slot, source in enumerate(layers):
        for key in [key for key in states if f".layers.{source}." in key]:
            states[key.replace(f".{source}.", f".{slot}.", 1)] = states[key]
    states = {key: states[key] for key in model.state_dict()}
    model.load_state_dict(states)
    return model.eval()


@torch.no_grad()
def truth(model, speech, lengths=None):
    """Hidden states as transformers gives them, and the output."""
    mask = None if lengths is None else frame_mask(lengths, speech.size(1)).long()
    output = model(speech, attention_mask=mask, output_hidden_states=True)
    # the last of hidden_states lacks the final LayerNorm of large models
    return [*output.hidden_states[:-1], output.last_hidden_state]


@torch.no_grad()
def states_of(student, speech, lengths):
    frames = frame_lengths(student, lengths)
    return hidden_states(student, cnn_features(student, speech), frames), frames


def assert_same(states, expected, frames):
    assert len(states) == len(expected)
    for layer, (a, b) in enumerate(zip(states, expected)):
        for i, n in enumerate(frames.tolist()):
            assert torch.allclose(a[i, :n], b[i, :n], atol=1e-5), layer


def test_the_papers_student_has_26_87_million_parameters():
    student = build_student(
        dict(
            num_hidden_layers=12,
            hidden_size=384,
            intermediate_size=1536,
            num_attention_heads=8,
        ),
        DepthSampler("full"),
    )
    assert sum(weight.numel() for weight in student.parameters()) == 26_872_960
    states = student.state_dict()
    assert sum(value.numel() for value in states.values()) == 26_872_960
    cnn = [v.numel() for k, v in states.items() if k.startswith("feature_extractor.")]
    # 1 convolution of 10, 4 of 3, 2 of 2 taps, 512 channels, and a GroupNorm
    assert sum(cnn) == 512 * 10 + (4 * 3 + 2 * 2) * 512**2 + 2 * 512


def test_state_dict_keys_are_those_of_transformers(conf):
    student = build(conf, DepthSampler("bernoulli"))
    student.encoder.layers.select([1, 3])
    theirs = HubertModel(HubertConfig(**{**conf, **NO_MASKS})).state_dict()
    assert list(student.state_dict()) == list(theirs)
    assert type(student) is HubertModel


@pytest.mark.parametrize("layers", [[0, 1, 2, 3], [0, 2], [1, 2, 3], [3]])
def test_hidden_states_are_those_of_a_plain_hubert(conf, layers, waveforms):
    """Of the layers that run, with padding and without."""
    speech, lengths = waveforms
    student = build(conf)
    student.encoder.layers.select(layers)
    model = plain(student, conf, layers)
    states, frames = states_of(student, speech, lengths)
    assert frames.tolist() == [27, 18]
    assert_same(states, truth(model, speech, lengths), frames)
    one = speech[1:, :6010]
    states, frames = states_of(student, one, lengths[1:])
    assert_same(states, truth(model, one), frames)


def test_transformers_own_forward_runs_the_same_layers(conf, waveforms):
    student = build(conf)
    student.encoder.layers.select([0, 2])
    with torch.no_grad():
        output = student(waveforms[0]).last_hidden_state
        expected = plain(student, conf, [0, 2])(waveforms[0]).last_hidden_state
    assert torch.allclose(output, expected, atol=1e-6)


def test_a_slot_that_is_off_is_not_called(student_conf):
    student, called = build(student_conf), []
    for slot, layer in enumerate(student.encoder.layers.children()):
        layer.register_forward_hook(lambda *_, slot=slot: called.append(slot))
    student.encoder.layers.select([1, 3])
    states_of(student, torch.randn(1, 2000), torch.tensor([2000]))
    assert called == [1, 3]


def test_a_thin_cnn(student_conf, waveforms):
    dims = [4, 4, 6, 6, 8, 8, 10]
    student = build({**student_conf, "conv_dim": dims})
    states, frames = states_of(student, *waveforms)
    assert frames.tolist() == [27, 18] and states[-1].shape == (2, 27, 12)
    found = [layer.conv.out_channels for layer in student.feature_extractor.conv_layers]
    assert found == dims
    assert student.feature_projection.projection.in_features == 10


def test_does_without_the_masking_machinery(student_conf):
    student = build(student_conf)
    assert not any("masked_spec_embed" in key for key in student.state_dict())
    for key, value in NO_MASKS.items():
        assert getattr(student.config, key) == value, key


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(hiden_size=8, num_layers=3), "has no hiden_size, num_layers"),
        (dict(layerdrop=0.1), "layerdrop can not be set: .*depth_sampler"),
        (dict(mask_feature_prob=0.1), "mask_feature_prob can not .*mask_time_prob"),
        (dict(hidden_size=10, num_attention_heads=3), "student_conf: "),
        (dict(conv_dim=[8] * 6), "student_conf: "),
        (dict(conv_kernel=[10, 3]), "student_conf: "),
        (dict(hidden_size="broad"), "student_conf: "),
        (dict(hidden_act="no such"), "student_conf: "),
        (dict(feat_extract_norm="batch"), "student_conf: "),
        (dict(num_conv_pos_embedding_groups=5), "student_conf: "),
        (dict(num_attention_heads=0), "student_conf: "),
        (dict(num_hidden_layers=0), "0 layers"),
    ],
    ids=str,
)
def test_refuses_what_is_no_student(student_conf, wrong, message):
    with pytest.raises(UserError, match=message):
        build_student({**student_conf, **wrong}, DepthSampler("full"))


def states_and_masks(student, speech, lengths):
    """Return hidden states, frames, and which of them entered as the mask embedding."""
    before, after = [], []
    handles = [
        student.feature_projection.register_forward_hook(
            lambda *a: before.append(a[2].clone())
        ),
        student.encoder.register_forward_pre_hook(
            lambda _, a: after.append(a[0].clone())
        ),
    ]
    states, frames = states_of(student, speech, lengths)
    for handle in handles:
        handle.remove()
    masked = (after[0] == student.masked_spec_embed).all(-1)
    assert torch.equal(after[0][~masked], before[0][~masked])
    return states, frames, masked


def test_the_input_is_masked_in_training_only(conf, waveforms):
    """Given the same spans, transformers' own forward gives the same output."""
    dropouts = "hidden attention activation feat_proj".split()
    conf = {**conf, **{f"{name}_dropout": 0.0 for name in dropouts}}
    masks = dict(mask_time_prob=0.5, mask_time_length=4)
    student, plain_student = build({**conf, **masks}), build(conf)
    missing = student.load_state_dict(plain_student.state_dict(), strict=False)
    assert missing.missing_keys == ["masked_spec_embed"]
    expected, frames = states_of(plain_student, *waveforms)
    states, _, masked = states_and_masks(student, *waveforms)  # of validation
    assert not masked.any()
    assert all(torch.equal(a, b) for a, b in zip(states, expected))

    off = build({**conf, **masks, "apply_spec_augment": False}).train()
    assert not states_and_masks(off, *waveforms)[2].any()

    np.random.seed(0)
    states, _, masked = states_and_masks(student.train(), *waveforms)
    again = states_and_masks(student, *waveforms)[2]
    assert not torch.equal(masked, again)
    for rows in masked, again:
        assert rows[0].any() and rows[1].any() and not rows[1, frames[1] :].any()
        assert not rows.all(1).any()
    assert not torch.allclose(states[0], expected[0], atol=1e-3)
    model = HubertModel(HubertConfig(**{**conf, **NO_MASKS, **masks})).eval()
    model.load_state_dict(student.state_dict())
    mask = frame_mask(waveforms[1], waveforms[0].size(1)).long()
    with torch.no_grad():
        truth = model(waveforms[0], mask, mask_time_indices=masked).last_hidden_state
    for i, n in enumerate(frames.tolist()):
        assert torch.allclose(states[-1][i, :n], truth[i, :n], atol=1e-5)


def test_speech_that_is_shorter_than_a_span_is_not_masked(student_conf):
    masks = dict(mask_time_prob=0.5, mask_time_length=10)
    student = build({**student_conf, **masks}).train()
    speech = torch.randn(1, 2000)  # 6 frames
    assert not states_and_masks(student, speech, torch.tensor([2000]))[2].any()


def test_zero_is_no_wish_to_drop_layers(student_conf):
    build_student({**student_conf, **NO_MASKS}, DepthSampler("full"))
