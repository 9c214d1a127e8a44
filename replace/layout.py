"""From rows with pads, packed documents and a cache to block-aligned sequences, and back.

Every attention variant sees one shape only: sequences of real tokens that start at a multiple of the block
size, with `lookback` blocks before the first new one. Pads, packing and continued forwards are settled here,
once.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Layout:
    """Where each token goes: N new blocks of S tokens behind L blocks of lookback, in Q sequences.

    A sequence is one document of a row.

    Attributes:
        block, lookback, blocks, tokens: S, L, N and T.
        start: `[Q]` int64, position of slot 0, the lookback's first, in each sequence; negative before the
            beginning.
        length: `[Q]` int64, real tokens of each sequence, those before this call included.
        before: `[Q]` int64, real tokens before this call.
        row: `[Q]` the batch row of each sequence, or None where every row is one sequence.
        source: `[Q, N * S]` token index of each new slot, or None where token t is slot t.
        target: `[B, T]` flat slot index of each token in `[Q, N * S]`, or None likewise; -1 for pads.
        last: `[B]` the sequence whose state a row ends with, or None.
    """

    block: int
    lookback: int
    blocks: int
    tokens: int
    start: Tensor
    length: Tensor
    before: Tensor
    row: Tensor | None = None
    source: Tensor | None = None
    target: Tensor | None = None
    last: Tensor | None = None

    def new(self, x: Tensor) -> Tensor:
        """Tokens to new slots: `[B, X, T, ...]` -> `[Q, X, N * S, ...]`; slots without a token are 0."""
        slots = self.blocks * self.block
        if self.source is None:
            pad = [0, 0] * (x.ndim - 3) + [0, slots - x.shape[2]]
            return torch.nn.functional.pad(x, pad) if slots > x.shape[2] else x
        index = self.source.clamp_min(0).view(-1, 1, slots, *[1] * (x.ndim - 3))
        taken = x if self.row is None else x[self.row]
        taken = taken.gather(2, index.expand(-1, x.shape[1], -1, *x.shape[3:]))
        return torch.where(
            self.source.view(index.shape) >= 0, taken, torch.zeros((), dtype=x.dtype, device=x.device)
        )

    def back(self, y: Tensor) -> Tensor:
        """New slots to tokens: `[Q, X, N * S, D]` -> `[B, X, T, D]`; pads are 0."""
        if self.target is None:
            return y[:, :, : self.tokens]
        flat = y.transpose(1, 2).flatten(0, 1)  # [Q * N * S, X, D]
        out = flat[self.target.clamp_min(0)]
        return torch.where((self.target >= 0)[..., None, None], out, 0).transpose(1, 2)

    def positions(self) -> Tensor:
        """`[Q, (L + N) * S]` int64: the position of each slot, negative before the beginning."""
        return self.start.unsqueeze(1) + torch.arange(
            (self.lookback + self.blocks) * self.block, device=self.start.device
        )

    def evicted(self) -> Tensor:
        """`[Q]`: how many blocks leave the exact part for good by the end of this call."""
        return self.length // self.block - self.before // self.block


def plain_layout(batch: int, tokens: int, block: int, lookback: int, device: torch.device) -> Layout:
    """Rows without pads, documents or past: token t of a row is slot t."""
    full = torch.full((batch,), tokens, device=device)
    return Layout(block, lookback, -(-tokens // block), tokens, full * 0 - lookback * block, full, full * 0)


def decode_layout(real: Tensor | None, before: Tensor, block: int, lookback: int) -> Layout:
    """One more token for each row: shapes that never change and no look at the data, as a compiler needs it.

    Args:
        real: `[B, 1]` bool, False for pads, or None.
        before: `[B]` real tokens of each row that the cache already holds.
    """
    batch, phase = before.shape[0], before % block
    row = torch.arange(batch, device=before.device)
    new = torch.ones_like(phase, dtype=torch.bool) if real is None else real[:, 0]
    here = torch.arange(block, device=before.device) == phase.unsqueeze(1)
    return Layout(
        *(block, lookback, 1, 1),
        start=(before // block - lookback) * block,
        length=before + new.long(),
        before=before,
        source=torch.where(here & new.unsqueeze(1), 0, -1),
        target=torch.where(new, row * block + phase, -1).unsqueeze(1),
    )


def general_layout(
    real: Tensor, document: Tensor | None, before: Tensor | None, block: int, lookback: int
) -> Layout:
    """Rows with pads, documents or a past.

    Args:
        real: `[B, T]` bool, False for pads.
        document: `[B, T]` int64, 0, 1, ... along a row, or None for one document a row.
        before: `[B]` real tokens of each row that the cache already holds, or None.
    """
    batch, tokens = real.shape
    device = real.device
    before = torch.zeros(batch, dtype=torch.long, device=device) if before is None else before
    document = torch.zeros_like(real, dtype=torch.long) if document is None else document
    per_row = document.masked_fill(~real, 0).amax(1) + 1
    first = per_row.cumsum(0) - per_row
    sequences = int(per_row.sum())
    row = torch.repeat_interleave(torch.arange(batch, device=device), per_row)
    held = torch.zeros(sequences, dtype=torch.long, device=device)
    held[first] = before
    sequence = first.unsqueeze(1) + document  # [B, T]
    count = torch.zeros(sequences, dtype=torch.long, device=device).index_add_(
        0, sequence[real], torch.ones_like(sequence[real])
    )
    rank = (real.long().cumsum(1) - 1) - torch.where(
        document > 0, _real_before_document(real, document), torch.zeros_like(document)
    )
    slot = rank + (held % block)[sequence]
    slots = -(-int((held % block + count).max().clamp_min(1)) // block) * block
    target = torch.where(real, sequence * slots + slot, -1)
    source = torch.full((sequences * slots,), -1, dtype=torch.long, device=device)
    token = torch.arange(tokens, device=device).expand(batch, tokens)
    source[target[real]] = token[real]
    return Layout(
        block,
        lookback,
        slots // block,
        tokens,
        (held // block - lookback) * block,
        held + count,
        held,
        row,
        source.view(sequences, slots),
        target,
        first + per_row - 1,
    )


def _real_before_document(real: Tensor, document: Tensor) -> Tensor:
    """`[B, T]`: how many real tokens of the row stand before the first token of the token's own document."""
    total = real.long().cumsum(1)
    starts = torch.cat([torch.ones_like(real[:, :1]), document[:, 1:] != document[:, :-1]], dim=1)
    before = torch.where(starts, total - real.long(), torch.zeros_like(total))
    return before.cummax(1).values


def documents_of(position_ids: Tensor | None, real: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """Number the documents packed into each row: a new one starts where positions do not go on by one.

    Args:
        position_ids: `[B or 1, T]`, or None.
        real: `[B, T]` bool, False for pads, or None.
        shape: (B, T).

    Returns:
        `[B, T]` int64, or None where every row is one document. Pads do not count; across them positions may
        leap forward, so that there only a fall is a new document.
    """
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[1] != shape[1] or shape[1] < 2:
        return None
    jump = position_ids[:, 1:] != position_ids[:, :-1] + 1
    if not bool(jump.any()):
        return None
    jump = jump.expand(shape[0], -1)
    if real is not None:
        position = position_ids.expand(shape)
        place = torch.arange(shape[1], device=real.device)
        before = (
            torch.where(real, place, -1).cummax(1).values[:, :-1]
        )  # the last real token before each token
        fall = position[:, 1:] <= position.gather(1, before.clamp_min(0))
        jump = torch.where(before == place[:-1], jump, fall) & (before >= 0) & real[:, 1:]
    if not bool(jump.any()):
        return None
    return torch.nn.functional.pad(jump.long(), (1, 0)).cumsum(1)
