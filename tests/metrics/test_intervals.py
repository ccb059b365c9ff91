"""Intervals: quantiles follow from one level of confidence, and shared errors cancel where estimates are combined."""

from __future__ import annotations

import numpy as np
import pytest
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import (
    CONFIDENCE,
    PERCENT,
    POWER,
    combine,
    critical_t,
    detectable_effect,
    holm,
    interval,
    p_value,
    partial_conjunction,
    standard_error,
    t_quantile,
    with_interval,
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


def test_p_of_a_figure_without_spread_is_zero_or_one() -> None:
    assert p_value(0.1, (1.0, 1.0)) == 0.0
    assert p_value(0.0, (1.0, 1.0)) == 1.0


def test_errors_that_two_figures_share_cancel_in_their_difference() -> None:
    first = Estimate(value=2.0, replicates=REPLICATES)
    second = Estimate(value=1.0, replicates=tuple(value - 1 for value in REPLICATES))
    difference = combine(lambda a, b: a - b, first, second)
    assert difference.value == 1.0
    assert difference.interval == pytest.approx((1.0, 1.0))


def test_without_replicates_on_one_side_there_is_no_interval() -> None:
    assert combine(lambda a, b: a - b, Estimate(value=2.0, replicates=REPLICATES), Estimate(value=1.0)).interval is None


def test_a_combination_with_an_absent_figure_is_absent_for_its_reason() -> None:
    missing = absent("one layer has no pairs")
    assert combine(lambda a, b: a - b, Estimate(value=2.0), missing) == missing


def test_halves_remove_a_bias_that_falls_with_the_number_of_tokens() -> None:
    truth, bias = 0.5, 0.1
    whole, half = Estimate(value=truth + bias), Estimate(value=truth + 2 * bias)
    replicates = [Estimate(value=value) for value in REPLICATES]
    corrected = with_interval(whole, [half, half], replicates)
    assert corrected.best == pytest.approx(truth)
    assert corrected.interval == pytest.approx(interval(truth, REPLICATES))
    assert with_interval(whole, [half, half], replicates, low=0.55).best == 0.55
    assert with_interval(whole, [half, half], [*replicates, absent("no update")]) == whole
    assert with_interval(whole, [half, absent("no update")], replicates) == whole


def test_a_detectable_effect_is_significant_with_the_stated_power() -> None:
    """Falling short by the quantile of the power leaves a distance that is just significant."""
    shortfall = t_quantile(POWER, 5) * standard_error(REPLICATES)
    just_significant = detectable_effect(REPLICATES) - shortfall
    assert p_value(just_significant, REPLICATES) == pytest.approx((1 - CONFIDENCE) / 2)


def test_holm_steps_down_and_never_reorders() -> None:
    assert holm([0.04, 0.01, 0.03]) == pytest.approx([0.06, 0.03, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_a_partial_conjunction_lies_between_bonferroni_and_the_largest_p() -> None:
    p_values = [0.2, 0.01, 0.04]
    assert partial_conjunction(p_values, 1) == pytest.approx(0.03)
    assert partial_conjunction(p_values, 2) == pytest.approx(0.08)
    assert partial_conjunction(p_values, 3) == 0.2
    assert partial_conjunction([0.9, 0.8], 1) == 1.0
