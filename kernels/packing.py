"""Sequences packed into one row, cut into chunks or laid into rows that never hold tokens of two of them."""

from collections.abc import Sequence
from itertools import groupby, pairwise
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


class Rows(NamedTuple):
    """Each sequence laid into a row of its own, rows of like length side by side in one batch.

    Lengths of one batch have as many binary digits, so that more than half of its slots hold a token: all
    batches together are smaller than 2 T, however long the longest sequence is. Only their shapes have to be
    known to the host; nothing is copied to the device.
    """

    shapes: list[tuple[int, int]]
    """Rows and slots of each batch, the shortest first."""
    order: Tensor
    """`[N]` int64: whose the rows are, batch after batch."""
    rank: Tensor
    """`[N]` int64: the row of each sequence."""
    slots: Tensor
    """`[T]` int64: where among all batches' slots each token is."""
    place: Tensor
    """`[T]` int64: how many tokens of its own sequence are before each token."""
    lengths: Tensor
    """`[T]` int64: how long each token's sequence is."""

    @classmethod
    def of(cls, cu_seqlens: Tensor, borders: Sequence[int] | None, length: int) -> "Rows":
        """The layout of T tokens.

        Args:
            cu_seqlens: `[N + 1]` int, where sequences begin and end; held to 0..T.
            borders: its values, or None where they cannot be read; every row has T slots then.
            length: T.
        """
        edges = cu_seqlens.long().clamp(0, length)
        sizes = edges.diff()
        shapes = [(sizes.shape[0], length)]
        if borders is not None:
            known = sorted(stop - start for start, stop in pairwise(borders))
            shapes = [(len(own), own[-1]) for own in (list(g) for _, g in groupby(known, int.bit_length))]
        order = sizes.argsort(stable=True)
        rank = order.argsort()
        first, starts = 0, []
        for rows, slots in shapes:
            starts.append(first + torch.arange(rows, device=edges.device) * slots)
            first += rows * slots
        token = torch.arange(length, device=edges.device)
        sequence = (torch.searchsorted(edges, token, right=True) - 1).clamp(0, sizes.shape[0] - 1)
        place = token - edges[sequence]
        slot = (torch.cat(starts)[rank[sequence]] + place).clamp(0, first - 1)
        return cls(shapes, order, rank, slot, place, sizes[sequence])

    def lay(self, x: Tensor) -> list[Tensor]:
        """`[1, T, ...]` -> the batches, `[rows, slots, ...]` each, 0 (False) where no token is."""
        counts = [rows * slots for rows, slots in self.shapes]
        flat = x.new_zeros(sum(counts), *x.shape[2:]).index_copy(0, self.slots, x[0])
        return [
            batch.unflatten(0, shape) for batch, shape in zip(flat.split(counts), self.shapes, strict=True)
        ]

    def tokens(self, batches: Sequence[Tensor]) -> Tensor:
        """What `lay` made of it, `[1, T, ...]`."""
        return torch.cat([batch.flatten(0, 1) for batch in batches]).index_select(0, self.slots).unsqueeze(0)

    def split(self, x: Tensor) -> Sequence[Tensor]:
        """One entry a sequence, `[N, ...]` -> `[rows, ...]` of each batch."""
        return x.index_select(0, self.order).split([rows for rows, _ in self.shapes])

    def join(self, batches: Sequence[Tensor]) -> Tensor:
        """What `split` made of it, `[N, ...]`."""
        return torch.cat(list(batches)).index_select(0, self.rank)
