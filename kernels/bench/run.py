"""A benchmark from beginning to end: what is right is found, timed in turns, kept after each round."""

import logging
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from kernels.bench import clock, plot, record
from kernels.bench.cells import Cell, calls, probes, steps
from kernels.bench.machine import commit, device_name, versions
from kernels.bench.ops import window_linear_attention
from kernels.bench.ops.base import Op
from kernels.bench.ops.gated_delta_rule import DeltaRule, GatedDeltaRule
from kernels.bench.ops.infini_memory import InfiniMemory
from kernels.bench.ops.linear_attention import LinearAttention, UnnormalizedLinearAttention
from kernels.bench.ops.softmax_attention import SoftmaxAttention
from kernels.bench.size import Size
from kernels.dispatch import fla_refusal, triton_refusal

SHORT = 10
"""Samples of a decoded token at each turn."""
BAR = "{desc} {percentage:3.0f} %|{bar}| {elapsed}, {remaining} left"
LOG = logging.getLogger(__name__)


def ops_for(device: torch.device) -> list[Op]:
    """What is measured; forms that are there to compare Triton kernels with others', on a GPU only."""
    found: list[Op] = [LinearAttention(), GatedDeltaRule(), InfiniMemory()]
    if window_linear_attention.there():
        found.append(window_linear_attention.WindowLinearAttention())
    found.append(SoftmaxAttention())
    if device.type == "cuda":
        found += [UnnormalizedLinearAttention(), DeltaRule()]
    return found


def bench(size: Size, ops: Sequence[Op], device: torch.device, path: Path) -> list[record.Row]:
    """Measure, and keep the rows in the CSV `path` and its plot beside it.

    An interrupt leaves the rows that were measured.

    Returns:
        the rows.
    """
    LOG.info("%s, %s", device_name(device), versions())
    _say_who(device, size.dtype)
    place = record.Place(device_name(device), versions(), commit())
    kept: list[record.Row] = []
    done: list[record.Row] = []
    cells: list[Cell] = []

    def keep() -> None:
        kept[:] = done + record.rows(cells, place)
        if kept:
            record.write(path, kept)

    try:
        for width in size.widths:
            of_calls = partial(clock.sample, device=device, most=10, least=0.05)
            of_steps = partial(_steps, device=device)
            for kind, make, rounds, seconds, take in (
                ("sequences", calls, size.rounds, size.seconds, of_calls),
                ("one token", steps, -(-size.steps // SHORT), size.seconds / 4, of_steps),
            ):
                cells = probes(size, width, device)
                label = f"{kind}, head dim {width}"
                for cell in tqdm(make(size, ops, width, device), desc=f"{label}: is it right", unit="form"):
                    cells.append(cell)
                with tqdm(total=rounds * len(cells), desc=f"{label}: rounds", bar_format=BAR) as bar:
                    clock.in_turns(cells, take, rounds, seconds, bar, keep)
                done, cells = list(kept), []
    finally:
        keep()
        if kept:
            plot.draw(kept, path.with_suffix(".png"))
    return kept


def _steps(work: Callable[[], object], device: torch.device) -> list[float]:
    """Without the first sample of a turn, in which the processor's caches hold something else."""
    taken = clock.sample(work, device, SHORT + 1, 0.05)
    return taken[1:] or taken


def _say_who(device: torch.device, dtype: torch.dtype) -> None:
    """Who does not take part, and why."""
    fused = "Triton needs a GPU" if device.type == "cpu" else triton_refusal(device, dtype)
    for name, why in (("triton", fused), ("fla", fla_refusal("fla", "__name__", device))):
        if why is not None:
            LOG.info("without %s: %s", name, why)
