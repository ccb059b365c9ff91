"""Student's t, for every number of groups that a calibration can have."""

from __future__ import annotations

import pytest
from delta_suite.metrics.intervals import _T_80, T_975, t_distribution, t_quantile
from scipy.special import stdtr, stdtrit

FREEDOM = tuple(T_975)


@pytest.mark.parametrize("df", FREEDOM)
@pytest.mark.parametrize("p", [0.5, 0.75, 0.975, 0.995, 1 - 5e-5, 1 - 2e-7])
def test_quantiles_are_students(p: float, df: int) -> None:
    assert t_quantile(p, df) == pytest.approx(stdtrit(df, p), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("df", FREEDOM)
@pytest.mark.parametrize("t", [-3.0, 0.0, 0.4, 2.262, 50.0])
def test_the_distribution_is_students(t: float, df: int) -> None:
    assert t_distribution(t, df) == pytest.approx(stdtr(df, t), abs=1e-12)


@pytest.mark.parametrize("df", FREEDOM)
def test_the_tables_hold_the_same_quantiles(df: int) -> None:
    assert T_975[df] == pytest.approx(t_quantile(0.975, df), abs=5e-4)
    assert _T_80[df] == pytest.approx(t_quantile(0.8, df), abs=5.1e-4)
