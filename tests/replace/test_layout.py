"""Tokens to slots and back, and what counts as a document."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from replace.layout import documents_of, general_layout, plain_layout


def numbered(batch: int, tokens: int) -> Tensor:
    """`[B, 1, T, 1]`, every token its own number from 1 on."""
    return torch.arange(1, batch * tokens + 1).view(batch, 1, tokens, 1).float()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 5), st.integers(0, 2), st.integers(0, 999))
def test_every_real_token_has_its_slot_and_comes_back(
    batch: int, tokens: int, block: int, lookback: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    real = torch.rand(batch, tokens, generator=generator) > 0.3
    before = torch.randint(0, 9, (batch,), generator=generator)
    layout = general_layout(real, None, before, block, lookback)
    x = numbered(batch, tokens)
    slots = layout.new(x)
    assert torch.equal(layout.back(slots), torch.where(real[:, None, :, None], x, 0))
    positions = layout.positions()[:, lookback * block :]
    for row in range(batch):
        tokens_here = x[row, 0, real[row], 0]
        first = int(before[row])
        for i, number in enumerate(tokens_here):
            at = (positions[row] == first + i).nonzero()
            assert slots[row, 0, at.item(), 0] == number
        assert int((slots[row] != 0).sum()) == len(tokens_here)
        assert int(layout.length[row]) == first + len(tokens_here)
    assert (layout.start % block == 0).all()
    assert torch.equal(layout.evicted(), layout.length // block - before // block)


def test_plain_is_general_without_pads() -> None:
    plain = plain_layout(2, 11, 4, 1, torch.device("cpu"))
    general = general_layout(torch.ones(2, 11, dtype=torch.bool), None, None, 4, 1)
    x = numbered(2, 11)
    assert torch.equal(plain.new(x), general.new(x))
    assert torch.equal(plain.positions(), general.positions())
    for name in ("start", "length", "before"):
        assert torch.equal(getattr(plain, name), getattr(general, name))


def test_each_document_is_a_sequence_from_position_0() -> None:
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 1, 1]]).bool()
    document = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    layout = general_layout(real, document, None, 2, 1)
    assert layout.length.tolist() == [3, 2, 2, 2]
    assert layout.row.tolist() == [0, 0, 1, 1]
    assert layout.last.tolist() == [1, 3]
    slots = layout.new(numbered(2, 6))[:, 0, :, 0]
    assert slots.tolist() == [[1, 2, 3, 0], [4, 5, 0, 0], [8, 9, 0, 0], [11, 12, 0, 0]]


def documents(positions: list[int], real: list[int] | None = None) -> list[int] | None:
    """`documents_of` one row."""
    mask = None if real is None else torch.tensor([real]).bool()
    found = documents_of(torch.tensor([positions]), mask, (1, len(positions)))
    return None if found is None else found[0].tolist()


def test_documents() -> None:
    assert documents([0, 1, 2, 3]) is None
    assert documents([7, 8, 9]) is None
    assert documents([0, 1, 2, 0, 1]) == [0, 0, 0, 1, 1]
    assert documents([0, 0, 0]) == [0, 1, 2]
    # Pads: on the left, on the right, inside one document with either way of counting them, between two
    # documents.
    assert documents([1, 1, 0, 1, 2], [0, 0, 1, 1, 1]) is None
    assert documents([0, 1, 2, 2, 2], [1, 1, 1, 0, 0]) is None
    assert documents([0, 1, 1, 1, 2], [1, 1, 0, 0, 1]) is None
    assert documents([0, 1, 2, 3, 4], [1, 1, 0, 0, 1]) is None
    assert documents([0, 1, 0, 0, 1], [1, 1, 0, 1, 1]) == [0, 0, 0, 1, 1]
    assert documents_of(None, None, (1, 4)) is None
    both = documents_of(torch.tensor([[0, 1, 0, 1]]), None, (2, 4))
    assert both is not None
    assert both.tolist() == [[0, 0, 1, 1]] * 2
