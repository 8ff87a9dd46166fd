"""Means with intervals: what a handful of seeds can say."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds."""

    mean: float | None
    """None: nothing was measured."""
    half_width: float | None
    """Half the width of the interval; None with fewer than two seeds."""
    n: int
    """Seeds that were measured."""


def estimate(values: Iterable[float | None], confidence: float = 0.95) -> Estimate:
    """Average over seeds, with the interval of Student's t distribution.

    The half width is t s / sqrt(n): s the sample standard deviation (n - 1 below), t the quantile at
    (1 + confidence) / 2 with n - 1 degrees of freedom.

    Args:
        values: One a seed; None and NaN are absent and do not count.
        confidence: Share of such intervals that cover the true mean, values being normal; in (0, 1).

    Source: Student 1908, "The probable error of a mean", Biometrika 6.
    """
    from scipy.special import stdtrit

    measured = [value for value in values if value is not None and not math.isnan(value)]
    n = len(measured)
    if n == 0:
        return Estimate(None, None, 0)
    mean = math.fsum(measured) / n
    if n == 1:
        return Estimate(mean, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in measured) / (n - 1))
    return Estimate(mean, float(stdtrit(n - 1, (1 + confidence) / 2)) * deviation / math.sqrt(n), n)
