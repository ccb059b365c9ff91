"""Comparing two measurements, on figures whose noise is known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from delta_suite.metrics.estimate import Estimate
from delta_suite.regression.comparison import Comparison, Snapshot, Status, compare, first_changed_layer, worst
from delta_suite.regression.turns import turns

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


def side(figures: dict[str, dict[str, Estimate]], **changes: Any) -> Snapshot:
    content: dict[str, Any] = {
        "model": {
            "name": "m",
            "source": "directory:m",
            "revision": None,
            "fingerprint": "f" * 64,
            "architecture": "Llama",
            "layers": 4,
            "hidden": 16,
        },
        "calibration": {"name": "docs", "sha256": "a" * 64, "documents": 40, "tokens": 400, "dropped": 0},
        "created": "2026-11-24T00:00:00Z",
        "dtype": "float32",
        "hardware": "a CPU",
        "settings": {"max_tokens": 2048},
        "metric_versions": {"stream_norm": 1, "update_norm": 1, "intra_cosine": 1},
        "phases": {"C": (1, 2)},
        "estimates": {"raw": figures},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            content[section] = {**content[section], name: value}
        else:
            content[section] = value
    return Snapshot.model_validate(content)


def one(old: Snapshot, new: Snapshot, **options: Any) -> Comparison:
    found = [own for own in compare(old, new, **options) if "turn" not in own.metric]
    assert len(found) == 1
    return found[0]


def layer(estimate: Estimate, metric: str = "stream_norm") -> dict[str, dict[str, Estimate]]:
    return {"layer:3": {metric: estimate}}


def documents(seed: int, shift: float = 0.0) -> list[float]:
    rng = random.Random(seed)
    return [10 + shift + rng.gauss(0, 1) for _ in range(GROUPS * PER_GROUP)]


def test_the_same_figures_are_the_same() -> None:
    own = one(side(layer(mean_of(documents(0)))), side(layer(mean_of(documents(0)))))
    assert (own.status, own.difference, own.fails) == (Status.SAME, 0.0, False)


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
    """Of a mean with groups of one document the jackknife is the paired t-test, exactly."""
    a, b = documents(0)[:GROUPS], documents(1)[:GROUPS]
    own = one(side(layer(mean_of(a))), side(layer(mean_of(b))))
    differences = np.array(b) - np.array(a)
    half = 2.2621571628 * differences.std(ddof=1) / math.sqrt(GROUPS)
    assert own.interval_95 == pytest.approx((differences.mean() - half, differences.mean() + half))


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
        ({"dtype": "bfloat16"}, "were float32 there and are bfloat16"),
        ({"settings": {"max_tokens": 128}}, "max_tokens was 2048 there and is 128"),
        ({"metric_versions__intra_cosine": 2}, "version 1 there and is version 2"),
        ({"phases": {"C": (1, 3)}}, "layers 1-2 there and is layers 1-3"),
        ({"model__layers": 5}, "4 layers x 16 there, 5 x 16 here"),
    ],
)
def test_what_is_not_comparable_says_why(changes: dict[str, Any], telling: str) -> None:
    figures = {"C": {"intra_cosine": Estimate(value=0.5)}}
    own = one(side(figures), side(figures, **changes))
    assert own.status is Status.NOT_COMPARABLE
    assert own.fails
    assert telling in str(own.reason)


def test_new_and_gone() -> None:
    some, none = side(layer(Estimate(value=1.0))), side({})
    absent = side(layer(Estimate(value=None, reason="no update")))
    assert one(none, some).status is Status.NEW
    assert not one(none, some).fails
    assert one(some, none).status is Status.GONE
    gone = one(some, absent)
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
            side({f"layer:{i}": {"stream_norm": mean_of(list(row))} for i, row in enumerate(own)}, **changes)
            for own, changes in zip(draws, ({}, {"calibration__sha256": "b" * 64}), strict=True)
        )
        alarms += any(own.fails for own in compare(old, new, other_documents=True))
    assert alarms <= 0.05 * runs


def test_turns_are_angles() -> None:
    eye = np.eye(16)[:8]
    turned = eye.copy()
    turned[0] = math.cos(math.radians(30)) * eye[0] + math.sin(math.radians(30)) * np.eye(16)[8]
    found = turns(np.stack([eye, eye, eye, eye * 0]), np.stack([turned, -eye, eye[[1, 0, *range(2, 8)]], eye]))
    assert found["direction_turn"][:3] == pytest.approx([30.0, 0.0, 90.0], abs=1e-5)
    assert found["subspace_turn"][:3] == pytest.approx([30.0 / 8, 0.0, 0.0], abs=1e-5)
    assert found["direction_turn"][3] is None
    kept = turns(eye[None].astype(np.float16), turned[None])
    assert kept["direction_turn"][0] == pytest.approx(30.0, abs=0.05)


def test_the_first_changed_layer_and_the_worst_status() -> None:
    same = Comparison("layer:0", "gamma", "raw", Status.SAME, difference=0.0, tolerance=1.0)
    drifts = [
        Comparison(f"layer:{own}", "gamma", "raw", Status.DRIFT, difference=2.0, tolerance=1.0) for own in (10, 9)
    ]
    allowed = Comparison("layer:1", "gamma", "raw", Status.DRIFT, difference=0.5, tolerance=1.0)
    assert first_changed_layer([same, allowed, *drifts]) == 9
    assert first_changed_layer([same, allowed]) is None
    assert worst([same, allowed]) is Status.DRIFT
    gone = Comparison("layer:2", "gamma", "raw", Status.GONE)
    assert worst([same, *drifts, gone]) is Status.GONE
