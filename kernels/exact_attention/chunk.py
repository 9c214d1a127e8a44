"""Softmax attention of a block's queries over the keys that stay exact."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.numerics import wide


def exact_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, dropout: float = 0.0
) -> Tensor:
    """softmax(scaling q k^T) v by torch's fused attention.

    Args:
        q: `[B, G, N, Q, D]`, Q = R * S the queries of one block of all R heads that share a key-value head.
        k: `[B, G, N, K, D]`; v: `[B, G, N, K, Dv]`.
        mask: bool, broadcastable to `[B, G, N, Q, K]`, True where a key is seen; every query sees at least
            one.

    Returns:
        `[B, G, N, Q, Dv]` in the dtype of v.
    """
    lead, queries, keys = q.shape[:3], q.shape[3], k.shape[3]
    flat_mask = mask.expand(*lead, queries, keys).reshape(-1, 1, queries, keys)
    out = F.scaled_dot_product_attention(
        q.reshape(-1, 1, *q.shape[3:]).to(v.dtype),
        k.reshape(-1, 1, *k.shape[3:]).to(v.dtype),
        v.reshape(-1, 1, *v.shape[3:]),
        attn_mask=flat_mask,
        dropout_p=dropout,
        scale=scaling,
    )
    return out.view(*lead, queries, v.shape[-1])


def exact_weights(
    q: Tensor,
    k: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The softmax itself `[B, G, N, Q, K]` and the logarithm of its denominator `[B, G, N, Q, 1]`, both fp32.

    Args:
        q, k, mask, scaling: as in `exact_attention`.
        softcap: logits become softcap * tanh(logits / softcap).
        sink_logit: `[1, G, 1, Q, 1]`, a learned logit per head that takes part in the denominator only.
    """
    logits = (wide(q) @ wide(k).transpose(-1, -2)) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~mask, -torch.inf)
    if sink_logit is not None:
        logits = torch.cat([logits, wide(sink_logit).expand(*logits.shape[:-1], 1)], dim=-1)
    mass = torch.logsumexp(logits, dim=-1, keepdim=True)
    return torch.exp(logits - mass)[..., : k.shape[-2]], mass


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
