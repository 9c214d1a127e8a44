"""Softmax attention of a block's queries over the keys that stay exact."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.numerics import wide


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """softmax(scaling q k^T) v.

    Args:
        q: `[B, G, N, Q, D]`, Q = R * S the queries of one block of all R heads that share a key-value head.
        k: `[B, G, N, K, D]`; v: `[B, G, N, K, Dv]`.
        mask: bool `[B, G, N, S, K]` (broadcast), True where a key is seen; every query sees at least one.

    Returns:
        `[B, G, N, Q, Dv]` in the dtype of v.
    """
    lead, size, keys = q.shape[:3], mask.shape[-2], k.shape[3]
    repeat = q.shape[3] // size
    bias = torch.zeros((), dtype=v.dtype, device=v.device).expand(*lead, size, keys)
    bias = bias.masked_fill(~mask, -torch.inf)
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # For so few keys the backward of torch's fused attention takes twice as long on a CPU as this one.
        logits = (wide(q) @ wide(k).transpose(-1, -2)).unflatten(3, (repeat, size)) * scaling
        weights = (logits + bias.unsqueeze(3)).softmax(-1).flatten(3, 4)
        return (F.dropout(weights, dropout) @ wide(v)).to(v.dtype)
    out = F.scaled_dot_product_attention(
        q.reshape(-1, repeat, size, q.shape[-1]).to(v.dtype),
        k.reshape(-1, 1, *k.shape[3:]).to(v.dtype).expand(-1, repeat, -1, -1),
        v.reshape(-1, 1, *v.shape[3:]).expand(-1, repeat, -1, -1),
        attn_mask=bias.reshape(-1, 1, size, keys),
        dropout_p=dropout,
        scale=scaling,
    )
    return out.reshape(*lead, repeat * size, v.shape[-1])


def exact_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The softmax itself `[B, G, N, Q, K]` and the logarithm of its denominator `[B, G, N, Q, 1]`, both fp32.

    A query that sees no key at all has weights 0 and the logarithm -inf, without NaN in forward or backward.

    Args:
        q, k, mask, scaling: as in `exact_attention`.
        softcap: logits become softcap * tanh(logits / softcap).
        sink_logit: `[1, G, 1, Q, 1]`, a learned logit per head that takes part in the denominator only.
    """
    logits = (wide(q) @ wide(k).transpose(-1, -2)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.unflatten(3, (-1, mask.shape[-2])).masked_fill(~mask.unsqueeze(3), -torch.inf)
    logits = logits.flatten(3, 4)
    if sink_logit is not None:
        logits = torch.cat([logits, wide(sink_logit).expand(*logits.shape[:-1], 1)], dim=-1)
    top = logits.detach().amax(-1, keepdim=True)
    weights = torch.exp(logits - torch.where(top == -torch.inf, 0, top))
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1, total)
    mass = torch.where(empty, -torch.inf, total.log() + top)
    return weights[..., : k.shape[-2]] / total, mass


def exact_attention_with_mass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    dropout: float = 0.0,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `exact_attention`, spelled out in fp32, with what `exact_weights` takes and gives beside it.

    Returns:
        out `[B, G, N, Q, Dv]` and log(sum exp) `[B, G, N, Q, 1]`, both fp32.
    """
    weights, mass = exact_weights(q, k, mask, scaling, softcap, sink_logit)
    return F.dropout(weights, dropout) @ wide(v), mass
