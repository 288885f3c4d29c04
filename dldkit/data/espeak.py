"""Speech of espeak-ng, from the shared library in the package espeakng-loader."""

import ctypes
from math import gcd

import numpy as np
from scipy.signal import resample_poly

from dldkit.errors import UserError


class Espeak:
    """espeak-ng in this process.

    Its oscillators run on from one call to the next: the same calls in the same order
    make the same samples in a new process only. Voices with breath (the variants f2,
    f3, f5 ...) differ even then: their noise is different in every process.

    Raises:
        UserError: the package is not installed, or its library does not start.
    """

    RETRIEVAL, UTF8 = 2, 1
    RATE, PITCH = 1, 3

    def __init__(self):
        try:
            import espeakng_loader
        except ImportError:
            raise UserError(
                "synthesised speech needs espeak-ng: pip install espeakng-loader"
            )
        self.lib = ctypes.CDLL(espeakng_loader.get_library_path())
        data = espeakng_loader.get_data_path().encode()
        self.fs = self.lib.espeak_Initialize(self.RETRIEVAL, 0, data, 0)
        if self.fs <= 0:
            raise UserError(
                f"espeak-ng does not start with its data in {data.decode()}"
            )
        self.chunks: list[np.ndarray] = []
        samples = ctypes.POINTER(ctypes.c_short)
        callback = ctypes.CFUNCTYPE(
            ctypes.c_int, samples, ctypes.c_int, ctypes.c_void_p
        )
        self.callback = callback(self._collect)  # kept: C holds no reference to it
        self.lib.espeak_SetSynthCallback(self.callback)

    def _collect(self, samples, count, _events) -> int:
        if count > 0:
            self.chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    def __call__(
        self, text: str, voice: str, rate: int, pitch: int, fs: int
    ) -> np.ndarray:
        """Return `text` (Time,) in [-1, 1] at `fs` Hz, without silence at its ends.

        Args:
            voice: accent and variant, such as en-us+m3.
            rate: words per minute.
            pitch: 0 to 100.

        Raises:
            UserError: there is no such voice.
        """
        if self.lib.espeak_SetVoiceByName(voice.encode()) != 0:
            raise UserError(f"espeak-ng has no voice {voice}")
        self.lib.espeak_SetParameter(self.RATE, rate, 0)
        self.lib.espeak_SetParameter(self.PITCH, pitch, 0)
        self.chunks.clear()
        said = text.encode()
        self.lib.espeak_Synth(said, len(said) + 1, 0, 1, 0, self.UTF8, None, None)
        self.lib.espeak_Synchronize()
        signal = np.concatenate(self.chunks).astype(np.float32) / 32768
        loud = np.flatnonzero(np.abs(signal) > 0.005)
        common = gcd(self.fs, fs)
        signal = resample_poly(
            signal[loud[0] : loud[-1] + 1], fs // common, self.fs // common
        )
        return np.clip(signal, -1, 1)
