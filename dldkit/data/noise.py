"""Rooms and babble that spoil clean speech, made of nothing but random numbers and it.

Both are simulated: there is no recorded noise that every user may download.
"""

import numpy as np
from scipy.signal import fftconvolve

RT60 = (0.2, 0.6)  # seconds that a room takes to fade by 60 dB
TALKERS = (2, 4)  # fewest and most speakers of the babble
DIRECT = 0.002  # seconds before the first reflection
PAUSE = 0.2  # longest pause of a talker, in seconds


def room(rng: np.random.Generator, fs: int) -> np.ndarray:
    """Draw an impulse response: Polack's model, noise that decays exponentially.

    The reflections have the energy of the direct sound, or up to 6 dB less.
    """
    rt60 = rng.uniform(*RT60)
    time = np.arange(int(fs * rt60)) / fs
    response = rng.standard_normal(len(time)) * 10 ** (-3 * time / rt60)
    response[time < DIRECT] = 0.0
    response /= np.sqrt((response**2).sum()) * 10 ** (rng.uniform(0, 6) / 20)
    response[0] = 1.0
    return response


def babble(
    length: int, recordings: list[np.ndarray], rng: np.random.Generator, fs: int
) -> np.ndarray:
    """Let some talkers say random `recordings` all the time; (length,)."""
    mixed = np.zeros(length, np.float32)
    for _ in range(rng.integers(TALKERS[0], TALKERS[1] + 1)):
        start = -int(rng.integers(fs))
        while start < length:
            said = recordings[rng.integers(len(recordings))]
            said = said / (np.abs(said).max() + 1e-6)
            first, last = max(start, 0), min(start + len(said), length)
            if first < last:
                mixed[first:last] += said[first - start : last - start]
            start += len(said) + int(rng.integers(fs * PAUSE))
    return mixed


def spoil(
    signal: np.ndarray,
    others: list[np.ndarray],
    snr: float,
    rng: np.random.Generator,
    fs: int,
) -> np.ndarray:
    """Return `signal` (Time,) in a room, with babble of `others` in the same room.

    Args:
        others: recordings of other speakers.
        snr: energy of the reverberant signal to that of the babble, in dB.
    """
    noise = babble(len(signal), others, rng, fs)
    signal = fftconvolve(signal, room(rng, fs))[: len(signal)]
    noise = fftconvolve(noise, room(rng, fs))[: len(signal)]
    gain = np.sqrt((signal**2).mean() / (noise**2).mean()) * 10 ** (-snr / 20)
    mixed = signal + gain * noise
    return (0.5 * mixed / np.abs(mixed).max()).astype(np.float32)
