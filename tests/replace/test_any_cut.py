"""Any lengths, cuts, paddings and batch sizes (properties 3, 5, 7 and 15), drawn by hypothesis."""

import functools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from replace.blocks import Call, Heads
from replace.cache import ReplacedCacheLayer
from replace.config import AttentionConfig
from replace.mixer import VARIANTS, BlockMixer
from replace.rotary import RotarySpec

HEADS = Heads(2, 1, 4, 3)
SMALL = {"block": 3, "window": 3, "sinks": 2, "pairs": 2, "pairs_score": "learned", "distance_cap": 8}
VARIATIONS: list[dict] = [
    {"name": "infini", "gate": "token"},
    {"name": "infini", "update": "delta_bounded", "local": "segment", "feature_map": "elu"},
    {"name": "linear"},
    {"name": "sliding_window", "pairs_score": "attention"},
]
LONGEST = 26


@functools.cache
def mixer_of(which: int) -> BlockMixer:
    """An fp64 mixer with parameters away from their neutral start."""
    options = AttentionConfig(**(SMALL | VARIATIONS[which]))
    mixer = VARIANTS.get(options.name)(options, HEADS, RotarySpec([1.0, 0.3], "half")).double()
    generator = torch.Generator().manual_seed(which)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).double() * 0.5)
    return mixer


def row_of(seed: int, length: int) -> list[Tensor]:
    """q, k, v `[1, H or G, T, 4]` and the layer's input `[1, T, 3]` of one row, fp64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(1, 2, length, 4), (1, 1, length, 4), (1, 1, length, 4), (1, length, 3)]
    return [torch.randn(shape, generator=generator).double() for shape in shapes]


@st.composite
def histories(draw: st.DrawFn) -> tuple[int, int, list[list[tuple[int, int]]]]:
    """A variant, a seed, and calls: for each row how many pads stand before its new tokens, and how many they
    are.
    """
    rows = draw(st.integers(1, 3))
    cell = st.tuples(st.integers(0, 3), st.one_of(st.integers(0, 7), st.just(1)))
    calls = draw(st.lists(st.lists(cell, min_size=rows, max_size=rows), min_size=1, max_size=5))
    return draw(st.integers(0, len(VARIATIONS) - 1)), draw(st.integers(0, 99)), calls


@settings(max_examples=60)
@given(histories())
@torch.no_grad()
def test_every_row_reads_as_if_it_were_alone_and_whole(history: tuple) -> None:
    which, seed, calls = history
    mixer, rows = mixer_of(which), len(calls[0])
    lengths = [sum(call[row][1] for call in calls) for row in range(rows)]
    texts = [row_of(seed + row, max(1, length)) for row, length in enumerate(lengths)]
    wanted = [mixer(*text[:3], Call(text[3], 0.4)) for text in texts]
    slot, done = ReplacedCacheLayer(), [0] * rows
    for call in calls:
        width = max(1, max(before + count for before, count in call))
        batch = [x.new_full((rows, *x.shape[1:-2], width, x.shape[-1]), 7.0) for x in texts[0]]  # pads are 7
        real = torch.zeros(rows, width, dtype=torch.bool)
        for row, (before, count) in enumerate(call):
            real[row, before : before + count] = True
            for whole, piece in zip(texts[row], batch, strict=True):
                piece[row, ..., before : before + count, :] = whole[0, ..., done[row] : done[row] + count, :]
        got = mixer(*batch[:3], Call(batch[3], 0.4, real=real, slot=slot))
        for row, (before, count) in enumerate(call):
            want = wanted[row][0, :, done[row] : done[row] + count]
            torch.testing.assert_close(got[row, :, before : before + count], want, rtol=1e-8, atol=1e-9)
            done[row] += count
    assert slot.state is not None
    assert slot.state.length.tolist() == lengths
