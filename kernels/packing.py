"""Sequences packed into one row, cut into chunks that never hold tokens of two of them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """The chunks of a packed row, in order, and after them some empty ones.

    How many there are depends on the sequences' lengths, which the host does not know without waiting for
    the device; so there are always T // C + N of them, enough for any lengths, and the spare ones hold none.
    """

    offsets: Tensor
    """`[N + 1]` int64: sequence n owns the chunks from offsets[n] to offsets[n + 1]."""
    sequence: Tensor
    """`[X]` int64: whose a chunk is; spare chunks are given to the last sequence."""
    start: Tensor
    """`[X]` int64: a chunk's first token."""
    stop: Tensor
    """`[X]` int64: one past its last token; equal to `start` in a spare chunk."""


def chunk_count(length: int, sequences: int, size: int) -> int:
    """X, how many chunks `chunk_table` makes."""
    return length // size + sequences


def chunk_table(cu_seqlens: Tensor, length: int, size: int) -> Chunks:
    """Cut packed sequences into chunks of `size` tokens, on the device that `cu_seqlens` is on.

    Args:
        cu_seqlens: `[N + 1]` int, where sequences begin and end; held to 0..T, so that no value of it can
            make a kernel leave its tensors.
        length: T.
        size: C.
    """
    borders = cu_seqlens.long().clamp(0, length)
    sequences = borders.shape[0] - 1
    counts = (borders[1:] - borders[:-1] + size - 1) // size
    offsets = torch.nn.functional.pad(counts.clamp_min(0).cumsum(0), (1, 0))
    index = torch.arange(chunk_count(length, sequences, size), device=borders.device)
    sequence = (torch.searchsorted(offsets, index, right=True) - 1).clamp_max(sequences - 1)
    end = borders[sequence + 1]
    start = torch.minimum(borders[sequence] + (index - offsets[sequence]) * size, end)
    return Chunks(offsets, sequence, start, torch.minimum(start + size, end))


def token_slots(cu_seqlens: Tensor, chunks: Chunks, length: int, size: int) -> Tensor:
    """Where among all chunks' slots each token of a packed row is, `[T]`."""
    borders = cu_seqlens.long()
    token = torch.arange(length, device=borders.device)
    sequence = (torch.searchsorted(borders, token, right=True) - 1).clamp(0, borders.shape[0] - 2)
    return chunks.offsets[sequence] * size + token - borders[sequence]
