"""Observations: which figure a metric, a scope, a variant and an aggregate name, and why there may be none."""

from __future__ import annotations

import statistics

import pytest
from delta_suite.claims.observe import NotMeasuredError, Quantity, layers_of, observe
from delta_suite.records.view import RecordView
from delta_suite.selftest.law_worlds import LAW_C, LAW_E, law
from delta_suite.selftest.planted import SHARED

from tests.planted_records import planted_view


@pytest.mark.parametrize(
    ("scope", "layers"),
    [
        ("model", range(24)),
        ("C", range(6, 11)),
        ("layer:3", range(3, 4)),
        ("layers:8-15", range(8, 16)),
        ("layers:20-24", "the model has layers 0-23, so no layers:20-24"),
        ("depth:0.5-1.0", range(12, 24)),
        ("depth:0.5-1.5", "the depth ends at 1, so no depth:0.5-1.5"),
        ("depth:0.5-0.5", "no layer of 24 is in depth:0.5-0.5"),
        ("depth:0.1.2-1", "a model of 24 layers has no phase depth:0.1.2-1 (its phases: A, C, E)"),
        ("D", "a model of 24 layers has no phase D (its phases: A, C, E)"),
    ],
)
def test_a_scope_is_its_layers_or_the_reason_why_there_are_none(
    view: RecordView, scope: str, layers: range | str
) -> None:
    assert layers_of(scope, view.model.layers, view.phases) == layers


@pytest.mark.parametrize(
    ("over", "aggregate"), [("mean", statistics.fmean), ("median", statistics.median), ("min", min)]
)
def test_layers_are_aggregated(view: RecordView, over: str, aggregate: object) -> None:
    observation = observe(view, "effective_rank", "C", over=over)
    values = [view.layer(layer, "effective_rank", "raw").value for layer in range(SHARED[0], SHARED[1] + 1)]
    assert observation.value == pytest.approx(aggregate(values))  # type: ignore[operator]
    assert observation.interval is not None
    assert list(observation.per_layer.values()) == values


def test_the_mean_of_a_phase_metric_is_the_metric_itself(view: RecordView) -> None:
    whole = observe(view, "capture_fraction", "C")
    assert whole.interval is not None
    smallest = observe(view, "capture_fraction", "C", over="min")
    assert (smallest.value, smallest.interval) == (min(whole.per_layer.values()), None)  # type: ignore[type-var]


def test_a_metric_of_the_law_is_the_median_of_its_layers() -> None:
    view = planted_view(law, phases={"C": LAW_C, "E": LAW_E}, variants=("sink_free",), parts=("spectra", "law"))
    whole, median, smallest = (observe(view, "own_r2", "C", over=over) for over in ("mean", "median", "min"))
    assert whole.value == median.value == pytest.approx(statistics.median(whole.per_layer.values()))  # type: ignore[type-var]
    assert whole.interval == median.interval is not None
    assert smallest.value == min(whole.per_layer.values())  # type: ignore[type-var]
    assert smallest.value < whole.value


def test_unknown_names_are_errors_that_list_the_known_ones(view: RecordView) -> None:
    with pytest.raises(ValueError, match="no variant 'nosuch': one of raw, sink_free, centred"):
        observe(view, "gamma", "C", variant="nosuch")
    with pytest.raises(ValueError, match="no metric 'nosuch': `delta-suite metrics` lists them"):
        observe(view, "nosuch", "C")
    with pytest.raises(ValueError, match="no aggregate 'nosuch': one of mean, median, min, max, each"):
        observe(view, "gamma", "C", over="nosuch")


@pytest.mark.parametrize("metric", ["gamma", "intra_cosine", "boundary_p"])
def test_a_variant_that_was_not_measured_is_absent(view: RecordView, metric: str) -> None:
    observation = observe(view, metric, "model", variant="centred")
    assert (observation.value, observation.reason) == (None, "variant centred was not measured")


@pytest.mark.parametrize("metric", ["gamma", "intra_cosine", "boundary_p"])
def test_a_variant_of_an_older_meaning_is_absent(view: RecordView, metric: str) -> None:
    older = RecordView(view.record.model_copy(update={"variants": {"raw": 1, "sink_free": 0}}), view.arrays)
    assert older.variants == ("raw",)
    observation = observe(older, metric, "model", variant="sink_free")
    assert observation.value is None
    assert "was measured in version 0, and means something else today: measure it again" in str(observation.reason)


def test_without_arrays_layers_have_no_common_interval(view: RecordView, bare: RecordView) -> None:
    whole = observe(bare, "effective_rank", "C")
    assert (whole.value, whole.reason) == (
        None,
        "its arrays, gone.safetensors, are not beside the record of planted: copy them there, or measure it again: "
        "delta-suite measure planted",
    )
    each = observe(bare, "effective_rank", "C", over="each")
    assert each.value == pytest.approx(observe(view, "effective_rank", "C").value)
    assert each.interval is None
    single = observe(bare, "effective_rank", "layer:8")
    assert single.interval == pytest.approx(observe(view, "effective_rank", "layer:8").interval)


def test_a_quantity_computes_as_a_float_and_shows_its_interval(view: RecordView) -> None:
    quantity = Quantity(observe(view, "intra_cosine", "C"))
    assert 0.7 < quantity < 0.9
    assert 2 * quantity == 2 * float(quantity)
    assert repr(quantity) == "{:.6g} [{:.6g}, {:.6g}]".format(float(quantity), *quantity.interval)


def test_a_quantity_without_a_number_raises_its_reason_when_it_is_used(view: RecordView) -> None:
    quantity = Quantity(observe(view, "intra_cosine", "D"))
    assert quantity.value is None
    assert repr(quantity) == f"not measured: {quantity.reason}"
    for use in (lambda: quantity > 0, lambda: quantity == 1, lambda: 1 + quantity, lambda: bool(quantity)):
        with pytest.raises(NotMeasuredError, match="intra_cosine over D of planted is not measured: a model of 24"):
            use()
