"""Linear attention token by token (Katharopoulos et al. 2020, eq. 16-20): what all other forms must equal."""

from itertools import pairwise

import torch
from torch import Tensor

from kernels.linear_attention.state import LinearState, divide
from kernels.numerics import wide


def step(
    q: Tensor, k: Tensor, v: Tensor, state: LinearState, mask: Tensor | None, normalize: bool, eps: float
) -> tuple[Tensor, LinearState]:
    """One token: write phi(k)^T v, then read with phi(q).

    Args:
        q: `[B, H, F]`; k: `[B, G, F]`; v: `[B, G, D]`; fp32 or fp64.
        mask: `[B]` bool, False where the token is not written.

    Returns:
        `[B, H, D]`, and the state with the token.
    """
    if mask is not None:
        k, v = torch.where(mask[:, None, None], k, 0), torch.where(mask[:, None, None], v, 0)
    state = LinearState(state.M + k.unsqueeze(-1) * v.unsqueeze(-2), state.z + k)
    queries = q.unflatten(1, (k.shape[1], -1))
    out = torch.einsum("bgrf,bgfd->bgrd", queries, state.M)
    if normalize:
        out = divide(out, torch.einsum("bgrf,bgf->bgr", queries, state.z), eps)
    return out.flatten(1, 2), state


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: LinearState,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, LinearState]:
    """`kernels.linear_attention`, one token after the other, in fp32 or fp64; arguments checked before."""
    q, k, v, dtype = wide(q), wide(k), wide(v), v.dtype
    if cu_seqlens is not None:
        outs, states = [], []
        for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            part = slice(start, stop)
            held = LinearState(initial.M[n : n + 1], initial.z[n : n + 1])
            written = None if mask is None else mask[:, part]
            out, state = linear_attention(
                q[:, part], k[:, part], v[:, part], held, written, None, normalize, eps
            )
            outs.append(out)
            states.append(state)
        M, z = zip(*states, strict=True)
        return torch.cat(outs, 1).to(dtype), LinearState(torch.cat(M), torch.cat(z))
    outs, state = [], initial
    for t in range(q.shape[1]):
        written = None if mask is None else mask[:, t]
        out, state = step(q[:, t], k[:, t], v[:, t], state, written, normalize, eps)
        outs.append(out)
    return torch.stack(outs, 1).to(dtype), state
