"""The linear memory token by token, in the paper's sums: what `chunk.py` must equal (Munkhdalai et al. 2024, eq. 4-5)."""

import torch
from torch import Tensor


def linear_memory(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, weight: Tensor, block: int, lookback: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads of a memory that holds the blocks at least `lookback + 1` before a query's own.

    Args:
        phi_q: `[B, T, H, F]`; phi_k: `[B, T, G, F]`; v: `[B, T, G, D]`; weight: `[B, T, G]`, 0 where nothing is written.
        block: S. lookback: blocks before the query's own that stay outside the memory.

    Returns:
        reads `[B, T, H, D]` (0 where the memory is empty) and the sums M `[B, G, F, D]`, z `[B, G, F]` after all T tokens.
    """
    batch, length, heads, _ = phi_q.shape
    groups, repeat = phi_k.shape[2], heads // phi_k.shape[2]
    reads = torch.zeros(batch, length, heads, v.shape[-1], dtype=v.dtype)
    for t in range(length):
        end = max(0, t // block - lookback) * block
        for b in range(batch):
            for h in range(heads):
                g = h // repeat
                numerator, denominator = torch.zeros_like(v[b, 0, g]), torch.zeros((), dtype=v.dtype)
                for j in range(end):
                    a = weight[b, j, g] * (phi_q[b, t, h] * phi_k[b, j, g]).sum()
                    numerator, denominator = numerator + a * v[b, j, g], denominator + a
                if denominator > 0:
                    reads[b, t, h] = numerator / denominator
    weighted = phi_k * weight.unsqueeze(-1)
    return reads, torch.einsum("btgf,btgd->bgfd", weighted, v), weighted.sum(1).reshape(batch, groups, -1)
