"""The linear memory token by token, in the sums of Munkhdalai et al. (2024): what `chunk.py` must equal."""

import torch
from torch import Tensor


def linear_memory(
    phi_q: Tensor, phi_k: Tensor, v: Tensor, weight: Tensor, block: int, lookback: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Reads of a memory that holds the blocks at least `lookback + 1` before a query's own.

    Args:
        phi_q: `[B, T, H, F]`; phi_k: `[B, T, G, F]`; v: `[B, T, G, D]`.
        weight: `[B, T, G]`, 0 where nothing is written.
        block: S.
        lookback: blocks before the query's own that stay outside the memory.

    Returns:
        reads `[B, T, H, D]` (0 where the memory is empty) and the sums M `[B, G, F, D]`, z `[B, G, F]` after
        all T tokens.
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


def delta_bounded(phi_k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """The bounded delta update of one sequence and head, in sums, block by block and token by token.

    Args:
        phi_k: `[N, S, F]`, N blocks of S tokens; v: `[N, S, D]`.
        weight: `[N, S]`, 0 where nothing is written.

    Returns:
        M `[F, D]`, z `[F]` and n, the sum of gamma.
    """
    M, z, n = torch.zeros(phi_k.shape[-1], v.shape[-1], dtype=v.dtype), torch.zeros_like(phi_k[0, 0]), 0.0
    for keys, values, gates in zip(phi_k, v, weight, strict=True):
        tokens = [(w * phi, value) for phi, value, w in zip(keys, values, gates, strict=True) if w > 0]
        new_M, new_z = M.clone(), z.clone()
        for phi, _ in tokens:
            gamma = min(1.0, max(0.0, 1 - float(phi @ z) / float(phi @ phi)))
            new_z, n = new_z + gamma * phi, n + gamma
        for phi, value in tokens:
            reach, crowd = float(phi @ new_z), sum(float(phi @ other) for other, _ in tokens)
            new_M = new_M + torch.outer(phi, min(1.0, reach / crowd) * (value - phi @ M / reach))
        M, z = new_M, new_z
    return M, z, n


def delta(phi_k: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, float]:
    """The delta update as published (eq. 5) of one sequence and head; shapes as in `delta_bounded`.

    Returns:
        M `[F, D]`, z `[F]` and n, the sum of the weights.
    """
    M, z, n = torch.zeros(phi_k.shape[-1], v.shape[-1], dtype=v.dtype), torch.zeros_like(phi_k[0, 0]), 0.0
    for keys, values, gates in zip(phi_k, v, weight, strict=True):
        new_M, new_z = M.clone(), z.clone()
        for phi, value, w in zip(keys, values, gates, strict=True):
            if w > 0:
                seen = float(phi @ z)
                new_M = new_M + torch.outer(w * phi, value - phi @ M / seen if seen else value)
                new_z, n = new_z + w * phi, n + float(w)
        M, z = new_M, new_z
    return M, z, n
