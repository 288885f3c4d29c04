"""What the families share that run a frozen model."""

import pytest
import torch
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from dldkit.errors import UserError
from dldkit.sfm.teacher.opening import open_teacher


def test_a_teacher_is_frozen(any_teacher, waveforms):
    teacher = open_teacher(any_teacher, [1, 3])
    before = {k: v.clone() for k, v in teacher.model.state_dict().items()}
    outputs, lengths = teacher(*waveforms)
    again, _ = teacher(*waveforms)
    assert all(torch.equal(a, b) for a, b in zip(outputs, again))
    assert not any(output.requires_grad for output in outputs)
    # as the target of a loss
    guess = torch.zeros_like(outputs[0], requires_grad=True)
    torch.nn.functional.mse_loss(guess, outputs[0]).backward()
    assert not any(module.training for module in teacher.model.modules())
    for name, parameter in teacher.model.named_parameters():
        assert not parameter.requires_grad and parameter.grad is None, name
    for name, values in teacher.model.state_dict().items():
        assert torch.equal(values, before[name]), name


def test_refuses_speech_of_no_frame(wave_teacher, whisper_teacher, waveforms):
    speech, lengths = waveforms
    for directory in (wave_teacher()[1], whisper_teacher(WhisperEncoder)[1]):
        teacher = open_teacher(directory, [1])
        lengths[1] = 319
        with pytest.raises(UserError, match="utterance b has 319 samples: too few"):
            teacher(speech, lengths, ["a", "b"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_follows_the_speech_to_the_gpu_in_half_precision(any_teacher, waveforms):
    teacher = open_teacher(any_teacher, [1, 3])
    expected, lengths = teacher(*waveforms)
    with torch.autocast("cuda", torch.bfloat16):
        outputs, output_lengths = teacher(waveforms[0].cuda(), waveforms[1])
    assert output_lengths.tolist() == lengths.tolist()
    for output, exact in zip(outputs, expected):
        assert output.is_cuda and output.dtype == torch.float32
        for i, n in enumerate(lengths.tolist()):
            difference = (output[i, :n].cpu() - exact[i, :n]).abs().max()
            assert 0 < difference < 0.1 * exact.abs().max()
