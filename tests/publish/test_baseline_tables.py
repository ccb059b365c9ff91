"""Terminal tables of comparisons: side by side, the text of a failure, the tables of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from delta_suite.publish.baseline_tables import BaselineRow, changes_table, item_text, run_table, side_by_side
from delta_suite.publish.screen import Screen
from delta_suite.records.view import RecordView
from delta_suite.regression.baseline import load_baseline
from delta_suite.regression.comparison import Comparison, Status, UnknownVariantError, by_item, worst
from delta_suite.regression.turns import direction_figures
from delta_suite.regression.update import update_baseline

from tests.regression.planted import LAYERS, planted


def changed(view: RecordView, **update: Any) -> RecordView:
    return RecordView(view.record.model_copy(update=update), view.arrays, view.directions)


def with_version(view: RecordView, metric: str, version: int) -> RecordView:
    provenance = view.record.provenance
    versions = provenance.metric_versions | {metric: version}
    return changed(view, provenance=provenance.model_copy(update={"metric_versions": versions}))


def shown(*models: Any, **options: Any) -> str:
    """Return two models side by side, as a wide terminal shows them."""
    return "\n\n".join(
        part if isinstance(part, str) else part.text(Screen(200)) for part in side_by_side(*models, **options)
    )


def row_of(text: str, *start: str) -> list[str]:
    """Return the words of the only line that starts with these words."""
    (line,) = (line.split() for line in text.splitlines() if line.split()[: len(start)] == list(start))
    return line


def test_side_by_side_marks_what_changed_beyond_noise() -> None:
    text = shown(planted(), planted(shift=1.0))
    assert row_of(text, "A", "stream_norm") == [
        *["A", "stream_norm", "10.50", "11.50", "≠", "+1.000", "+1.000", "..", "+1.000"]
    ]
    assert "≠" not in row_of(text, "C", "intra_cosine")
    assert text.endswith(
        "intervals: 95%, paired by document. ≠ a difference even if all of them are considered at once"
    )
    assert "not comparable" not in text


def test_a_difference_without_an_interval_is_not_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delta_suite.regression.comparison._paired_noise", lambda *_: None)  # one document
    text = shown(planted(), planted(shift=1.0))
    assert row_of(text, "A", "stream_norm") == ["A", "stream_norm", "10.50", "11.50", "+1.000", "-"]
    assert "≠" not in text
    assert text.endswith("no intervals, so nothing tells a difference from what other texts would change")


def test_side_by_side_shows_how_far_directions_turned() -> None:
    text = shown(planted(), planted(turn=40.0))
    assert [row_of(text, str(layer))[1] for layer in range(LAYERS)] == ["40.0"] * LAYERS
    gone = shown(planted(), planted(with_directions=False))
    assert "the directions are not at hand, so their turning is not shown" in gone


def test_side_by_side_shows_layers_where_they_are_asked_for() -> None:
    text = shown(planted(), planted(shift=1.0), layers=True)
    assert row_of(text, "3", "stream_norm")[2:6] == ["13.00", "14.00", "≠", "+1.000"]
    deeper = shown(planted(), planted(layers=5), layers=True)
    assert "the models differ in shape, so their layers are not compared" in deeper


def test_side_by_side_names_metrics_of_different_versions_in_place_of_comparing_them() -> None:
    text = shown(planted(), with_version(planted(), "intra_cosine", 99))
    assert "not comparable:\nintra_cosine was version 1 there and is version 99 here" in text
    assert not any(line.split()[1:2] == ["intra_cosine"] for line in text.splitlines() if line.startswith(("A", "C")))
    assert row_of(text, "A", "cross_cosine")


def test_side_by_side_of_other_documents_is_asked_for() -> None:
    others = planted(calibration="b" * 64)
    assert shown(planted(), others).startswith("not comparable: the calibrations are docs (aaaaaaaa) and docs (b")
    assert "unpaired: other documents" in shown(planted(), others, other_documents=True)


def test_a_variant_that_is_not_compared_or_not_measured_is_an_error() -> None:
    with pytest.raises(UnknownVariantError, match="variant 'nosuch' is unknown: use one of raw, sink_free"):
        shown(planted(), planted(), "nosuch")
    with pytest.raises(UnknownVariantError, match="m: variant sink_free was not measured"):
        shown(planted(), changed(planted(), variants={"raw": 1}), "sink_free")


def comparisons(path: Path, now: RecordView) -> dict[str, list[Comparison]]:
    update_baseline(path, planted(), {})
    return by_item(load_baseline(path).compare(now, direction_figures(now)))


def rows(items: dict[str, list[Comparison]], model: str = "m") -> list[BaselineRow]:
    return [BaselineRow.of(model, "m.json", item, worst(group), group, "record.json") for item, group in items.items()]


def test_the_text_of_a_failure_names_every_layer_and_what_was_allowed(tmp_path: Path) -> None:
    now = planted(shift=1.0)
    items = comparisons(tmp_path / "m.json", now)
    baseline, group = load_baseline(tmp_path / "m.json"), items["layers/stream_norm"]
    text = item_text("layers/stream_norm", worst(group), group, baseline, now, "pytest ...")
    assert text.splitlines()[0] == "layers/stream_norm of m: drift"
    assert row_of(text, "layer", "2", "stream_norm", "raw")[4:7] == ["12.00", "13.00", "+1.000"]
    assert "  first at   layer 0\n" in text
    assert "the interval of the difference, paired by document" in text
    assert text.endswith("  reproduce  pytest ...")


def test_the_tables_of_a_run_count_items_and_list_changes(tmp_path: Path) -> None:
    items = comparisons(tmp_path / "m.json", planted(shift=1.0))
    table = run_table(rows(items)).text(Screen(200))
    assert row_of(table, "model") == ["model", "baseline", "same", "drift", "first", "layer"]
    assert row_of(table, "m") == ["m", "m.json", str(len(items) - 1), "1", "0"]
    assert row_of(changes_table(rows(items)).text(Screen(200)), "m")[:4] == [
        "m",
        "layers/stream_norm",
        "drift",
        "10.00",
    ]


def test_one_reason_for_many_items_is_one_line(tmp_path: Path) -> None:
    items = comparisons(tmp_path / "m.json", planted(calibration="b" * 64))
    assert {worst(group) for group in items.values()} == {Status.NOT_COMPARABLE}
    (line,) = (line for line in changes_table(rows(items)).text(Screen(200)).splitlines() if line.startswith("m "))
    assert f"{len(items)} items" in line
    assert "the calibration is another" in line
