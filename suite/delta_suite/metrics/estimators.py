"""Metrics put to what was kept of a model: every estimate of a layer, a pair or a phase, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from delta_suite.metrics.boundaries import Boundaries, find_boundaries, segments_of
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import with_interval
from delta_suite.metrics.registry import METRICS, DirectionGram, Metric
from delta_suite.reduction.statistics import LayerStatistics

NO_UPDATE = "the update is zero on every token that enters"
LAW_NOT_MEASURED = "the update law was not fitted over these layers: it is, over the phases, when a model is measured"
TOO_FEW_TOKENS = "fewer than two tokens enter"

_DEFINED_WITHOUT_UPDATE = ("frobenius", "update_norm", "stream_norm", "relative_step", "block_influence")


def layer_metrics(
    layer: LayerStatistics, halves: Sequence[LayerStatistics] = (), replicates: Sequence[LayerStatistics] = ()
) -> dict[str, Estimate]:
    """Every metric that a layer's statistics give.

    halves, replicates: the same of each half of the documents, and without each group of them.
    """

    def estimate(metric: Metric, own: LayerStatistics) -> Estimate:
        if own.tokens < 2:
            return absent(TOO_FEW_TOKENS)
        if own.eigenvalues.sum() == 0.0 and metric.name not in _DEFINED_WITHOUT_UPDATE:
            return absent(NO_UPDATE)
        found: Estimate = metric.compute(own)
        return found

    return {
        name: _estimated(metric, partial(estimate, metric), layer, halves, replicates)
        for name, metric in METRICS.items()
        if metric.scope == "layer" and not metric.from_directions
    }


_Case = TypeVar("_Case")
"""What a figure is computed from: of all documents, of a half, or without a group of them."""


def _estimated(
    metric: Metric,
    compute: Callable[[_Case], Estimate],
    whole: _Case,
    halves: Sequence[_Case],
    replicates: Sequence[_Case],
) -> Estimate:
    """compute(whole), with its bias, taken off as the metric wants it, and its interval from the replicates."""
    found = compute(whole)
    if found.value is None or not replicates:
        return found
    of_halves = [compute(half) for half in halves] if metric.bias == "halves" else []
    without = [compute(own) for own in replicates]
    return with_interval(found, of_halves, without, metric.low, metric.high, metric.bias)


def direction_metrics(gram: DirectionGram, layer: int) -> dict[str, Estimate]:
    """Every layer metric that needs directions, and every pair metric of the layer with the one after it."""
    out = {}
    with _one_thread():
        for name, metric in METRICS.items():
            if metric.from_directions:
                out[name] = _of_directions(metric, gram, [layer], partial(metric.compute, layer=layer))
            elif metric.scope == "pair" and layer + 1 == gram.layers:
                out[name] = absent("the last layer has no layer after it")
            elif metric.scope == "pair":
                pair = [layer, layer + 1]
                found = _of_directions(metric, gram, pair, partial(phase_metric, metric, layers=pair))
                out[name] = found.model_copy(update={"per_layer": None})
    return out


def phase_metrics(gram: DirectionGram, layers: Sequence[int], only: str | None = None) -> dict[str, Estimate]:
    """Every pair and phase metric, or only one of them, over a contiguous set of layers.

    Those of the update law come with a reason instead: it is fitted when the model is at hand.
    """
    with _one_thread():
        return {
            name: absent(LAW_NOT_MEASURED)
            if metric.from_law
            else _of_directions(metric, gram, layers, partial(phase_metric, metric, layers=layers))
            for name, metric in METRICS.items()
            if metric.scope in {"pair", "phase"} and only in (None, name)
        }


def phase_metric(metric: Metric, gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """A pair or phase metric over a set of layers whose directions all exist, without its interval."""
    if metric.scope == "pair":
        return _over_pairs(metric, gram, layers)
    found: Estimate = metric.compute(gram, layers)
    return found


def _of_directions(
    metric: Metric, gram: DirectionGram, layers: Sequence[int], compute: Callable[[DirectionGram], Estimate]
) -> Estimate:
    """The figure where all directions exist."""

    def estimate(own: DirectionGram) -> Estimate:
        missing = own.without_direction(layers)
        return absent(f"the update of layer {missing[0]} is zero, so it has no direction") if missing else compute(own)

    return _estimated(metric, estimate, gram, gram.halves, gram.replicates)


@lru_cache
def _libraries() -> ThreadpoolController:
    """Those of numpy and scipy."""
    import scipy.linalg  # noqa: F401  (only what is loaded is controlled)

    return ThreadpoolController()


def _one_thread() -> AbstractContextManager[object]:
    """Inside, numpy and scipy take one thread: their matrices here have tens of rows, and more threads take longer, on
    a machine of many cores several times as long. Entered around many figures, as it takes as long as one of them."""
    limited: AbstractContextManager[object] = _libraries().limit(limits=1, user_api="blas")
    return limited


def resampled(metric: Metric, gram: DirectionGram, compute: Callable[[DirectionGram], Estimate]) -> Estimate:
    """A figure of directions, with its bias and its interval."""
    with _one_thread():
        return _estimated(metric, compute, gram, gram.halves, gram.replicates)


def boundaries_under(
    gram: DirectionGram,
    phases: Mapping[str, tuple[int, int]],
) -> Boundaries | Estimate:
    """The boundaries of a model under a phase map, or an absent estimate that says why there are none."""
    layers = gram.layers
    if missing := gram.without_direction(range(layers)):
        return absent(f"the update of layer {missing[0]} is zero, so it has no direction")
    declared = segments_of(phases, layers)
    if not declared:
        return absent("one phase holds all layers, so there is no boundary")
    if len(declared) == layers - 1:
        return absent("each layer is a phase of its own, so there is no boundary to find")
    again = np.array([own.similarity for own in gram.replicates]) if gram.replicates else None
    return find_boundaries(gram.similarity, declared, again)


def boundary_metrics(found: Boundaries | Estimate) -> dict[str, Estimate]:
    """Every metric of a model under its phase map."""
    chosen = {name: metric for name, metric in METRICS.items() if metric.scope == "model"}
    return {name: found if isinstance(found, Estimate) else metric.compute(found) for name, metric in chosen.items()}


def pairs_of(metric: Metric, layers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """First and second layer of each pair that a pair metric takes inside a set of layers."""
    index = np.asarray(layers)
    first, second = _pairs(len(index), metric.adjacent)
    return index[first], index[second]


@lru_cache
def _pairs(count: int, adjacent: bool) -> tuple[np.ndarray, np.ndarray]:
    first, second = np.triu_indices(count, k=1)
    if adjacent:
        next_to = second == first + 1
        return first[next_to], second[next_to]
    return first, second


def _over_pairs(metric: Metric, gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Mean of a pair metric over the pairs inside, and each layer's mean over its own pairs."""
    if len(layers) == 1:
        return absent("one layer has no pairs")
    first, second = pairs_of(metric, layers)
    values = np.asarray(metric.compute(gram, first, second))
    per_layer: Mapping[int, float | None] = {
        layer: float(values[(first == layer) | (second == layer)].mean()) for layer in layers
    }
    return Estimate(value=float(values.mean()), per_layer=dict(per_layer))
