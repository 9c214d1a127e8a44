"""Window, sinks and linear sum by block, plain PyTorch: what the CPU runs, and the fallback everywhere else.

Block i of the queries sees the keys of blocks i - L to i, the sinks where they are older than those, and the
sums over the blocks before i - L. What block j writes is put L blocks later, so that the sums before block i
are those that it reads. Blocks are taken a few at a time, so that what they make stays in the processor's
cache; inside a piece, sums are one product with a triangle of ones, in which a packed sequence reaches over
its own blocks only.
"""

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

PIECE = 512
"""Tokens computed at once, at least one block."""


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
    there = None if seen is None else seen.unsqueeze(-1).expand_as(k[..., 0])
    if sinks is not None:
        there = k.new_ones(k.shape[:3], dtype=torch.bool) if there is None else there
        k, v = torch.cat([sinks.k, k], 1), torch.cat([sinks.v, v], 1)
        there = torch.cat([sinks.seen & apart[:, None, None], there], 1)
    rows, features = (x.unflatten(1, (groups, -1)) for x in (q, phi_q))  # [B, G, R, ...]
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    # Of one query what is not finite spoils nothing but itself, unless it is not seen.
    if there is not None:
        there = there.transpose(1, 2)
        k, v = (torch.where(there.unsqueeze(-1), x, 0) for x in (k, v))
    logits = (rows @ k.transpose(-1, -2)) * scale
    if there is not None:
        logits = torch.where(there.unsqueeze(2), logits, -torch.inf)
    answer = None if answer is None else answer.unflatten(1, (groups, -1))
    mass = None if mass is None else mass.unflatten(1, (groups, -1)).unsqueeze(-1)
    return joined(logits, v, features @ sums.M, features @ sums.z.unsqueeze(-1), answer, mass).flatten(1, 2)


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
    piece: int = PIECE,
) -> tuple[Tensor, InfiniState, InfiniCounters]:
    """As `reference.window_linear_attention`, about `piece` tokens at a time."""
    dtype, (batch, length), groups = v.dtype, q.shape[:2], k.shape[2]
    q, k, v, phi_q, phi_k = (wide(x) for x in (q, k, v, phi_q, phi_k))
    cut = _Cut.of(q, cu_seqlens, block, lookback)

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
    first = _sums(initial)
    held, last = first, InfiniState(*(torch.zeros_like(x[:1]) for x in first))
    outs, clamped = [], torch.zeros(initial.n.shape, dtype=torch.int64, device=q.device)
    size = max(1, piece // block)
    slot = torch.arange((lookback + 1) * block, device=q.device)
    own = torch.arange(block, device=q.device).unsqueeze(-1) + lookback * block
    for start in range(0, count, size):
        place = slice(start, min(start + size, count))
        # The memory.
        update, limited = block_updates(phi_k[:, :, place], written[:, :, place], weight[:, :, place], clamp)
        update_n = update.n.detach()
        changes = InfiniState(update.M * update_n[..., None, None], update.z * update_n[..., None], update_n)
        if cut.sequence is None:
            opened, mine = InfiniState(*(x.unsqueeze(2) for x in held)), None
        else:
            sequence = cut.sequence[place]
            goes_on = sequence == cut.sequence[max(start - 1, 0)] if start else sequence < 0
            opened = InfiniState(
                *(
                    torch.where(
                        goes_on.view(1, 1, -1, *[1] * (y.dim() - 2)),
                        y.unsqueeze(2),
                        cut.per_sequence(x, place),
                    )
                    for x, y in zip(first, last, strict=True)
                )
            )
            mine = sequence == torch.arange(len(first.n), device=q.device).unsqueeze(-1)  # [N, P]
        open_M, open_z = (_prefix(x, cut.sequence, place) for x in changes[:2])
        memory_M, memory_z = open_M + opened.M, open_z + opened.z
        if mine is None:
            held = InfiniState(*(x + y.sum(2).to(x.dtype) for x, y in zip(held, changes, strict=True)))
            clamped = clamped + limited.sum(-1)
        else:
            own_sequence = mine.to(q.dtype)
            held = InfiniState(
                *(
                    x + torch.tensordot(own_sequence.to(x.dtype), y[0].to(x.dtype), ([1], [1]))
                    for x, y in zip(held, changes, strict=True)
                )
            )
            last = InfiniState(
                memory_M[:, :, -1] + changes.M[:, :, -1], memory_z[:, :, -1] + changes.z[:, :, -1], last.n
            )
            clamped = clamped + torch.tensordot(own_sequence, limited[0].to(q.dtype), ([1], [1])).long()
        # The exact part.
        span = slice(place.start, place.stop + lookback)
        keys, values, visible, spoiled = (
            x[:, :, span].unfold(2, lookback + 1, 1).movedim(-1, 3).flatten(3, 4) for x in (k, v, there, bad)
        )
        within = cut.order[place].unsqueeze(-1) - lookback + slot // block >= 0  # [P, W]
        visible = visible.squeeze(-1) & within
        allowed = visible.unsqueeze(3) & (slot <= own)  # [B, G, P, S, W]
        queries = q[:, :, place]
        logits = (queries @ keys.transpose(-1, -2)) * scale
        logits = torch.where(spoiled.squeeze(-1).unsqueeze(3), torch.nan, logits)
        logits = torch.where(allowed.unsqueeze(3), logits.unflatten(3, (-1, block)), -torch.inf).flatten(3, 4)
        if sinks is not None:
            first_k, first_v = (cut.per_sequence(wide(x).transpose(1, 2), place) for x in sinks[:2])
            apart = before[:, None] + cut.order[place] > lookback  # [N, P]
            if cut.sequence is not None:
                apart = apart.gather(0, cut.sequence[place].unsqueeze(0))
            known = cut.per_sequence(sinks.seen.transpose(1, 2), place) & apart[:, None, :, None]
            more = (queries @ first_k.transpose(-1, -2)) * scale
            logits = torch.cat([torch.where(known.unsqueeze(3), more, -torch.inf), logits], -1)
            values = torch.cat([first_v.expand(*values.shape[:3], -1, -1), values], 3)
        near = (None if x is None else x[:, :, place] for x in (answer, mass))
        asked = phi_q[:, :, place]
        outs.append(joined(logits, values, asked @ memory_M, asked @ memory_z.unsqueeze(-1), *near))
    out = torch.cat(outs, 2).unflatten(3, (-1, block)).transpose(2, 3).flatten(1, 2)
    n = held.n
    safe = n.clamp_min(TINY).to(held.M.dtype)
    state = InfiniState(held.M / safe[..., None, None], held.z / safe[..., None], n)
    return cut.tokens(out, length).to(dtype), state, InfiniCounters(clamped, _per_sequence(lost, cu_seqlens))


def _sums(initial: InfiniState) -> InfiniState:
    n = initial.n.to(count_dtype(initial.n.device))
    own = n.detach().to(initial.M.dtype)
    return InfiniState(initial.M * own[..., None, None], initial.z * own[..., None], n)


def _prefix(x: Tensor, sequence: Tensor | None, place: slice) -> Tensor:
    """Of `[B, G, P, ...]` the sums over the earlier blocks of the same sequence."""
    triangle = torch.ones(x.shape[2], x.shape[2], dtype=x.dtype, device=x.device).tril(-1)
    if sequence is not None:
        triangle = triangle * (sequence[place].unsqueeze(-1) == sequence[place])
    return (triangle @ x.flatten(3)).view_as(x)


def _per_sequence(lost: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """`[B, T, G]` bool counted, `[N, G]` int64."""
    if cu_seqlens is None:
        return lost.sum(1)
    count = pad(lost[0].long().cumsum(0), (0, 0, 1, 0))
    return count[cu_seqlens[1:].long()] - count[cu_seqlens[:-1].long()]
