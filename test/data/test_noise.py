"""Rooms and babble."""

import numpy as np
import pytest

from dldkit.data.noise import spoil


def test_babble_has_the_level_that_was_asked_for():
    """With a talker who says silence but for noise, in a room without reflections."""
    rng = np.random.default_rng(0)
    tone = np.sin(np.arange(16000) / 5).astype(np.float32)
    others = [rng.standard_normal(4000).astype(np.float32)]
    for snr in (20.0, 0.0):
        mixed = spoil(tone, others, snr, np.random.default_rng(1), 8000)
        # a tone stays one in any room: what is left after fitting it is babble
        waves = np.exp(1j * np.arange(16000) / 5)[:, None].view(float)
        late = slice(6000, None)  # after the room's response
        fit = np.linalg.lstsq(waves[late], mixed[late], rcond=None)[0]
        heard = waves[late] @ fit
        rest = mixed[late] - heard
        found = 10 * np.log10((heard**2).mean() / (rest**2).mean())
        assert found == pytest.approx(snr, abs=1.5)
