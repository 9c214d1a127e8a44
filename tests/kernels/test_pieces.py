"""How a call is cut: into pieces of one size whatever its batch and length, which are the whole."""

import pytest
import torch

from kernels.pieces import Pieces

CPU = torch.device("cpu")


@pytest.mark.parametrize("most", [1, 4, 7, 12, 20, 48, 100])
@pytest.mark.parametrize(("batch", "total"), [(1, 1), (1, 7), (3, 1), (4, 6), (5, 3)])
def test_pieces_are_the_whole(batch: int, total: int, most: int) -> None:
    pieces = Pieces.of(batch, total, 2, most, CPU)
    whole = torch.arange(batch * total * 2.0).view(batch, total, 2).requires_grad_()
    cut = pieces.cut(whole)
    assert all(2 * x.shape[0] * x.shape[1] <= max(most, 2) for x in cut)
    assert len(cut) == pieces.steps * len(torch.arange(batch).split(pieces.rows))
    joined = pieces.join(cut)
    assert torch.equal(joined, whole)
    (gradient,) = torch.autograd.grad(joined, whole, whole.detach())
    assert torch.equal(gradient, whole)


def test_as_many_tokens_are_as_many_pieces() -> None:
    """However they are arranged: else a token would cost more at one length than at another."""
    counts = set()
    for total in (1, 2, 4, 16, 64, 256):
        pieces = Pieces.of(256 // total, total, 4, 32, CPU)
        counts.add(len(pieces.cut(torch.empty(256 // total, total, 0))))
    assert counts == {32}


def test_a_gpu_takes_all_rows_at_once() -> None:
    assert Pieces.of(8, 16, 4, 64, torch.device("cuda")) == Pieces(8, 16, 8, 2)
