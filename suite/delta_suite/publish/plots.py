"""A record's plots, as plotly figures: plain JSON, made from the record alone. The page gives them their colours."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from delta_suite.errors import RecordError
from delta_suite.escaping import plot_text
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import PERCENT
from delta_suite.metrics.registry import METRICS
from delta_suite.publish.wording import NONE, number
from delta_suite.records.view import RecordView

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

SHARES = 64
"""Energy shares drawn per layer: what lies beyond is a tail that a plot does not show."""

TRANSPARENT = "rgba(0, 0, 0, 0)"


@dataclass(frozen=True)
class Plot:
    """One figure of a page, or why there is none."""

    name: str
    title: str
    caption: str
    square: bool
    figure: Figure | None
    reason: str | None = None


def plots(view: RecordView, variant: str) -> tuple[Plot, ...]:
    """Return the plots of a record in one variant. Those that need arrays which are gone say so."""
    drawn = [_cosines(view, variant), _spectrum(view, variant), _ranks(view, variant), _steps(view, variant)]
    if view.record.law is not None:
        drawn.append(_transfer(view))
    return tuple(drawn)


def why_no_arrays(view: RecordView, content: str) -> str:
    """Return why a record has no arrays of this content: the file that is gone, or a record that never had them."""
    try:
        view.content()
    except RecordError as error:
        return str(error)
    return f"the record holds no {content}; measure it again: {view.measure_again()}"


def _rows(matrix: np.ndarray, digits: int = 4) -> list[list[float | None]]:
    """Return a matrix as JSON: rounded for the eye, null for NaN."""
    return [[None if math.isnan(value) else round(float(value), digits) for value in row] for row in matrix]


# --- phases ----------------------------------------------------------------------------------------------------


def _ordered(view: RecordView) -> list[tuple[str, int, int]]:
    return sorted(((name, first, last) for name, (first, last) in view.phases.items()), key=lambda row: row[1])


def phase_edges(view: RecordView) -> list[float]:
    """Return where a phase begins or ends between two layers: 3.5 lies between layers 3 and 4."""
    last_layer = view.model.layers - 1
    edges = {edge for _, first, last in _ordered(view) for edge in (first - 0.5, last + 0.5)}
    return sorted(edge for edge in edges if 0 < edge < last_layer)


def detected_edges(view: RecordView) -> list[float]:
    """Return the boundaries that were detected rather than declared, each before the first layer of its segment."""
    boundaries = view.record.boundaries.get("raw")
    return [] if boundaries is None else [layer - 0.5 for layer in boundaries.detected]


def _phase_names(view: RecordView) -> list[dict[str, Any]]:
    return [
        {
            **{
                "text": plot_text(name),
                "x": (first + last) / 2,
                "xref": "x",
                "y": 1.0,
                "yref": "paper",
                "yanchor": "bottom",
            },
            **{"showarrow": False, "font": {"size": 12}},
        }
        for name, first, last in _ordered(view)
    ]


def _bands(view: RecordView) -> list[dict[str, Any]]:
    """Return every second phase as a shade, and the detected boundaries as dashed lines."""
    shaded = [
        {
            **{"type": "rect", "layer": "below", "xref": "x", "yref": "paper", "y0": 0, "y1": 1},
            **{"x0": first - 0.5, "x1": last + 0.5, "fillcolor": BAND, "line": {"width": 0}},
        }
        for index, (_, first, last) in enumerate(_ordered(view))
        if index % 2 == 0
    ]
    lines = [
        {
            **{"type": "line", "xref": "x", "yref": "paper", "y0": 0, "y1": 1, "x0": edge, "x1": edge},
            "line": {"color": VERMILION, "width": 2, "dash": "dash"},
        }
        for edge in detected_edges(view)
    ]
    return shaded + lines


def _grid_lines(view: RecordView, across: tuple[float, float] | None) -> list[dict[str, Any]]:
    """Return boundaries over a heatmap: declared in white on black, to show on every colour, detected dashed."""
    low, high = -0.5, view.model.layers - 0.5
    vertical = across or (low, high)
    lines = []

    def add(edge: float, colour: str, width: int, dash: str) -> None:
        line = {"type": "line", "line": {"color": colour, "width": width, "dash": dash}}
        lines.append(line | {"x0": edge, "x1": edge, "y0": vertical[0], "y1": vertical[1]})
        if across is None:
            lines.append(line | {"x0": low, "x1": high, "y0": edge, "y1": edge})

    for edge in phase_edges(view):
        add(edge, "#000000", 3, "solid")
        add(edge, "#FFFFFF", 1, "solid")
    for edge in detected_edges(view):
        add(edge, "#000000", 3, "solid")
        add(edge, VERMILION, 2, "dash")
    return lines


# --- figures ---------------------------------------------------------------------------------------------------


def _layer_axis(**more: Any) -> dict[str, Any]:
    return {"title": {"text": "layer"}, "zeroline": False, **more}


def _log_axis(view: RecordView, variant: str, metrics: Sequence[str], title: str) -> dict[str, Any]:
    """Return a logarithmic axis with whole numbers as ticks: plotly's default would write 0.2 and 20 both as 2."""
    shown = [estimate for metric in metrics for estimate in estimates(view, variant, metric)]
    values = [value for e in shown for value in (e.value, *(e.interval or ())) if value is not None and value > 0]
    low, high = (math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))) if values else (0, 1)
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    return {
        **{"title": {"text": title}, "type": "log", "zeroline": False},
        **{"tickmode": "array", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]},
    }


def _cosines(view: RecordView, variant: str) -> Plot:
    edges = detected_edges(view)
    caption = (
        "|v_L · v_M| of each pair of layers: 1 where two layers write along one direction. Solid lines: declared "
        "phase boundaries"
        + (
            f"; dashed lines: boundaries detected, before layers {', '.join(f'{edge + 0.5:g}' for edge in edges)}."
            if edges
            else "; no boundaries were searched for in this record."
        )
    )
    title = "Do the layers share a direction?"
    cosines = view.cosines(variant)
    if cosines is None:
        return Plot("cosines", title, caption, True, None, why_no_arrays(view, "cosines"))
    heatmap = {
        **{"type": "heatmap", "z": _rows(cosines), "zmin": 0, "zmax": 1, "colorscale": SCALE},
        "colorbar": {"title": {"text": "|cos|"}, "thickness": 12},
        "hovertemplate": "layers %{x} and %{y}: |cos| %{z:.4f}<extra></extra>",
    }
    layout = {
        "xaxis": _layer_axis(constrain="domain"),
        "yaxis": _layer_axis(autorange="reversed"),
        "shapes": _grid_lines(view, None),
        "annotations": _phase_names(view),
    }
    return Plot("cosines", title, caption, True, {"data": [heatmap], "layout": layout})


def _spectrum(view: RecordView, variant: str) -> Plot:
    title = "The spectrum over depth"
    caption = (
        "The share p_i of each layer's update energy that lies along its i-th singular direction, as a power of ten. "
        "A bright first row alone is an update of one direction; an even column is one of many."
    )
    energies = view.energies(variant)
    if energies is None:
        return Plot("spectrum", title, caption, False, None, why_no_arrays(view, "spectra"))
    shares = energies[:, :SHARES]
    count = shares.shape[1]
    logs = _rows(np.log10(np.where(shares > 0, shares, np.nan)).T)
    heatmap = {
        **{"type": "heatmap", "z": logs, "y0": 1, "dy": 1, "colorscale": SCALE},
        "colorbar": {"title": {"text": "log10 p"}, "thickness": 12},
        "hovertemplate": "layer %{x}, direction %{y}: p = 10^%{z:.2f}<extra></extra>",
    }
    layout = {
        "xaxis": _layer_axis(),
        "yaxis": {"title": {"text": "singular direction i"}, "autorange": "reversed", "zeroline": False},
        "shapes": _grid_lines(view, (0.5, count + 0.5)),
        "annotations": _phase_names(view),
    }
    return Plot("spectrum", title, caption, False, {"data": [heatmap], "layout": layout})


def _ranks(view: RecordView, variant: str) -> Plot:
    metrics = ("effective_rank", "participation_ratio", "stable_rank")
    layout = {
        "xaxis": _layer_axis(),
        "yaxis": _log_axis(view, variant, metrics, "directions"),
        "shapes": _bands(view),
        "annotations": _phase_names(view),
    }
    caption = "How many directions a layer's update has, by three measures. " + _about_intervals(view, variant, metrics)
    return Plot("ranks", "Ranks over depth", caption, False, {"data": _lines(view, variant, metrics), "layout": layout})


def layer_figure(view: RecordView, variant: str, metric: str) -> Figure:
    """Return one layer metric over depth, with its intervals and the phases."""
    layout = {
        "title": {"text": f"{plot_text(view.model.name)}: {metric.replace('_', ' ')} ({variant})"},
        "xaxis": _layer_axis(),
        "yaxis": {"title": {"text": METRICS[metric].unit}, "zeroline": False},
        "shapes": _bands(view),
        "annotations": _phase_names(view),
    }
    return {"data": _lines(view, variant, (metric,)), "layout": layout}


def _steps(view: RecordView, variant: str) -> Plot:
    metrics = ("gamma", "relative_step")
    upper = _lines(view, variant, metrics[:1])
    lower = [trace | {"yaxis": "y2"} for trace in _lines(view, variant, metrics[1:], SERIES[1:])]
    layout = {
        "xaxis": _layer_axis(anchor="y2"),
        "yaxis": _log_axis(view, variant, metrics[:1], "gamma") | {"domain": [0.54, 1.0]},
        "yaxis2": _log_axis(view, variant, metrics[1:], "relative step") | {"domain": [0.0, 0.46]},
        "shapes": _bands(view),
        "annotations": _phase_names(view),
    }
    caption = "gamma is the largest singular value of the update; the relative step is the mean of ||delta|| / ||h||. "
    caption += _about_intervals(view, variant, metrics)
    return Plot("steps", "The size of the steps", caption, False, {"data": upper + lower, "layout": layout})


def _transfer(view: RecordView) -> Plot:
    title = "Does one layer's map serve another?"
    caption = (
        "Held-out R² of the linear map fitted on one layer, when it predicts the update of another. At -1 the scale "
        "ends: worse than that looks the same. It does not depend on the variant."
    )
    transfer = view.transfer()
    if transfer is None:
        return Plot("transfer", title, caption, True, None, _why_no_transfer(view))
    heatmap = {
        **{"type": "heatmap", "z": _rows(transfer, 3), "zmin": -1, "zmax": 1, "colorscale": SCALE},
        "colorbar": {"title": {"text": "R²"}, "thickness": 12},
        "hovertemplate": "map of layer %{x} on layer %{y}: R² %{z:.3f}<extra></extra>",
    }
    layout = {
        "xaxis": _layer_axis(title={"text": "layer the map was fitted on"}),
        "yaxis": _layer_axis(title={"text": "layer that is predicted"}, autorange="reversed"),
        "shapes": _grid_lines(view, None),
        "annotations": _phase_names(view),
    }
    return Plot("transfer", title, caption, True, {"data": [heatmap], "layout": layout})


def _why_no_transfer(view: RecordView) -> str:
    """Return why the law could not be fitted, or else why its matrix is not at hand."""
    law = [name for name, metric in METRICS.items() if metric.takes == "law"]
    figures = [view.over(range(first, last + 1), name, "raw") for first, last in view.phases.values() for name in law]
    if figures and all(figure.value is None for figure in figures):
        return str(figures[0].reason)
    return why_no_arrays(view, "transfer matrix")


# --- lines -----------------------------------------------------------------------------------------------------


def estimates(view: RecordView, variant: str, metric: str) -> list[Estimate]:
    """Return one metric of every layer, without replicates."""
    return [view.layer(layer.layer, metric, variant, replicates=False) for layer in view.layers]


def _lines(
    view: RecordView,
    variant: str,
    metrics: Sequence[str],
    series: Sequence[tuple[str, str, str]] = SERIES,
) -> list[dict[str, Any]]:
    """Return one line a metric, with a band for the interval of each layer that has one."""
    traces = []
    for metric, (colour, marker, dash) in zip(metrics, series, strict=False):
        values = estimates(view, variant, metric)
        name = metric.replace("_", " ")
        if any(estimate.interval for estimate in values):
            traces += _band(values, colour)
        traces.append(
            {
                **{"type": "scatter", "mode": "lines+markers", "name": name, "y": [e.value for e in values]},
                **{"line": {"color": colour, "dash": dash, "width": 2}, "marker": {"symbol": marker, "size": 7}},
                "hovertext": [_hover(layer, name, METRICS[metric].unit, e) for layer, e in enumerate(values)],
                "hoverinfo": "text",
            }
        )
    return traces


def _band(values: Sequence[Estimate], colour: str) -> list[dict[str, Any]]:
    def edge(end: Callable[[tuple[float, float]], float]) -> dict[str, Any]:
        return {
            **{"type": "scatter", "mode": "lines", "hoverinfo": "skip", "line": {"color": TRANSPARENT, "width": 0}},
            "showlegend": False,
            "y": [end(e.interval) if e.interval else None for e in values],
        }

    red, green, blue = (int(colour[start : start + 2], 16) for start in (1, 3, 5))
    fill = {"fill": "tonexty", "fillcolor": f"rgba({red}, {green}, {blue}, 0.28)"}
    return [edge(min), edge(max) | fill]


def _hover(layer: int, name: str, unit: str, estimate: Estimate) -> str:
    if estimate.value is None:
        return f"layer {layer}: {name} {plot_text(estimate.reason or NONE)}"
    text = f"layer {layer}: {name} {number(estimate.value)}{'' if unit == '1' else f' {unit}'}"
    if estimate.corrected is not None:
        text += f", bias-corrected {number(estimate.corrected)}"
    if estimate.interval is not None:
        text += f", {PERCENT} {number(estimate.interval[0])} to {number(estimate.interval[1])}"
    return text


def _about_intervals(view: RecordView, variant: str, metrics: Sequence[str]) -> str:
    if any(e.interval for metric in metrics for e in estimates(view, variant, metric)):
        unit = view.record.resampling.unit
        return f"Bands: {PERCENT} intervals over {unit}s, around the bias-corrected value, so the line can leave them."
    return "This record holds no intervals for them."
