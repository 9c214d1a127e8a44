"""The gated delta rule in chunks: all tokens of a chunk at once, one chunk after the other.

With b the steps, G_ti the decay from token i to token t, g_t that from the chunk's beginning to t, and g_C
that over all of it:
T = (I + tril(diag(b) (K K^T o G), -1))^-1 diag(b);  U = T V;  W = T diag(g) K;  u = U - W S;
S' = g_C S + (diag(g_C / g) K)^T u;  O = diag(g) Q S + (Q K^T o G o mask) u.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear_memory.chunk import LARGEST
from kernels.numerics import wide

CHUNK = 64
"""Tokens that `gated_delta_rule` takes at once."""

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


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.gated_delta_rule`, with the same arguments and results."""
    batch, length, heads, _ = q.shape
    groups = k.shape[2]
    size = min(CHUNK, max(length, 1))
    count = max(1, -(-length // size))

    def chunked(x: Tensor) -> Tensor:  # [B, T, X, ...] -> [B, X, N, S, ...]
        x = F.pad(x, [0, 0] * (x.ndim - 2) + [0, count * size - length])
        return x.transpose(1, 2).unflatten(2, (count, size))

    seen = torch.ones(batch, length, 1, dtype=torch.bool, device=q.device) if mask is None else mask
    seen = chunked(seen.unsqueeze(-1) if seen.ndim == 2 else seen).expand(-1, groups, -1, -1)
    k, v, beta, log_decay = (chunked(wide(x)) for x in (k, v, beta, log_decay))
    k, v = (torch.where(seen.unsqueeze(-1), x, 0) for x in (k, v))
    beta, log_decay = torch.where(seen, beta, 0), torch.where(seen, log_decay, 0)
    if initial_state is None:
        initial_state = k.new_zeros(batch, groups, k.shape[-1], v.shape[-1])
    parts = transform(k, v, scaled_step(k, beta), log_decay)
    states, errors, _ = recur(k, parts, wide(initial_state), None)
    q = chunked(wide(q)).unflatten(1, (groups, heads // groups))  # [B, G, R, N, S, D]
    inside = (q @ k.transpose(-1, -2).unsqueeze(2)) * parts.between.unsqueeze(2)
    before = (q @ states[:, :, :-1].unsqueeze(2)) * parts.since[:, :, None, ..., None]
    out = before + inside @ errors.unsqueeze(2)
    return out.flatten(3, 4).flatten(1, 2).transpose(1, 2)[:, :length], states[:, :, -1]


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
    largest = torch.maximum(k.detach().abs().amax(-1), v.detach().abs().amax(-1))
    written = mask & (largest < LARGEST) & beta.isfinite() & log_decay.isfinite()
    k, v = (torch.where(written.unsqueeze(-1), x, 0) for x in (k, v))
    beta, log_decay = torch.where(written, beta, 0), torch.where(written, log_decay, 0)
    states, _, clamped = recur(k, transform(k, v, scaled_step(k, beta), log_decay), wide(initial), clamp)
    return Written(states, written, clamped)


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


def recur(k: Tensor, parts: Chunks, initial: Tensor, clamp: float | None) -> tuple[Tensor, Tensor, Tensor]:
    """Chunk after chunk.

    Returns:
        the state before each chunk and after the last `[B, G, N + 1, D, Dv]`, u `[B, G, N, S, Dv]`, and
        `[B, G, N]` bool, which changes were beyond `clamp` and so limited.
    """
    kept = parts.since[..., -1, None, None]
    keys = (parts.between[..., -1, :].unsqueeze(-1) * k).transpose(-1, -2)
    state, states, errors, clamped = initial, [initial], [], []
    for chunk in range(k.shape[2]):
        error = parts.U[:, :, chunk] - parts.W[:, :, chunk] @ state
        change = keys[:, :, chunk] @ error
        if clamp is not None:
            largest = change.detach().abs().amax((-1, -2))
            change = change * (clamp / largest.clamp_min(clamp))[..., None, None]
            clamped.append(largest > clamp)
        state = kept[:, :, chunk] * state + change
        states.append(state)
        errors.append(error)
    limited = torch.stack(clamped, 2) if clamped else k.new_zeros(k.shape[:3], dtype=torch.bool)
    return torch.stack(states, 2), torch.stack(errors, 2) if errors else parts.U, limited
