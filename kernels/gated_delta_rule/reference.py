"""The gated delta rule token by token: what `chunk.py` must equal."""

import torch
from torch import Tensor

from kernels.gated_delta_rule.chunk import ABSOLUTE, RELATIVE
from kernels.numerics import wide


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor,
    initial_state: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S <- a_t S;  S <- S + b_t k_t (v_t - k_t S)^T;  o_t = q_t S, for each sequence and key-value head.

    Args:
        q: `[B, T, H, D]`, H = R G; head h reads the state of key-value head h // R.
        k: `[B, T, G, D]`; v: `[B, T, G, Dv]`.
        beta: `[B, T, G]` from 0 to 1, the share of the old answer to k_t that is replaced;
            b_t = beta_t / (|k_t|^2 (1 + RELATIVE) + ABSOLUTE).
        log_decay: `[B, T, G]` <= 0, the logarithm of a_t.
        initial_state: `[B, G, D, Dv]`; None for zeros.
        mask: bool `[B, T]` or `[B, T, G]`; a token that is False neither writes nor decays.

    Returns:
        out `[B, T, H, Dv]` and the state after the last token `[B, G, D, Dv]`, both fp32 (fp64 for fp64).
    """
    q, k, v, beta, log_decay = (wide(x) for x in (q, k, v, beta, log_decay))
    batch, length, heads, width = q.shape
    groups = k.shape[2]
    state = k.new_zeros(batch, groups, width, v.shape[-1]) if initial_state is None else wide(initial_state)
    outputs = []
    for t in range(length):
        key, value, share, decay = k[:, t], v[:, t], beta[:, t], log_decay[:, t].exp()
        if mask is not None:
            seen = mask[:, t].reshape(batch, -1).expand(batch, groups)
            share, decay = torch.where(seen, share, 0), torch.where(seen, decay, 1)
            key, value = (torch.where(seen.unsqueeze(-1), x, 0) for x in (key, value))
        state = decay[..., None, None] * state
        step = share / (key.square().sum(-1) * (1 + RELATIVE) + ABSOLUTE)
        error = value - torch.einsum("bgd,bgdv->bgv", key, state)
        state = state + torch.einsum("bg,bgd,bgv->bgdv", step, key, error)
        per_head = state.repeat_interleave(heads // groups, dim=1)
        outputs.append(torch.einsum("bhd,bhdv->bhv", q[:, t], per_head))
    out = torch.stack(outputs, 1) if outputs else q.new_zeros(batch, 0, heads, v.shape[-1])
    return out, state
