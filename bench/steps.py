"""Training steps, their times when many kinds take turns, and what takes the time."""

import time
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from tabulate import tabulate

Key = TypeVar("Key", bound=Hashable)


def training_step(
    loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Run forward, backward, clipping and update, as ESPnet's trainer does."""
    loss().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 5.0)
    optimizer.step()
    optimizer.zero_grad()
    if parameters[0].is_cuda:
        torch.cuda.synchronize()


def times_in_turns(
    steps: Mapping[Key, Callable[[], None]], rounds: int
) -> dict[Key, list[float]]:
    """Return the seconds of each step in each round, after a round that warms up.

    All steps take turns within a round, so that a drift of the machine's speed hits
    neighbours alike. One thread on the CPU is timed by the time that it has computed,
    so that other processes on the machine count little.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_initialized()
    clock = time.thread_time if alone else time.perf_counter
    times: dict[Key, list[float]] = {key: [] for key in steps}
    for _ in range(rounds + 1):
        for key, step in steps.items():
            begin = clock()
            step()
            times[key].append(clock() - begin)
    return {key: of_rounds[1:] for key, of_rounds in times.items()}


def trace(steps: dict[str, Callable[[], None]], count: int = 10) -> str:
    """Return the table of the operations that take most of these steps' time."""
    on_gpu = torch.cuda.is_available()
    shares: dict[str, dict[str, float]] = {}
    for name, step in steps.items():
        with torch.profiler.profile() as profiler:
            step()
        times = {
            event.key: (
                event.self_device_time_total if on_gpu else event.self_cpu_time_total
            )
            for event in profiler.key_averages()
        }
        total = sum(times.values())
        shares[name] = {key: 100 * time / total for key, time in times.items()}
    keys = {key for of in shares.values() for key in of}
    ranked = sorted(keys, key=lambda k: -max(of.get(k, 0.0) for of in shares.values()))
    rows = [
        (key, *(f"{of.get(key, 0.0):.1f}" for of in shares.values()))
        for key in ranked[:count]
    ]
    return tabulate(rows, ["operation", *(f"{name}, %" for name in shares)], "github")
