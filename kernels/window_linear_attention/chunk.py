"""Window, sinks and linear sum by block, plain PyTorch: what the CPU runs, and the fallback everywhere else.

Block i of the queries sees the keys of blocks i - L to i, the sinks where they are older than those, and the
sums over the blocks before i - L. What block j writes is put L blocks later, so that the sums before block i
are those that it reads. Blocks are taken a few at a time, so that what they make stays in the processor's
cache; inside a piece, sums are one product with a triangle of ones, in which a packed sequence reaches over
its own blocks only.
"""

from itertools import repeat
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from kernels.infini_memory.chunk import taken
from kernels.infini_memory.state import InfiniCounters, InfiniState, written_blocks
from kernels.linear_memory.chunk import TINY, block_updates
from kernels.numerics import count_dtype, wide
from kernels.packing import chunk_table, token_slots
from kernels.window_linear_attention.state import Sinks

PIECE = 2048
"""Tokens times rows times key-value heads computed at once, at least one block.

By measurement (milliseconds of one thread of a Xeon; 4,096 tokens, 4 heads of 64, blocks and window of 32;
forward, and with backward): 512 took 74.7 and 200, 1024 65.3 and 167, 2048 66.8 and 163, 4096 67.3 and 169.
"""


def joined(
    logits: Tensor,
    values: Tensor,
    numerator: Tensor,
    denominator: Tensor,
    answer: Tensor | None,
    mass: Tensor | None,
) -> Tensor:
    """(sum e^s v + numerator + e^mass answer) / (sum e^s + denominator + e^mass), 0 where that is 0 / 0.

    Args:
        logits: s, `[..., Q, W]`; values: `[..., W, D]`.
        numerator, answer: `[..., Q, D]`; denominator, mass: `[..., Q, 1]`.
    """
    held = denominator > torch.finfo(denominator.dtype).tiny
    divisor = torch.where(held, denominator, 1)
    log = torch.where(held, divisor.log(), -torch.inf)
    top = torch.maximum(logits.detach().amax(-1, keepdim=True), log.detach())
    if mass is not None:
        top = torch.maximum(top, mass.detach())
    top = torch.where(top == -torch.inf, 0, top)
    weights, share = (logits - top).exp(), (log - top).exp()
    total = weights.sum(-1, keepdim=True) + share
    out = weights @ values + share * (numerator / divisor)
    if mass is not None and answer is not None:
        beside = (mass - top).exp()
        total, out = total + beside, out + beside * answer
    return out / torch.where(total == 0, 1, total)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    answer: Tensor | None,
    mass: Tensor | None,
    seen: Tensor | None,
    sinks: Sinks | None,
    apart: Tensor,
    sums: InfiniState,
    scale: float,
) -> Tensor:
    """As `reference.step`, as batched products."""
    groups = k.shape[2]
    rows, features = (x.unflatten(1, (groups, -1)) for x in (q, phi_q))  # [B, G, R, ...]
    # Of one query what is not finite spoils nothing but itself, unless it is not seen.
    if seen is not None:
        k, v = (torch.where(seen[:, :, None, None], x, 0) for x in (k, v))
    logits = (rows @ k.permute(0, 2, 3, 1)) * scale
    if seen is not None:
        logits = torch.where(seen[:, None, None], logits, -torch.inf)
    if sinks is not None:
        known = (sinks.seen & apart[:, None, None]).unsqueeze(-1)
        first_k, first_v = (torch.where(known, x, 0) for x in sinks[:2])
        first = (rows @ first_k.permute(0, 2, 3, 1)) * scale
        logits = torch.cat([torch.where(known.permute(0, 2, 3, 1), first, -torch.inf), logits], -1)
        v = torch.cat([first_v, v], 1)
    answer = None if answer is None else answer.unflatten(1, (groups, -1))
    mass = None if mass is None else mass.unflatten(1, (groups, -1)).unsqueeze(-1)
    read = (features @ sums.M, features @ sums.z.unsqueeze(-1))
    return joined(logits, v.transpose(1, 2), *read, answer, mass).flatten(1, 2)


class _Cut(NamedTuple):
    """The blocks of a call, N of all sequences of a packed row or of each row."""

    order: Tensor
    """`[N]` int64, which block of its sequence each is."""
    leaving: Tensor
    """`[T]` bool, tokens that leave the window for good."""
    sequence: Tensor | None
    """`[N]` int64, whose each is; None where rows are not packed."""
    token: Tensor | None
    """`[N, S]` int64, which token is in each slot, T where none is; None likewise."""
    slots: Tensor | None
    """`[T]` int64, where each token is; None likewise."""

    @classmethod
    def of(cls, q: Tensor, cu_seqlens: Tensor | None, block: int, lookback: int) -> "_Cut":
        """The cut of T tokens in blocks of S."""
        length = q.shape[1]
        if cu_seqlens is None:
            place = torch.arange(length, device=q.device)
            index = torch.arange(-(-length // block), device=q.device)
            leaving = place < written_blocks(length, block, lookback) * block
            return cls(index, leaving, None, None, None)
        chunks = chunk_table(cu_seqlens, length, block)
        slots = token_slots(cu_seqlens, chunks, length, block)
        index = torch.arange(chunks.start.shape[0], device=q.device) - chunks.offsets[chunks.sequence]
        leaves = chunks.start + (lookback + 1) * block <= cu_seqlens.long()[chunks.sequence + 1]
        token = chunks.start[:, None] + torch.arange(block, device=q.device)
        token = torch.where(token < chunks.stop[:, None], token, length)
        return cls(index, leaves[slots // block], chunks.sequence, token, slots)

    def blocks(self, x: Tensor, block: int) -> Tensor:
        """`[B, T, X, E]` -> `[B, X, N, S, E]`, 0 where there is no token."""
        if self.token is None:
            x = pad(x, (0, 0, 0, 0, 0, len(self.order) * block - x.shape[1]))
            return x.unflatten(1, (-1, block)).permute(0, 3, 1, 2, 4)
        return pad(x, (0, 0, 0, 0, 0, 1))[:, self.token].permute(0, 3, 1, 2, 4)

    def tokens(self, x: Tensor, length: int) -> Tensor:
        """`[B, X, N, S, E]` -> `[B, T, X, E]`."""
        x = x.permute(0, 2, 3, 1, 4).flatten(1, 2)
        return x[:, :length] if self.slots is None else x[:, self.slots]

    def per_sequence(self, x: Tensor, place: slice) -> Tensor:
        """Of blocks `place`, each its sequence's `x [N, G, ...]`: `[B, G, P, ...]`, P 1 where not packed."""
        return (
            x.unsqueeze(2) if self.sequence is None else x[self.sequence[place]].transpose(0, 1).unsqueeze(0)
        )


def window_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    phi_q: Tensor,
    phi_k: Tensor,
    write_gate: Tensor | None,
    answer: Tensor | None,
    mass: Tensor | None,
    seen: Tensor | None,
    write: Tensor | None,
    sinks: Sinks | None,
    before: Tensor,
    initial: InfiniState,
    cu_seqlens: Tensor | None,
    block: int,
    lookback: int,
    scale: float,
    clamp: float,
    piece: int | None = None,
) -> tuple[Tensor, InfiniState, InfiniCounters]:
    """As `reference.window_linear_attention`, about `piece` tokens at a time."""
    dtype, (batch, length), groups = v.dtype, q.shape[:2], k.shape[2]
    block = min(block, length + 1)  # of a longer one nothing leaves either, and what it lacks is filled up
    q, k, v, phi_q, phi_k = (wide(x) for x in (q, k, v, phi_q, phi_k))
    cut = _Cut.of(q, cu_seqlens, block, lookback)
    late, lookback = lookback, min(lookback, len(cut.order))  # none is further back than the first

    def shifted(x: Tensor) -> Tensor:
        """`[B, X, N, ...]`, L blocks later: zeros first."""
        return pad(x, [0, 0] * (x.dim() - 3) + [lookback, 0])

    # What is written, at the block that first reads it.
    here = cut.leaving.view(1, -1, 1) if write is None else (cut.leaving & write).unsqueeze(-1)
    weight = torch.ones_like(phi_k[..., 0]) if write_gate is None else write_gate.to(k.dtype)
    phi_k, written, weight, lost = taken(phi_k, v, weight, here)
    count = len(cut.order)
    phi_k, written, weight = (
        shifted(cut.blocks(x, block))[:, :, :count] for x in (phi_k, written, weight.unsqueeze(-1))
    )
    weight = torch.where((cut.order >= lookback).view(1, 1, -1, 1), weight.squeeze(-1), 0)
    # What is seen.
    there = torch.ones_like(k[..., :1], dtype=torch.bool) if seen is None else seen[..., None, None]
    there = there.expand(batch, length, groups, 1)
    finite = (k.isfinite().all(-1) & v.isfinite().all(-1)).unsqueeze(-1)
    k, v = (torch.where(there & finite, x, 0) for x in (k, v))
    k, v, there, bad = (shifted(cut.blocks(x, block)) for x in (k, v, there, there & ~finite))

    def rows(x: Tensor | None) -> Tensor | None:
        """`[B, T, H, E]` -> `[B, G, N, R S, E]`: the heads of a group side by side."""
        if x is None:
            return None
        return cut.blocks(wide(x), block).unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)

    q, phi_q = rows(q), rows(phi_q)  # type: ignore[assignment]
    answer, mass = rows(answer), rows(None if mass is None else mass.unsqueeze(-1))
    memory = _Memory(cut, initial, clamp)
    slot = torch.arange((lookback + 1) * block, device=q.device)
    causal = slot <= torch.arange(block, device=q.device).unsqueeze(-1) + lookback * block  # [S, W]
    count = max(1, (piece or PIECE // (batch * groups)) // block)
    # Cut all at once: the backward of a slice would fill a tensor as large as all pieces with zeros.
    windows = (x.unfold(2, lookback + 1, 1).movedim(-1, 3) for x in (k, v, there, bad))
    given = (q, phi_q, answer, mass, phi_k, written, weight, *windows)
    pieces = zip(*(repeat(None) if x is None else x.split(count, 2) for x in given), strict=False)
    outs: list[Tensor] = []
    for queries, asked, reply, log, keys, values, gates, *window in pieces:
        place = slice(len(outs) * count, len(outs) * count + queries.shape[2])
        M, z = memory.write(keys, values, gates, place)
        near_k, near_v, visible, spoiled = (x.flatten(3, 4) for x in window)
        within = cut.order[place].unsqueeze(-1) - lookback + slot // block >= 0  # [P, W]
        allowed = (visible.squeeze(-1) & within).unsqueeze(3) & causal  # [B, G, P, S, W]
        logits = (queries @ near_k.transpose(-1, -2)) * scale
        logits = torch.where(spoiled.squeeze(-1).unsqueeze(3), torch.nan, logits)
        logits = torch.where(allowed.unsqueeze(3), logits.unflatten(3, (-1, block)), -torch.inf).flatten(3, 4)
        if sinks is not None:
            first_k, first_v = (cut.per_sequence(wide(x).transpose(1, 2), place) for x in sinks[:2])
            apart = before[:, None] + cut.order[place] > late  # [N, P]
            if cut.sequence is not None:
                apart = apart.gather(0, cut.sequence[place].unsqueeze(0))
            known = cut.per_sequence(sinks.seen.transpose(1, 2), place) & apart[:, None, :, None]
            more = (queries @ first_k.transpose(-1, -2)) * scale
            logits = torch.cat([torch.where(known.unsqueeze(3), more, -torch.inf), logits], -1)
            near_v = torch.cat([first_v.expand(*near_v.shape[:3], -1, -1), near_v], 3)
        outs.append(joined(logits, near_v, asked @ M, asked @ z.unsqueeze(-1), reply, log))
    out = torch.cat(outs, 2).unflatten(3, (-1, block)).transpose(2, 3).flatten(1, 2)
    counters = InfiniCounters(memory.clamped, _per_sequence(lost, cu_seqlens))
    return cut.tokens(out, length).to(dtype), memory.state(), counters


class _Memory:
    """The sums that go from piece to piece."""

    def __init__(self, cut: _Cut, initial: InfiniState, clamp: float) -> None:
        self.cut, self.clamp = cut, clamp
        n = initial.n.to(count_dtype(initial.n.device))
        own = n.detach().to(initial.M.dtype)
        self.first = InfiniState(initial.M * own[..., None, None], initial.z * own[..., None], n)
        self.held = self.first
        """Of each sequence, over all that it has written so far."""
        self.last = (torch.zeros_like(initial.M[:1]), torch.zeros_like(initial.z[:1]))
        """After the block before the piece."""
        self.clamped = torch.zeros(n.shape, dtype=torch.int64, device=n.device)

    def write(self, k: Tensor, v: Tensor, weight: Tensor, place: slice) -> tuple[Tensor, Tensor]:
        """Write blocks `place`; M and z before each of them, as sums `[B, G, P, ...]`.

        Args:
            k: `[B, G, P, S, F]`; v: `[B, G, P, S, D]`; weight: `[B, G, P, S]`.
        """
        update, limited = block_updates(k, v, weight, self.clamp)
        n = update.n.detach()
        changes = (update.M * n[..., None, None], update.z * n[..., None], n)
        triangle = torch.ones(k.shape[2], k.shape[2], dtype=k.dtype, device=k.device).tril(-1)
        if self.cut.sequence is None:
            opened: list[Tensor] = [x.unsqueeze(2) for x in self.held[:2]]
            totals = [x.sum(2) for x in changes]
            self.clamped = self.clamped + limited.sum(-1)
        else:
            sequence = self.cut.sequence[place]
            triangle = triangle * (sequence.unsqueeze(-1) == sequence)
            goes_on = sequence == self.cut.sequence[max(place.start - 1, 0)]
            goes_on = (goes_on & (place.start > 0)).view(1, 1, -1, 1)
            opened = [
                torch.where(goes_on.unsqueeze(-1) if x.dim() == 4 else goes_on, x.unsqueeze(2), y)
                for x, y in zip(
                    self.last, (self.cut.per_sequence(x, place) for x in self.first), strict=False
                )
            ]
            mine = (sequence == torch.arange(len(self.held.n), device=k.device).unsqueeze(-1)).to(k.dtype)
            totals = [torch.tensordot(mine, x[0], ([1], [1])) for x in changes]
            self.clamped = self.clamped + torch.tensordot(mine, limited[0].to(k.dtype), ([1], [1])).long()
        M, z = ((triangle @ x.flatten(3)).view_as(x) + y for x, y in zip(changes[:2], opened, strict=True))
        self.held = InfiniState(*(x + y.to(x.dtype) for x, y in zip(self.held, totals, strict=True)))
        self.last = (M[:, :, -1] + changes[0][:, :, -1], z[:, :, -1] + changes[1][:, :, -1])
        return M, z

    def state(self) -> InfiniState:
        """The final state."""
        M, z, n = self.held
        safe = n.clamp_min(TINY).to(M.dtype)
        return InfiniState(M / safe[..., None, None], z / safe[..., None], n)


def _per_sequence(lost: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[B, T, G]` bool counted, `[N, G]` int64."""
    if cu_seqlens is None:
        return lost.sum(1)
    count = pad(lost[0].long().cumsum(0), (0, 0, 1, 0))
    return count[cu_seqlens[1:].long()] - count[cu_seqlens[:-1].long()]
