"""Intervals of everything that is measured, over the units of the calibration (capture/units.py).

The replicates of an estimate are its values without each of G groups of units in turn: without each domain, where
domains are declared. Their spread gives its standard error, by the delete-a-group jackknife (Kott 2001), with G - 1
degrees of freedom.

The bias of a figure of the spectrum is read from the mean of its replicates, which are right to second order
(Quenouille 1956). On planted truth this covers as often as the halves did, and more often where domains differ. The
bias of other figures is read from the two halves of the units: a bias that falls as 1/n doubles where the tokens halve,
so 2 x whole - mean of halves is free of it (Quenouille 1949, with two groups).

Figures of sets of k = 8 directions are not corrected. Where the 8th and 9th singular values are close, the halves
differ in which directions they choose, and that bias does not fall as 1/n. On planted truth (30, 80 and 300 documents)
the correction made the spread of these figures half as large again, removed no bias, and lowered their coverage from
0.91-0.98 to 0.88-0.95.

Percentile bootstraps of an effective rank cover 0-11% where 95% is claimed, because each resample adds a bias.
results/selftest.md lists the coverage of this form, figure by figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from jaxtyping import Float64

from delta_suite.metrics.definition import Bias
from delta_suite.metrics.estimate import Estimate, ValueAlone

CONFIDENCE = 0.95
"""The level of every interval of the suite; every quantile, and every percentage in a text, follows from it."""

PERCENT = f"{CONFIDENCE:.0%}"
"""The level as texts write it."""

POWER = 0.8
"""The probability of detecting an effect of the minimum detectable size."""


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t with `degrees` degrees of freedom.

    Example:
        >>> round(t_quantile(0.975, 9), 3)
        2.262
    """
    from scipy.special import stdtrit  # takes a fifth of a second, and a run without intervals need not spend it

    return float(stdtrit(degrees, probability))


def critical_t(groups: int) -> float:
    """Return the number of standard errors that an interval at CONFIDENCE reaches to either side, with G groups.

    Example:
        >>> round(critical_t(10), 3)
        2.262
    """
    return t_quantile((1 + CONFIDENCE) / 2, groups - 1)


def standard_errors(replicates: Float64[np.ndarray, "groups ..."]) -> Float64[np.ndarray, " ..."]:
    """Return the standard errors of figures, sqrt((G - 1) / G * sum (r_g - mean r)^2), from replicates r.

    Groups lie along the first axis. Source: the delete-a-group jackknife, Kott 2001.
    """
    groups = len(replicates)
    return np.asarray(np.sqrt((groups - 1) / groups * ((replicates - replicates.mean(axis=0)) ** 2).sum(axis=0)))


def standard_error(replicates: Sequence[float]) -> float:
    """Return the standard error of one figure from its replicates."""
    return float(standard_errors(np.asarray(replicates, dtype=np.float64)))


def interval(
    centre: float, replicates: Sequence[float], low: float = -math.inf, high: float = math.inf
) -> tuple[float, float]:
    """Return centre +- critical_t standard errors, cut to the range from `low` to `high` of the quantity."""
    half = critical_t(len(replicates)) * standard_error(replicates)
    return min(high, max(low, centre - half)), max(low, min(high, centre + half))


def with_interval(
    whole: Estimate,
    halves: Sequence[Estimate],
    replicates: Sequence[Estimate | ValueAlone],
    low: float = -math.inf,
    high: float = math.inf,
    bias: Bias = "halves",
    documents: Sequence[Estimate | ValueAlone] = (),
) -> Estimate:
    """Return an estimate with its bias removed and its interval; unchanged where a replicate or half has no value.

    `documents` are the values without each group of documents, where `replicates` are those without each domain.

    `bias` says how the bias is estimated. "replicates" takes it from the mean change from deleting a group, G - 1 times
    (Quenouille 1956). "halves" takes it from `halves`, the figure of each half of the units.
    "groups" takes it from the replicates, for a figure that compares one half with the other: m - 1 times the mean
    change from deleting one of the m groups of a half, added over both halves (the jackknife of two samples, Arvesen
    1969). "none" removes nothing.
    """
    values = [replicate.value for replicate in replicates]
    half_values = [half.value for half in halves if half.value is not None]
    known = [value for value in values if value is not None]
    if whole.value is None or not known or len(known) < len(values) or len(half_values) < len(halves):
        return whole
    corrected = whole.value
    if bias == "halves" and halves:
        corrected = 2 * whole.value - float(np.mean(half_values))
    elif bias == "replicates":
        corrected = whole.value - (len(known) - 1) * (float(np.mean(known)) - whole.value)
    elif bias == "groups":
        sides = [np.array(known[half::2]) - whole.value for half in (0, 1)]
        corrected = whole.value - sum((len(side) - 1) * float(side.mean()) for side in sides)
    corrected = min(high, max(low, corrected))
    update: dict[str, object] = {
        "corrected": corrected,
        "interval": interval(corrected, known, low, high),
        "replicates": tuple(known),
    }
    narrower = [document.value for document in documents if document.value is not None]
    if narrower and len(narrower) == len(documents):
        update["interval_documents"] = interval(corrected, narrower, low, high)
        update["replicates_documents"] = tuple(narrower)
    return whole.model_copy(update=update)


def combine(
    function: Callable[..., float],
    *estimates: Estimate,
    low: float = -math.inf,
    high: float = math.inf,
    arithmetic: bool = False,
) -> Estimate:
    """Return function(values) of estimates measured on the same units, with its interval where all have one.

    The function is applied to the values, to the corrected values, and to each replicate in turn, so errors that the
    estimates share cancel in a difference. Where an estimate has no value, that estimate is returned.

    arithmetic: true for a function of sums and products alone, which is applied to all replicates at once.

    Example:
        >>> combine(lambda a, b: a - b, Estimate(value=0.75), Estimate(value=0.5)).value
        0.25
    """
    values = [estimate.value for estimate in estimates]
    if any(value is None for value in values):
        return next(estimate for estimate in estimates if estimate.value is None)
    value = float(function(*values))
    replicates = _applied(function, [estimate.replicates for estimate in estimates], arithmetic)
    if replicates is None:
        return Estimate(value=value)
    corrected = float(function(*(estimate.best for estimate in estimates)))
    documents = _applied(function, [estimate.replicates_documents for estimate in estimates], arithmetic)
    return Estimate(
        value=value,
        corrected=min(high, max(low, corrected)),
        interval=interval(corrected, replicates, low, high),
        interval_documents=None if documents is None else interval(corrected, documents, low, high),
        replicates=replicates,
        replicates_documents=documents,
    )


def _applied(
    function: Callable[..., Any], lists: Sequence[Sequence[float] | None], arithmetic: bool
) -> tuple[float, ...] | None:
    """Return the function of each row of replicates; None where an estimate has none, or another number of them."""
    known = [replicates for replicates in lists if replicates is not None]
    if len(known) < len(lists) or len({len(replicates) for replicates in known}) != 1:
        return None
    if arithmetic:
        return tuple(function(*(np.array(replicates, dtype=np.float64) for replicates in known)).tolist())
    return tuple(float(function(*row)) for row in zip(*known, strict=True))


def detectable_effect(replicates: Sequence[float]) -> float:
    """Return the smallest distance from a threshold that is detected with probability POWER, at CONFIDENCE."""
    groups = len(replicates)
    return (critical_t(groups) + t_quantile(POWER, groups - 1)) * standard_error(replicates)


def p_value(distance: float, replicates: Sequence[float]) -> float:
    """Return the one-sided p-value of the hypothesis that a distance is at most 0, from its replicates (t test)."""
    from scipy.special import stdtr

    error = standard_error(replicates)
    if error == 0.0:
        return 0.0 if distance > 0 else 1.0
    return float(stdtr(len(replicates) - 1, -distance / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return the adjusted p-values of several hypotheses, in the order given (Holm 1979).

    Example:
        >>> holm([0.01, 0.04])
        [0.02, 0.04]
    """
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def partial_conjunction(p_values: Sequence[float], holding: int) -> float:
    """Return the p-value of "it holds in at least `holding` of M models", (M - r + 1) p_(r) with r = `holding`.

    p_(r) is the r-th smallest p-value. Source: Benjamini & Heller 2008.

    Example:
        >>> partial_conjunction([0.01, 0.5, 0.02], holding=2)
        0.04
    """
    return min(1.0, (len(p_values) - holding + 1) * sorted(p_values)[holding - 1])
