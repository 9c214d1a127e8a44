"""How much is measured: on each kind of device by default, and `--quick`."""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class Size:
    """One benchmark.

    Attributes:
        lengths: T of forward and forward_backward.
        tokens: of one call; the batch is tokens / T, at least 1, so that all lengths do the same work.
        widths: head dims.
        hidden: heads = hidden / head dim.
        longest: the longest T of softmax attention, whose work grows with its square.
        contexts: tokens before a decoded one.
        steps: samples of a decoded token.
        rounds: how often every form is visited, unless `seconds` have gone by before (three rounds at least).
        seconds: of timing whole sequences, for each head dim; a quarter of it for decoded tokens.
        copy: bytes of the copy that gives the memory bandwidth.
        matmul: rows of the square product that gives the rate of arithmetic.
    """

    lengths: tuple[int, ...]
    tokens: int
    widths: tuple[int, ...]
    hidden: int
    longest: int
    contexts: tuple[int, ...]
    steps: int
    rounds: int
    seconds: float
    dtype: torch.dtype
    copy: int
    matmul: int


def _powers(first: int, last: int) -> tuple[int, ...]:
    return tuple(2**n for n in range(first, last + 1))


CPU = Size(
    lengths=_powers(10, 15), tokens=2**15, widths=(64,), hidden=256, longest=2**14, contexts=_powers(10, 16),
    steps=200, rounds=7, seconds=200, dtype=torch.float32, copy=2**28, matmul=2048,
)  # fmt: skip
GPU = Size(
    lengths=_powers(10, 17), tokens=2**16, widths=(64, 128), hidden=2048, longest=2**17,
    contexts=_powers(10, 16), steps=200, rounds=5, seconds=240, dtype=torch.bfloat16, copy=2**31, matmul=8192,
)  # fmt: skip


def size_for(device: torch.device, quick: bool) -> Size:
    """The default size for a device; `quick` has fewer lengths and rounds and takes well under a minute."""
    size = CPU if device.type == "cpu" else GPU
    if not quick:
        return size
    lengths, contexts = (2**10, 2**12, size.tokens // 4), (2**10, size.contexts[-1])
    return replace(
        size, lengths=lengths, tokens=size.tokens // 4, widths=(64,), contexts=contexts, longest=2**12,
        steps=40, rounds=3, seconds=30,
    )  # fmt: skip
