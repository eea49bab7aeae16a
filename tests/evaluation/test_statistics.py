"""Intervals, Holm's correction and power, against SciPy and against simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from torch_gradmatch.evaluation.statistics import Interval, holm, interval_of, power


def test_intervals_and_p_values_are_scipys():
    values = np.random.default_rng(0).normal(0.3, 1.0, 7).tolist()
    found, expected = interval_of(values), stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(expected.pvalue)
    assert (found.low, found.high) == pytest.approx(tuple(expected.confidence_interval()))
    assert interval_of([0.5]).p == 1
    assert str(interval_of([0.5])) == "+0.500 [-]"
    assert (interval_of([0.0, 0.0]).p, interval_of([0.1, 0.1]).p) == (1, 0)


def test_holm_is_the_step_down_of_bonferroni():
    generator = np.random.default_rng(1)
    for number in (1, 2, 7):
        p = generator.uniform(size=number) ** 3
        corrected = np.array(holm(p.tolist()))
        for level in (0.01, 0.05, 0.3):  # rejected one after the other, until one is not
            rejected = np.zeros(number, bool)
            for rank, index in enumerate(np.argsort(p)):
                if p[index] * (number - rank) > level:
                    break
                rejected[index] = True
            np.testing.assert_array_equal(corrected <= level, rejected)


@pytest.mark.parametrize(("difference", "comparisons"), [(0.5, 1), (1.0, 5), (0.0, 1)])
def test_power_is_how_often_a_simulated_study_sees_the_difference(difference: float, comparisons: int):
    drawn = np.random.default_rng(2).normal(difference, 0.6, (20_000, 6))
    p = stats.ttest_1samp(drawn, 0, axis=1).pvalue
    seen = ((p < 0.05 / comparisons) & (drawn.mean(1) >= 0)).mean()
    spread = Interval(0.0, -1.0, 1.0, 1.0, 0.6, 6)
    assert power(difference, spread, comparisons) == pytest.approx(seen, abs=0.012)
    assert power(difference, Interval(0.1, -math.inf, math.inf, 1.0, math.nan, 1), 1) == 0
