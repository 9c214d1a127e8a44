"""Perplexity equals a computation token by token, however the text is cut and batched."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from eval.perplexity import perplexity, tokenise, windows
from replace.errors import UserError

TEXT = "It was the best of times, it was the worst of times; “naïve” she said — 42 times over.\n\n" * 40


def by_hand(model, ids, length, stride):
    """-log p of every token but the first, each in a forward of its own, with its window's context."""
    losses = {}
    for start in range(0, len(ids), stride):
        for place in range(start + 1, min(start + length, len(ids))):
            if place not in losses:
                logits = model(torch.tensor([ids[start:place]])).logits[0, -1].double()
                losses[place] = (-logits.log_softmax(-1)[ids[place]]).item()
    return losses


@pytest.mark.parametrize(("length", "stride"), [(32, None), (32, 8), (50, 50), (33, 32)])
def test_equals_brute_force(tiny, length, stride):
    with torch.inference_mode():
        ids, _ = tokenise(tiny.tokenizer, TEXT, 130)
        losses = by_hand(tiny.model, ids, length, stride or length)
    found = perplexity(tiny.model, tiny.tokenizer, TEXT, length=length, stride=stride, tokens=130)
    assert found["tokens"] == len(losses)
    assert found["ppl"] == pytest.approx(math.exp(sum(losses.values()) / len(losses)), rel=1e-5)
    assert sum(window["tokens"] for window in found["windows"]) == len(losses)
    assert sum(bucket["tokens"] for bucket in found["by_position"]) == len(losses)


def test_batches_change_nothing(tiny):
    one = perplexity(tiny.model, tiny.tokenizer, TEXT, length=32, tokens=200)
    many = perplexity(tiny.model, tiny.tokenizer, TEXT, length=32, tokens=200, batch=4)
    assert many["ppl"] == pytest.approx(one["ppl"], rel=1e-5)
    assert many["interval"] == pytest.approx(one["interval"], rel=1e-5)


def test_bits_per_byte_counts_the_bytes_of_the_text(tiny):
    """With one window, where only the first token is not scored, the bytes are those of all the others."""
    short = TEXT[:300]
    ids = tiny.tokenizer(short)["input_ids"]
    found = perplexity(tiny.model, tiny.tokenizer, short, length=len(ids), tokens=10_000)
    size = len(short.encode()) - len(tiny.tokenizer.decode(ids[:1]).encode())
    assert found["bits_per_byte"] == pytest.approx(found["windows"][0]["nll"] / math.log(2) / size)


def test_bytes_add_up_where_characters_are_split(tiny):
    ids, sizes = tokenise(tiny.tokenizer, TEXT, 500)
    assert sizes.min() >= 0
    assert sizes.sum() == len(tiny.tokenizer.decode(ids, errors="ignore").encode())


def test_only_the_beginning_of_a_long_text_is_tokenised(tiny):
    ids, _ = tokenise(tiny.tokenizer, TEXT * 50, 64)
    assert ids == tiny.tokenizer(TEXT * 50)["input_ids"][:64]


@given(count=st.integers(2, 200), length=st.integers(2, 60), part=st.floats(0.01, 1))
def test_every_token_is_scored_once(count, length, part):
    stride = max(1, round(part * length))
    scored = [place for _, stop, first in windows(count, length, stride) for place in range(first, stop)]
    assert len(scored) == len(set(scored))
    left_out = set(range(count)) - set(scored)
    # A disjoint window cannot score its own first token; overlapping ones leave out only the text's first.
    assert left_out == {0} if stride < length else left_out <= set(range(0, count, length))
    for start, stop, first in windows(count, length, stride):
        assert 0 <= start < first < stop <= min(start + length, count)


def test_a_broken_model_has_no_perplexity_but_a_reason(tiny):
    weight = tiny.model.model.norm.weight.data
    kept = weight.clone()
    try:
        weight.fill_(float("nan"))
        found = perplexity(tiny.model, tiny.tokenizer, TEXT, length=32, tokens=64)
    finally:
        weight.copy_(kept)
    assert found["ppl"] is None
    assert "not finite" in found["why"]


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"length": 1, "tokens": 64}, "perplexity_length"),
        ({"length": 32, "tokens": 1}, "perplexity_tokens"),
        ({"length": 32, "tokens": 64, "stride": 33}, "stride"),
        ({"length": 32, "tokens": 64, "stride": 0}, "stride"),
    ],
)
def test_impossible_options_are_named(tiny, options, field):
    with pytest.raises(UserError, match=field):
        perplexity(tiny.model, tiny.tokenizer, TEXT, **options)


def test_an_empty_text_is_refused(tiny):
    with pytest.raises(UserError, match="0 tokens"):
        perplexity(tiny.model, tiny.tokenizer, "", length=32, tokens=64)
