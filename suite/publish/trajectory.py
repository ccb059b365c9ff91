"""One model over its training: every metric and verdict against the step, as tables and as a page with a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from tabulate import tabulate

from suite.analysis.metrics import METRICS, Estimate
from suite.models.registry import ModelSpec
from suite.publish.tables import NONE, PHASE_COLUMNS, Row, number
from suite.records.measurement import Measurement, write_atomically

STEPS_ABREAST = 8
"""Columns of steps in one table; more steps go into a table below it."""

VERDICT_COLOURS = {"PASS": "#2a9d6f", "FAIL": "#c8443c", "INCONCLUSIVE": "#d9a441", "NOT MEASURED": "#b5b5b5"}


def series(specs: Iterable[ModelSpec]) -> dict[str, dict[int, str]]:
    """The training runs among these models: name -> step -> model, in order of the steps; two checkpoints at least."""
    found: dict[str, dict[int, str]] = {}
    for spec in specs:
        if spec.series is not None:
            found.setdefault(spec.series[0], {})[spec.series[1]] = spec.name
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
    from suite.analysis.uncertainty import combine

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


# --- the plot --------------------------------------------------------------------------------------------------


def trajectory_figure(
    name: str, measurements: Mapping[int, Measurement], rows: Sequence[Row] = (), variant: str = "raw"
) -> Any:
    """A plotly figure: one metric over the steps (a menu chooses which), a line a phase with 95% intervals, and below
    it the verdict on every claim, step by step."""
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    steps = list(measurements)
    models = [measurement.model.name for measurement in measurements.values()]
    claims = list(dict.fromkeys(f"{row.hypothesis}/{row.expectation}" for row in rows))
    figure = make_subplots(
        rows=2 if claims else 1,
        cols=1,
        shared_xaxes=True,
        vertical_spacing=0.08,
        row_heights=[0.65, 0.35] if claims else [1.0],
    )
    phases = list(dict.fromkeys(phase for own in measurements.values() for phase in own.phases))
    traces: list[str] = []
    for metric in METRICS:
        for phase in phases:
            found = [phase_estimate(own, metric, phase, variant) for own in measurements.values()]
            values = [None if own is None else own.value for own in found]
            if all(value is None for value in values):
                continue
            bars = [_bars(own) for own in found]
            figure.add_trace(
                go.Scatter(
                    x=steps,
                    y=values,
                    name=phase,
                    legendgroup=phase,
                    mode="lines+markers",
                    visible=metric == _first(traces, metric),
                    error_y={
                        "type": "data",
                        "symmetric": False,
                        "array": [high for _, high in bars],
                        "arrayminus": [low for low, _ in bars],
                        "thickness": 1,
                    },
                    hovertemplate=f"{metric}, phase {phase}: %{{y:.4g}} at step %{{x}}<extra></extra>",
                ),
                row=1,
                col=1,
            )
            traces.append(metric)
    for claim in claims:
        by_model = {row.model: row for row in rows if f"{row.hypothesis}/{row.expectation}" == claim}
        found_rows = [by_model.get(model) for model in models]
        figure.add_trace(
            go.Scatter(
                x=steps,
                y=[claim] * len(steps),
                mode="markers",
                showlegend=False,
                marker={
                    "size": 13,
                    "symbol": "square",
                    "color": [VERDICT_COLOURS.get(row.verdict, "#777") if row else "#fff" for row in found_rows],
                },
                text=[f"{row.verdict} {number(row.observed)}" if row else "not judged" for row in found_rows],
                hovertemplate=f"{claim}: %{{text}} at step %{{x}}<extra></extra>",
            ),
            row=2,
            col=1,
        )
    for step in _changed_at(rows, dict(zip(steps, models, strict=True))):
        figure.add_vline(x=step, line={"dash": "dot", "color": "#c8443c", "width": 1})
    shown = list(dict.fromkeys(traces))
    buttons = [
        {
            "label": metric,
            "method": "update",
            "args": [
                {"visible": [own == metric for own in traces] + [True] * len(claims)},
                {"yaxis.title.text": f"{metric} [{METRICS[metric].unit}]"},
            ],
        }
        for metric in shown
    ]
    axes = [
        {
            "label": f"{kind} steps",
            "method": "relayout",
            "args": [{f"{axis}.type": kind for axis in ("xaxis", "xaxis2")}],
        }
        for kind in ("linear", "log")
    ]
    figure.update_layout(
        title=f"{name}: {len(steps)} checkpoints, variant {variant}; dotted where a verdict changed",
        updatemenus=[
            {"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.14, "yanchor": "top"},
            {"buttons": axes, "x": 1, "xanchor": "right", "y": 1.14, "yanchor": "top"},
        ],
        yaxis_title=f"{shown[0]} [{METRICS[shown[0]].unit}]" if shown else "",
        template="plotly_white",
        height=560 + 26 * len(claims),
        margin={"t": 120},
    )
    figure.update_xaxes(title_text="training step", row=2 if claims else 1, col=1)
    return figure


def _first(traces: Sequence[str], metric: str) -> str:
    """The metric that is shown until another is chosen: the first that has a line."""
    return traces[0] if traces else metric


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


def write_page(figure: Any, path: Path) -> Path:
    """One HTML file that needs nothing else. Raises RecordError where it cannot be written."""
    write_atomically(path, figure.to_html(include_plotlyjs=True, full_html=True))
    return path
