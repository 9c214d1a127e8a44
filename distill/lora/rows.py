"""The rows that adapters are trained on: documents packed into rows, each token with its position."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from replace.config import StageBudget

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a token that no loss is taken of."""


@dataclass
class Encoded:
    """One document: its tokens, and which of them are learnt.

    Attributes:
        ids: `[N]` int64.
        learnt: `[N]` bool.
    """

    ids: Tensor
    learnt: Tensor


@dataclass
class Packed:
    """Rows of one part of a step.

    Attributes:
        input_ids: `[B, T]`.
        labels: `[B, T]`, the token itself or IGNORED; position t predicts the label of t + 1.
        position_ids: `[B, T]`, which begin anew at 0 with each document. By them softmax layers mask and
            replaced layers reset their memory, so nothing passes from one document to the next.
        counted: learnt tokens of all parts of the step, which its loss is the mean over.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    counted: int

    def to(self, device: torch.device) -> "Packed":
        """The same rows on a device."""
        ids, labels, positions = (x.to(device) for x in (self.input_ids, self.labels, self.position_ids))
        return Packed(ids, labels, positions, self.counted)

    def rows(self, part: slice) -> "Packed":
        """Some of the rows; the step's learnt tokens are counted as before."""
        return Packed(self.input_ids[part], self.labels[part], self.position_ids[part], self.counted)


def pack(documents: Sequence[Encoded], length: int, filler: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows of ids, labels and positions, each `[length]`, the documents in their order.

    A document that does not fit into what is left of a row begins the next one; the rest of a row is a
    document of its own, of `filler` tokens that are not learnt. What is longer than a row loses its end, and
    a document is left out that then has nothing to learn.
    """
    rows, cut, dropped = [], 0, 0
    held: list[Encoded] = []
    for document in documents:
        short = Encoded(document.ids[:length], document.learnt[:length])
        if not bool(short.learnt[1:].any()):
            dropped += 1
            continue
        cut += len(short.ids) < len(document.ids)
        if held and sum(len(one.ids) for one in held) + len(short.ids) > length:
            rows.append(_row(held, length, filler))
            held = []
        held.append(short)
    if held:
        rows.append(_row(held, length, filler))
    if cut or dropped:
        logger.info(
            "of %d documents %d lost their end, and %d were left out with nothing to learn in %d tokens",
            *(len(documents), cut, dropped, length),
        )
    return rows


def _row(documents: list[Encoded], length: int, filler: int) -> tuple[Tensor, Tensor, Tensor]:
    left = length - sum(len(one.ids) for one in documents)
    rest = Encoded(torch.full((left,), filler), torch.zeros(left, dtype=torch.bool))
    parts = [*documents, rest]
    ids = torch.cat([one.ids for one in parts])
    labels = torch.cat([_labels(one) for one in parts])
    return ids, labels, torch.cat([torch.arange(len(one.ids)) for one in parts])


def _labels(document: Encoded) -> Tensor:
    """The first token of a document has nothing before it that could predict it."""
    labels = document.ids.masked_fill(~document.learnt, IGNORED)
    labels[:1] = IGNORED
    return labels


class PackedRows:
    """Draws packed rows; row i depends on the documents, the seed and i alone."""

    def __init__(
        self, rows: list[tuple[Tensor, Tensor, Tensor]], budget: StageBudget, accumulate: int, seed: int
    ) -> None:
        self.rows, self.budget, self.accumulate = rows, budget, accumulate
        generator = torch.Generator().manual_seed(seed * 1000 + 4)
        self.order = torch.randperm(len(rows), generator=generator).tolist()

    @property
    def steps(self) -> int:
        """Optimizer steps: all tokens are used, and less than one step's more."""
        return -(-self.budget.tokens // (self.budget.batch * self.accumulate * self.budget.length))

    def batch(self, step: int, accumulate: int = 1, part: int = 0) -> Packed:
        """The rows of step `step`, or of its part `part` of `accumulate`."""
        size = self.budget.batch
        first = step * accumulate * size
        numbers = [self.order[(first + i) % len(self.order)] for i in range(accumulate * size)]
        counted = sum(int((self.rows[number][1][1:] != IGNORED).sum()) for number in numbers)
        mine = [self.rows[number] for number in numbers[part * size : (part + 1) * size]]
        ids, labels, positions = (torch.stack(column) for column in zip(*mine, strict=True))
        return Packed(ids, labels, positions, counted)
