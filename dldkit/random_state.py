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


@contextmanager
def repeated_draws(module: torch.nn.Module) -> Iterator[None]:
    """Let each forward of `module` draw the random numbers of its first one."""
    first, others = [], []

    def begin(*_) -> None:
        others.append(_states())
        if first:
            _set_states(first[0])
        else:
            first.append(others[-1])

    def end(*_) -> None:
        state = others.pop()
        if first[0] is not state:
            _set_states(state)

    handles = (
        module.register_forward_pre_hook(begin),
        module.register_forward_hook(end),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _states() -> tuple:
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return torch.get_rng_state(), cuda, np.random.get_state()


def _set_states(states: tuple) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1])
    np.random.set_state(states[2])
