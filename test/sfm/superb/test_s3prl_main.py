"""What s3prl needs, and newer packages do not have."""

import shutil

import numpy as np
import pytest
import soundfile
import torch

from dldkit.sfm.superb.s3prl_main import apply_effects_tensor, audio_info


def test_audio_info_counts_frames(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(1234), 8000)
    info = audio_info(tmp_path / "a.wav")
    assert (info.num_frames, info.sample_rate) == (1234, 8000)


def test_gain_is_in_decibels():
    speech = torch.tensor([[0.5, -0.25, 0.0]])
    effects = [["channels", "1"], ["rate", "16000"], ["gain", "-6.020599913"]]
    quieter, rate = apply_effects_tensor(speech, 16000, effects)
    assert rate == 16000
    torch.testing.assert_close(quieter, speech / 2)


@pytest.mark.skipif(not shutil.which("sox"), reason="needs the program sox")
def test_silence_is_cut_and_speech_kept():
    time = torch.arange(16000) / 16000
    tone = 0.5 * torch.sin(2 * torch.pi * 300 * time)
    speech = torch.cat([torch.zeros(16000), tone, torch.zeros(32000), tone])[None]
    effects = [["silence", "1", "0.1", "0.1%", "-1", "0.1", "0.1%"]]
    kept, _ = apply_effects_tensor(speech, 16000, effects)
    assert kept.dtype == torch.float32
    assert kept.shape[0] == 1 and abs(kept.shape[1] - 2 * 16000) < 0.25 * 16000
    assert kept.square().sum() == pytest.approx(float(speech.square().sum()), rel=0.02)
