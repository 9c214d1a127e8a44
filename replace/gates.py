"""Numbers per token and head that a variant computes from the attention layer's input."""

import torch
from torch import Tensor, nn

from kernels.numerics import wide
from replace.blocks import Heads


class ReadGate(nn.Module):
    """g = sigmoid(beta) per head, or sigmoid(w.x_t + beta) per token and head with w = 0 at the start."""

    def __init__(self, heads: Heads, kind: str, initial: float) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.full((heads.query,), initial))
        self.weight = nn.Parameter(torch.zeros(heads.query, heads.hidden)) if kind == "token" else None

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden `[B, T, C]` -> `[B, H, T, 1]` fp32 in (0, 1)."""
        x = wide(hidden)
        beta = self.beta.to(x.dtype)
        if self.weight is None:
            return beta.sigmoid().view(1, -1, 1, 1).expand(*x.shape[:1], -1, x.shape[1], 1)
        return (
            torch.nn.functional.linear(x, self.weight.to(x.dtype), beta)
            .sigmoid()
            .transpose(1, 2)
            .unsqueeze(-1)
        )


class TokenMap(nn.Module):
    """w.x_t + b per key-value head, w = 0 at the start."""

    def __init__(self, heads: Heads, initial: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads.key_value, heads.hidden))
        self.bias = nn.Parameter(torch.full((heads.key_value,), initial))

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden `[B, T, C]` -> `[B, G, T]` fp32."""
        x = wide(hidden)
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).transpose(1, 2)
