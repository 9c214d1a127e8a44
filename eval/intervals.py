"""Intervals: how far a figure measured on few episodes or few windows can be trusted. All are two-sided."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import brentq
from scipy.stats import beta, binomtest, norm

LEVEL = 0.95
RESAMPLES = 1000


def clopper_pearson(hits: int, trials: int, level: float = LEVEL) -> list[float]:
    """The exact interval of a binomial rate (Clopper and Pearson 1934): it covers with at least `level`.

    Raises:
        ValueError: `trials` is 0, or `hits` lies outside 0..trials.
    """
    if trials < 1 or not 0 <= hits <= trials:
        raise ValueError(f"{hits} hits of {trials} trials is not a rate")
    tail = (1 - level) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - tail, hits + 1, trials - hits))
    return [low, high]


def paired_difference(on: Sequence[int], off: Sequence[int], level: float = LEVEL) -> dict:
    """The difference of two rates measured on the same episodes, with its interval and an exact test.

    The interval is Tango's score interval (1998), which holds for few episodes and for rates of 0 and 1; the
    test is McNemar's exact one, on the episodes where the two disagree.

    Returns:
        {"difference", "interval", "p", "episodes", "only_on", "only_off"}; difference = rate(on) - rate(off).
    """
    if len(on) != len(off) or not on:
        raise ValueError(f"pairs are needed, got {len(on)} and {len(off)} episodes")
    count = len(on)
    only_on = sum(1 for a, b in zip(on, off, strict=True) if a and not b)
    only_off = sum(1 for a, b in zip(on, off, strict=True) if b and not a)
    discordant = only_on + only_off
    return {
        "difference": (only_on - only_off) / count,
        "interval": _tango(only_on, only_off, count, level),
        "p": float(binomtest(only_on, discordant).pvalue) if discordant else 1.0,
        "episodes": count,
        "only_on": only_on,
        "only_off": only_off,
    }


def unpaired_difference(hits: int, trials: int, others: int, other_trials: int) -> list[float]:
    """The interval of the difference of two rates that were measured on different episodes.

    The exact interval of each is put together as in Newcombe (1998): each bound is as far from the difference
    as the bounds of the two rates that push it there.
    """
    (low, high), (other_low, other_high) = (
        clopper_pearson(hits, trials),
        clopper_pearson(others, other_trials),
    )
    rate, other = hits / trials, others / other_trials
    below, above = math.hypot(rate - low, other_high - other), math.hypot(high - rate, other - other_low)
    return [rate - other - below, rate - other + above]


def _tango(b: int, c: int, n: int, level: float) -> list[float]:
    """The differences d that a score test of the counts b (first only) and c (second only) of n accepts."""
    limit = float(norm.ppf((1 + level) / 2))

    def score(d: float) -> float:
        # The most likely rate of "second only" given d, from A q^2 + B q + C = 0.
        half = ((2 * n - b + c) * d - b - c) / (4 * n)
        rate = math.sqrt(max(0.0, half**2 + c * d * (1 - d) / (2 * n))) - half
        variance = max(0.0, n * (2 * rate + d * (1 - d)))
        gap = b - c - n * d
        return gap / math.sqrt(variance) if variance > 0 else 0.0

    estimate, edge = (b - c) / n, 1 - 1e-9
    low, high = -1.0, 1.0
    if score(-edge) > limit:
        low = brentq(lambda d: score(d) - limit, -edge, min(estimate, edge))
    if score(edge) < -limit:
        high = brentq(lambda d: score(d) + limit, max(estimate, -edge), edge)
    return [float(low), float(high)]


def bootstrap(
    count: int,
    statistic: Callable[[np.ndarray], float],
    *,
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> list[float] | None:
    """The percentile bootstrap over `count` units; None below two units, where resampling says nothing.

    Args:
        statistic: takes drawn indices [count] and gives the figure; draws that are not finite are left out.
    """
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    values = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    finite = [value for value in values if np.isfinite(value)]
    if not finite:
        return None
    tail = 100 * (1 - level) / 2
    low, high = np.percentile(finite, [tail, 100 - tail])
    return [float(low), float(high)]
