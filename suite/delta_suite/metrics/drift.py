"""Smooth drifts over depth, fitted to a model with one phase left out, and whether they share as much as that phase.

Layers near each other resemble each other in every model, so a phase that shares much shows nothing yet. What a smooth
drift does not have is an edge. The statistic is

    1 - (mean over pairs across the edges of the phase) / (mean over pairs inside it),    both at the same distances,

where a pair crosses an edge if one of its layers lies inside. It is taken at the declared layers and at shifts of up to
SHIFT layers, and the largest counts, so that a phase declared one or two layers off is found; every drift takes the
same largest value. Its p-value is its rank among DRAWS drifts.

A drift is a unit vector y_L that follows a Gaussian process over depth. The kernel and the degrees of freedom are those
at which (y_L . y_M)^2 has the mean of the model's squared cosines at each distance and departs from it as far; pairs of
layers that both lie in the phase are left out of the fit.

Two simpler nulls failed on planted drifts (tests/metrics/test_drift.py). The rank among windows that share at most half
of their layers with the phase, each with the same shifts, calls 0.24 to 0.34 of all drifts a phase C: windows so far
apart are no fair sample of those in between. The mean over pairs inside, without the pairs across, calls up to 0.5 a
phase, because a drift may be slow where the phase lies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64

from delta_suite.metrics.direction_gram import NO_DIRECTION, DirectionGram, GramStack
from delta_suite.metrics.estimate import ONE_DOCUMENT, Estimate
from delta_suite.metrics.estimators import phase_value, resampled
from delta_suite.metrics.registry import METRICS
from delta_suite.metrics.segmentation import DRAWS, PILOT, SEED, drift_cosines, embedding_of, matching_dimensions
from delta_suite.metrics.stacked import Values, stacked_values

SHIFT = 2
"""Layers by which the declared phase, and every window compared with it, may be shifted."""

FITTED = ("intra_cosine", "intra_cosine_cross_fitted")
"""The metrics that drifts can be fitted to: means of cosines of top directions over pairs of layers."""

_STEPS = 8
"""Steps of matching the kernel and the degrees of freedom to the model; each depends on the other."""

_AT_ONCE = 100
"""Drifts drawn at a time."""

_TINY = 1e-12
"""Least mean over pairs inside a phase that the others are divided by."""


@dataclass(frozen=True)
class SmoothDrifts:
    """The statistic of a phase, and those of the drifts."""

    statistic: float
    drawn: Float64[np.ndarray, " draws"]
    """In ascending order."""

    @property
    def p(self) -> float:
        """The p-value: (1 + number of drifts with at least the phase's statistic) / (draws + 1)."""
        return float((1 + (self.drawn >= self.statistic).sum()) / (1 + len(self.drawn)))

    def edge(self, quantile: float, *, high: bool) -> float:
        """Return the statistic beyond which p <= 1 - quantile, at the high or at the low end."""
        allowed = max(1, int((1.0 - quantile) * (len(self.drawn) + 1) + 1e-9))
        return float(self.drawn[-allowed] if high else self.drawn[allowed - 1])


@dataclass(frozen=True)
class EdgeContrast:
    """The values of a metric over a phase at which the phase stands at either end of the drifts."""

    p: float
    high: Estimate
    """The value beyond which the phase has a sharper edge than the drifts of the quantile asked for."""
    low: Estimate
    """The value below which it has a blunter one than as many."""


def against_drifts(gram: DirectionGram, metric: str, phase: range) -> SmoothDrifts | str:
    """Return a phase beside the drifts fitted to the other layers, or the reason why there are none."""
    if metric not in FITTED:
        return f"{metric} is no mean of cosines over pairs of layers; drifts are fitted to {', '.join(FITTED)}"
    if problem := outside_fit(gram.layers, phase):
        return problem
    if missing := gram.without_direction(range(gram.layers)):
        return NO_DIRECTION.format(missing[0])
    cosines = pair_cosines(gram, metric)
    return ONE_DOCUMENT if cosines is None else smooth_drifts(cosines, phase)


def edge_bounds(gram: DirectionGram, metric: str, phase: range, drifts: SmoothDrifts, quantile: float) -> EdgeContrast:
    """Return the values of the metric at which the phase would stand at the ends of the drifts, with intervals.

    With the contrast T of the phase and q of the drifts, that is value (1 - T) / (1 - q): what the pairs across its
    edges have, over what 1 - q of a drift leaves for them.
    """
    definition = METRICS[metric]

    def bound(edge: float) -> Estimate:
        def of(gram: DirectionGram) -> Estimate:
            cosines, estimate = pair_cosines(gram, metric), phase_value(definition, gram, phase)
            if cosines is None or estimate.value is None:
                return estimate
            across = estimate.value * (1.0 - float(edge_contrast(cosines, phase)))
            return Estimate(value=across / max(1.0 - edge, _TINY))

        def of_stack(stack: GramStack) -> Values | None:
            cosines, values = pair_cosines(stack, metric), stacked_values(metric, stack, phase)
            if cosines is None or values is None:
                return None
            return np.asarray(values * (1.0 - edge_contrast(cosines, phase)) / max(1.0 - edge, _TINY))

        return resampled(definition, gram, of, of_stack)

    return EdgeContrast(drifts.p, bound(drifts.edge(quantile, high=True)), bound(drifts.edge(quantile, high=False)))


def pair_cosines(gram: DirectionGram | GramStack, metric: str) -> Float64[np.ndarray, "... layers layers"] | None:
    """Return the cosines of layers that a metric of `FITTED` averages; None for another, and with one document."""
    if metric == "intra_cosine":
        return np.asarray(np.minimum(np.abs(gram.cosines), 1.0))
    return gram.cross if metric == "intra_cosine_cross_fitted" else None


def edge_contrast(cosines: Float64[np.ndarray, "... layers layers"], phase: range) -> Float64[np.ndarray, " ..."]:
    """Return the largest contrast of a phase with the pairs across its edges, over shifts of up to SHIFT layers.

    Example:
        >>> cosines = np.kron(np.eye(2), np.full((4, 4), 0.5)) + 0.25
        >>> float(edge_contrast(cosines, range(4, 8)))  # 0.75 inside, 0.25 across
        0.6666666666666667
    """
    layers = cosines.shape[-1]
    contrasts = []
    for shift in range(-SHIFT, SHIFT + 1):
        first = phase[0] + shift
        if 0 <= first <= layers - len(phase):
            inside, across = _weights(layers, range(first, first + len(phase)))
            share = (cosines * across).sum(axis=(-2, -1)) / np.maximum((cosines * inside).sum(axis=(-2, -1)), _TINY)
            contrasts.append(1.0 - share)
    return np.asarray(np.max(contrasts, axis=0))


@lru_cache
def _weights(layers: int, window: range) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of pairs inside a window and across its edges; each distance weighs as it does inside."""
    within = np.zeros(layers, dtype=bool)
    within[window[0] : window[-1] + 1] = True
    both, one = np.logical_and.outer(within, within), np.logical_xor.outer(within, within)
    inside, across = np.zeros((layers, layers)), np.zeros((layers, layers))
    lags = _lags(layers)
    for lag in range(1, len(window)):
        for chosen, weights in ((both, inside), (one, across)):
            pairs = chosen & (lags == lag)
            weights[pairs] = (len(window) - lag) / pairs.sum()
    return inside / inside.sum(), across / across.sum()


def smooth_drifts(cosines: Float64[np.ndarray, "layers layers"], phase: range, draws: int = DRAWS) -> SmoothDrifts:
    """Return the statistic of a phase and those of drifts fitted to the other pairs of layers.

    `cosines` are absolute; those of a layer with itself are its reliability, which dampens the drifts' cosines with
    other layers as it dampens the model's. Draws are seeded. Raises ValueError unless the phase has two layers at least
    and leaves out one.
    """
    layers = len(cosines)
    if not 2 <= len(phase) < layers:
        raise ValueError(f"a phase of {len(phase)} of {layers} layers has no pairs inside, or no edge")
    generator = np.random.default_rng(SEED)
    damping = np.sqrt(np.outer(cosines.diagonal(), cosines.diagonal()))
    squares = np.minimum((cosines / np.maximum(damping, _TINY)) ** 2, 1.0)
    fitted = np.ones((layers, layers), dtype=bool)
    fitted[phase[0] : phase[-1] + 1, phase[0] : phase[-1] + 1] = False
    np.fill_diagonal(fitted, True)
    factor, dimensions = _fit(squares, fitted, generator)
    drawn = [
        edge_contrast(np.abs(drift_cosines(factor, dimensions, generator, count)) * damping, phase)
        for count in (min(_AT_ONCE, draws - first) for first in range(0, draws, _AT_ONCE))
    ]
    return SmoothDrifts(float(edge_contrast(cosines, phase)), np.sort(np.concatenate(drawn)))


def _fit(squares: np.ndarray, fitted: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, float]:
    """Return the factor of the kernel, and the degrees of freedom.

    In nu dimensions unrelated directions have a mean squared cosine of 1 / nu, which the kernel must not hold as well.
    """
    means, departure = _by_lag(squares, fitted)

    def departures(dimensions: float) -> list[float]:
        drifts = drift_cosines(_factor(means, dimensions), dimensions, generator, PILOT) ** 2
        return [_by_lag(drift, fitted)[1] for drift in drifts]

    dimensions = matching_dimensions(departure, departures, _STEPS)
    return _factor(means, dimensions), dimensions


def _factor(means: np.ndarray, dimensions: float) -> np.ndarray:
    """Return one row per layer, whose inner products are the kernel, with which squared cosines have these means."""
    unrelated = 1.0 / (round(dimensions) if dimensions < len(means) else dimensions)
    factor = embedding_of(np.sqrt(np.maximum((means - unrelated) / (1.0 - unrelated), 0.0)))
    return np.asarray(factor / np.linalg.norm(factor, axis=1)[:, None])


def _by_lag(squares: np.ndarray, fitted: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the matrix of the means of the fitted pairs at each distance, and the mean squared departure from it."""
    lags, weights = _lags(len(squares)), fitted.astype(np.float64)
    counts = np.bincount(lags.ravel(), weights.ravel())
    means = np.bincount(lags.ravel(), (squares * weights).ravel()) / np.maximum(counts, 1.0)
    known = np.flatnonzero(counts)
    means = np.interp(np.arange(len(means)), known, means[known])
    return means[lags], float((weights * (squares - means[lags]) ** 2).sum() / weights.sum())


def _lags(layers: int) -> np.ndarray:
    """Return the distance of each pair of layers."""
    return np.abs(np.subtract.outer(np.arange(layers), np.arange(layers)))


def outside_fit(layers: int, phase: Sequence[int]) -> str | None:
    """Return why drifts cannot be held against a phase of a model of this depth, or None if they can.

    Example:
        >>> outside_fit(64, range(10, 32)) is None, outside_fit(6, range(1, 4))
        (True, 'this depth cannot decide: 6 layers, and a comparison with smooth drifts needs 20 layers')
    """
    if layers < FEWEST_LAYERS:
        needed = f"a comparison with smooth drifts needs {FEWEST_LAYERS} layers"
        return f"this depth cannot decide: {layers} layers, and {needed}"
    if len(phase) < SHORTEST:
        return f"these {len(phase)} layers cannot decide: a comparison with smooth drifts needs a phase of {SHORTEST}"
    if len(phase) == layers:
        return "all layers are in the phase, so it has no edge"
    return None


SHORTEST, FEWEST_LAYERS = 3, 20
"""Least layers of a phase, and of a model, that drifts are held against. Of eight kinds of planted drift, 100 each, at
most 0.07 of any kind are called a phase C of 20 layers, 0.02 on average; of 16 layers up to 0.12, of 12 up to 0.12. A
planted phase with cosines of 0.5 is found in all of 20 repeats at 20 layers, and in 0.80 to 1.00 of them at 16."""
