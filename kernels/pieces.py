"""How much of a call is computed at once: pieces of one size, whatever the batch and the length are.

What a piece makes has to stay in the processor's cache. A piece is some chunks of one row or, where rows are
short, some whole rows; so 32 rows of 1,024 tokens are the same work in the same pieces as one of 32,768, and
a token costs the same in both.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Pieces(NamedTuple):
    """B rows of N chunks, `[B, N, ...]`, cut into pieces of all rows, of whole rows, or of parts of one row.

    Attributes:
        batch, total: B and N.
        rows, chunks: of a piece, the last of a row excepted.
    """

    batch: int
    total: int
    rows: int
    chunks: int

    @classmethod
    def of(cls, batch: int, total: int, groups: int, most: int, device: torch.device) -> "Pieces":
        """Pieces of about `most` chunks, each counted once for every key-value head.

        On a GPU rows are taken together: what is computed at once has to fill it.
        """
        if device.type != "cpu":
            return cls(batch, total, batch, max(1, most // (batch * groups)))
        chunks = max(1, most // groups)
        if chunks < total:
            return cls(batch, total, 1, chunks)
        return cls(batch, total, min(batch, max(1, most // (groups * max(1, total)))), max(1, total))

    @property
    def steps(self) -> int:
        """Pieces from the first chunk of a row to its last."""
        return -(-self.total // self.chunks)

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """`[B, N, ...]` -> pieces `[b, n, ...]`, row after row.

        All are cut at once: the backward of a slice would fill a tensor as large as all pieces with zeros.
        """
        if self.rows == self.batch:
            return x.split(self.chunks, 1)
        if self.steps == 1:
            return x.split(self.rows)
        along = [self.chunks] * (self.steps - 1) + [self.total - self.chunks * (self.steps - 1)]
        return [piece.unsqueeze(0) for piece in x.flatten(0, 1).split(along * self.batch)]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Pieces `[b, n, ...]` -> `[B, N, ...]`."""
        if self.rows == self.batch:
            return torch.cat(list(pieces), 1)
        if self.steps == 1:
            return torch.cat(list(pieces))
        return torch.cat([piece.squeeze(0) for piece in pieces]).unflatten(0, (self.batch, self.total))
