"""The Infini memory token by token, in the sums of Munkhdalai et al. (2024): what all forms must equal."""

import torch
from torch import Tensor

from kernels.infini_memory.state import InfiniCounters, InfiniState
from kernels.linear_memory.chunk import EMPTY, LARGEST, TINY
from kernels.numerics import wide


def step(q: Tensor, local: Tensor, gate: Tensor, state: InfiniState) -> Tensor:
    """One token's read and mix; nothing is written.

    Args:
        q: `[B, H, F]`; local: `[B, H, D]`; gate: `[B, H]` or `[H]`; fp32 or fp64.

    Returns:
        `[B, H, D]`.
    """
    repeat = q.shape[1] // state.z.shape[1]
    M, z = (x.repeat_interleave(repeat, 1) for x in (state.M, state.z))
    reach = (q * z).sum(-1, keepdim=True)
    empty = reach <= EMPTY
    answer = torch.einsum("bhf,bhfd->bhd", q, M) / torch.where(empty, 1, reach)
    share = gate.to(q.dtype).unsqueeze(-1)
    return torch.where(empty, local, share * answer + (1 - share) * local)


def infini_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    local: Tensor,
    gate: Tensor,
    write_gate: Tensor | None,
    mask: Tensor | None,
    initial: InfiniState,
    block: int,
    lookback: int,
    clamp: float,
) -> tuple[Tensor, InfiniState, InfiniCounters]:
    """`kernels.infini_memory`, one token after the other, in fp32 or fp64; arguments checked before."""
    dtype, (batch, length), groups = v.dtype, q.shape[:2], k.shape[2]
    q, k, v, local = wide(q), wide(k), wide(v), wide(local)
    weight = k.new_ones(batch, length, groups) if write_gate is None else write_gate.to(k.dtype)
    M, z, n = initial.M * over(initial.n, initial.M), initial.z * over(initial.n, initial.z), initial.n
    clamped, nonfinite = (torch.zeros(batch, groups, dtype=torch.int64, device=q.device) for _ in range(2))

    def write(index: int) -> None:
        """Add block `index` to the sums, its mean limited."""
        nonlocal M, z, n, clamped, nonfinite
        tokens = slice(index * block, (index + 1) * block)
        seen = None if mask is None else mask[:, tokens]
        update, limited, lost = block_update(k[:, tokens], v[:, tokens], weight[:, tokens], seen, clamp)
        M, z, n = M + update.M, z + update.z, n + update.n.to(n.dtype)
        clamped, nonfinite = clamped + limited, nonfinite + lost

    def state() -> InfiniState:
        held = n.clamp_min(TINY)
        return InfiniState(M / over(held, M), z / over(held, z), n)

    outs = []
    for t in range(length):
        if t % block == 0 and t // block - lookback > 0:
            write(t // block - lookback - 1)
        outs.append(step(q[:, t], local[:, t], gate[:, t] if gate.dim() == 3 else gate, state()))
    if length % block == 0 and length // block - lookback > 0:
        write(length // block - lookback - 1)
    return torch.stack(outs, 1).to(dtype), state(), InfiniCounters(clamped, nonfinite)


def block_update(
    k: Tensor, v: Tensor, weight: Tensor, mask: Tensor | None, clamp: float
) -> tuple[InfiniState, Tensor, Tensor]:
    """What one block adds to the sums, token by token, its mean limited.

    Args:
        k: `[B, S, G, F]`; v: `[B, S, G, D]`; weight: `[B, S, G]`; fp32 or fp64.
        mask: `[B, S]` bool, False where a token is not written.

    Returns:
        the sums; `[B, G]` bool, whether they were limited; `[B, G]` int64, the tokens left out.
    """
    batch, _, groups, features = k.shape
    M, z = k.new_zeros(batch, groups, features, v.shape[-1]), k.new_zeros(batch, groups, features)
    count, lost = torch.zeros_like(z[..., 0]), torch.zeros(batch, groups, dtype=torch.int64, device=k.device)
    for t in range(k.shape[1]):
        key, value, w = k[:, t], v[:, t], weight[:, t]
        largest = torch.maximum(key.abs().amax(-1), value.abs().amax(-1))
        fits = (torch.maximum(largest, w.abs()) < LARGEST).detach()
        here = torch.ones_like(fits) if mask is None else mask[:, t, None]
        lost = lost + (here & ~fits & ~(w <= 0))
        taken = here & fits & (w > 0)
        key, value = (torch.where(taken.unsqueeze(-1), x, 0) for x in (key, value))
        w = torch.where(taken, w, 0)
        weighted = w.unsqueeze(-1) * key
        M = M + weighted.unsqueeze(-1) * value.unsqueeze(-2)
        z, count = z + weighted, count + w.detach()
    mean = torch.maximum(M.detach().abs().amax((-1, -2)), z.detach().abs().amax(-1)) / count.clamp_min(TINY)
    limit = clamp / mean.clamp_min(clamp)
    return InfiniState(M * over(limit, M), z * over(limit, z), count), mean > clamp, lost


def over(x: Tensor, like: Tensor) -> Tensor:
    """`[B, G]` against `[B, G, ...]`, in that dtype."""
    return x.to(like.dtype).view(*x.shape, *[1] * (like.dim() - 2))
