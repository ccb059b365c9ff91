"""Small static plots: where values lie, what a reader without sight gets, and nothing but what was drawn."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from delta_suite.publish.card_plots import COSINES, RANKS, card_plots
from delta_suite.publish.svg import LEVELS, Axis, Drawing, colour_of
from delta_suite.records.view import RecordView

from tests.planted_records import planted_view

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def view() -> RecordView:
    return planted_view(parts=("spectra", "boundaries"))


def drawn(drawing: Drawing) -> ET.Element:
    return ET.fromstring(drawing.svg())


def test_a_reader_without_sight_gets_title_and_description() -> None:
    root = drawn(Drawing(10, 20, "a < b", "one & two"))
    assert root.get("role") == "img"
    assert [child.text for child in root][:2] == ["a < b", "one & two"]
    assert [child.tag for child in root][:2] == [f"{SVG}title", f"{SVG}desc"]


def test_ground_and_text_follow_the_readers_scheme() -> None:
    drawing = Drawing(10, 20, "t", "d")
    drawing.text(1, 2, "words")
    root = drawn(drawing)
    style = root.find(f"{SVG}style")
    assert style is not None
    light, dark = str(style.text).split("@media(prefers-color-scheme:dark)")
    used = {str(element.get("class")) for element in root.iter() if element.get("class")}
    assert used == {"plot-paper", "plot-ink"}
    for name in used:
        colours = [re.findall(rf"\.{name}{{fill:(#\w+)}}", part) for part in (light, dark)]
        assert colours[0] != colours[1]


@pytest.mark.parametrize("layers", [1, 2, 3, 4, 6, 30, 64, 126])
def test_layers_are_labelled_by_whole_numbers_and_not_too_many(layers: int) -> None:
    ticks = Axis(-0.5, layers - 0.5, 0, 100, whole=True).ticks()
    assert 1 <= len(ticks) <= 14
    assert all(tick == int(tick) and 0 <= tick < layers for tick in ticks)


@pytest.mark.parametrize(("low", "high"), [(1, 300), (0.9, 1e4), (1.2, 1.9), (5.5, 9), (3, 3.00001)])
def test_a_logarithmic_axis_has_two_labels_at_least(low: float, high: float) -> None:
    ticks = Axis(low, high, 0, 100, log=True).ticks()
    assert 2 <= len(ticks) <= 14
    assert all(low <= tick <= high for tick in ticks)


def test_colours_grow_lighter_with_the_value() -> None:
    weights = np.array([0.2126, 0.7152, 0.0722])
    codes = [colour_of(value) for value in np.linspace(0, 1, LEVELS)]
    light = [float(weights @ [int(code[i : i + 2], 16) for i in (1, 3, 5)]) for code in codes]
    assert light == sorted(light)
    assert len(set(codes)) == LEVELS


def test_a_heat_map_has_a_square_for_each_value_and_none_for_nan() -> None:
    matrix = np.array([[0.0, 1.0, 2.0], [np.nan, 0.5, -1.0]])
    drawing = Drawing(10, 20, "t", "d")
    drawing.heat_map(matrix, Axis(-0.5, 2.5, 0, 30), Axis(-0.5, 1.5, 100, 140))
    (group,) = drawn(drawing).iter(f"{SVG}g")
    assert group.get("transform") == "translate(0 100) scale(10.0000 20.0000)"
    squares = {
        (int(row), int(column)): path.get("fill")
        for path in group
        for column, row in re.findall(r"M(\d+) (\d+)h1v1h-1z", str(path.get("d")))
    }
    assert set(squares) == {(0, 0), (0, 1), (0, 2), (1, 1), (1, 2)}
    assert squares[0, 0] == squares[1, 2] == colour_of(0)  # beyond the scale is its end
    assert squares[0, 1] == squares[0, 2] == colour_of(1)


def test_a_line_is_interrupted_where_a_value_is_missing() -> None:
    drawing = Drawing(10, 20, "t", "d")
    drawing.path([(0.0, 1.0), (1.0, 2.0), None, (3.0, 4.125)], "#000000")
    (path,) = drawn(drawing).iter(f"{SVG}path")
    assert path.get("d") == "M0 1 L1 2 M3 4.12"


def test_the_cards_plots_explain_their_lines(view: RecordView) -> None:
    plots = {name: " ".join(ET.fromstring(svg).itertext()) for name, svg in card_plots(view).items()}
    assert "white: declared phases; dashed: detected boundaries" in plots[COSINES]
    assert "dashed: detected boundaries; bands: 95% intervals" in plots[RANKS]
    assert "blank" not in plots[COSINES]
    for text in plots.values():
        assert {"C", "E"} <= set(text.split())
    bare = RecordView(view.record.model_copy(update={"boundaries": {}}), view.arrays)
    assert not any("detected" in svg for svg in card_plots(bare).values())


def test_the_cards_ranks_have_a_band_and_a_marker_for_each_layer(view: RecordView) -> None:
    root = ET.fromstring(card_plots(view)[RANKS])
    assert len(list(root.iter(f"{SVG}polygon"))) == 3
    assert len(list(root.iter(f"{SVG}circle"))) == 24 + 1  # and one in the legend
