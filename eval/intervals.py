"""Intervals: how far a figure measured on few episodes or few windows can be trusted. All are two-sided."""

from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import beta

LEVEL = 0.95
RESAMPLES = 1000


def clopper_pearson(hits: int, trials: int, level: float = LEVEL) -> list[float]:
    """The exact interval of a binomial rate (Clopper and Pearson 1934): it covers the true rate in at least
    `level`.

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
    """The difference of two rates measured on the same episodes, with an exact interval.

    Only the episodes where the two disagree carry information (McNemar): of those, the share in favour of
    `on` has a Clopper-Pearson interval, which is carried over to the difference. The interval excludes 0
    exactly where McNemar's exact test rejects. If nothing disagrees, the bound is that of zero events in n
    trials, to either side.

    Returns:
        {"difference", "interval", "episodes", "only_on", "only_off"}; difference = rate(on) - rate(off).
    """
    if len(on) != len(off) or not on:
        raise ValueError(f"pairs are needed, got {len(on)} and {len(off)} episodes")
    count = len(on)
    only_on = sum(1 for a, b in zip(on, off, strict=True) if a and not b)
    only_off = sum(1 for a, b in zip(on, off, strict=True) if b and not a)
    discordant = only_on + only_off
    if discordant:
        interval = [(2 * p - 1) * discordant / count for p in clopper_pearson(only_on, discordant, level)]
    else:
        bound = clopper_pearson(0, count, level)[1]
        interval = [-bound, bound]
    return {
        "difference": (only_on - only_off) / count,
        "interval": interval,
        "episodes": count,
        "only_on": only_on,
        "only_off": only_off,
    }


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
        statistic: takes the drawn indices [count] and returns the figure; draws that are not finite are left
            out.
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
