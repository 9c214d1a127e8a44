"""Feature maps phi: q or k `[B, H, T, D]` -> `[B, H, T, F]` in fp32; phi(q).phi(k) is a weight, at least 0.

A map is a subclass of `FeatureMap` in the registry. It is given q and k times the root of the teacher's
softmax scale (or `attention.scale`), so that q.k is the teacher's logit, up to positions.
"""

from typing import ClassVar

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.errors import bad_value
from replace.registry import Registry

FEATURE_MAPS: Registry[type["FeatureMap"]] = Registry("attention.feature_map", base=lambda: FeatureMap)


class FeatureMap(nn.Module):
    """The base of all maps.

    Attributes:
        learned: whether there are weights that stage 1 can teach.
        largest_head_dim: beyond it the map has too many features to be of use; None where any will do.
    """

    learned: ClassVar[bool] = False
    largest_head_dim: ClassVar[int | None] = None

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()

    @staticmethod
    def features(head_dim: int) -> int:
        """F."""
        raise NotImplementedError

    @classmethod
    def takes(cls, head_dim: int) -> bool:
        """Whether heads of this width are possible."""
        return cls.largest_head_dim is None or head_dim <= cls.largest_head_dim


def check_feature_map(name: str, head_dim: int) -> None:
    """Refuse a map that heads of this width are too wide for.

    Raises:
        UserError: unknown, or too wide.
    """
    if FEATURE_MAPS.get(name).takes(head_dim):
        return
    others = [other for other in FEATURE_MAPS.names() if FEATURE_MAPS.get(other).takes(head_dim)]
    largest = FEATURE_MAPS.get(name).largest_head_dim
    allowed = f"{', '.join(others)} for a head_dim of {head_dim} ({name} takes at most {largest})"
    raise bad_value("attention.feature_map", name, allowed)


@FEATURE_MAPS.register("elu")
class Elu(FeatureMap):
    """elu(x) + 1 (Katharopoulos et al. 2020).

    It is computed as relu(x) + exp(min(x, 0)), because the sum elu(x) + 1 rounds to 0 at x = -20.
    """

    @staticmethod
    def features(head_dim: int) -> int:
        """F = D."""
        return head_dim

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        return x.relu() + x.clamp(max=0).exp()


@FEATURE_MAPS.register("hedgehog")
class Hedgehog(FeatureMap):
    """softmax([xW, -xW]) with a learned W per head (Zhang et al. 2024), W the identity at the start."""

    learned = True

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        self.weight = nn.Parameter(torch.eye(head_dim).repeat(heads, 1, 1))

    @staticmethod
    def features(head_dim: int) -> int:
        """F = 2 D."""
        return 2 * head_dim

    def forward(self, x: Tensor) -> Tensor:
        y = torch.einsum("bhtd,hde->bhte", wide(x), self.weight.to(wide(x).dtype))
        return torch.cat([y, -y], dim=-1).softmax(dim=-1)


@FEATURE_MAPS.register("t2r")
class LearnedReLU(FeatureMap):
    """relu(xW + b) with learned W and b per head (Kasai et al. 2021, T2R).

    W starts as [I, -I] / sqrt(2) and b as 1 / sqrt(2 D). So of the two features of a dimension one is always
    open, and no token has an empty feature vector; and where none is shut phi(q).phi(k) = 1 + q.k, the first
    order of exp(q.k). Untrained, it therefore weighs like softmax where logits are small, hardly selects
    where they are large, and gives 0 to a key that opposes the query in every dimension. Training may shut
    features for good; a query without an open one reads an empty memory.
    """

    learned = True

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__(heads, head_dim)
        unit = torch.eye(head_dim) * 0.5**0.5
        self.weight = nn.Parameter(torch.cat([unit, -unit], dim=-1).repeat(heads, 1, 1))
        self.bias = nn.Parameter(torch.full((heads, 2 * head_dim), (2 * head_dim) ** -0.5))

    @staticmethod
    def features(head_dim: int) -> int:
        """F = 2 D."""
        return 2 * head_dim

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        y = torch.einsum("bhtd,hde->bhte", x, self.weight.to(x.dtype))
        return (y + self.bias.to(x.dtype).unsqueeze(1)).relu()


@FEATURE_MAPS.register("taylor")
class Taylor(FeatureMap):
    """phi(q).phi(k) = 1 + q.k + (q.k)^2 / 2, the second order of exp (Keles et al. 2023; Arora et al. 2024).

    The weight is ((1 + q.k)^2 + 1) / 2, at least 1/2 whatever the logit, up to rounding, which in fp32 is
    1e-7 of (|q| |k|)^2. Nothing is learned: it is near softmax for logits within 1 of 0, a parabola beyond,
    and so large for very negative logits as well. Features may be negative, a weight is not.
    """

    largest_head_dim = 64

    @staticmethod
    def features(head_dim: int) -> int:
        """F = 1 + D + D (D + 1) / 2: a product of two dimensions counts once, not in both orders."""
        return 1 + head_dim + head_dim * (head_dim + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        x = wide(x)
        first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
        factor = x.new_ones(len(first)).masked_fill(first == second, 0.5**0.5)
        return torch.cat([torch.ones_like(x[..., :1]), x, x[..., first] * x[..., second] * factor], dim=-1)
