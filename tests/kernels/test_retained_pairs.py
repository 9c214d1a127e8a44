"""The choice of pairs: parallel against sorting Python tuples, ties and all."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.retained_pairs import chunk, reference

LEVELS = [-torch.inf, -1.0, 0.0, 0.0, 1.0, 2.0]  # few levels, so that nearly everything ties


def living(selection: chunk.Selection) -> list:
    """The kept pool indices, in the reference's form."""
    rows = zip(selection.index.tolist(), selection.alive.tolist(), strict=True)
    return [
        [
            [[i for i, a in zip(*step, strict=True) if a] for step in zip(index, alive, strict=True)]
            for index, alive in zip(*row, strict=True)
        ]
        for row in rows
    ]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 5), st.integers(0, 10_000))
def test_equals_the_reference_with_ties(keep: int, blocks: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(LEVELS)
    scores = levels[torch.randint(len(LEVELS), (2, 2, blocks, size), generator=generator)]
    initial = levels[torch.randint(len(LEVELS), (2, 2, keep), generator=generator)]
    selection = chunk.select_pairs(scores, initial)
    assert living(selection) == reference.select_pairs(scores, initial)


def draw(keep: int, blocks: int, size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, those of the pairs held before, and ranks that take another order."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.tensor(LEVELS)
    pool = levels[torch.randint(len(LEVELS), (2, 2, keep + blocks * size), generator=generator)]
    rank = pool + torch.randint(-2, 3, pool.shape, generator=generator)
    return pool[..., keep:].unflatten(2, (blocks, size)), pool[..., :keep], rank


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(0, 4), st.integers(1, 5), st.integers(0, 10_000), st.data())
def test_recent_places_equal_the_reference_with_ties(keep, blocks, size, seed, data) -> None:
    recent = data.draw(st.integers(0, keep))
    scores, initial, rank = draw(keep, blocks, size, seed)
    selection = chunk.select_pairs(scores, initial, rank, recent)
    assert living(selection) == reference.select_pairs(scores, initial, rank, recent)
    pool = (initial != -torch.inf).sum(-1) + (scores != -torch.inf).flatten(2).sum(-1)
    assert (selection.alive[:, :, -1].sum(-1) == pool.clamp_max(keep)).all(), (
        "no place stays empty for nothing"
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 10_000), st.data())
def test_recent_places_do_not_depend_on_how_the_blocks_are_cut(keep, blocks, size, seed, data) -> None:
    """The choice block by block is the choice over all at once, of the score's best and of the rest."""
    recent = data.draw(st.integers(0, keep))
    scores, _, rank = draw(keep, blocks, size, seed)
    empty = torch.full((2, 2, keep), -torch.inf)
    selection = chunk.select_pairs(scores, empty, rank, recent)
    whole = scores.flatten(2).unsqueeze(2)
    at_once = chunk.select_pairs(whole, empty, rank, recent)
    assert [[steps[-1] for steps in row] for row in living(selection)] == [
        [steps[-1] for steps in row] for row in living(at_once)
    ]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 4), st.integers(0, 10_000))
def test_every_candidate_is_kept_or_dropped_once(keep: int, blocks: int, size: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.tensor(LEVELS)[torch.randint(len(LEVELS), (1, 1, blocks, size), generator=generator)]
    selection = chunk.select_pairs(scores, torch.full((1, 1, keep), -torch.inf))
    kept = selection.index[0, 0, -1][selection.alive[0, 0, -1]].tolist()
    dropped = selection.dropped[0, 0][selection.dropped_alive[0, 0]].tolist()
    candidates = (scores.flatten() != -torch.inf).nonzero().flatten() + keep
    assert sorted(kept + dropped) == candidates.tolist()


def test_one_block_at_a_time_is_the_choice_over_all_at_once() -> None:
    torch.manual_seed(0)
    scores, keep = torch.randint(0, 5, (1, 1, 6, 4)).float(), 5
    selection = chunk.select_pairs(scores, torch.full((1, 1, keep), -torch.inf))
    order = torch.argsort(scores.flatten(), descending=True, stable=True)[:keep].sort().values
    assert (selection.index[0, 0, -1] - keep).tolist() == order.tolist()


def test_pool_rows_and_their_gradient() -> None:
    torch.manual_seed(0)
    pool = torch.randn(2, 3, 5, 4).double().requires_grad_()
    index = torch.randint(5, (2, 3, 2, 6))
    want = torch.stack([torch.stack([pool[b, g][index[b, g]] for g in range(3)]) for b in range(2)])
    torch.testing.assert_close(chunk.gather_pool(pool, index), want)
    assert torch.autograd.gradcheck(lambda p: chunk.gather_pool(p, index), (pool,))
