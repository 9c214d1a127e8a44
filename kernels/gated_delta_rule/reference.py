"""The gated delta rule token by token: what all other forms must equal."""

from itertools import pairwise

import torch
from torch import Tensor

from kernels.gated_delta_rule.chunk import scaled_step
from kernels.numerics import wide


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
    """One token: decay, replace what k reads, then read with q.

    Args:
        q: `[B, H, F]`; k: `[B, G, F]`; v: `[B, G, D]`; fp32 or fp64.
        beta: `[B, G]`; log_decay: `[B, G]`, None for no decay.
        state: `[B, G, F, D]`.
        mask: bool `[B, 1]` or `[B, G]`, False where the token neither writes nor decays.
        scaled: as in `gated_delta_rule`.

    Returns:
        `[B, H, D]`, and the state with the token.
    """
    log_decay = torch.zeros_like(beta) if log_decay is None else log_decay
    if mask is not None:
        beta, log_decay = torch.where(mask, beta, 0), torch.where(mask, log_decay, 0)
        k, v = (torch.where(mask.unsqueeze(-1), x, 0) for x in (k, v))
    share = scaled_step(k, beta) if scaled else beta
    state = log_decay.exp()[..., None, None] * state
    error = v - torch.einsum("bgf,bgfd->bgd", k, state)
    state = state + torch.einsum("bg,bgf,bgd->bgfd", share, k, error)
    out = torch.einsum("bgrf,bgfd->bgrd", q.unflatten(1, (k.shape[1], -1)), state)
    return out.flatten(1, 2), state


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
) -> tuple[Tensor, Tensor]:
    """S <- a_t S;  S <- S + b_t k_t (v_t - k_t S)^T;  o_t = q_t S, for each sequence and key-value head.

    Args:
        q: `[B, T, H, F]`, H = R G; head h reads the state of key-value head h // R.
        k: `[B, T, G, F]`; v: `[B, T, G, D]`.
        beta: `[B, T, G]` from 0 to 1, the share of the old answer to k_t that is replaced;
            b_t = beta_t / (|k_t|^2 (1 + RELATIVE) + ABSOLUTE), or beta_t itself where not `scaled`.
        log_decay: `[B, T, G]` <= 0, the logarithm of a_t; None for a_t = 1.
        initial_state: `[N, G, F, D]`; None for zeros.
        mask: bool `[B, T]` or `[B, T, G]`; a token that is False neither writes nor decays.
        cu_seqlens: `[N + 1]`, where the sequences packed into one row begin and end; else N = B.

    Returns:
        out `[B, T, H, D]` and the state after the last token `[N, G, F, D]`, both fp32 (fp64 for fp64).
    """
    q, k, v, beta = (wide(x) for x in (q, k, v, beta))
    if log_decay is not None:
        log_decay = wide(log_decay)
    if cu_seqlens is not None:
        parts = []
        for n, (start, stop) in enumerate(pairwise(cu_seqlens.tolist())):
            piece = slice(start, stop)
            decay = None if log_decay is None else log_decay[:, piece]
            seen = None if mask is None else mask[:, piece]
            held = None if initial_state is None else initial_state[n : n + 1]
            tokens = (q[:, piece], k[:, piece], v[:, piece], beta[:, piece])
            parts.append(gated_delta_rule(*tokens, decay, held, seen, scaled=scaled))
        outs, states = zip(*parts, strict=True)
        return torch.cat(outs, 1), torch.cat(states)
    if mask is not None and mask.ndim == 2:
        mask = mask.unsqueeze(-1)
    batch, length, heads, _ = q.shape
    shape = (batch, k.shape[2], k.shape[3], v.shape[3])
    state = k.new_zeros(shape) if initial_state is None else wide(initial_state)
    outputs = []
    for t in range(length):
        decay, seen = (None if x is None else x[:, t] for x in (log_decay, mask))
        out, state = step(q[:, t], k[:, t], v[:, t], beta[:, t], decay, state, seen, scaled)
        outputs.append(out)
    out = torch.stack(outputs, 1) if outputs else q.new_zeros(batch, 0, heads, v.shape[-1])
    return out, state
