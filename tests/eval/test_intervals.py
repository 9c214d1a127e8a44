"""Intervals cover what they should, and hold at the edges where simple ones fail."""

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from eval.intervals import bootstrap, clopper_pearson, paired_difference, unpaired_difference


@given(trials=st.integers(1, 60), share=st.floats(0, 1))
def test_clopper_pearson_inverts_the_binomial_test(trials, share):
    hits = round(share * trials)
    low, high = clopper_pearson(hits, trials)
    assert low <= hits / trials <= high
    if hits > 0:
        assert binom.sf(hits - 1, trials, low) == pytest.approx(0.025)
    if hits < trials:
        assert binom.cdf(hits, trials, high) == pytest.approx(0.025)


def test_clopper_pearson_of_known_cases():
    assert clopper_pearson(9, 9)[0] == pytest.approx(
        0.6637, abs=1e-4
    )  # design 02: "bounds the true rate above .66"
    assert clopper_pearson(0, 24)[1] == pytest.approx(0.1425, abs=1e-4)


@pytest.mark.parametrize(("hits", "trials"), [(1, 0), (-1, 3), (4, 3)])
def test_what_is_not_a_rate_is_refused(hits, trials):
    with pytest.raises(ValueError, match="not a rate"):
        clopper_pearson(hits, trials)


@given(pairs=st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1, max_size=40))
def test_the_paired_interval_holds_its_estimate_and_is_symmetric(pairs):
    on, off = [a for a, _ in pairs], [b for _, b in pairs]
    one, other = paired_difference(on, off), paired_difference(off, on)
    low, high = one["interval"]
    assert -1 <= low <= one["difference"] <= high <= 1
    assert one["difference"] == pytest.approx(np.mean(on) - np.mean(off))
    assert other["interval"] == pytest.approx([-high, -low], abs=1e-6)
    assert other["p"] == pytest.approx(one["p"])
    assert low < high


def test_the_paired_interval_covers_the_truth():
    """Of 400 draws of 24 pairs with a true difference of .5, about 95 % of the intervals hold it."""
    rng = random.Random(0)
    held = 0
    for _ in range(400):
        draws = [rng.random() for _ in range(24)]
        found = paired_difference([int(x < 0.6) for x in draws], [int(x < 0.1) for x in draws])
        held += found["interval"][0] <= 0.5 <= found["interval"][1]
    assert held >= 0.91 * 400


def test_bootstrap_is_seeded_and_needs_two_units():
    values = np.random.default_rng(0).normal(3, 1, 200)
    interval = bootstrap(200, lambda draw: values[draw].mean())
    assert interval == bootstrap(200, lambda draw: values[draw].mean())
    assert interval[0] < values.mean() < interval[1]
    assert interval[1] - interval[0] == pytest.approx(2 * 1.96 / 200**0.5, rel=0.2)
    assert bootstrap(1, lambda draw: 1.0) is None
    assert bootstrap(5, lambda draw: float("nan")) is None


def test_an_unpaired_difference_is_the_exact_interval_where_the_other_rate_is_known():
    low, high = clopper_pearson(7, 20)
    many = 10**7
    assert unpaired_difference(7, 20, many // 2, many) == pytest.approx([low - 0.5, high - 0.5], abs=1e-3)


def test_an_unpaired_difference_turns_with_its_sides_and_is_wider_than_a_paired_one():
    one, other = [1] * 15 + [0] * 5, [1] * 8 + [0] * 12
    low, high = unpaired_difference(15, 20, 8, 20)
    assert [-high, -low] == pytest.approx(unpaired_difference(8, 20, 15, 20))
    paired = paired_difference(one, other)["interval"]
    assert low < paired[0] < 0.35 < paired[1] < high


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.5), (0.9, 0.6), (0.05, 0.1)])
def test_an_unpaired_difference_covers(p, q):
    draw = np.random.default_rng(0)
    hits = draw.binomial(20, p, 400), draw.binomial(30, q, 400)
    bounds = [unpaired_difference(int(a), 20, int(b), 30) for a, b in zip(*hits, strict=True)]
    assert sum(low <= p - q <= high for low, high in bounds) >= 0.95 * 400
