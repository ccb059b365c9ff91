"""The rule by which a second measurement confirms a record."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from delta_suite.records.record import Record
from delta_suite.regression.agreement import agreement, of_other_groups, other_subject, same_arithmetic

from tests.planted_records import planted_view


@pytest.fixture(scope="module")
def record() -> Record:
    return planted_view(parts=("spectra", "boundaries")).record


def elsewhere(record: Record, **changes: str) -> Record:
    """Return the record as if it had been measured on another device, in another dtype, or on other hardware."""
    return record.model_copy(update={"provenance": record.provenance.model_copy(update=changes)})


def changed(record: Record, **changes: Any) -> Record:
    """Return the record with another effective rank in layer 3."""
    layer = record.layers[3]
    estimates = layer.metrics["raw"]
    estimate = estimates["effective_rank"].model_copy(update=changes)
    metrics = layer.metrics | {"raw": estimates | {"effective_rank": estimate}}
    layers = [*record.layers]
    layers[3] = layer.model_copy(update={"metrics": metrics})
    return record.model_copy(update={"layers": tuple(layers)})


def test_a_record_agrees_with_itself(record: Record) -> None:
    result = agreement(record, record)
    assert result.agrees
    assert result.undecided == 0
    assert result.agreeing > 300
    assert other_subject(record, record) is None


@pytest.mark.parametrize(
    ("device", "dtype", "hardware", "same"),
    [
        ("cpu", "float32", "another CPU", True),
        ("cpu", "bfloat16", "another CPU", False),
        ("cuda", "float32", "1 x H100", False),
    ],
)
def test_the_same_arithmetic(record: Record, device: str, dtype: str, hardware: str, same: bool) -> None:
    here = elsewhere(record, device="cpu", dtype="float32", hardware="a CPU").provenance
    there = elsewhere(record, device=device, dtype=dtype, hardware=hardware).provenance
    assert same_arithmetic(here, there) is same
    assert same_arithmetic(there, there)


@pytest.mark.parametrize(("share", "agrees"), [(0.9e-5, True), (1.1e-5, False)])
def test_with_the_same_arithmetic_a_figure_agrees_within_1e5(record: Record, share: float, agrees: bool) -> None:
    estimate = record.layers[3].metrics["raw"]["effective_rank"]
    assert estimate.value is not None
    assert estimate.interval is not None
    largest = max(estimate.value, *estimate.interval)
    result = agreement(record, changed(record, value=estimate.value + share * largest))
    assert result.agrees is agrees
    if not agrees:
        (difference,) = result.differences
        assert (difference.scope, difference.metric, difference.variant) == ("layer:3", "effective_rank", "raw")
        assert difference.number == "value"
        assert difference.stated == estimate.value


def test_an_end_of_an_interval_is_compared_too(record: Record) -> None:
    estimate = record.layers[3].metrics["raw"]["effective_rank"]
    assert estimate.interval is not None
    low, high = estimate.interval
    (difference,) = agreement(record, changed(record, interval=(low, 1.01 * high))).differences
    assert difference.number == "upper end"


def test_a_figure_that_is_gone_differs(record: Record) -> None:
    gone = changed(record, value=None, corrected=None, interval=None, sd=None, reason="none")
    (difference,) = agreement(record, gone).differences
    assert difference.again is None
    assert not agreement(gone, record).agrees


@pytest.mark.parametrize(("share", "agrees"), [(0.9, True), (1.1, False)])
def test_elsewhere_a_figure_agrees_within_the_interval(record: Record, share: float, agrees: bool) -> None:
    estimate = record.layers[3].metrics["raw"]["effective_rank"]
    assert estimate.corrected is not None
    assert estimate.interval is not None
    moved = share * (estimate.interval[1] - estimate.corrected)
    again = changed(record, corrected=estimate.corrected + moved, interval=tuple(e + moved for e in estimate.interval))
    result = agreement(record, elsewhere(again, dtype="bfloat16"))
    assert not result.same_arithmetic
    assert result.agrees is agrees


def test_an_interval_that_is_wide_enough_for_anything_confirms_nothing(record: Record) -> None:
    estimate = record.layers[3].metrics["raw"]["effective_rank"]
    assert estimate.corrected is not None
    forged = changed(record, corrected=2 * estimate.corrected, interval=(0.0, 1000.0))
    (difference,) = agreement(forged, elsewhere(record, dtype="bfloat16")).differences
    assert difference.stated == 2 * estimate.corrected
    assert "has the record's" in difference.allowed


def test_what_has_no_interval_is_undecided_elsewhere(record: Record) -> None:
    estimate = record.layers[3].metrics["raw"]["effective_rank"]
    assert estimate.corrected is not None
    again = changed(record, value=estimate.corrected * 1.001, corrected=None, interval=None)
    result = agreement(record, elsewhere(again, dtype="bfloat16"))
    assert result.undecided == 1 + len(record.layers)  # and the rounding of the dtype
    assert result.agrees


def test_what_is_about_the_dtype_is_not_compared_with_another(record: Record) -> None:
    layers = len(record.layers)
    assert "rounding_share" in record.layers[0].metrics["raw"]
    assert agreement(record, elsewhere(record, dtype="bfloat16")).undecided == layers
    assert agreement(record, elsewhere(record, device="cuda")).undecided == 0


def test_other_versions_are_not_compared(record: Record) -> None:
    versions = record.provenance.metric_versions
    older = {name: version - 1 for name, version in versions.items()}
    provenance = record.provenance.model_copy(update={"metric_versions": older})
    result = agreement(record, record.model_copy(update={"provenance": provenance}))
    assert (result.agreeing, result.agrees) == (0, False)


def test_another_model_or_other_texts_are_no_second_measurement(record: Record) -> None:
    other = record.model_copy(update={"model": record.model.model_copy(update={"fingerprint": "f" * 64})})
    assert "the files are others" in str(other_subject(record, other))
    texts = record.model_copy(update={"calibration": record.calibration.model_copy(update={"sha256": "f" * 64})})
    assert "the texts are others" in str(other_subject(record, texts))


def test_arrays_in_another_order_are_named_and_rounding_is_not() -> None:
    draw = np.random.default_rng(0)
    gammas, cosines = 5 + draw.normal(size=(10, 4)), draw.normal(scale=0.01, size=(10, 6)).astype(np.float16)
    rounding = draw.normal(scale=1e-7, size=(10, 6)).astype(np.float16)
    stored = {
        "raw.units.gamma": gammas,
        "raw.cosines.units": cosines,
        "raw.angles.units": rounding,
        "raw.cross": cosines,
    }
    assert of_other_groups(stored, stored) == []
    turned = {name: array[::-1] for name, array in stored.items()}
    assert of_other_groups(stored, turned) == ["raw.cosines.units", "raw.units.gamma"]
    of_phases = {"raw.scope_units.capture_fraction": gammas.T, "law.units.map_r2": gammas.T}
    assert of_other_groups(of_phases, {name: array[:, ::-1] for name, array in of_phases.items()}) == sorted(of_phases)
    nearly = {name: array * (1 + 1e-6) for name, array in stored.items()}
    assert of_other_groups(stored, nearly) == []
