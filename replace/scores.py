"""Which pairs to retain: one number per token and key-value head; the highest stay.

A score is final when the token's block leaves the window and depends on nothing later, so that it cannot leak
the future. What a score is given is said by `needs`:

- `token`: forward(hidden `[B, T, C]`, key, value `[B, G, T, D]`) -> `[B, G, T]`;
- `position`: forward(positions `[Q, W]` int64) -> `[Q, G, W]`;
- `window`: forward(weights `[Q, G, N, R, S, P]`, how the R S queries of each block attend to the P slots of
  its window) -> `[Q, G, N, P]`, summed over the blocks that see a slot;
- `memory`: forward(value, answer, both `[Q, G, N, S, D]`, the leaving values and what the memory of all older
  tokens answers to their keys) -> `[Q, G, N, S]`.
"""

from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.registry import Registry

if TYPE_CHECKING:
    from replace.mixer import Heads

SCORES: Registry[type["Score"]] = Registry("attention.pairs_score", base=lambda: Score)


class Score(nn.Module):
    """The base of all scores.

    Attributes:
        needs: see the module.
        grid: scores are rounded to 1 / grid. Equal tokens have equal scores up to rounding noise, which would
            otherwise decide, differently in each cut of the same text, which of them is kept; on a grid they
            tie, and the earlier one stays.
    """

    needs: ClassVar[str] = "token"
    grid: ClassVar[int] = 1024

    def __init__(self, heads: "Heads") -> None:
        super().__init__()
        self.groups = heads.key_value

    def final(self, score: Tensor) -> Tensor:
        """On the grid, and finite: one that overflowed is the lowest, or its pair would be in no place."""
        lowest = torch.finfo(score.dtype).min
        return ((score * self.grid).round() / self.grid).nan_to_num(lowest, lowest, lowest)


PRIOR = -2.7
"""The logit of 6 %, the share of tokens worth retaining: from 0 it takes a hundred rows to learn it."""


@SCORES.register("learned")
class LearnedScore(Score):
    """A linear map of the attention layer's input, taught in stage 1 by the teacher's later attention.

    At the start all scores are equal, so the earliest tokens are kept, and in recent places the latest.
    """

    def __init__(self, heads: "Heads") -> None:
        super().__init__(heads)
        self.weight = nn.Parameter(torch.zeros(heads.key_value, heads.hidden))
        self.bias = nn.Parameter(torch.full((heads.key_value,), PRIOR))

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """hidden `[B, T, C]` -> `[B, G, T]` fp32."""
        x = wide(hidden)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).transpose(1, 2)


@SCORES.register("key_norm")
class KeyNormScore(Score):
    """The negative norm of the key: keys of small norm attract attention (Devoto et al. 2024).

    No parameters.
    """

    def forward(self, hidden: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """key `[B, G, T, D]` -> `[B, G, T]` fp32."""
        return -wide(key).norm(dim=-1)


@SCORES.register("random")
class RandomScore(Score):
    """A fixed hash of position and head: a baseline that knows nothing, the same however a text is cut."""

    needs = "position"

    def forward(self, positions: Tensor) -> Tensor:
        """positions `[Q, W]` -> `[Q, G, W]` fp32, one of 2^22 levels, all of them on the grid."""
        head = torch.arange(self.groups, device=positions.device).view(1, -1, 1)
        x = positions.unsqueeze(1) * 0x9E3779B1 + head * 0x85EBCA77
        for factor in (0x2C1B3C6D, 0x297A2D39):
            x = x & 0xFFFFFFFF
            x = (x ^ (x >> 15)) * factor
        return ((x >> 10) & 0x3FFFFF).float() / self.grid


@SCORES.register("attention")
class AttentionScore(Score):
    """The attention a token receives while in the window (H2O, Zhang et al. 2023, for a bounded time)."""

    needs = "window"

    def forward(self, weights: Tensor) -> Tensor:
        """weights `[Q, G, N, R, S, P]` -> `[Q, G, N, P]`: the group's largest head, summed over queries."""
        return weights.amax(3).sum(3)


@SCORES.register("self_recall")
class SelfRecallScore(Score):
    """How badly the memory answers a token's own key (McDermott et al. 2025, LoLA).

    What the memory knows need not be kept.
    """

    needs = "memory"
    grid = 2**16  # residuals are of the size of values, which may be small throughout

    def forward(self, value: Tensor, answer: Tensor) -> Tensor:
        """value, answer `[Q, G, N, S, D]` -> `[Q, G, N, S]`: the norm of the residual."""
        return (value - answer).norm(dim=-1)
