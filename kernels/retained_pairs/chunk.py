"""Retained pairs, block by block in PyTorch.

Some of the K places may be kept for recent pairs: they go to the best by another rank, in which a later pair
is ahead by its lateness, among those that the score alone has left out.

Both are total orders (the higher first, then the earlier position) that no later candidate changes, which
makes the choice made block by block equal to the choice made over all candidates at once, so that prefill in
any pieces keeps the same pairs. For the recent places that holds because a pair that the score alone once
leaves out is left out for good.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Selection:
    """Which pairs are held before each block, as indices into a pool.

    Pool index i < K is a pair held before the call, K + j * S + s is token s of block j.

    Attributes:
        index: `[B, G, N + 1, K]` int64, in the order of the pool; entry i holds after i blocks were offered.
        alive: `[B, G, N + 1, K]` bool, False where a place is empty.
        dropped: `[B, G, N, S]` int64, the S pool indices that lost at each block, empty places included.
        dropped_alive: `[B, G, N, S]` bool, False where the loser was no candidate at all.
    """

    index: Tensor
    alive: Tensor
    dropped: Tensor
    dropped_alive: Tensor


@torch.no_grad()
def select_pairs(scores: Tensor, initial: Tensor, rank: Tensor | None = None, recent: int = 0) -> Selection:
    """Keep the K best-scored pairs as blocks are offered one after the other.

    Args:
        scores: `[B, G, N, S]` fp32, -inf where a token is no candidate.
        initial: `[B, G, K]` fp32, scores of the pairs held before, -inf where a place is empty.
        rank: `[B, G, K + N S]` fp32, in the order of the pool: what the recent places go by, -inf where the
            score is.
        recent: how many of the K places go to the best by `rank` of what the score leaves out.
    """
    batch, groups, blocks, size = scores.shape
    keep = initial.shape[-1]
    held_score = initial
    held_index = torch.arange(keep, device=scores.device).expand(batch, groups, keep)
    tokens = torch.arange(size, device=scores.device).expand(batch, groups, size)
    index, score = [held_index], [held_score]
    dropped, dropped_score = [], []
    for block in range(blocks):
        pool_score = torch.cat([held_score, scores[:, :, block]], dim=-1)
        pool_index = torch.cat([held_index, tokens + (keep + block * size)], dim=-1)
        order = torch.argsort(pool_score, dim=-1, descending=True, stable=True)
        if recent:
            assert rank is not None
            pool_rank = rank.gather(-1, pool_index).scatter(-1, order[..., : keep - recent], torch.inf)
            order = torch.argsort(pool_rank, dim=-1, descending=True, stable=True)
        kept, lost = order[..., :keep].sort(dim=-1).values, order[..., keep:]
        held_score, held_index = pool_score.gather(-1, kept), pool_index.gather(-1, kept)
        index.append(held_index)
        score.append(held_score)
        dropped.append(pool_index.gather(-1, lost))
        dropped_score.append(pool_score.gather(-1, lost))
    empty = scores.new_empty(batch, groups, 0, size)
    return Selection(
        index=torch.stack(index, dim=2),
        alive=torch.stack(score, dim=2) != -torch.inf,
        dropped=torch.stack(dropped, dim=2) if dropped else empty.long(),
        dropped_alive=(torch.stack(dropped_score, dim=2) if dropped else empty) != -torch.inf,
    )


def gather_pool(pool: Tensor, index: Tensor) -> Tensor:
    """Rows of a pool: `pool [B, G, P, D]`, `index [B, G, ...]` -> `[B, G, ..., D]`.

    An embedding look-up: its backward is a dense accumulation, several times faster on CPUs than `gather`'s.
    """
    batch, groups, size, width = pool.shape
    offset = (
        torch.arange(batch * groups, device=pool.device).view(batch, groups, *[1] * (index.ndim - 2)) * size
    )
    return torch.nn.functional.embedding(index + offset, pool.reshape(-1, width))
