"""A record's plots, as plotly figures: plain JSON, made from the record alone. The page gives them their colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel

from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.registry import METRICS
from delta_suite.publish.tables import number
from delta_suite.records.record import Measurement

Figure = dict[str, Any]
"""`data` and `layout` of plotly.js."""

# Okabe & Ito 2008, told apart under every common colour blindness, and readable on white and on near-black.
BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"

SERIES = ((BLUE, "circle", "solid"), (ORANGE, "square", "dash"), (GREEN, "diamond", "dot"))
"""Colour, marker and dash of the lines of one plot: any one of the three is enough to tell them apart."""

SCALE = "Cividis"
"""Even in lightness, and the same to people with and without colour blindness (Nuñez et al. 2018)."""

BAND = "rgba(128, 128, 128, 0.16)"
"""Every second phase, on white and on near-black."""

TRANSPARENT = "rgba(0, 0, 0, 0)"

OLD_RECORD = "this record is older than the section that the plot is drawn from; measure the model again"


@dataclass(frozen=True)
class Plot:
    """One figure of a page, or why there is none."""

    name: str
    title: str
    caption: str
    square: bool
    figure: Figure | None
    reason: str | None = None


def section(measurement: Measurement, name: str) -> dict[str, Any] | None:
    """An optional section of the record, as plain values; None where the record has none."""
    found = getattr(measurement, name, None)
    if isinstance(found, BaseModel):
        found = found.model_dump(mode="json")
    return found if isinstance(found, dict) else None


def plots(measurement: Measurement, variant: str) -> tuple[Plot, ...]:
    """The plots of a record in one variant. Sections that a record may lack are left out or say why."""
    found = [
        _cosines(measurement, variant),
        _spectrum(measurement, variant),
        _ranks(measurement, variant),
        _steps(measurement, variant),
    ]
    law = section(measurement, "law")
    if law is not None and law.get("transfer"):
        found.append(_transfer(measurement, law["transfer"]))
    return tuple(found)


# --- phases ----------------------------------------------------------------------------------------------------


def _ordered(measurement: Measurement) -> list[tuple[str, int, int]]:
    return sorted(((name, first, last) for name, (first, last) in measurement.phases.items()), key=lambda row: row[1])


def phase_edges(measurement: Measurement) -> list[float]:
    """Where a phase begins or ends between two layers: 3.5 lies between layers 3 and 4."""
    last_layer = measurement.model.layers - 1
    edges = {edge for _, first, last in _ordered(measurement) for edge in (first - 0.5, last + 0.5)}
    return sorted(edge for edge in edges if 0 < edge < last_layer)


def found_edges(measurement: Measurement) -> list[float]:
    """The boundaries that were found rather than declared, each just before the first layer of its segment."""
    boundaries = measurement.boundaries.get("raw")
    return [] if boundaries is None else [layer - 0.5 for layer in boundaries.found]


def _phase_names(measurement: Measurement) -> list[dict[str, Any]]:
    return [
        {
            **{"text": name, "x": (first + last) / 2, "xref": "x", "y": 1.0, "yref": "paper", "yanchor": "bottom"},
            **{"showarrow": False, "font": {"size": 12}},
        }
        for name, first, last in _ordered(measurement)
    ]


def _bands(measurement: Measurement) -> list[dict[str, Any]]:
    """Every second phase shaded, and the found boundaries as dashed lines."""
    shaded = [
        {
            **{"type": "rect", "layer": "below", "xref": "x", "yref": "paper", "y0": 0, "y1": 1},
            **{"x0": first - 0.5, "x1": last + 0.5, "fillcolor": BAND, "line": {"width": 0}},
        }
        for index, (_, first, last) in enumerate(_ordered(measurement))
        if index % 2 == 0
    ]
    found = [
        {
            **{"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "x0": edge, "x1": edge},
            "line": {"color": VERMILION, "width": 2, "dash": "dash"},
        }
        for edge in found_edges(measurement)
    ]
    return shaded + found


def _grid_lines(measurement: Measurement, across: tuple[float, float] | None) -> list[dict[str, Any]]:
    """Boundaries over a heatmap: declared in white on black, so that they show on every colour, found dashed."""
    low, high = -0.5, measurement.model.layers - 0.5
    vertical = across or (low, high)
    lines = []

    def add(edge: float, colour: str, width: int, dash: str) -> None:
        line = {"type": "line", "line": {"color": colour, "width": width, "dash": dash}}
        lines.append(line | {"x0": edge, "x1": edge, "y0": vertical[0], "y1": vertical[1]})
        if across is None:
            lines.append(line | {"x0": low, "x1": high, "y0": edge, "y1": edge})

    for edge in phase_edges(measurement):
        add(edge, "#000000", 3, "solid")
        add(edge, "#FFFFFF", 1, "solid")
    for edge in found_edges(measurement):
        add(edge, "#000000", 3, "solid")
        add(edge, VERMILION, 2, "dash")
    return lines


# --- figures ---------------------------------------------------------------------------------------------------


def _layer_axis(**more: Any) -> dict[str, Any]:
    return {"title": {"text": "layer"}, "zeroline": False, **more}


def _log_axis(measurement: Measurement, variant: str, metrics: Sequence[str], title: str) -> dict[str, Any]:
    """A logarithmic axis whose ticks are whole numbers: plotly's own would write 0.2 and 20 both as 2."""
    own = [estimate for metric in metrics for estimate in estimates(measurement, variant, metric)]
    values = [value for e in own for value in (e.value, *(e.interval or ())) if value is not None and value > 0]
    low, high = (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if values else (0, 1)
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    return {
        **{"title": {"text": title}, "type": "log", "zeroline": False},
        **{"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]},
    }


def full_matrix(triangle: Sequence[Sequence[float | None]]) -> list[list[float | None]]:
    """The symmetric matrix of which a record holds what lies above the diagonal; the diagonal is 1."""
    layers = len(triangle) + 1
    matrix: list[list[float | None]] = [[1.0] * layers for _ in range(layers)]
    for first, row in enumerate(triangle):
        for second, value in enumerate(row, start=first + 1):
            matrix[first][second] = matrix[second][first] = value
    return matrix


def _cosines(measurement: Measurement, variant: str) -> Plot:
    found = found_edges(measurement)
    caption = (
        "|v_L · v_M| of each pair of layers: 1 where two layers write along one direction. Solid lines: declared "
        "phase boundaries"
        + (
            f"; dashed lines: boundaries found, before layers {', '.join(f'{edge + 0.5:g}' for edge in found)}."
            if found
            else "; no boundaries were searched for in this record."
        )
    )
    title = "Do the layers share a direction?"
    triangle = (measurement.cosines or {}).get(variant)
    if triangle is None:
        return Plot("cosines", title, caption, True, None, OLD_RECORD)
    heatmap = {
        **{"type": "heatmap", "z": full_matrix(triangle), "zmin": 0, "zmax": 1, "colorscale": SCALE},
        "colorbar": {"title": {"text": "|cos|"}, "thickness": 12},
        "hovertemplate": "layers %{x} and %{y}: |cos| %{z:.4f}<extra></extra>",
    }
    layout = {
        "xaxis": _layer_axis(constrain="domain"),
        "yaxis": _layer_axis(autorange="reversed"),
        "shapes": _grid_lines(measurement, None),
        "annotations": _phase_names(measurement),
    }
    return Plot("cosines", title, caption, True, {"data": [heatmap], "layout": layout})


def _spectrum(measurement: Measurement, variant: str) -> Plot:
    title = "The spectrum over depth"
    caption = (
        "The share p_i of each layer's update energy that lies along its i-th singular direction, as a power of ten. "
        "A bright first row alone is an update of one direction; an even column is one of many."
    )
    shares = (measurement.spectra or {}).get(variant)
    if shares is None:
        return Plot("spectrum", title, caption, False, None, OLD_RECORD)
    count = max((len(row) for row in shares), default=0)
    logs: list[list[float | None]] = [
        [round(math.log10(row[i]), 4) if i < len(row) else None for row in shares] for i in range(count)
    ]
    heatmap = {
        **{"type": "heatmap", "z": logs, "y0": 1, "dy": 1, "colorscale": SCALE},
        "colorbar": {"title": {"text": "log10 p"}, "thickness": 12},
        "hovertemplate": "layer %{x}, direction %{y}: p = 10^%{z:.2f}<extra></extra>",
    }
    layout = {
        "xaxis": _layer_axis(),
        "yaxis": {"title": {"text": "singular direction i"}, "autorange": "reversed", "zeroline": False},
        "shapes": _grid_lines(measurement, (0.5, count + 0.5)),
        "annotations": _phase_names(measurement),
    }
    return Plot("spectrum", title, caption, False, {"data": [heatmap], "layout": layout})


def _ranks(measurement: Measurement, variant: str) -> Plot:
    metrics = ("effective_rank", "participation_ratio", "stable_rank")
    layout = {
        "xaxis": _layer_axis(),
        "yaxis": _log_axis(measurement, variant, metrics, "directions"),
        "shapes": _bands(measurement),
        "annotations": _phase_names(measurement),
    }
    caption = "How many directions a layer's update has, by three measures. " + _about_intervals(
        measurement, variant, metrics
    )
    return Plot(
        "ranks", "Ranks over depth", caption, False, {"data": _lines(measurement, variant, metrics), "layout": layout}
    )


def _steps(measurement: Measurement, variant: str) -> Plot:
    metrics = ("gamma", "relative_step")
    upper = _lines(measurement, variant, metrics[:1])
    lower = [trace | {"yaxis": "y2"} for trace in _lines(measurement, variant, metrics[1:], SERIES[1:])]
    layout = {
        "xaxis": _layer_axis(anchor="y2"),
        "yaxis": _log_axis(measurement, variant, metrics[:1], "gamma") | {"domain": [0.54, 1.0]},
        "yaxis2": _log_axis(measurement, variant, metrics[1:], "relative step") | {"domain": [0.0, 0.46]},
        "shapes": _bands(measurement),
        "annotations": _phase_names(measurement),
    }
    caption = "gamma is the largest singular value of the update; the relative step is the mean of ||delta|| / ||h||. "
    caption += _about_intervals(measurement, variant, metrics)
    return Plot("steps", "The size of the steps", caption, False, {"data": upper + lower, "layout": layout})


def _transfer(measurement: Measurement, transfer: Sequence[Sequence[float | None]]) -> Plot:
    heatmap = {
        **{"type": "heatmap", "z": [list(row) for row in transfer], "zmin": -1, "zmax": 1, "colorscale": SCALE},
        "colorbar": {"title": {"text": "R²"}, "thickness": 12},
        "hovertemplate": "map of layer %{x} on layer %{y}: R² %{z:.3f}<extra></extra>",
    }
    layout = {
        "xaxis": _layer_axis(title={"text": "layer the map was fitted on"}),
        "yaxis": _layer_axis(title={"text": "layer that is predicted"}, autorange="reversed"),
        "shapes": _grid_lines(measurement, None),
        "annotations": _phase_names(measurement),
    }
    caption = (
        "Held-out R² of the linear map fitted on one layer, when it predicts the update of another. At -1 the scale "
        "ends: worse than that looks the same. It does not depend on the variant."
    )
    return Plot("transfer", "Does one layer's map serve another?", caption, True, {"data": [heatmap], "layout": layout})


# --- lines -----------------------------------------------------------------------------------------------------


def estimates(measurement: Measurement, variant: str, metric: str) -> list[Estimate]:
    """One metric of every layer."""
    absent = Estimate(value=None, reason=f"the record is older than the metric {metric}")
    return [layer.metrics[variant].get(metric, absent) for layer in measurement.layers]


def _lines(
    measurement: Measurement,
    variant: str,
    metrics: Sequence[str],
    series: Sequence[tuple[str, str, str]] = SERIES,
) -> list[dict[str, Any]]:
    """One line a metric, with a band for the interval of each layer that has one."""
    traces = []
    for metric, (colour, marker, dash) in zip(metrics, series, strict=False):
        own = estimates(measurement, variant, metric)
        name = metric.replace("_", " ")
        if any(estimate.interval for estimate in own):
            traces += _band(own, colour)
        traces.append(
            {
                **{"type": "scatter", "mode": "lines+markers", "name": name, "y": [e.value for e in own]},
                **{"line": {"color": colour, "dash": dash, "width": 2}, "marker": {"symbol": marker, "size": 7}},
                "hovertext": [_hover(layer, name, METRICS[metric].unit, e) for layer, e in enumerate(own)],
                "hoverinfo": "text",
            }
        )
    return traces


def _band(own: Sequence[Estimate], colour: str) -> list[dict[str, Any]]:
    def edge(end: Callable[[tuple[float, float]], float]) -> dict[str, Any]:
        return {
            **{"type": "scatter", "mode": "lines", "hoverinfo": "skip", "line": {"color": TRANSPARENT, "width": 0}},
            "showlegend": False,
            "y": [end(e.interval) if e.interval else None for e in own],
        }

    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red}, {green}, {blue}, 0.28)"}
    return [edge(min), edge(max) | fill]


def _hover(layer: int, name: str, unit: str, estimate: Estimate) -> str:
    if estimate.value is None:
        return f"layer {layer}: {name} {estimate.reason}"
    text = f"layer {layer}: {name} {number(estimate.value)}{'' if unit == '1' else f' {unit}'}"
    if estimate.corrected is not None:
        text += f", bias-corrected {number(estimate.corrected)}"
    if estimate.interval is not None:
        text += f", 95% {number(estimate.interval[0])} to {number(estimate.interval[1])}"
    return text


def _about_intervals(measurement: Measurement, variant: str, metrics: Sequence[str]) -> str:
    if any(e.interval for metric in metrics for e in estimates(measurement, variant, metric)):
        return (
            "Bands: 95% intervals, documents as the unit, around the bias-corrected value, so the line can leave them."
        )
    return "This record holds no intervals for them."


def layer_values(measurement: Measurement, variant: str, metrics: Sequence[str]) -> list[tuple[int, str, list[str]]]:
    """The numbers behind the plots, for a table: layer, phase and each metric in words."""
    columns: Mapping[str, list[Estimate]] = {m: estimates(measurement, variant, m) for m in metrics}
    return [
        (layer.layer, layer.phase, [number(columns[metric][layer.layer].value) for metric in metrics])
        for layer in measurement.layers
    ]
