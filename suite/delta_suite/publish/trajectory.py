"""One model over its training: every metric and verdict against the step, as tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import Any

from tabulate import tabulate

from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.registry import METRICS
from delta_suite.models.registry import ModelSpec
from delta_suite.publish.plots import BLUE, GREEN, ORANGE, VERMILION, Figure
from delta_suite.publish.tables import NONE, PHASE_COLUMNS, Row, number
from delta_suite.records.record import Measurement, ModelRecord

STEPS_ABREAST = 8
"""Columns of steps in one table; more steps go into a table below it."""


def series(models: Iterable[ModelSpec | ModelRecord]) -> dict[str, dict[int, str]]:
    """The training runs among these models: name -> step -> model, in order of the steps; two checkpoints at least."""
    found: dict[str, dict[int, str]] = {}
    for model in models:
        if model.series is not None:
            found.setdefault(model.series[0], {})[model.series[1]] = model.name
    return {name: dict(sorted(steps.items())) for name, steps in found.items() if len(steps) > 1}


# --- tables ----------------------------------------------------------------------------------------------------


def verdict_table(rows: Sequence[Row], steps: Mapping[int, str]) -> str:
    """Claims by steps."""
    claims = dict.fromkeys((row.hypothesis, row.expectation) for row in rows)
    cells = {(row.hypothesis, row.expectation, row.model): row for row in rows}
    lines = []
    for hypothesis, expectation in claims:
        own = [cells.get((hypothesis, expectation, model)) for model in steps.values()]
        words = [
            NONE if row is None else row.verdict if row.observed is None else f"{row.verdict} {number(row.observed, 3)}"
            for row in own
        ]
        lines.append([f"{hypothesis}/{expectation}", *words])
    return _abreast(lines, "expectation", steps)


def verdict_changes(rows: Sequence[Row], steps: Mapping[int, str]) -> list[str]:
    """For each claim whose verdict changed, between which steps, and from what to what."""
    lines = []
    for claim in dict.fromkeys((row.hypothesis, row.expectation) for row in rows):
        verdicts = {row.model: row.verdict for row in rows if (row.hypothesis, row.expectation) == claim}
        known = [(step, verdicts[model]) for step, model in steps.items() if model in verdicts]
        changes = [
            f"{before} -> {after} at step {step} (still {before} at {last})"
            for (last, before), (step, after) in pairwise(known)
            if before != after
        ]
        if changes:
            lines.append(f"{'/'.join(claim)}: {'; '.join(changes)}")
    return lines


def metric_table(
    measurements: Mapping[int, Measurement], variant: str = "raw", metrics: Sequence[str] | None = None
) -> str:
    """Metrics by steps, phase by phase: those of the table of phases, or others; layer metrics as their mean."""
    names = list(PHASE_COLUMNS) if metrics is None else metrics
    steps = {step: measurement.model.name for step, measurement in measurements.items()}
    phases = dict.fromkeys(phase for measurement in measurements.values() for phase in measurement.phases)
    lines = []
    for name in names:
        for phase in phases:
            values = _values(measurements, name, phase, variant)
            if any(value is not None for value in values):
                lines.append([f"{PHASE_COLUMNS.get(name, name)} {phase}", *(number(value) for value in values)])
    return _abreast(lines, "metric, phase", steps)


def _values(measurements: Mapping[int, Measurement], metric: str, phase: str, variant: str) -> list[float | None]:
    found = [phase_estimate(own, metric, phase, variant) for own in measurements.values()]
    return [None if own is None else own.value for own in found]


def _abreast(lines: Sequence[Sequence[str]], first: str, steps: Mapping[int, str]) -> str:
    """A table, or several below each other where there are many steps."""
    numbers = [str(step) for step in steps]
    tables = []
    for start in range(0, len(numbers), STEPS_ABREAST):
        part = slice(start + 1, start + 1 + STEPS_ABREAST)
        headers = [first, *(f"step {own}" for own in numbers[start : start + STEPS_ABREAST])]
        align = ("left", *["right"] * (len(headers) - 1))
        cut = [[line[0], *line[part]] for line in lines]
        tables.append(tabulate(cut, headers=headers, disable_numparse=True, colalign=align if cut else None))
    return "\n\n".join(tables)


def phase_estimate(measurement: Measurement, metric: str, phase: str, variant: str) -> Estimate | None:
    """A metric over a phase; of a layer metric the mean over the phase's layers, with its interval. None without."""
    from delta_suite.metrics.intervals import combine

    if phase not in measurement.scopes or variant not in measurement.scopes[phase].metrics:
        return None
    if METRICS[metric].scope != "layer":
        return measurement.scopes[phase].metrics[variant].get(metric)
    first, last = measurement.phases[phase]
    own = [measurement.layers[layer].metrics[variant].get(metric) for layer in range(first, last + 1)]
    if any(estimate is None or estimate.value is None for estimate in own):
        return None
    known = [estimate for estimate in own if estimate is not None]
    return combine(
        lambda *values: sum(values) / len(values), *known, low=METRICS[metric].low, high=METRICS[metric].high
    )


# --- figures ---------------------------------------------------------------------------------------------------

STYLES = (
    *((BLUE, "circle", "solid"), (ORANGE, "square", "dash"), (GREEN, "diamond", "dot"), (VERMILION, "x", "dashdot")),
    *(("#56B4E9", "triangle-up", "longdash"), ("#CC79A7", "star", "longdashdot")),
)
"""Colour, marker and dash of the phases, in their order; of a seventh and later ones from the first again."""


def figures(measurements: Mapping[int, Measurement], rows: Sequence[Row], variant: str) -> dict[str, Figure]:
    """By metric: a line a phase over the steps, with 95% intervals; dotted lines where a verdict changed.

    A layer metric is its mean over the phase. A metric that no phase has a value for is left out.
    """
    steps = {step: own.model.name for step, own in measurements.items()}
    phases = list(dict.fromkeys(phase for own in measurements.values() for phase in own.phases))
    changes = [
        {
            **{"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1},
            **{"layer": "below", "line": {"color": VERMILION, "width": 1, "dash": "dot"}},
        }
        for step in _changed_at(rows, steps)
    ]
    found = {}
    for metric, known in METRICS.items():
        traces = [
            trace
            for phase, style in zip(phases, cycle(STYLES), strict=False)
            if (trace := _line(measurements, metric, phase, variant, style)) is not None
        ]
        if traces:
            layout = {
                "xaxis": {"title": {"text": "training step"}, "zeroline": False},
                "yaxis": {"title": {"text": metric + ("" if known.unit == "1" else f" [{known.unit}]")}},
                "shapes": changes,
                "showlegend": True,
            }
            found[metric] = {"data": traces, "layout": layout}
    return found


def _line(
    measurements: Mapping[int, Measurement], metric: str, phase: str, variant: str, style: tuple[str, str, str]
) -> dict[str, Any] | None:
    own = [phase_estimate(measurement, metric, phase, variant) for measurement in measurements.values()]
    values = [None if estimate is None or estimate.value is None else _short(estimate.value) for estimate in own]
    if all(value is None for value in values):
        return None
    colour, marker, dash = style
    trace = {
        **{"type": "scatter", "mode": "lines+markers", "name": phase, "x": list(measurements), "y": values},
        **{"line": {"color": colour, "dash": dash, "width": 2}, "marker": {"symbol": marker, "size": 8}},
        "hovertemplate": f"phase {phase}, step %{{x}}: %{{y:.4g}}<extra></extra>",
    }
    bars = [_bars(estimate) for estimate in own]
    if any(low or high for low, high in bars):
        above, below = [_short(high) for _, high in bars], [_short(low) for low, _ in bars]
        trace["error_y"] = {
            **{"type": "data", "symmetric": False, "array": above, "arrayminus": below},
            **{"thickness": 1, "width": 3},
        }
    return trace


def _short(value: float) -> float:
    """A plot shows no more than five digits."""
    return float(f"{value:.5g}")


def _bars(estimate: Estimate | None) -> tuple[float, float]:
    """How far the interval reaches below and above the value."""
    if estimate is None or estimate.value is None or estimate.interval is None:
        return 0.0, 0.0
    low, high = estimate.interval
    return max(0.0, estimate.value - low), max(0.0, high - estimate.value)


def _changed_at(rows: Sequence[Row], steps: Mapping[int, str]) -> list[int]:
    """The steps at which any verdict is another than at the step before."""
    verdicts = {(row.hypothesis, row.expectation, row.model): row.verdict for row in rows}
    claims = {(row.hypothesis, row.expectation) for row in rows}
    return [
        step
        for (_, before), (step, after) in pairwise(steps.items())
        if any(verdicts.get((*claim, before)) != verdicts.get((*claim, after)) for claim in claims)
    ]
