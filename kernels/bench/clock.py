"""Samples of how long work takes, in turns: every form once, then every form again.

So a minute in which the machine is slow hits all of them, and the medians remain comparable.
"""

import time
from collections.abc import Callable, Sequence
from typing import Protocol

import torch

from kernels.bench.cells import Cell

LEAST_ROUNDS = 3


class Bar(Protocol):
    """What is used of a progress bar."""

    def update(self, n: float = 1) -> bool | None:
        """So many more cells were visited."""


def sample(work: Callable[[], object], device: torch.device, most: int, least: float) -> list[float]:
    """Seconds of calls of `work`, one after the other.

    Args:
        most: calls.
        least: once they took so many seconds together, it is enough.
    """
    if device.type == "cuda":
        return _on_a_gpu(work, most, least)
    taken: list[float] = []
    while len(taken) < most and sum(taken) < least:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


def _on_a_gpu(work: Callable[[], object], most: int, least: float) -> list[float]:
    """By the GPU's own clock; one call beforehand, so that what is launched waits for what runs."""
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    count = max(1, min(most, int(least / max(time.perf_counter() - start, 1e-9))))
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for begin, end in events:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def in_turns(
    cells: Sequence[Cell],
    take: Callable[[Callable[[], object]], list[float]],
    rounds: int,
    seconds: float,
    bar: Bar,
    after: Callable[[], None],
) -> None:
    """Add samples to every cell that has work, in rounds over all of them.

    Args:
        take: gives samples of a work.
        seconds: no round begins that would end after so many, beyond `LEAST_ROUNDS`.
        after: called after each round.
    """
    start = time.perf_counter()
    for done in range(rounds):
        gone = time.perf_counter() - start
        if done >= LEAST_ROUNDS and gone * (done + 1) / done > seconds:
            bar.update((rounds - done) * len(cells))
            return
        for cell in cells:
            if cell.work is not None:
                cell.seconds += take(cell.work)
            bar.update(1)
        after()
