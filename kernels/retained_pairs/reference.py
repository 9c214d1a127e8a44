"""Retained pairs, one block at a time in plain Python: what `chunk.py` must equal."""

import torch
from torch import Tensor


def select_pairs(
    scores: Tensor, initial: Tensor, rank: Tensor | None = None, recent: int = 0
) -> list[list[list[list[int]]]]:
    """The kept pool indices after each block, by sorting Python tuples.

    Args:
        scores: `[B, G, N, S]`, -inf where a token is no candidate.
        initial: `[B, G, K]`, scores of the pairs held before, -inf where a place is empty.
        rank: `[B, G, K + N S]`, what the recent places go by.
        recent: how many of the K places go to the best by `rank` of what the score leaves out.

    Returns:
        for each batch row, head and number of blocks seen (0..N): the sorted pool indices of the living
        pairs. Index i < K is a pair held before, K + j * S + s the token s of block j.
    """
    batch, groups, blocks, size = scores.shape
    keep = initial.shape[-1]
    result = []
    for row in range(batch):
        heads = []
        for head in range(groups):
            held = [(i, float(x)) for i, x in enumerate(initial[row, head]) if x != -torch.inf]
            steps = [[i for i, _ in held]]
            for block in range(blocks):
                for slot in range(size):
                    score = float(scores[row, head, block, slot])
                    if score != -torch.inf:
                        held.append((keep + block * size + slot, score))
                held.sort(key=lambda item: (-item[1], item[0]))
                held, rest = held[: keep - recent], held[keep - recent :]
                if rank is not None:
                    ranks = rank[row, head].tolist()
                    rest.sort(key=lambda item: (-ranks[item[0]], item[0]))
                held = sorted([*held, *rest[:recent]])
                steps.append([i for i, _ in held])
            heads.append(steps)
        result.append(heads)
    return result
