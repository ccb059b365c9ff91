"""One model over its training: every metric and verdict against the step, as tables and figures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle, pairwise, product
from typing import Any

from delta_suite.escaping import plot_text
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import combine
from delta_suite.metrics.registry import METRICS
from delta_suite.models.spec import ModelSpec
from delta_suite.publish.model_tables import PHASE_COLUMNS, lacks_pairs
from delta_suite.publish.plots import BLUE, GREEN, ORANGE, VERMILION, Figure
from delta_suite.publish.rows import Row
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.wording import NONE, number, verdict_text
from delta_suite.records.record import ModelRecord
from delta_suite.records.view import RecordView


def series(models: Iterable[ModelSpec | ModelRecord]) -> dict[str, dict[int, str]]:
    """Return the training runs among these models: name -> step -> model, in order of the steps, two at least."""
    runs: dict[str, dict[int, str]] = {}
    for model in models:
        if model.series is not None:
            runs.setdefault(model.series[0], {})[model.series[1]] = model.name
    return {name: dict(sorted(steps.items())) for name, steps in runs.items() if len(steps) > 1}


# --- tables ----------------------------------------------------------------------------------------------------


def verdict_table(rows: Sequence[Row], steps: Mapping[int, str]) -> Table:
    """Return claims by steps."""
    claims = dict.fromkeys((row.hypothesis, row.expectation) for row in rows)
    cells = {(row.hypothesis, row.expectation, row.model): row for row in rows}
    lines: list[list[str | Cell]] = []
    for hypothesis, expectation in claims:
        claim_rows = [cells.get((hypothesis, expectation, model)) for model in steps.values()]
        words = [
            NONE if row is None else Cell(verdict_text(row.word, row.observed), verdict=row.word) for row in claim_rows
        ]
        lines.append([f"{hypothesis}/{expectation}", *words])
    return Table.of(["expectation", *(f"step {step}" for step in steps)], lines)


def verdict_changes(rows: Sequence[Row], steps: Mapping[int, str]) -> list[str]:
    """Return for each claim whose verdict changed between which steps, and from what to what."""
    lines = []
    for claim in dict.fromkeys((row.hypothesis, row.expectation) for row in rows):
        verdicts = {row.model: row.word for row in rows if (row.hypothesis, row.expectation) == claim}
        known = [(step, verdicts[model]) for step, model in steps.items() if model in verdicts]
        changes = [
            f"{before} -> {after} at step {step} (still {before} at {last})"
            for (last, before), (step, after) in pairwise(known)
            if before != after
        ]
        if changes:
            lines.append(f"{'/'.join(claim)}: {'; '.join(changes)}")
    return lines


def metric_table(views: Mapping[int, RecordView], variant: str = "raw", metrics: Sequence[str] | None = None) -> Table:
    """Return metrics by steps, phase by phase: those of the table of phases, or others; layer metrics as their mean."""
    names = list(PHASE_COLUMNS) if metrics is None else metrics
    phases = dict.fromkeys(phase for view in views.values() for phase in view.phases)
    lines = []
    for name in names:
        for phase in phases:
            values = _values(views, name, phase, variant)
            if any(value is not None for value in values):
                lines.append([f"{PHASE_COLUMNS.get(name, name)} {phase}", *(number(value) for value in values)])
    head = ["metric, phase", *(f"step {step}" for step in views)]
    return Table.of(head, lines, align="l" + "r" * len(views))


def _values(views: Mapping[int, RecordView], metric: str, phase: str, variant: str) -> list[float | None]:
    estimates = [phase_estimate(view, metric, phase, variant) for view in views.values()]
    return [None if estimate is None else estimate.value for estimate in estimates]


def phase_estimate(view: RecordView, metric: str, phase: str, variant: str) -> Estimate | None:
    """Return a metric over a phase, a layer metric as the mean over its layers; None where there is no value."""
    if phase not in view.phases:
        return None
    first, last = view.phases[phase]
    layers = range(first, last + 1)
    definition = METRICS[metric]
    if lacks_pairs(metric, layers):
        return None
    if definition.scope != "layer":
        return None if definition.scope == "model" else view.over(layers, metric, variant)
    estimates = [view.layer(layer, metric, variant) for layer in layers]
    if any(estimate.value is None for estimate in estimates):
        return None
    return combine(lambda *values: sum(values) / len(values), *estimates, low=definition.low, high=definition.high)


# --- figures ---------------------------------------------------------------------------------------------------

STYLES = (
    *((BLUE, "circle", "solid"), (ORANGE, "square", "dash"), (GREEN, "diamond", "dot"), (VERMILION, "x", "dashdot")),
    *(("#56B4E9", "triangle-up", "longdash"), ("#CC79A7", "star", "longdashdot")),
)
"""Colour, marker and dash of the phases, in their order; a seventh phase takes the first style again."""


class PhaseFigures:
    """The figures of a checkpoint's phases, without the record that they are from: a run can have thousands."""

    def __init__(self, view: RecordView) -> None:
        """Take the figures from a record."""
        self.model, self.phases, self.variants = view.model, view.phases, view.variants
        self.versions = view.record.provenance.metric_versions
        self._figures: dict[tuple[str, str, str], tuple[float, tuple[float, float] | None]] = {}
        for variant, metric, phase in product(self.variants, METRICS, self.phases):
            estimate = phase_estimate(view, metric, phase, variant)
            if estimate is not None and estimate.value is not None:
                self._figures[metric, phase, variant] = (estimate.value, estimate.interval)

    def as_json(self) -> dict[str, Any]:
        """Return plain values, from which `from_json` makes the same again."""
        return {
            "model": self.model.model_dump(mode="json"),
            "phases": list(self.phases.items()),
            "variants": self.variants,
            "versions": self.versions,
            "figures": [(*key, *figure) for key, figure in self._figures.items()],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> PhaseFigures:
        """Return what `as_json` was made of. Raises a ValueError, KeyError or TypeError where it was not."""
        figures = cls.__new__(cls)
        figures.model = ModelRecord.model_validate(content["model"])
        figures.phases = {name: (first, last) for name, (first, last) in content["phases"]}
        figures.variants, figures.versions = tuple(content["variants"]), content["versions"]
        figures._figures = {
            (metric, phase, variant): (value, None if interval is None else (interval[0], interval[1]))
            for metric, phase, variant, value, interval in content["figures"]
        }
        return figures

    def estimate(self, metric: str, phase: str, variant: str) -> Estimate | None:
        """Return a metric over a phase, without its replicates; None where there is no value."""
        if (figure := self._figures.get((metric, phase, variant))) is None:
            return None
        return Estimate(value=figure[0], interval=figure[1])


def figures(checkpoints: Mapping[int, PhaseFigures], rows: Sequence[Row], variant: str) -> dict[str, Figure]:
    """Return by metric a line a phase over the steps, with intervals; dotted lines where a verdict changed.

    A layer metric is its mean over the phase. A metric that no phase has a value for is left out, and so is one whose
    version differs between the checkpoints: its figures are not comparable.
    """
    steps = {step: checkpoint.model.name for step, checkpoint in checkpoints.items()}
    phases = list(dict.fromkeys(phase for checkpoint in checkpoints.values() for phase in checkpoint.phases))
    changes = [
        {
            **{"type": "line", "xref": "x", "yref": "paper", "x0": step, "x1": step, "y0": 0, "y1": 1},
            **{"layer": "below", "line": {"color": VERMILION, "width": 1, "dash": "dot"}},
        }
        for step in _changed_at(rows, steps)
    ]
    drawn = {}
    for metric, known in METRICS.items():
        traces = [
            trace
            for phase, style in zip(phases, cycle(STYLES), strict=False)
            if (trace := _line(checkpoints, metric, phase, variant, style)) is not None
        ]
        versions = {checkpoint.versions[metric] for checkpoint in checkpoints.values() if metric in checkpoint.versions}
        if traces and len(versions) < 2:
            layout = {
                "xaxis": {"title": {"text": "training step"}, "zeroline": False},
                "yaxis": {"title": {"text": metric + ("" if known.unit == "1" else f" [{known.unit}]")}},
                "shapes": changes,
                "showlegend": True,
            }
            drawn[metric] = {"data": traces, "layout": layout}
    return drawn


def _line(
    checkpoints: Mapping[int, PhaseFigures], metric: str, phase: str, variant: str, style: tuple[str, str, str]
) -> dict[str, Any] | None:
    estimates = [checkpoint.estimate(metric, phase, variant) for checkpoint in checkpoints.values()]
    values = [None if estimate is None or estimate.value is None else _short(estimate.value) for estimate in estimates]
    if all(value is None for value in values):
        return None
    colour, marker, dash = style
    trace = {
        **{"type": "scatter", "mode": "lines+markers", "name": plot_text(phase), "x": list(checkpoints), "y": values},
        **{"line": {"color": colour, "dash": dash, "width": 2}, "marker": {"symbol": marker, "size": 8}},
        "hovertemplate": f"phase {plot_text(phase)}, step %{{x}}: %{{y:.4g}}<extra></extra>",
    }
    bars = [_bars(estimate) for estimate in estimates]
    if any(low or high for low, high in bars):
        above, below = [_short(high) for _, high in bars], [_short(low) for low, _ in bars]
        trace["error_y"] = {
            **{"type": "data", "symmetric": False, "array": above, "arrayminus": below},
            **{"thickness": 1, "width": 3},
        }
    return trace


def _short(value: float) -> float:
    """Return a value with five digits: a plot shows no more."""
    return float(f"{value:.5g}")


def _bars(estimate: Estimate | None) -> tuple[float, float]:
    """Return how far the interval reaches below and above the value."""
    if estimate is None or estimate.value is None or estimate.interval is None:
        return 0.0, 0.0
    low, high = estimate.interval
    return max(0.0, estimate.value - low), max(0.0, high - estimate.value)


def _changed_at(rows: Sequence[Row], steps: Mapping[int, str]) -> list[int]:
    """Return the steps at which any verdict is another than at the step before."""
    verdicts = {(row.hypothesis, row.expectation, row.model): row.word for row in rows}
    claims = {(row.hypothesis, row.expectation) for row in rows}
    return [
        step
        for (_, before), (step, after) in pairwise(steps.items())
        if any(verdicts.get((*claim, before)) != verdicts.get((*claim, after)) for claim in claims)
    ]
