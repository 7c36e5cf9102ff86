"""How many seeds would decide what is undecided."""

from __future__ import annotations

import bisect
import math

from scipy.special import stdtrit

from analysis.statistics.tables import CONFIDENCE

POWER = 0.8  # the chance to decide, if the mean and the spread that were measured are the true ones
MOST_SEEDS = 1000  # beyond it, infinity


def seeds_to_decide(mean: float, sd: float, level: float = 1 - CONFIDENCE) -> float:
    """The fewest seeds with which a two-sided t test at `level` tells the mean from 0 with a chance of 80%.

    mean and sd (over seeds) are taken as the true ones, which few seeds tell badly: an order of magnitude. Infinity for
    more than 1000, NaN where the mean is 0 or nothing is known of the spread. Computed by statsmodels (TTestPower).
    """
    if not sd > 0 or mean == 0 or not math.isfinite(mean):
        return math.nan
    from statsmodels.stats.power import TTestPower

    test, numbers = TTestPower(), range(2, MOST_SEEDS + 1)
    place = bisect.bisect_left(numbers, POWER, key=lambda n: test.power(abs(mean) / sd, n, level))
    return float(numbers[place]) if place < len(numbers) else math.inf


def sd_of_interval(low: float, high: float, n: int) -> float:
    """The standard deviation over n seeds from which a t interval of the mean was made; NaN for n < 2."""
    if n < 2:
        return math.nan
    return (high - low) / 2 * math.sqrt(n) / float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
