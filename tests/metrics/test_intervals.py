"""Intervals: the quantiles follow from one level of confidence, and what is combined keeps what it has in common."""

from __future__ import annotations

import numpy as np
import pytest
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import (
    CONFIDENCE,
    PERCENT,
    combine,
    critical_t,
    interval,
    p_value,
    standard_error,
    t_quantile,
)

REPLICATES = (1.0, 1.2, 0.9, 1.1, 1.05, 0.97)


def test_every_quantile_follows_from_the_confidence() -> None:
    assert f"{CONFIDENCE:.0%}" == PERCENT
    assert critical_t(10) == pytest.approx(2.262157, abs=1e-6)
    assert critical_t(17) == pytest.approx(2.119905, abs=1e-6)  # an even number of degrees of freedom
    assert t_quantile(0.8, 9) == pytest.approx(0.883404, abs=1e-6)


def test_the_standard_error_is_the_jackknife_of_deleted_groups() -> None:
    values = np.array(REPLICATES)
    groups = len(values)
    assert standard_error(REPLICATES) == pytest.approx(
        np.sqrt((groups - 1) / groups * ((values - values.mean()) ** 2).sum())
    )


def test_an_interval_is_cut_to_the_range_of_the_quantity() -> None:
    low, high = interval(0.9, REPLICATES, high=1.0)
    assert high == 1.0
    assert low == pytest.approx(0.9 - critical_t(6) * standard_error(REPLICATES))


@pytest.mark.parametrize("distance", [-0.3, 0.0, 0.2, 5.0])
def test_p_is_the_tail_beyond_the_distance(distance: float) -> None:
    p = p_value(distance, REPLICATES)
    assert t_quantile(1 - p, 5) * standard_error(REPLICATES) == pytest.approx(distance, abs=1e-9)


def test_p_of_a_figure_without_spread_is_certain() -> None:
    assert p_value(0.1, (1.0, 1.0)) == 0.0
    assert p_value(0.0, (1.0, 1.0)) == 1.0


def test_what_two_figures_share_cancels_in_their_difference() -> None:
    first = Estimate(value=2.0, replicates=REPLICATES)
    second = Estimate(value=1.0, replicates=tuple(value - 1 for value in REPLICATES))
    difference = combine(lambda a, b: a - b, first, second)
    assert difference.value == 1.0
    assert difference.interval == pytest.approx((1.0, 1.0))


def test_without_replicates_on_one_side_there_is_no_interval() -> None:
    assert combine(lambda a, b: a - b, Estimate(value=2.0, replicates=REPLICATES), Estimate(value=1.0)).interval is None
