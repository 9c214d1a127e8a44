"""Which keys are exact, and softmax over them, one query at a time: what the chunked path must equal."""

import math

import torch
from torch import Tensor


def exact_keys(t: int, block: int, lookback: int, sinks: int, retained: list[int]) -> list[int]:
    """Positions that stay exact for the query at position t, sorted.

    They are its own block up to t, `lookback` blocks before it, and what is older of the first `sinks` tokens
    and of the retained positions.
    """
    start = max(0, t // block - lookback) * block
    far = {j for j in (*range(sinks), *retained) if j < start}
    return sorted(far) + list(range(start, t + 1))


def softmax_read(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Tensor:
    """softmax(scaling q k^T) v for one query: q `[D]`, k `[K, D]`, v `[K, Dv]` -> `[Dv]`."""
    logits = [scaling * float(q @ key) for key in k]
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return torch.stack([w * value for w, value in zip(weights, v, strict=True)]).sum(0) / sum(weights)
