"""Feature maps phi: q or k `[B, H, T, D]` -> `[B, H, T, F]` >= 0 in fp32; phi(q).phi(k) is a weight.

A map is a class in the registry with `features(head_dim) -> F` and a constructor `(heads, head_dim)`.
"""

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.registry import Registry

FEATURE_MAPS: Registry = Registry("attention.feature_map")


@FEATURE_MAPS.register("elu")
class Elu(nn.Module):
    """elu(x) + 1 (Katharopoulos et al. 2020).

    It is computed as relu(x) + exp(min(x, 0)), because the sum elu(x) + 1 rounds to 0 at x = -20.
    """

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()

    @staticmethod
    def features(head_dim: int) -> int:
        """F = D."""
        return head_dim

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        return x.relu() + x.clamp(max=0).exp()


@FEATURE_MAPS.register("hedgehog")
class Hedgehog(nn.Module):
    """softmax([xW, -xW]) with a learned W per head (Zhang et al. 2024), W the identity at the start."""

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))

    @staticmethod
    def features(head_dim: int) -> int:
        """F = 2 D."""
        return 2 * head_dim

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bhtd,hde->bhte", wide(x), self.weight.to(wide(x).dtype))
        return torch.cat([y, -y], dim=-1).softmax(dim=-1)
