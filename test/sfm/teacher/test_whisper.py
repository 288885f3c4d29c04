"""Whisper's encoder."""

import os
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from hidden_states import LAYERS, assert_gives
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from dldkit.errors import UserError
from dldkit.sfm.teacher.opening import open_teacher, teacher_info


@pytest.mark.parametrize(
    "cls", [WhisperEncoder, transformers.WhisperForConditionalGeneration]
)
def test_whisper_agrees_with_transformers(cls, whisper_teacher, waveforms):
    model, directory = whisper_teacher(cls)
    encoder = model if cls is WhisperEncoder else model.model.encoder
    speech, lengths = waveforms
    extractor = transformers.WhisperFeatureExtractor.from_pretrained(directory)
    mel = extractor(
        [s[:n].numpy() for s, n in zip(speech, lengths)],
        sampling_rate=16000,
        return_tensors="pt",
    )
    states = []
    for layer in encoder.layers:
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0]))
    with torch.no_grad():
        states.append(encoder(**mel).last_hidden_state)
    for layers in LAYERS:
        teacher = open_teacher(directory, layers)
        assert_gives(teacher, speech, lengths, states, [28, 18])
        assert len(teacher.model.layers) == max(1, *layers)


def test_whisper_needs_no_preprocessor_config(whisper_teacher, waveforms):
    _, directory = whisper_teacher(WhisperEncoder, seconds=30)
    (expected,), _ = open_teacher(directory, [3])(*waveforms)
    (directory / "preprocessor_config.json").unlink()
    (output,), _ = open_teacher(directory, [3])(*waveforms)
    assert torch.equal(output, expected)


def test_whisper_does_not_hear_what_lies_in_the_padding(whisper_teacher, waveforms):
    teacher = open_teacher(whisper_teacher(WhisperEncoder)[1], [3])
    (expected,), _ = teacher(*waveforms)
    speech = waveforms[0].clone()
    speech[1, 6010:] = 1.0
    assert torch.equal(teacher(speech, waveforms[1])[0][0][1, :18], expected[1, :18])


@pytest.mark.skipif("TEACHER" not in os.environ, reason="needs Whisper's weights")
def test_pretrained_whisper(waveforms):
    path = os.environ["TEACHER"]
    stored = safetensors.torch.load_file(Path(path) / "model.safetensors")
    info = teacher_info(path)
    teacher = open_teacher(path, [2, info.num_layers])
    loaded = teacher.model.state_dict()
    assert all(torch.equal(loaded[k], v.float()) for k, v in stored.items())
    (middle, last), lengths = teacher(*waveforms)
    assert lengths.tolist() == [28, 18]
    assert middle.shape == last.shape == (2, 28, info.hidden_size)
    # what the batch holds besides makes no difference
    (alone, _), _ = teacher(waveforms[0][1:, :6010], waveforms[1][1:])
    assert torch.allclose(alone[0], middle[1, :18], atol=1e-4)


def test_refuses_a_whisper_encoder_that_claims_to_be_the_model(whisper_teacher):
    _, directory = whisper_teacher(WhisperEncoder)
    config = directory / "config.json"
    config.write_text(config.read_text().replace("WhisperEncoder", "WhisperModel"))
    with pytest.raises(UserError, match="lacks .* of the weights"):
        open_teacher(directory, [1])


def test_whisper_refuses_more_than_30_seconds(whisper_teacher):
    teacher = open_teacher(whisper_teacher(WhisperEncoder, seconds=30)[1], [1])
    speech, lengths = torch.zeros(2, 480001), torch.tensor([480000, 480001])
    with pytest.raises(UserError, match="utterance b has 480001 .*lower max_seconds"):
        teacher(speech, lengths, ["a", "b"])
    (output,), frames = teacher(speech[:1], lengths[:1])
    assert frames.tolist() == [1500] and output.size(1) == 1500
