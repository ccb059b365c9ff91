"""Comparisons for a figure over a phase, taken from the same model: windows, matched lags, random directions.

A free permutation of layers is no null: any smooth drift over depth beats it. What holds is the rank of the phase among
all windows of as many layers (false-positive rate 0-0.05 on planted drifts, `delta-suite selftest`).

Pairs outside the phase at the same distances are a contrast, not a test of a phase: documents cannot tell what chance
made of the layers, and where a drift is uneven the contrast differs from zero in half of all models. So a claim against
"lag" is to stand beside one against "window".
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.estimators import phase_value, resampled
from delta_suite.metrics.intervals import combine
from delta_suite.metrics.registry import METRICS

FROM_TOP_DIRECTIONS = (
    "intra_cosine",
    "cross_cosine",
    "adjacent_cosine",
    "block_effective_rank",
    "block_effective_rank_fraction",
)
"""Metrics made of the v_L alone: a random direction can stand in for each."""

OVER_PAIRS = ("intra_cosine", "intra_cosine_cross_fitted", "subspace_overlap", "principal_angle")
"""Metrics that are a mean over pairs of layers, so that pairs elsewhere can be matched by their distance."""


def windows(total: int, length: int) -> list[range]:
    """Return all runs of `length` neighbouring layers.

    Example:
        >>> windows(4, 3)
        [range(0, 3), range(1, 4)]
    """
    return [range(first, first + length) for first in range(total - length + 1)]


def allowed_above(windows: int, quantile: float) -> int:
    """Return how many of the other windows may be as extreme, for the phase's rank among all to have p <= 1 - quantile.

    Negative where even the most extreme window of so few has a larger p.
    """
    return int((1.0 - quantile) * windows + 1e-9) - 1


def extreme(estimates: Sequence[Estimate], allowed: int, *, high: bool) -> Estimate:
    """Return the bound to pass: the value that exactly `allowed` of these lie beyond, at the high or the low end."""

    def bound(*values: float) -> float:
        return sorted(values, reverse=high)[allowed]

    return combine(bound, *estimates)


def rank_p(value: float, others: Sequence[float], *, high: bool) -> float:
    """Return (1 + how many others are at least as extreme) / (how many there are in all)."""
    beyond = sum(other >= value if high else other <= value for other in others)
    return (1 + beyond) / (1 + len(others))


def lag_matched(gram: DirectionGram, name: str, layers: Sequence[int]) -> Estimate:
    """Return the metric over pairs that do not both lie in the phase, at the distances of the pairs that do.

    Each distance weighs as it does inside the phase; distances at which every pair lies inside are left out.
    """
    if name not in OVER_PAIRS:
        return absent(f"{name} is no mean over pairs of layers; lags can be matched for {', '.join(OVER_PAIRS)}")
    inside = set(layers)
    metric = METRICS[name]

    def mean(gram: DirectionGram) -> Estimate:
        total, weight = 0.0, 0
        for lag in range(1, len(layers)):
            pairs = [(first, first + lag) for first in range(gram.layers - lag)]
            outside = [pair for pair in pairs if not inside.issuperset(pair)]
            estimates = [phase_value(metric, gram, pair) for pair in outside if not gram.without_direction(pair)]
            values = [estimate.value for estimate in estimates if estimate.value is not None]
            if values:
                total += (len(layers) - lag) * float(np.mean(values))
                weight += len(layers) - lag
        return Estimate(value=total / weight) if weight else absent("no pair outside the phase has its distances")

    return resampled(metric, gram, mean)


def random_directions(gram: DirectionGram, name: str, layers: Sequence[int]) -> list[float] | str:
    """Return the metric with each v_L drawn at random with the covariance of its updates, once per draw; or why not."""
    if name not in FROM_TOP_DIRECTIONS:
        return f"{name} is not made of the v_L alone; random directions stand in for {', '.join(FROM_TOP_DIRECTIONS)}"
    if gram.random is None:
        return "no random directions were drawn when it was measured"
    values = []
    for draw in gram.random.astype(np.float64):
        drawn = DirectionGram(gram.hidden, draw)
        value = phase_value(METRICS[name], drawn, layers).value
        if value is not None:
            values.append(value)
    return values or f"{name} has no value over these layers"
