"""What the Infini memory carries from one call to the next, and what it counts."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.numerics import count_dtype


class InfiniState(NamedTuple):
    """Running means over the tokens written, each weighing as much as its write gate says.

    M = sum w phi(k)^T v / n `[B, G, F, D]` and z = sum w phi(k) / n `[B, G, F]`, fp32, or fp64 for fp64
    inputs; n = sum w `[B, G]`, fp64 or int64, exact to 2^53 tokens. n M and n z are the sums of the paper.
    """

    M: Tensor
    z: Tensor
    n: Tensor

    @classmethod
    def empty(
        cls, batch: int, groups: int, features: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> "InfiniState":
        """A state that holds nothing."""
        return cls(
            torch.zeros(batch, groups, features, width, device=device, dtype=dtype),
            torch.zeros(batch, groups, features, device=device, dtype=dtype),
            torch.zeros(batch, groups, device=device, dtype=count_dtype(device)),
        )


class InfiniCounters(NamedTuple):
    """What was not taken as it came, of each row and key-value head: `[B, G]` int64, on the device."""

    clamped: Tensor
    """Blocks whose mean update was limited."""
    nonfinite: Tensor
    """Tokens left out because key, value or write gate was not finite, or too large."""


def written_blocks(length: int, block: int, lookback: int) -> int:
    """How many blocks of a call leave for good: whole ones with `lookback` whole ones after them."""
    return max(0, length // block - lookback)
