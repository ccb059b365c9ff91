"""Estimates of every layer, pair and phase from what was kept of a model, each with its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from delta_suite.metrics.definition import Metric
from delta_suite.metrics.direction_gram import NO_DIRECTION, DirectionGram, GramStack, upper_pairs
from delta_suite.metrics.estimate import Estimate, ValueAlone, absent
from delta_suite.metrics.intervals import with_interval
from delta_suite.metrics.registry import METRICS
from delta_suite.metrics.stacked import Values, stacked_values
from delta_suite.metrics.state import OF_VARIANT
from delta_suite.reduction.state_statistics import StateLayer, StateStatistics
from delta_suite.reduction.statistics import LayerStatistics

NO_UPDATE = "the update is zero on every token that enters"
"""The reason of a metric that a zero update leaves undefined."""

TOO_FEW_TOKENS = "fewer than two tokens enter"
"""The reason of every metric of a layer with fewer than two tokens."""

_DEFINED_WITHOUT_UPDATE = ("frobenius", "update_norm", "stream_norm", "relative_step", "block_influence")

_Case = TypeVar("_Case", LayerStatistics, StateStatistics, DirectionGram)
"""The part of the calibration that a figure is computed from: all units, one half, or all but one group of them."""


def layer_value(layer: LayerStatistics, metric: Metric) -> Estimate:
    """Return a metric of one layer's statistics, without its interval."""
    if layer.tokens < 2:
        return absent(TOO_FEW_TOKENS)
    if layer.eigenvalues.sum() == 0.0 and metric.name not in _DEFINED_WITHOUT_UPDATE:
        return absent(NO_UPDATE)
    estimate: Estimate = metric.compute(layer)
    return estimate


def layer_metrics(
    layer: LayerStatistics,
    halves: Sequence[LayerStatistics] = (),
    replicates: Sequence[LayerStatistics] = (),
    documents: Sequence[LayerStatistics] = (),
    *,
    averages: bool = True,
) -> dict[str, Estimate]:
    """Return every metric of a layer that takes tokens or its spectrum, by name.

    `halves` are the statistics of each half of the units, which remove biases; `replicates` those without each group of
    units, which give intervals; `documents` those without each group of documents, where the unit is the domain.
    `averages` includes the metrics that average over tokens.
    """
    return {
        name: _resampled(metric, partial(layer_value, metric=metric), layer, halves, replicates, documents)
        for name, metric in METRICS.items()
        if metric.takes == "spectrum" or (averages and metric.takes == "tokens")
    }


def state_metrics(state: StateLayer, variant: str) -> dict[str, Estimate]:
    """Return every metric of a state that is recorded under a variant, by name."""
    cases = (state.whole, (), state.replicates, state.documents)
    return {name: _resampled(METRICS[name], METRICS[name].compute, *cases) for name in OF_VARIANT[variant]}


def _resampled(
    metric: Metric,
    compute: Callable[[_Case], Estimate],
    whole: _Case,
    halves: Iterable[_Case],
    replicates: Sequence[_Case],
    documents: Sequence[_Case],
    values: Sequence[ValueAlone] | None = None,
) -> Estimate:
    """Return compute(whole) with its bias removed, as the metric asks for it, and its intervals from replicates.

    values: those of replicates and then of documents, where they were formed at once.
    """
    estimate = compute(whole)
    if estimate.value is None or not replicates:
        return estimate
    half_estimates = [compute(half) for half in halves] if metric.bias == "halves" else []
    if values is None:
        without: Sequence[Estimate | ValueAlone] = [compute(replicate) for replicate in replicates]
        narrower: Sequence[Estimate | ValueAlone] = [compute(replicate) for replicate in documents]
    else:
        without, narrower = values[: len(replicates)], values[len(replicates) :]
    return with_interval(estimate, half_estimates, without, metric.low, metric.high, metric.bias, narrower)


def direction_metrics(gram: DirectionGram, layer: int) -> dict[str, Estimate]:
    """Return every layer metric that needs directions, and every pair metric of the layer with the one after it."""
    estimates = {}
    with one_thread():
        for name, metric in METRICS.items():
            if metric.takes != "directions":
                continue
            if metric.scope == "layer":
                estimates[name] = _from_directions(metric, gram, [layer], partial(metric.compute, layer=layer))
            elif metric.scope == "pair" and layer + 1 == gram.layers:
                estimates[name] = absent("the last layer has no layer after it")
            elif metric.scope == "pair":
                pair = [layer, layer + 1]
                estimate = _from_directions(metric, gram, pair, partial(phase_value, metric, layers=pair))
                estimates[name] = estimate.model_copy(update={"per_layer": None})
    return estimates


def phase_metrics(gram: DirectionGram, layers: Sequence[int]) -> dict[str, Estimate]:
    """Return every pair and phase metric of directions over a contiguous set of layers."""
    with one_thread():
        return {
            name: phase_metric(gram, layers, metric)
            for name, metric in METRICS.items()
            if metric.takes == "directions" and metric.scope in {"pair", "phase"}
        }


def phase_metric(gram: DirectionGram, layers: Sequence[int], metric: Metric) -> Estimate:
    """Return one pair or phase metric over a set of layers, with its interval."""
    return _from_directions(metric, gram, layers, partial(phase_value, metric, layers=layers))


def phase_value(metric: Metric, gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return a pair or phase metric over layers whose directions all exist, without its interval."""
    if metric.scope == "pair":
        return _over_pairs(metric, gram, layers)
    estimate: Estimate = metric.compute(gram, layers)
    return estimate


def _from_directions(
    metric: Metric, gram: DirectionGram, layers: Sequence[int], compute: Callable[[DirectionGram], Estimate]
) -> Estimate:
    """Return the figure with its interval; absent where a layer among these has no direction."""

    def estimate(gram: DirectionGram) -> Estimate:
        missing = gram.without_direction(layers)
        return absent(NO_DIRECTION.format(missing[0])) if missing else compute(gram)

    values = None if gram.stack is None else stacked_values(metric.name, gram.stack, layers)
    return _resampled(metric, estimate, gram, gram.halves or (), gram.replicates, gram.documents, _alone(values))


def _alone(values: Values | None) -> list[ValueAlone] | None:
    return None if values is None else [ValueAlone(value) for value in values.tolist()]


def resampled(
    metric: Metric,
    gram: DirectionGram,
    compute: Callable[[DirectionGram], Estimate],
    of_stack: Callable[[GramStack], Values | None] = lambda stack: None,
) -> Estimate:
    """Return a figure of directions with its bias removed and its interval.

    of_stack: function that returns the values without each group at once, or None where it cannot.
    """
    with one_thread():
        values = None if gram.stack is None else of_stack(gram.stack)
        return _resampled(metric, compute, gram, gram.halves or (), gram.replicates, gram.documents, _alone(values))


@lru_cache
def _libraries() -> ThreadpoolController:
    """Return a controller of the thread pools of numpy and scipy."""
    import scipy.linalg  # noqa: F401  (only what is loaded is controlled)

    return ThreadpoolController()


@contextmanager
def one_thread() -> Iterator[None]:
    """Limit numpy and scipy to one thread; within such a block once more costs nothing.

    Matrices here have tens of rows, for which more threads take longer: several times as long on a machine of many
    cores. Enter it around many figures, because entering takes as long as computing one.
    """
    if _LIMITED.get():
        yield
        return
    before = _LIMITED.set(True)
    try:
        with _libraries().limit(limits=1, user_api="blas"):
            yield
    finally:
        _LIMITED.reset(before)


_LIMITED = ContextVar("_LIMITED", default=False)
"""True within a block of `one_thread`."""


@lru_cache
def _pairs(count: int, adjacent: bool) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of both members of each pair among `count` layers."""
    first, second = upper_pairs(count)
    if adjacent:
        next_to = second == first + 1
        return first[next_to], second[next_to]
    return first, second


def _over_pairs(metric: Metric, gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the mean of a pair metric over the pairs inside, and each layer's mean over its pairs."""
    if len(layers) == 1:
        return absent("one layer has no pairs")
    index = np.asarray(layers)
    first, second = (index[positions] for positions in _pairs(len(layers), metric.adjacent))
    values = np.asarray(metric.compute(gram, first, second))
    per_layer: Mapping[int, float | None] = {
        layer: float(values[(first == layer) | (second == layer)].mean()) for layer in layers
    }
    return Estimate(value=float(values.mean()), per_layer=dict(per_layer))
