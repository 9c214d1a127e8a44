"""Small numerical helpers that every operator shares."""

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


def count_dtype(device: torch.device) -> torch.dtype:
    """Of weights behind a running mean: fp64, which counts tokens exactly to 2^53; fp32 on mps."""
    return torch.float32 if device.type == "mps" else torch.float64
