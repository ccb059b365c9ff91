"""Comparisons for a figure over a phase, taken from the same model: windows, matched lags, random directions.

A free permutation of layers is no null, because any smooth drift over depth beats it. The rank of the phase among all
windows of as many layers is a valid test: its false-positive rate on planted drifts is 0-0.05 (`delta-suite selftest`).

Pairs outside the phase at the same distances are a contrast, not a test of a phase. Resampling documents does not show
how layers vary by chance, and where a drift is uneven the contrast differs from zero in half of all models. So a claim
against "lag" belongs beside one against "window".
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from delta_suite.metrics.direction_gram import NO_DIRECTION, DirectionGram, GramStack
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.estimators import phase_value, resampled
from delta_suite.metrics.intervals import combine
from delta_suite.metrics.registry import METRICS
from delta_suite.metrics.stacked import Values, mean_over_pairs

FROM_TOP_DIRECTIONS = (
    "intra_cosine",
    "cross_cosine",
    "adjacent_cosine",
    "block_effective_rank",
    "block_effective_rank_fraction",
    "equal_cosine",
)
"""Metrics computed from the top directions v_L alone, for which random directions can be substituted."""

OVER_PAIRS = ("intra_cosine", "intra_cosine_cross_fitted", "subspace_overlap", "principal_angle")
"""Metrics that are a mean over pairs of layers, so that pairs outside the phase can be matched by distance."""


def windows(total: int, length: int) -> list[range]:
    """Return all runs of `length` neighbouring layers.

    Example:
        >>> windows(4, 3)
        [range(0, 3), range(1, 4)]
    """
    return [range(first, first + length) for first in range(total - length + 1)]


def allowed_above(windows: int, quantile: float) -> int:
    """Return the number of other windows that may be as extreme as the phase for its rank to have p <= 1 - quantile.

    The result is negative where there are too few windows for any rank to reach that p.

    Example:
        >>> allowed_above(40, 0.95), allowed_above(10, 0.95)
        (1, -1)
    """
    return int((1.0 - quantile) * windows + 1e-9) - 1


def extreme(estimates: Sequence[Estimate], allowed: int, *, high: bool) -> Estimate:
    """Return the value that exactly `allowed` of the estimates lie beyond, at the high or the low end."""

    def bound(*values: float) -> float:
        return sorted(values, reverse=high)[allowed]

    return combine(bound, *estimates)


def rank_p(value: float, others: Sequence[float], *, high: bool) -> float:
    """Return the p-value of a rank: (1 + number of others at least as extreme) / (1 + number of others).

    Example:
        >>> rank_p(0.9, [0.1, 0.5, 0.95], high=True)
        0.5
    """
    beyond = sum(other >= value if high else other <= value for other in others)
    return (1 + beyond) / (1 + len(others))


def lag_matched(gram: DirectionGram, name: str, layers: Sequence[int]) -> Estimate:
    """Return the metric over pairs of layers outside the phase, at the distances of the pairs inside it.

    A pair is outside unless both its layers lie in the phase. Each distance has the weight that it has inside the
    phase; distances without a pair outside are left out. Absent for a metric that is no mean over pairs.
    """
    if name not in OVER_PAIRS:
        return absent(f"{name} is no mean over pairs of layers; lags can be matched for {', '.join(OVER_PAIRS)}")
    inside = set(layers)
    metric = METRICS[name]

    def mean(gram: DirectionGram) -> Estimate:
        total, weight = 0.0, 0
        matrix = _cosines_of_pairs(name, gram)
        for lag in range(1, len(layers)):
            pairs = [(first, first + lag) for first in range(gram.layers - lag)]
            outside = [pair for pair in pairs if not inside.issuperset(pair)]
            if matrix is None:
                estimates = [phase_value(metric, gram, pair) for pair in outside if not gram.without_direction(pair)]
                values = [estimate.value for estimate in estimates if estimate.value is not None]
            else:
                values = [value for pair in outside if not math.isnan(value := matrix[pair])]
            if values:
                total += (len(layers) - lag) * float(np.mean(values))
                weight += len(layers) - lag
        return Estimate(value=total / weight) if weight else absent("no pair outside the phase has its distances")

    def means(stack: GramStack) -> Values | None:
        matrices = {"intra_cosine": np.minimum(np.abs(stack.cosines), 1.0), "intra_cosine_cross_fitted": stack.cross}
        matrix = matrices.get(name)
        if matrix is None or not (stack.cosines.diagonal(axis1=1, axis2=2) >= 0.5).all():
            return None
        total, weight = np.zeros(len(matrix)), 0
        for lag in range(1, len(layers)):
            first = [first for first in range(gram.layers - lag) if not inside.issuperset((first, first + lag))]
            if first:
                places = np.array(first)
                total += (len(layers) - lag) * mean_over_pairs(matrix, places, places + lag)
                weight += len(layers) - lag
        return total / weight if weight else None

    return resampled(metric, gram, mean, means)


def _cosines_of_pairs(name: str, gram: DirectionGram) -> np.ndarray | None:
    """Return a metric of cosines for every pair of layers at once, NaN where it has none; None for other metrics.

    Pair by pair, they took four fifths of the time of judging a model of 30 layers.
    """
    layers = range(gram.layers)
    values: np.ndarray
    if name == "intra_cosine":
        values, missing = np.minimum(np.abs(gram.cosines), 1.0), gram.without_direction(layers)
    elif name == "intra_cosine_cross_fitted" and gram.cross is not None:
        values, missing = gram.cross.copy(), [*gram.without_direction(layers), *gram.without_half(layers)]
    else:
        return None
    values[missing] = values[:, missing] = np.nan
    return values


def random_directions(gram: DirectionGram, name: str, layers: Sequence[int]) -> list[float] | str:
    """Return the metric of random directions, one value per draw, or the reason why there are none.

    Each v_L is drawn at random with the covariance of its layer's updates.
    """
    if name not in FROM_TOP_DIRECTIONS:
        return f"{name} is not made of the v_L alone; random directions stand in for {', '.join(FROM_TOP_DIRECTIONS)}"
    if gram.random is None:
        return "no random directions were drawn when it was measured"
    values = []
    for draw in gram.random.astype(np.float64):
        drawn = DirectionGram(gram.hidden, draw)
        if missing := drawn.without_direction(layers):
            return NO_DIRECTION.format(missing[0])
        value = phase_value(METRICS[name], drawn, layers).value
        if value is not None:
            values.append(value)
    return values or f"{name} has no value over these layers"
