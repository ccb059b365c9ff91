"""Comparing two measurements, on figures whose noise is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from delta_suite.metrics.estimate import Estimate
from delta_suite.records.arrays import ArrayFile
from delta_suite.records.record import Record
from delta_suite.records.view import RecordView
from delta_suite.regression.comparison import (
    Comparison,
    Status,
    UnknownVariantError,
    compare_figures,
    first_changed_layer,
    require_compared,
    worst,
)

GROUPS = 10
PER_GROUP = 4


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean over documents with its delete-a-group replicates: document i is in group i % 10."""
    total, n = sum(values), len(values)
    parts = [[v for i, v in enumerate(values) if i % GROUPS == group] for group in range(GROUPS)]
    return Estimate(
        value=total / n,
        corrected=total / n,
        replicates=tuple((total - sum(part)) / (n - len(part)) for part in parts),
    )


def side(figures: dict[str, dict[str, Estimate]], **changes: Any) -> RecordView:
    """A record of four layers that holds these figures alone; a change is a key of the record, or `section__key`."""
    provenance = {"created": "2026-11-24T00:00:00Z", "suite": "0", "dtype": "float32", "attention": "", "device": "cpu"}
    provenance |= {"hardware": "a CPU", "versions": {}, "seconds": {}, "peak_memory_bytes": {}, "cache_key": ""}
    provenance |= {"settings": {"max_tokens": 2048}}
    provenance |= {"metric_versions": {"stream_norm": 1, "update_norm": 1, "intra_cosine": 1}}
    content: dict[str, Any] = {
        "schema": 3,
        "model": {"name": "m", "source": "directory:m", "fingerprint": "f" * 64, "architecture": "Llama"}
        | {"layers": 4, "hidden": 16},
        "calibration": {"name": "docs", "sha256": "a" * 64, "documents": 40, "tokens": 400, "dropped": 0}
        | {"begins_with": [("<s>", 1)]},
        "resampling": {"units": 40, "groups": GROUPS},
        "parts": ["spectra"],
        "variants": {"raw": 1},
        "sinks": {"position_zero": 0, "large_norm": 0, "ratio": 6.0, "largest": []},
        "certificate": {"holds": True, "blocks": 4, "forward_passes": 1, "final_norm": [], "identities": {}},
        "provenance": provenance,
        "phases": {"C": (1, 2)},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        content[section] = {**content[section], name: value} if name else value
    arrays = {}
    layers = content["model"]["layers"]
    for scope, metrics in figures.items():
        for metric, estimate in metrics.items():
            if estimate.replicates is None:
                continue
            units = np.full((GROUPS, layers), np.nan)
            units[:, int(scope.removeprefix("layer:"))] = estimate.replicates
            before = arrays.get(f"raw.units.{metric}", units)
            arrays[f"raw.units.{metric}"] = np.where(np.isnan(before), units, before)
    record = Record.model_validate(
        content
        | {
            "layers": [
                {"layer": layer, "phase": "", "metrics": {"raw": figures.get(f"layer:{layer}", {})}}
                for layer in range(layers)
            ],
            "scopes": {
                name: {"layers": span, "metrics": {"raw": figures.get(name, {})}}
                for name, span in content["phases"].items()
            },
        }
    )
    return RecordView(record, ArrayFile(Path("memory"), content=arrays))


def one(old: RecordView, new: RecordView, **options: Any) -> Comparison:
    comparisons = [each for each in compare_figures(old, new, **options) if each.scope != "model"]
    assert len(comparisons) == 1
    return comparisons[0]


def layer(estimate: Estimate, metric: str = "stream_norm") -> dict[str, dict[str, Estimate]]:
    return {"layer:3": {metric: estimate}}


def documents(seed: int, shift: float = 0.0) -> list[float]:
    rng = random.Random(seed)
    return [10 + shift + rng.gauss(0, 1) for _ in range(GROUPS * PER_GROUP)]


def test_the_same_figures_are_the_same() -> None:
    comparison = one(side(layer(mean_of(documents(0)))), side(layer(mean_of(documents(0)))))
    assert (comparison.status, comparison.difference, comparison.fails) == (Status.SAME, 0.0, False)


def test_pairing_takes_the_noise_of_the_documents_away() -> None:
    """A shift of a tenth of the documents' spread shows on the same documents, and not on others."""
    old = side(layer(mean_of(documents(0))))
    shifted = [value + 0.1 + 0.001 * (-1) ** i for i, value in enumerate(documents(0))]
    paired = one(old, side(layer(mean_of(shifted))))
    assert paired.status is Status.DRIFT
    assert paired.fails
    assert paired.difference == pytest.approx(0.1)
    others = side(layer(mean_of(documents(1, 0.1))), calibration__sha256="b" * 64)
    assert one(old, others, other_documents=True).status is Status.SAME


def test_a_pair_has_the_textbook_interval() -> None:
    """The jackknife of a mean with groups of one document is the paired t-test, exactly."""
    a, b = documents(0)[:GROUPS], documents(1)[:GROUPS]
    comparison = one(side(layer(mean_of(a))), side(layer(mean_of(b))))
    differences = np.array(b) - np.array(a)
    half = 2.2621571628 * differences.std(ddof=1) / math.sqrt(GROUPS)
    assert comparison.interval_alone == pytest.approx((differences.mean() - half, differences.mean() + half))


def test_rounding_is_no_drift_and_more_is_where_there_is_no_interval() -> None:
    def status(old: float, new: float, metric: str = "stream_norm") -> Status:
        return one(side(layer(Estimate(value=old), metric)), side(layer(Estimate(value=new), metric))).status

    assert status(1000.0, 1000.009) is Status.SAME
    assert status(1000.0, 1000.02) is Status.DRIFT
    assert status(1e-6, 9e-6, "intra_cosine") is Status.SAME  # of a bounded metric the bound counts, not the value
    assert status(1e-6, 3e-5, "intra_cosine") is Status.DRIFT


def test_a_stated_tolerance_is_the_one_that_counts() -> None:
    sides = side(layer(Estimate(value=10.0))), side(layer(Estimate(value=10.5)))
    assert one(*sides).fails
    allowed = one(*sides, tolerances={"stream_norm": 0.6})
    assert (allowed.status, allowed.fails, allowed.stated) == (Status.DRIFT, False, True)
    assert one(*sides, tolerances={"stream_norm": 0.6, "layers/stream_norm": 0.4}).fails
    noisy = side(layer(mean_of(documents(0)))), side(layer(mean_of(documents(1))))
    assert one(*noisy, tolerances={"stream_norm": 1e-4}).fails  # also one that is tighter than the noise


@pytest.mark.parametrize(
    ("changes", "telling"),
    [
        ({"calibration__sha256": "b" * 64}, "calibration is another"),
        ({"calibration__tokens": 401}, "tokenizer is another"),
        ({"calibration__begins_with": []}, "begin with <s> there and with no special token here"),
        ({"provenance__dtype": "bfloat16"}, "were float32 there and are bfloat16"),
        ({"provenance__settings": {"max_tokens": 128}}, "max_tokens was 2048 there and is 128"),
        ({"provenance__metric_versions": {"intra_cosine": 2}}, "version 1 there and is version 2"),
        ({"phases": {"C": (1, 3)}}, "layers 1-2 there and is layers 1-3"),
        ({"model__layers": 5}, "4 layers x 16 there, 5 x 16 here"),
    ],
)
def test_what_is_not_comparable_says_why(changes: dict[str, Any], telling: str) -> None:
    figures = {"C": {"intra_cosine": Estimate(value=0.5)}}
    comparison = one(side(figures), side(figures, **changes))
    assert comparison.status is Status.NOT_COMPARABLE
    assert comparison.fails
    assert telling in str(comparison.reason)


def test_new_and_gone() -> None:
    present, missing = side(layer(Estimate(value=1.0))), side({})
    absent = side(layer(Estimate(value=None, reason="no update")))
    assert one(missing, present).status is Status.NEW
    assert not one(missing, present).fails
    assert one(present, missing).status is Status.GONE
    gone = one(present, absent)
    assert (gone.status, gone.fails) == (Status.GONE, True)
    assert "no update" in str(gone.reason)


def test_other_documents_need_intervals() -> None:
    other = side(layer(Estimate(value=1.0)), calibration__sha256="b" * 64)
    assert one(side(layer(Estimate(value=2.0))), other, other_documents=True).status is Status.NOT_MEASURED


def test_an_unchanged_model_is_called_changed_in_at_most_five_of_a_hundred_runs() -> None:
    """60 figures of 40 documents each, on other documents: heavy tails, as token norms have."""
    rng = np.random.default_rng(0)
    alarms, runs = 0, 200
    for _ in range(runs):
        draws = rng.standard_t(4, size=(2, 60, GROUPS * PER_GROUP))
        old, new = (
            side(
                {f"layer:{i}": {"stream_norm": mean_of(list(row))} for i, row in enumerate(rows)},
                model__layers=60,
                **changes,
            )
            for rows, changes in zip(draws, ({}, {"calibration__sha256": "b" * 64}), strict=True)
        )
        alarms += any(each.fails for each in compare_figures(old, new, other_documents=True))
    assert alarms <= 0.05 * runs


def test_the_first_changed_layer_and_the_worst_status() -> None:
    same = Comparison("layer:0", "gamma", "raw", Status.SAME, difference=0.0, tolerance=1.0)
    drifts = [
        Comparison(f"layer:{index}", "gamma", "raw", Status.DRIFT, difference=2.0, tolerance=1.0) for index in (10, 9)
    ]
    allowed = Comparison("layer:1", "gamma", "raw", Status.DRIFT, difference=0.5, tolerance=1.0)
    assert first_changed_layer([same, allowed, *drifts]) == 9
    assert first_changed_layer([same, allowed]) is None
    assert worst([same, allowed]) is Status.DRIFT
    gone = Comparison("layer:2", "gamma", "raw", Status.GONE)
    assert worst([same, *drifts, gone]) is Status.GONE


def test_variants_that_changed_their_meaning_are_not_compared() -> None:
    figures = layer(Estimate(value=0.5))
    comparison = one(side(figures), side(figures, variants={"raw": 2}))
    assert comparison.status is Status.NOT_COMPARABLE
    assert "variant raw was version 1 there and is version 2 here" in str(comparison.reason)


def test_a_part_that_was_not_measured_is_not_gone() -> None:
    old = side({"C": {"sharing_index": Estimate(value=0.5)}}, parts=["spectra", "law"], law={"phases": {"C": (1, 2)}})
    comparison = one(old, side({}))
    assert (comparison.status, comparison.fails) == (Status.NOT_MEASURED, False)
    assert "--parts law" in str(comparison.reason)


def test_an_unknown_variant_is_an_error() -> None:
    with pytest.raises(UnknownVariantError, match="'nosuch' is unknown: use one of raw, sink_free"):
        require_compared("nosuch")
    with pytest.raises(UnknownVariantError, match="'centred' is not compared"):
        require_compared("centred")
