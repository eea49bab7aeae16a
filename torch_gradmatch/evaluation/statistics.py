"""Intervals, tests and power of paired differences; needs SciPy.

A difference counts only if it is there for another domain *and* for another seed: the larger of both p-values is that
of the method (an intersection-union test), and Holm's correction (*A Simple Sequentially Rejective Multiple Test
Procedure*, Scandinavian Journal of Statistics, 1979) is for the number of methods.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

__all__ = ["LEVEL", "Interval", "holm", "interval_of", "power"]

LEVEL = 0.05


@dataclass(frozen=True)
class Interval:
    """A mean with its interval of confidence by Student, 95 %, and the two-sided p-value of 0.

    Attributes:
        mean: The mean.
        low: Lower end; minus infinity of a single number.
        high: Upper end.
        p: The p-value.
        spread: Standard deviation of the numbers, NaN of a single one.
        number: How many there are.
    """

    mean: float
    low: float
    high: float
    p: float
    spread: float
    number: int

    @property
    def ends(self) -> str:
        """Its ends as text."""
        return "[-]" if math.isinf(self.low) else f"[{self.low:+.3f}, {self.high:+.3f}]"

    def __str__(self) -> str:
        return f"{self.mean:+.3f} {self.ends}"


def interval_of(values: Sequence[float]) -> Interval:
    """Return Student's interval of the mean of some numbers.

    Args:
        values: The numbers, at least one.

    Returns:
        The interval.

    Example:
        >>> found = interval_of([1.0, 2.0, 3.0])
        >>> print(found, round(found.p, 3))
        +2.000 [-0.484, +4.484] 0.074
    """
    from scipy.stats import t

    mean, number = fmean(values), len(values)
    if number == 1:
        return Interval(mean, -math.inf, math.inf, 1.0, math.nan, 1)
    spread = stdev(values)
    error = spread / math.sqrt(number)
    if error == 0:
        return Interval(mean, mean, mean, float(mean == 0), 0.0, number)
    half = float(t.ppf(1 - LEVEL / 2, number - 1)) * error
    return Interval(mean, mean - half, mean + half, float(2 * t.sf(abs(mean) / error, number - 1)), spread, number)


def holm(values: Sequence[float]) -> list[float]:
    """Return p-values corrected for their number.

    Args:
        values: The p-values.

    Returns:
        The corrected ones, in the same order.

    Example:
        >>> holm([0.01, 0.5, 0.03])
        [0.03, 0.5, 0.06]
    """
    corrected, largest = [0.0] * len(values), 0.0
    for rank, index in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        largest = max(largest, min(1.0, (len(values) - rank) * values[index]))
        corrected[index] = largest
    return corrected


def power(difference: float, found: Interval, comparisons: int) -> float:
    """Return how likely a study with this spread tells a true difference from 0.

    Args:
        difference: The true one.
        found: Has the spread and the number of values.
        comparisons: The number of methods; the level is divided by it (the first step of Holm's correction).

    Returns:
        The probability, 0 of a single value.

    Example:
        >>> round(power(1.0, interval_of([1.0, 2.0, 3.0, 2.0]), 1), 2)
        0.4
    """
    from scipy.stats import nct, t

    if found.number == 1:
        return 0.0
    if found.spread == 0:
        return float(difference != 0)
    freedom = found.number - 1
    least = float(t.ppf(1 - LEVEL / comparisons / 2, freedom))
    return float(nct.sf(least, freedom, abs(difference) / found.spread * math.sqrt(found.number)))
