"""What linear attention carries from one call to the next, and how a read is divided."""

from typing import NamedTuple

import torch
from torch import Tensor

EMPTY = 1e-9
"""A read's denominator (in units of one token's phi(q).phi(k)) below this counts as an empty memory."""


class LinearState(NamedTuple):
    """Sums over the tokens written: M = sum phi(k)^T v `[B, G, F, D]` and z = sum phi(k) `[B, G, F]`.

    fp32, or fp64 for fp64 inputs. With `cu_seqlens` there is one state a sequence: N stands for B.
    """

    M: Tensor
    z: Tensor

    @classmethod
    def empty(
        cls, batch: int, groups: int, features: int, width: int, device: torch.device, dtype: torch.dtype
    ) -> "LinearState":
        """A state that holds nothing."""
        return cls(
            torch.zeros(batch, groups, features, width, device=device, dtype=dtype),
            torch.zeros(batch, groups, features, device=device, dtype=dtype),
        )


def divide(numerator: Tensor, denominator: Tensor, eps: float) -> Tensor:
    """numerator `[..., D]` / max(denominator `[...]`, eps), and 0 where the denominator is below `EMPTY`."""
    held = denominator.unsqueeze(-1)
    return torch.where(held < EMPTY, 0, numerator / held.clamp_min(eps))
