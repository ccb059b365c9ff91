"""Check the parts that layers have in figures of phases, the details of these figures, and the update law."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np

from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.registry import METRICS
from delta_suite.records.arrays import Arrays
from delta_suite.records.assemble import LAW_METRICS, LAW_VARIANT
from delta_suite.records.problem import (
    SINGLE,
    WRITTEN,
    Figures,
    Problem,
    Resampled,
    Resamples,
    equal_numbers,
    quoted,
)
from delta_suite.records.record import Record, ScopeRecord
from delta_suite.records.verify_layers import tokens_of
from delta_suite.reduction.statistics import TOP_K


def part_problems(record: Record, variant: str, scope: ScopeRecord, phase: str) -> Iterator[Problem]:
    """Yield where the numbers of a phase's layers, and the details of a figure, contradict the figure."""
    layers = list(range(scope.layers[0], scope.layers[1] + 1))
    for name, estimate in scope.metrics[variant].items():
        metric = METRICS.get(name)
        if metric is None:
            continue
        where = f"phase {phase}, {variant}, {name}"
        parts = estimate.per_layer
        if parts is not None:
            if sorted(parts) != layers:
                yield Problem(where, f"its layers are {quoted(sorted(parts))}, and the phase's {quoted(layers)}")
                continue
            values = [value for value in parts.values() if value is not None]
            highest = min(metric.high, metric.most) if not isinstance(metric.most, str) else metric.high
            slack = [WRITTEN * (1 + abs(value)) for value in values]
            if any(
                value < metric.low - more or value > highest + more for value, more in zip(values, slack, strict=True)
            ):
                yield Problem(where, f"a layer's number is outside {quoted(metric.low)} to {quoted(highest)}")
            mean = metric.takes == "directions" and not metric.adjacent and name != "intra_cosine_disattenuated"
            if estimate.value is not None and values and (mean or metric.takes == "law"):
                expected = statistics.fmean(values) if mean else statistics.median(values)
                if abs(estimate.value - expected) > max(slack):
                    how = "mean" if mean else "median"
                    yield Problem(
                        where, f"the value is {quoted(estimate.value)}, and the {how} of its layers {quoted(expected)}"
                    )
        elif metric.per_layer and estimate.value is not None:
            yield Problem(where, "the numbers of its layers are missing")
        yield from _detail_problems(record, variant, name, estimate, len(layers), where)


def _detail_problems(
    record: Record, variant: str, name: str, estimate: Estimate, count: int, where: str
) -> Iterator[Problem]:
    """Yield where the details of a figure of a phase contradict it or the record."""
    if estimate.value is None:
        return
    detail = estimate.detail or {}
    expected: dict[str, object] = {}
    if name == "shared_fraction" and variant in record.variants:
        expected = {"noise_edge": (1 + (TOP_K * count / record.model.hidden) ** 0.5) ** 2 / count}
        values: Any = detail.get("eigenvalues")
        if not _numbers(values) or not values or values != sorted(values, reverse=True):
            yield Problem(where, "its eigenvalues are missing, or do not descend")
        elif not all(-WRITTEN <= value <= 1 + WRITTEN for value in values):
            yield Problem(where, "an eigenvalue of a mean projector is outside 0 to 1")
        elif abs(values[0] - estimate.value) > WRITTEN:
            yield Problem(
                where, f"the value is {quoted(estimate.value)}, and the largest eigenvalue {quoted(float(values[0]))}"
            )
    elif name in LAW_METRICS:
        expected = {"hidden": record.model.hidden, "tokens": tokens_of(record, LAW_VARIANT)}
        documents, components = detail.get("documents"), detail.get("components")
        ridge: Any = detail.get("ridge")
        if not isinstance(documents, int) or not 2 <= documents <= record.calibration.documents:
            yield Problem(where, f"it says {quoted(documents)} documents, of {record.calibration.documents}")
        if not isinstance(components, int) or not 1 <= components <= record.model.hidden:
            yield Problem(where, f"it says {quoted(components)} components, of {record.model.hidden} dimensions")
        if not _numbers(ridge) or min(ridge, default=0.0) < 0:
            yield Problem(where, f"its ridge is {quoted(ridge)}")
        if "layers_without" in detail and estimate.per_layer is not None:
            expected["layers_without"] = sum(value is None for value in estimate.per_layer.values())
    for key, value in expected.items():
        stated = detail.get(key)
        if not equal_numbers(stated, value):
            yield Problem(where, f"its {key} is {quoted(stated)}, and follows to be {quoted(value)}")


def _numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int | float) for value in values)


# --- the law ---------------------------------------------------------------------------------------------------


def law_problems(
    record: Record, arrays: Arrays, today: Collection[str], resampled: Resampled, *, merged: bool
) -> Iterator[Problem]:
    """Yield where the law's figures contradict the transfer matrix; their intervals are checked with others.

    today: current metrics. resampled: what has intervals is added here.
    """
    assert record.law is not None
    fitted = list(record.law.phases.values())
    for name in LAW_METRICS:
        having = [
            (phase, scope.layers, scope.metrics[LAW_VARIANT][name])
            for phase, scope in record.scopes.items()
            if name in scope.metrics[LAW_VARIANT] and name in today
        ]
        units = arrays.get(f"law.units.{name}")
        if not having or (units is None and merged):
            continue
        lines = [fitted.index(layers) for _, layers, _ in having]
        figures = Figures.of(
            [(METRICS[name], f"phase {phase}, {LAW_VARIANT}", estimate) for phase, _, estimate in having]
        )
        part = (None if units is None else units[lines].T, None, 0.0)
        groups = record.resampling.groups if units is None else units.shape[1]
        resampled.add(figures, Resamples.join([part], len(lines), groups), centred=not merged)
    transfer = arrays.get("law.transfer")
    if transfer is None or merged:
        return
    matrix = transfer.astype(np.float64)
    for name, scope in record.scopes.items():
        first, last = scope.layers
        block = matrix[first : last + 1, first : last + 1]
        diagonal = np.diagonal(block)
        expected = {"own_r2": diagonal}
        if last > first:
            expected["transfer_r2"] = (block.sum(axis=1) - diagonal) / (last - first)
        for metric, values in expected.items():
            estimate = scope.metrics.get(LAW_VARIANT, {}).get(metric)
            if metric not in today or estimate is None or estimate.per_layer is None:
                continue
            for layer, value in zip(range(first, last + 1), values, strict=True):
                stated = estimate.per_layer.get(layer)
                tolerance = (SINGLE + WRITTEN) * (1 + float(np.abs(block[layer - first]).sum()))
                if stated is not None and not abs(stated - value) <= tolerance:
                    yield Problem(
                        f"phase {name}, {LAW_VARIANT}, {metric}",
                        f"layer {layer} has {quoted(stated)}, and the transfer matrix {quoted(float(value))}",
                    )


def fit_problems(record: Record) -> Iterator[Problem]:
    """Yield where two figures of the law say that they come from different fits; all phases are fitted at once."""
    kept: dict[str, Any] | None = None
    for phase, scope in record.scopes.items():
        for name in LAW_METRICS:
            estimate = scope.metrics.get(LAW_VARIANT, {}).get(name)
            if estimate is None or estimate.value is None:
                continue
            fit = {key: value for key, value in (estimate.detail or {}).items() if key != "layers_without"}
            kept = fit if kept is None else kept
            if fit != kept:
                yield Problem(
                    f"phase {phase}, {LAW_VARIANT}, {name}",
                    f"it comes from the fit {quoted(fit)}, others from {quoted(kept)}",
                )
