"""Hidden states in eight bits, with a scale for each dimension of each layer."""

import numpy as np


def pack(states: np.ndarray) -> np.ndarray:
    """Return int8 (Time + 2, Layers, Dim); the first two rows hold the scales' bytes.

    Args:
        states: floats (Time, Layers, Dim).
    """
    scale = (np.abs(states).max(0) / 127).clip(1e-6).astype(np.float16)
    packed = np.rint(states / scale.astype(np.float32)).clip(-127, 127)
    rows = scale[..., None].view(np.int8).transpose(2, 0, 1)
    return np.concatenate([rows, packed.astype(np.int8)])


def unpack(packed: np.ndarray) -> np.ndarray:
    """Return what `pack` was given, as float32 (Time, Layers, Dim).

    Args:
        packed: of `pack`, in any type of integers.
    """
    rows = np.ascontiguousarray(packed[:2].astype(np.int8).transpose(1, 2, 0))
    return packed[2:].astype(np.float32) * rows.view(np.float16)[..., 0]
