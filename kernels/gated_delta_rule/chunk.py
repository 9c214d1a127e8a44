"""The gated delta rule in chunks: all tokens of a chunk at once, one chunk after the other.

With b the steps, G_ti the decay from token i to token t, g_t that from the chunk's beginning to t, and g_C
that over all of it:
T = (I + tril(diag(b) (K K^T o G), -1))^-1 diag(b);  U = T V;  W = T diag(g) K;  u = U - W S;
S' = g_C S + (diag(g_C / g) K)^T u;  O = diag(g) Q S + (Q K^T o G o mask) u.
"""

from itertools import cycle, islice
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear_memory.chunk import LARGEST
from kernels.numerics import contiguous, wide
from kernels.packing import Chunks as Packed
from kernels.packing import chunk_table, token_slots
from kernels.pieces import Pieces

CHUNK = 64
"""Tokens that `gated_delta_rule` takes at once.

By measurement (milliseconds of one thread of a Xeon with 2 MB of L2 a core; 4,096 tokens, 4 heads of 64;
forward, and with backward; each with its best PIECE): 16 took 48.7 and 170, 32 42.8 and 131, 64 43.4 and 137,
128 60.6 and 173. Of 32 and 64, which are alike, the one with half as many steps in Python.
"""

PIECE = 64
"""Chunks times key-value heads, of one row or of several, whose transforms are computed at once: 16 took 47.0
and 146 (as above), 32 43.4 and 137, 64 42.8 and 140; the larger of the alike has fewer steps in Python."""

# The step is b = beta / (|k|^2 (1 + RELATIVE) + ABSOLUTE), which has the transition I - b k k^T of unit-norm
# keys and leaves |k| where it belongs, in what is read. It cannot explode, because beta <= 1 and
# - relative: b |k|^2 <= 1 for keys of any size, whatever |k|^2 was rounded to, so a write takes away at most
#   what stood there and never turns it around: without new values no write makes the state larger;
# - absolute: what one token adds is at most b |k| |v| <= |v| / (2 sqrt(ABSOLUTE)), largest at
#   |k| = sqrt(ABSOLUTE). Without it a key of 1e-4 would add 1e4 |v|, and queries of ordinary length would
#   read that. A key of length 1, short for a language model, loses 1e-4 of its step by it.
RELATIVE = 1e-6
ABSOLUTE = 1e-4


class Written(NamedTuple):
    """What `write_gated_delta` found.

    Attributes:
        states: `[B, G, N + 1, D, Dv]`, entry i after the first i blocks.
        written: `[B, G, N, S]` bool, the tokens that were written.
        clamped: `[B, G, N]` bool, the blocks whose change was limited.
    """

    states: Tensor
    written: Tensor
    clamped: Tensor


class Chunks(NamedTuple):
    """The parts of every chunk that do not depend on the state.

    Attributes:
        U: `[B, G, N, S, Dv]`; W: `[B, G, N, S, D]`; see the module.
        between: `[B, G, N, S, S]`, entry t, i: the decay from token i to token t, 0 for t < i.
        since: `[B, G, N, S]`, the decay from the beginning of the chunk to each token, itself included.
    """

    U: Tensor
    W: Tensor
    between: Tensor
    since: Tensor


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    mask: Tensor | None,
    scaled: bool,
) -> tuple[Tensor, Tensor]:
    """As `reference.step`, as three batched products."""
    batch, groups, features = k.shape
    if mask is not None:
        k, v = (torch.where(mask.unsqueeze(-1), x, 0) for x in (k, v))
        beta = torch.where(mask, beta, 0)
        log_decay = None if log_decay is None else torch.where(mask, log_decay, 0)
    share = scaled_step(k, beta) if scaled else beta
    held = state.flatten(0, 1)
    if log_decay is not None:
        held = held * log_decay.exp().view(-1, 1, 1)
    rows = k.reshape(-1, 1, features)
    error = torch.baddbmm(v.reshape(batch * groups, 1, -1), rows, held, alpha=-1)
    after = torch.baddbmm(held, rows.transpose(1, 2), error * share.reshape(-1, 1, 1))
    out = torch.bmm(q.reshape(batch * groups, -1, features), after)
    return out.reshape(batch, q.shape[1], -1), after.view_as(state)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scaled: bool = True,
    size: int = CHUNK,
    piece: int = PIECE,
) -> tuple[Tensor, Tensor]:
    """As `reference.gated_delta_rule`, in chunks of `size` tokens of which `piece` are prepared at once."""
    batch, length = q.shape[:2]
    groups = k.shape[2]
    size = min(size, max(length, 1))
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    if mask is not None:  # before any product, because 0 times NaN is NaN
        seen = mask.unsqueeze(-1) if mask.ndim == 2 else mask
        beta, log_decay = torch.where(seen, beta, 0), torch.where(seen, log_decay, 0)
        k, v = (torch.where(seen.unsqueeze(-1), x, 0) for x in (k, v))
    if cu_seqlens is None:
        chunks, states = None, batch
        cut = [_cut(x, size) for x in (q, k, v, beta, log_decay)]
    else:
        chunks, states = chunk_table(cu_seqlens, length, size), cu_seqlens.shape[0] - 1
        cut = [_gather(x, chunks, size) for x in (q, k, v, beta, log_decay)]
    if initial_state is None:
        initial_state = wide(k.new_zeros(states, groups, k.shape[-1], v.shape[-1]))
    initial = wide(initial_state)
    pieces = Pieces.of(batch, cut[0].shape[1], groups, piece, q.device)
    places = torch.arange(pieces.total, device=q.device).split(pieces.chunks)
    given = zip(cycle(places), *(pieces.cut(x) for x in cut), strict=False)
    outs, ends, after = [], [], []
    for state in initial[:batch].split(pieces.rows):
        for place, *some in islice(given, pieces.steps):
            # Copied once here instead of by every product.
            rows, keys, values, share, decay = (contiguous(x.transpose(2, 3).transpose(1, 2)) for x in some)
            share = scaled_step(keys, share) if scaled else share
            parts = transform(keys, values, share, decay)
            opened = None if chunks is None else _opened(initial, chunks, place)
            before, last, errors, _ = recur(keys, parts, state, None, opened)
            state = last[-1].view_as(state)
            outs.append(_read(rows, keys, before, errors, parts).permute(0, 2, 3, 1, 4))
            after += last
        ends.append(state)
    out = pieces.join(outs).flatten(1, 2)
    if chunks is None or cu_seqlens is None:
        return out[:, :length], torch.cat(ends)
    out = out[:, token_slots(cu_seqlens, chunks, length, size)]
    return out, torch.stack(after)[chunks.offsets[1:] - 1]  # `[G, F, D]` each, since B is 1


def _cut(x: Tensor, size: int) -> Tensor:
    """`[B, T, X, ...]` -> `[B, N, C, X, ...]`, N at least 1, filled with tokens that do nothing."""
    length = x.shape[1]
    missing = -length % size if length else size
    if missing:
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, missing])
    return x.unflatten(1, (-1, size))


def _gather(x: Tensor, chunks: Packed, size: int) -> Tensor:
    """As `_cut`, of the sequences packed into one row `[1, T, X, ...]`."""
    token = chunks.start[:, None] + torch.arange(size, device=x.device)
    within = (token < chunks.stop[:, None]).view(*token.shape, *[1] * (x.ndim - 2))
    return torch.where(within, x[0, token.clamp_max(x.shape[1] - 1)], 0).unsqueeze(0)


def _opened(initial: Tensor, chunks: Packed, place: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the chunks `place [P]` begin a sequence, `[P]`, and the states those begin with."""
    sequence = chunks.sequence[place]
    return place == chunks.offsets[sequence], initial[sequence]


def _read(q: Tensor, k: Tensor, before: Tensor, errors: Tensor, parts: Chunks) -> Tensor:
    """What the tokens of each chunk read, `[B, H, N, S, D]`; k is shared by the R heads of a group.

    Args:
        q: `[B, H, N, S, F]`; k: `[B, G, N, S, F]`.
        before: the state before each chunk; errors: u of each chunk.
    """
    groups, size = k.shape[1], k.shape[3]
    rows = q.unflatten(1, (groups, -1)).transpose(2, 3).flatten(3, 4)  # [B, G, N, R S, F]

    def per_head(x: Tensor) -> Tensor:  # [B, G, N, R S, ...] -> [B, G, N, R, S, ...]
        return x.unflatten(3, (-1, size))

    weights = per_head(rows @ k.transpose(-1, -2)) * parts.between.unsqueeze(3)
    out = per_head(rows @ before) * parts.since[:, :, :, None, :, None]
    out = out + per_head(weights.flatten(3, 4) @ errors)
    return out.transpose(2, 3).flatten(1, 2)


def write_gated_delta(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, mask: Tensor, initial: Tensor, clamp: float
) -> Written:
    """Prefix states of a memory that is written block by block, token by token inside a block.

    Args:
        k: `[B, G, N, S, D]`; v: `[B, G, N, S, Dv]`.
        beta, log_decay: `[B, G, N, S]` as in `gated_delta_rule`.
        mask: `[B, G, N, S]` bool, False for tokens that neither write nor decay; a token of which a figure
            is not finite, or of which k or v is beyond LARGEST, does neither as well.
        initial: `[B, G, D, Dv]`, the state before the first block.
        clamp: the largest magnitude an entry of a block's change beside decay may have; beyond it the change
            is scaled down. A part of a step is a step, so what holds for those holds for it.
    """
    k, v, beta, log_decay = (wide(x) for x in (k, v, beta, log_decay))
    k, v, beta, log_decay, written = sound(k, v, beta, log_decay, mask)
    initial, parts = wide(initial), transform(k, v, scaled_step(k, beta), log_decay)
    states = initial.unsqueeze(2)
    clamped = written.new_zeros(written.shape[:3])
    if k.shape[2]:
        _, after, _, clamped = recur(k, parts, initial, clamp)
        states = torch.stack([initial.flatten(0, 1), *after], 1).unflatten(0, k.shape[:2])
    return Written(states, written, clamped)


def sound(
    k: Tensor, v: Tensor, beta: Tensor, log_decay: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All four, 0 for tokens that neither write nor decay, and which do: `[...]` bool; as above."""
    largest = torch.maximum(k.detach().abs().amax(-1), v.detach().abs().amax(-1))
    written = mask & (largest < LARGEST) & beta.isfinite() & log_decay.isfinite()
    k, v = (torch.where(written.unsqueeze(-1), x, 0) for x in (k, v))
    return k, v, torch.where(written, beta, 0), torch.where(written, log_decay, 0), written


def scaled_step(k: Tensor, beta: Tensor) -> Tensor:
    """b = beta / (|k|^2 (1 + RELATIVE) + ABSOLUTE): `k [..., D]`, `beta [...]` -> `[...]`."""
    return beta / (k.square().sum(-1) * (1 + RELATIVE) + ABSOLUTE)


def transform(k: Tensor, v: Tensor, step: Tensor, log_decay: Tensor) -> Chunks:
    """U and W of every chunk by one triangular solve, and the decays.

    Args:
        k: `[B, G, N, S, D]`; v: `[B, G, N, S, Dv]`; step, log_decay: `[B, G, N, S]`.
    """
    size = k.shape[-2]
    lower = torch.ones(size, size, dtype=torch.bool, device=k.device).tril()
    # Column i sums the logarithms of i + 1 .. t. Differences of one running sum would be cheaper, but lose
    # what follows a token that forgets nearly everything.
    own = log_decay.unsqueeze(-1).expand(*log_decay.shape, size)
    between = torch.where(lower.tril(-1), own, 0).cumsum(-2)
    between = torch.where(lower, between, -torch.inf).exp()
    since = log_decay.cumsum(-1).exp()
    # Entry t, i: what token t finds of token i. The solve takes the diagonal for 1 and does not read it.
    found = (step.unsqueeze(-1) * (k @ k.transpose(-1, -2)) * between).tril(-1)
    given = torch.cat([v, since.unsqueeze(-1) * k], dim=-1) * step.unsqueeze(-1)
    solved = torch.linalg.solve_triangular(found, given, upper=False, unitriangular=True)
    U, W = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    return Chunks(U, W, between, since)


def recur(
    k: Tensor,
    parts: Chunks,
    initial: Tensor,
    clamp: float | None,
    opened: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    """Chunk after chunk.

    Args:
        clamp: the largest magnitude of an entry of a chunk's change, None for any.
        opened: `[N]` bool, which chunks begin a sequence, and `[N, G, D, Dv]`, the states those begin with.

    Returns:
        the states before each chunk `[B, G, N, D, Dv]` and after each, a list of N `[B G, D, Dv]`,
        u `[B, G, N, S, Dv]`, and `[B, G, N]` bool, which changes were beyond `clamp` and so limited.
    """
    lead = k.shape[:2]
    kept = parts.since[..., -1, None, None]
    keys = (parts.between[..., -1, :].unsqueeze(-1) * k).transpose(-1, -2)
    state, before, after, errors, clamped = initial.flatten(0, 1), [], [], [], []
    # Only what is in this loop waits for the chunk before. The backward of unbind is one stack; that of an
    # index would fill a tensor as large as all chunks with zeros.
    each = zip(*(x.flatten(0, 1).unbind(1) for x in (parts.U, parts.W, keys, kept)), strict=True)
    for chunk, (U, W, K, share) in enumerate(each):
        if opened is not None:
            state = torch.where(opened[0][chunk], opened[1][chunk], state)
        before.append(state)
        error = torch.baddbmm(U, W, state, alpha=-1)
        if clamp is None:
            state = torch.baddbmm(share * state, K, error)
        else:
            change = K @ error
            largest = change.detach().abs().amax((-1, -2))
            change = change * (clamp / largest.clamp_min(clamp))[..., None, None]
            clamped.append(largest > clamp)
            state = share * state + change
        after.append(state)
        errors.append(error)
    if not clamped:
        clamped = list(k.new_zeros(k.shape[2], lead.numel(), dtype=torch.bool))
    states, u, limited = (torch.stack(x, 1).unflatten(0, lead) for x in (before, errors, clamped))
    return states, after, u, limited
