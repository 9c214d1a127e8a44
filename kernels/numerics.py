"""Small numerical helpers that every operator shares."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """`x` in fp32, or as it is in fp64: the dtype in which sums, softmax and states are computed."""
    return x if x.dtype == torch.float64 else x.float()


def contiguous(x: Tensor) -> Tensor:
    """`wide(x)`, contiguous, by one copy at the most."""
    dtype = x.dtype if x.dtype == torch.float64 else torch.float32
    # A conversion alone keeps the strides of what it converts; where there is none, it copies nothing.
    return x.to(dtype, memory_format=torch.contiguous_format).contiguous()


def without_autocast(device: torch.device) -> AbstractContextManager:
    """Inside, products are as precise as their factors: a long text's state in bf16 is worth nothing.

    Where autocast is off already nothing is entered, which would cost a decoded token a tenth of its time.
    """
    kind = device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def count_dtype(device: torch.device) -> torch.dtype:
    """Of weights behind a running mean: fp64, which counts tokens exactly to 2^53; fp32 on mps."""
    return torch.float32 if device.type == "mps" else torch.float64
