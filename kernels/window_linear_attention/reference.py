"""Window, sinks and linear sum token by token: what all other forms must equal."""

from itertools import pairwise

import torch
from torch import Tensor

from kernels.infini_memory.reference import block_update, over
from kernels.infini_memory.state import InfiniCounters, InfiniState
from kernels.linear_memory.chunk import TINY
from kernels.numerics import wide
from kernels.window_linear_attention.state import Sinks


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
    """One token's read; nothing is written.

    Args:
        q: `[B, H, K]`; phi_q: `[B, H, F]`; k: `[B, W, G, K]`; v: `[B, W, G, D]`, its window with itself; fp32
            or fp64.
        answer: `[B, H, D]`; mass: `[B, H]`; both or neither.
        seen: `[B, W]` bool, False where a key of the window is not seen.
        apart: `[B]` bool, whether the sinks are older than the window.
        sums: M and z as sums, not means.

    Returns:
        `[B, H, D]`.
    """
    there = (
        torch.ones_like(k[..., 0], dtype=torch.bool) if seen is None else seen[..., None].expand_as(k[..., 0])
    )
    if sinks is not None:
        k, v = torch.cat([sinks.k, k], 1), torch.cat([sinks.v, v], 1)
        there = torch.cat([sinks.seen & apart[:, None, None], there], 1)
    finite = k.isfinite().all(-1) & v.isfinite().all(-1)
    k, v = (torch.where((there & finite).unsqueeze(-1), x, 0) for x in (k, v))
    repeat = q.shape[1] // k.shape[2]
    k, v, there, finite = (x.repeat_interleave(repeat, 2) for x in (k, v, there, finite))
    M, z = (x.repeat_interleave(repeat, 1) for x in (sums.M, sums.z))
    logits = torch.einsum("bhk,bwhk->bwh", q, k) * scale
    logits = torch.where(there, torch.where(finite, logits, torch.nan), -torch.inf)
    reach = torch.einsum("bhf,bhf->bh", phi_q, z)
    held = reach > torch.finfo(reach.dtype).tiny
    log_reach = torch.where(held, torch.where(held, reach, 1).log(), -torch.inf)
    parts = [*logits.unbind(1), log_reach, *([] if mass is None else [mass])]
    top = torch.stack(parts).amax(0).detach()
    top = torch.where(top == -torch.inf, 0, top)
    weights, share = (logits - top.unsqueeze(1)).exp(), (log_reach - top).exp()
    total = weights.sum(1) + share
    out = torch.einsum("bwh,bwhd->bhd", weights, v)
    means = torch.einsum("bhf,bhfd->bhd", phi_q, M) / torch.where(held, reach, 1).unsqueeze(-1)
    out = out + share.unsqueeze(-1) * means
    if mass is not None and answer is not None:
        beside = (mass - top).exp()
        total, out = total + beside, out + beside.unsqueeze(-1) * answer
    return out / torch.where(total == 0, 1, total).unsqueeze(-1)


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
) -> tuple[Tensor, InfiniState, InfiniCounters]:
    """`kernels.window_linear_attention`, one token after the other; arguments checked before.

    Args:
        answer, mass: the two of `extra`.
        seen: `mask`; write: `[B, T]` bool, the same without the sinks.
        sinks: of the sequences; before: `[N]` int64, the blocks in the initial state.
        lookback: L, the window in blocks.
    """
    if cu_seqlens is not None:
        found = []
        for i, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            tokens = (q, k, v, phi_q, phi_k, write_gate, answer, mass, seen, write)
            own: list = [None if x is None else x[:, start:stop] for x in tokens]
            own += [None if sinks is None else Sinks(*(x[i : i + 1] for x in sinks)), before[i : i + 1]]
            own += [InfiniState(*(x[i : i + 1] for x in initial)), None, block, lookback, scale, clamp]
            found.append(window_linear_attention(*own))
        out, after, counters = zip(*found, strict=True)
        return (
            torch.cat(out, 1),
            InfiniState(*(torch.cat(x) for x in zip(*after, strict=True))),
            InfiniCounters(*(torch.cat(x) for x in zip(*counters, strict=True))),
        )
    dtype, length = v.dtype, q.shape[1]
    q, k, v, phi_q, phi_k = (wide(x) for x in (q, k, v, phi_q, phi_k))
    sinks = None if sinks is None else Sinks(wide(sinks.k), wide(sinks.v), sinks.seen)
    answer, mass = (None if x is None else wide(x) for x in (answer, mass))
    weight = torch.ones_like(phi_k[..., 0]) if write_gate is None else write_gate.to(k.dtype)
    M, z, n = initial.M * over(initial.n, initial.M), initial.z * over(initial.n, initial.z), initial.n
    clamped, nonfinite = (torch.zeros(n.shape, dtype=torch.int64, device=q.device) for _ in range(2))
    outs = []
    for t in range(length + 1):
        leaving = t // block - lookback - 1
        if t % block == 0 and leaving >= 0:
            part = slice(leaving * block, (leaving + 1) * block)
            chosen = None if write is None else write[:, part]
            update, limited, lost = block_update(phi_k[:, part], v[:, part], weight[:, part], chosen, clamp)
            M, z, n = M + update.M, z + update.z, n + update.n.to(n.dtype)
            clamped, nonfinite = clamped + limited, nonfinite + lost
        if t == length:
            break
        window = slice(max(0, t // block - lookback) * block, t + 1)
        visible = None if seen is None else seen[:, window]
        apart = before + (t // block - lookback) > 0
        given: list = [q[:, t], k[:, window], v[:, window], phi_q[:, t]]
        given += [None if x is None else x[:, t] for x in (answer, mass)]
        given += [visible, sinks, apart, InfiniState(M, z, n), scale]
        outs.append(step(*given))
    held = n.clamp_min(TINY)
    state = InfiniState(M / over(held, M), z / over(held, z), n)
    return torch.stack(outs, 1).to(dtype), state, InfiniCounters(clamped, nonfinite)
