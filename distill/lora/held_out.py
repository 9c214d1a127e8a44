"""The loss on conversations that are not trained on, before and after, on the assistant's turns alone."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.lora.rows import IGNORED, Encoded, Packed, pack
from distill.lora.stage import cross_entropies, pieces
from distill.stages import head_of
from replace.precision import autocast, cast_once

LENGTH = 512
ROWS = 4
"""Rows that are read at the least: a smoke budget has too few tokens for a mean."""


@dataclass
class Losses:
    """Sums over the learnt tokens of each packed row, in nats, and how many they are, `[rows]`."""

    nats: Tensor
    tokens: Tensor


@torch.no_grad()
def held_out_loss(
    model: PreTrainedModel, documents: Sequence[Encoded], tokens: int, filler: int, precision: str
) -> Losses | None:
    """The losses on packed rows of up to about `tokens` tokens; None where there are no documents."""
    rows = pack(documents, LENGTH, filler)[: max(ROWS, tokens // LENGTH)]
    if not rows:
        return None
    training = model.training
    model.eval()
    nats, counts = [], []
    with autocast(precision, model.device), cast_once(model, precision):
        head = head_of(model)
        for ids, labels, positions in rows:
            batch = Packed(ids[None], labels[None], positions[None], 0).to(model.device)
            nats.append(sum(float(cross_entropies(h, y, head).sum()) for h, y in pieces(model, batch)))
            counts.append(int((labels[1:] != IGNORED).sum()))
    model.train(training)
    return Losses(torch.tensor(nats, dtype=torch.float64), torch.tensor(counts, dtype=torch.float64))


def compared(before: Losses | None, after: Losses | None) -> dict[str, Any] | None:
    """The mean losses of a token before and after, and their difference with its standard error over rows."""
    if before is None or after is None:
        return None
    total, rows = float(before.tokens.sum()), len(before.tokens)
    difference = float((after.nats - before.nats).sum()) / total
    # Of a ratio of sums, by its linearisation.
    rest = after.nats - before.nats - difference * before.tokens
    error = math.sqrt(float(rest.square().sum()) * rows / (rows - 1)) / total if rows > 1 else None
    return {
        "before": float(before.nats.sum()) / total,
        "after": float(after.nats.sum()) / total,
        "difference": difference,
        "standard_error": error,
        "tokens": int(total),
        "rows": rows,
        "unit": "nats a token of the assistant's turns",
    }
