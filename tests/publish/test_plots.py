"""The figures: what the record says, and what plotly itself accepts."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects
import pytest
from delta_suite.publish.plots import SHARES, layer_figure, phase_edges, plots
from delta_suite.publish.site.whole_site import SHIPPED
from delta_suite.publish.trajectory import figures
from delta_suite.records.store import load
from delta_suite.records.view import RecordView
from plotly.offline import get_plotlyjs_version

from tests.planted_records import planted_view, without_arrays
from tests.publish.conftest import Place, trained, turned, with_boundaries, with_intervals, with_transfer


@pytest.fixture
def record(place: Place) -> Callable[..., RecordView]:
    def make(*changes: Callable[[dict], object], **options: Any) -> RecordView:  # type: ignore[type-arg]
        def change(record: dict) -> None:  # type: ignore[type-arg]
            for one in changes:
                one(record)

        return load(place.add(change=change, **options))

    return make


def test_plotly_accepts_every_figure_of_every_variant(record: Callable[..., RecordView]) -> None:
    measurement = record(with_boundaries, with_intervals, arrays=with_transfer)
    names = set()
    for variant in measurement.variants:
        for plot in plots(measurement, variant):
            assert plot.figure is not None, plot.reason
            plotly.graph_objects.Figure(plot.figure)  # raises ValueError for what the schema has not
            names.add(plot.name)
    assert names == {"cosines", "spectrum", "ranks", "steps", "transfer"}


def test_plotly_accepts_the_figures_of_a_training_run(place: Place) -> None:
    for step in (0, 10):
        place.add(
            f"big--checkpoint-{step}",
            change=trained(step),
        )
    (run,) = turned(place.board()).groups[0].runs
    drawn = figures(run.figures(), run.rows, "raw")
    for figure in drawn.values():
        plotly.graph_objects.Figure(figure)
    lines = {trace["name"]: trace for trace in drawn["intra_cosine"]["data"]}
    assert lines["C"]["x"] == [0, 10]
    assert lines["C"]["y"] == pytest.approx([1, 1 / 11], abs=1e-5)
    assert lines["C"]["error_y"]["array"] == pytest.approx([0.1, 0.1 / 11], abs=1e-5)
    assert lines["C"]["error_y"]["arrayminus"] == pytest.approx([0.2, 0.2 / 11], abs=1e-5)
    mean = drawn["effective_rank"]["data"][0]  # of layers: the mean over the phase, with its interval
    assert mean["name"] == "A"
    first = run.entries[0].view
    values = [first.layers[layer].metrics["raw"]["effective_rank"].value for layer in range(2)]
    assert mean["y"][0] == pytest.approx(sum(v for v in values if v) / 2, rel=1e-4)
    assert [shape["x0"] for shape in drawn["gamma"]["layout"]["shapes"]] == [10]


def test_the_bundle_is_the_version_whose_schema_is_tested() -> None:
    bundle = Path(__file__).parents[2] / "suite" / "delta_suite" / "publish" / "assets" / "plotly-cartesian.min.js"
    assert bundle.name in SHIPPED
    assert f"plotly.js (cartesian - minified) v{get_plotlyjs_version()}" in bundle.read_text("utf-8")[:200]


def test_the_heatmap_is_the_records_cosines(record: Callable[..., RecordView]) -> None:
    measurement = record()
    plot = plots(measurement, "raw")[0]
    assert plot.figure is not None
    matrix = plot.figure["data"][0]["z"]
    cosines = measurement.cosines("raw")
    assert cosines is not None
    assert np.array(matrix) == pytest.approx(cosines, abs=1e-4)
    assert matrix[3][3] == 1.0


def without_boundaries(record: dict[str, Any]) -> None:
    record["boundaries"] = {}


def test_declared_and_detected_boundaries_are_drawn_apart(record: Callable[..., RecordView]) -> None:
    measurement = record(with_boundaries)
    plot = plots(measurement, "raw")[0]
    assert plot.figure is not None
    lines = [shape for shape in plot.figure["layout"]["shapes"] if shape["x0"] == shape["x1"]]
    dashed = {shape["x0"] for shape in lines if shape["line"]["dash"] == "dash"}
    solid = {shape["x0"] for shape in lines if shape["line"]["color"] == "#FFFFFF"}
    assert dashed == {2.5, 8.5}
    assert solid == set(phase_edges(measurement)) == {first - 0.5 for first, _ in measurement.phases.values() if first}
    assert "before layers 3, 9" in plot.caption
    assert "no boundaries were searched for" in plots(record(without_boundaries), "raw")[0].caption


def test_intervals_are_drawn_where_the_record_has_them(record: Callable[..., RecordView]) -> None:
    measurement = record(with_intervals)
    ranks = next(plot for plot in plots(measurement, "raw") if plot.name == "ranks")
    assert ranks.figure is not None
    low, high, line = ranks.figure["data"][:3]
    recorded = [layer.metrics["raw"]["effective_rank"] for layer in measurement.layers]
    assert list(zip(low["y"], high["y"], strict=True)) == [e.interval for e in recorded]
    assert line["y"] == [e.value for e in recorded]
    assert "95%" in line["hovertext"][0]
    assert high["fill"] == "tonexty"
    without = next(plot for plot in plots(record(), "raw") if plot.name == "ranks")
    assert without.figure is not None
    assert len(without.figure["data"]) == 3
    assert "no intervals" in without.caption


def test_the_spectrum_is_in_powers_of_ten(record: Callable[..., RecordView]) -> None:
    measurement = record()
    plot = next(plot for plot in plots(measurement, "centred") if plot.name == "spectrum")
    assert plot.figure is not None
    energies = measurement.energies("centred")
    assert energies is not None
    z = plot.figure["data"][0]["z"]
    assert len(z) == min(SHARES, energies.shape[1])
    assert z[0][5] == pytest.approx(math.log10(energies[5, 0]), abs=1e-4)


def test_without_arrays_a_plot_says_why_it_is_not_there(record: Callable[..., RecordView]) -> None:
    drawn = {plot.name: plot for plot in plots(record(arrays=None), "raw")}
    assert drawn["cosines"].figure is None
    for name in ("cosines", "spectrum"):
        assert str(drawn[name].reason).startswith("its arrays, 20261124T100000Z-00000000.safetensors, are not beside")
    assert drawn["ranks"].figure is not None


def test_a_law_that_could_not_be_fitted_says_why(record: Callable[..., RecordView]) -> None:
    drawn = {plot.name: plot for plot in plots(record(), "raw")}
    assert drawn["transfer"].figure is None
    assert drawn["transfer"].reason == record().over(range(2), "transfer_r2", "raw").reason
    unmeasured = record(lambda content: content.update(law=None))
    assert "transfer" not in {plot.name for plot in plots(unmeasured, "raw")}


def test_a_law_without_its_matrix_names_the_file() -> None:
    view = planted_view(parts=("spectra", "law"), variants=("raw", "sink_free"))
    fitted, gone = (
        {plot.name: plot for plot in plots(each, "raw")}["transfer"] for each in (view, without_arrays(view))
    )
    assert fitted.figure is not None
    assert gone.figure is None
    assert "gone.safetensors" in str(gone.reason)


def test_a_row_of_the_transfer_matrix_is_the_layer_that_is_predicted(record: Callable[..., RecordView]) -> None:
    """As in the arrays, where row L holds R^2 on layer L; a layer whose update does not vary is a gap."""
    rows = np.add.outer(np.arange(12.0), np.arange(12) / 10)
    rows[3] = np.nan
    view = record(arrays=lambda arrays: arrays.update({"law.transfer": rows.astype(np.float32)}))
    (plot,) = (plot for plot in plots(view, "raw") if plot.name == "transfer")
    assert plot.figure is not None
    (heatmap,), layout = plot.figure["data"], plot.figure["layout"]
    assert heatmap["z"][3] == [None] * 12
    assert heatmap["z"][5] == pytest.approx(list(rows[5]), abs=1e-3)
    assert layout["yaxis"]["title"]["text"] == "layer that is predicted"
    assert layout["xaxis"]["title"]["text"] == "layer the map was fitted on"
    assert "map of layer %{x} on layer %{y}" in heatmap["hovertemplate"]


def test_a_layer_without_an_update_is_a_gap(record: Callable[..., RecordView]) -> None:
    def still(record: dict) -> None:  # type: ignore[type-arg]
        for metrics in record["layers"][4]["metrics"].values():
            for name in metrics:
                metrics[name] = {"value": None, "reason": "the update is zero"}

    def without_energy(arrays: dict[str, np.ndarray]) -> None:
        for name, array in arrays.items():
            if name.endswith(".eigenvalues"):
                array[4] = 0.0

    for plot in plots(record(still, lambda content: content.update(law=None), arrays=without_energy), "raw"):
        assert plot.figure is not None
        plotly.graph_objects.Figure(plot.figure)
        if plot.name == "ranks":
            assert plot.figure["data"][0]["y"][4] is None
            assert "the update is zero" in plot.figure["data"][0]["hovertext"][4]


def test_one_metric_over_depth_is_a_figure(record: Callable[..., RecordView]) -> None:
    view = record(with_intervals)
    figure = plotly.graph_objects.Figure(layer_figure(view, "raw", "gamma"))
    assert list(figure.data[-1].y) == [view.layer(layer, "gamma", "raw").value for layer in range(12)]
