"""The two plots of a model card, as SVG: |cos| between layers, and the ranks over depth."""

from __future__ import annotations

import numpy as np

from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import PERCENT
from delta_suite.publish.plots import BLUE, GREEN, ORANGE, VERMILION, detected_edges, estimates, phase_edges
from delta_suite.publish.svg import Axis, Drawing
from delta_suite.records.view import RecordView

VARIANT = "raw"
"""The variant of the plots."""

COSINES, RANKS = "delta-suite-cosines.svg", "delta-suite-ranks.svg"

ALTERNATIVES = {
    COSINES: "Heatmap of |cos| between the top directions of all pairs of layers",
    RANKS: "Effective rank, participation ratio and stable rank of each layer's update",
}
"""A description of each plot, for those who do not see it."""

DASH = "6 4"
"""The pattern of detected boundaries."""

_SERIES = (
    ("effective_rank", BLUE, "circle", ""),
    ("participation_ratio", ORANGE, "square", "7 4"),
    ("stable_rank", GREEN, "diamond", "2 3"),
)


def card_plots(view: RecordView) -> dict[str, str]:
    """Return SVG by file name: the heat map where the record's arrays are at hand, and the ranks."""
    drawn = {}
    cosines = view.cosines(VARIANT)
    if cosines is not None:
        drawn[COSINES] = _cosines(view, cosines)
    drawn[RANKS] = _ranks(view)
    return drawn


def _cosines(view: RecordView, cosines: np.ndarray) -> str:
    drawing = Drawing(520, 470, f"{view.model.name}: |cos| between layers", ALTERNATIVES[COSINES])
    layers = view.model.layers
    x, y = Axis(-0.5, layers - 0.5, 60, 410, whole=True), Axis(-0.5, layers - 0.5, 30, 380, whole=True)
    drawing.heat_map(cosines, x, y)
    detected = detected_edges(view)
    for edges, colour, width, dash in ((phase_edges(view), "#ffffff", 1.2, ""), (detected, VERMILION, 2.0, DASH)):
        for edge in edges:
            for ends in ((x.at(edge), y.start, x.at(edge), y.end), (x.start, y.at(edge), x.end, y.at(edge))):
                drawing.line(*ends, "#000000", width + 1.6, dash)  # an outline, to show on every colour
                drawing.line(*ends, colour, width, dash)
    _name_phases(drawing, view, x, y.start - 8)
    drawing.axes(x, y, "layer", "layer")
    drawing.colour_bar(432, y.start, y.end, "|cos| of the top directions")
    lines = ["white: declared phases", *(["dashed: detected boundaries"] if detected else [])]
    if np.isnan(cosines).any():
        lines.append("blank: no direction")
    drawing.text((x.start + x.end) / 2, 452, "; ".join(lines), size=11)
    return drawing.svg()


def _ranks(view: RecordView) -> str:
    drawing = Drawing(640, 390, f"{view.model.name}: ranks over depth", ALTERNATIVES[RANKS])
    series = {metric: estimates(view, VARIANT, metric) for metric, *_ in _SERIES}
    values = [value for each in series.values() for value in _values(each) if value > 0]
    low, high = (min(values) / 1.15, max(values) * 1.15) if values else (1.0, 10.0)
    x, y = Axis(-0.5, view.model.layers - 0.5, 70, 620, whole=True), Axis(low, high, 290, 30, log=True)
    for first, last in sorted(view.phases.values())[::2]:
        start, end = x.at(first - 0.5), x.at(last + 0.5)
        height = y.start - y.end
        drawing.add("rect", x=start, y=y.end, width=end - start, height=height, fill="#808080", fill_opacity=0.16)
    detected = detected_edges(view)
    for edge in detected:
        drawing.line(x.at(edge), y.start, x.at(edge), y.end, VERMILION, 1.5, DASH)
    for metric, colour, _, _ in _SERIES:
        ends = [(layer, e.interval) for layer, e in enumerate(series[metric]) if e.interval and e.interval[0] > 0]
        if len(ends) == view.model.layers:
            upper = [(x.at(layer), y.at(interval[1])) for layer, interval in ends]
            drawing.band(upper, [(x.at(layer), y.at(interval[0])) for layer, interval in ends], colour)
    for metric, colour, shape, dash in _SERIES:
        points = [
            None if e.value is None or e.value <= 0 else (x.at(layer), y.at(e.value))
            for layer, e in enumerate(series[metric])
        ]
        drawing.path(points, colour, dash)
        for point in points:
            if point is not None:
                drawing.marker(*point, shape, colour)
    _name_phases(drawing, view, x, y.end - 8)
    drawing.axes(x, y, "layer", "directions")
    for index, (metric, colour, shape, dash) in enumerate(_SERIES):
        start = 110.0 + 170 * index
        drawing.line(start, 352, start + 28, 352, colour, 2, dash)
        drawing.marker(start + 14, 352, shape, colour)
        drawing.text(start + 36, 356, metric.replace("_", " "), anchor="start")
    lines = ["shaded: every second phase", *(["dashed: detected boundaries"] if detected else [])]
    if any(e.interval for each in series.values() for e in each):
        lines.append(f"bands: {PERCENT} intervals")
    drawing.text((x.start + x.end) / 2, 378, "; ".join(lines), size=11)
    return drawing.svg()


def _values(series: list[Estimate]) -> list[float]:
    """Return every value and every end of an interval."""
    ends = [end for estimate in series if estimate.interval for end in estimate.interval]
    return [*ends, *(e.value for e in series if e.value is not None)]


def _name_phases(drawing: Drawing, view: RecordView, x: Axis, height: float) -> None:
    for name, (first, last) in view.phases.items():
        drawing.text(x.at((first + last) / 2), height, name)
