"""Which pairs to retain: one number per token and key-value head; the highest stay.

A score is final when it is made and depends on nothing later than its token, so that it cannot leak the future.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.registry import Registry

if TYPE_CHECKING:
    from replace.mixer import Heads

SCORES: Registry[type[nn.Module]] = Registry("attention.pairs_score")


@SCORES.register("learned")
class LearnedScore(nn.Module):
    """One linear map of the attention layer's input per layer, taught by the teacher's later attention (stage 1).

    At the start all scores are 0, so the earliest tokens are kept.
    """

    def __init__(self, heads: "Heads") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads.key_value, heads.hidden))
        self.bias = nn.Parameter(torch.zeros(heads.key_value))

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """hidden `[B, T, C]` -> `[B, G, T]` fp32."""
        x = wide(hidden)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).transpose(1, 2)


@SCORES.register("key_norm")
class KeyNormScore(nn.Module):
    """The negative norm of the key: keys of small norm attract attention (Devoto et al. 2024). No parameters."""

    def __init__(self, heads: "Heads") -> None:
        super().__init__()

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """key `[B, G, T, D]` -> `[B, G, T]` fp32."""
        return -wide(key).norm(dim=-1)


@SCORES.register("random")
class RandomScore(nn.Module):
    """A fixed hash of the token's own key: a baseline that knows nothing, yet the same however the text was cut."""

    def __init__(self, heads: "Heads") -> None:
        super().__init__()

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """key `[B, G, T, D]` -> `[B, G, T]` fp32 in [-1, 1]."""
        return torch.sin(wide(key).sum(-1) * 43758.5453)
