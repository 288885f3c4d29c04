"""The state of the random number generators, kept while something is built."""

import random
from contextlib import contextmanager
from typing import Iterator

import numpy as np
import torch


@contextmanager
def untouched_random_numbers() -> Iterator[None]:
    """Undo what building a model draws: a resumed run builds it at another time."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=[]):  # models are built on the CPU
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
