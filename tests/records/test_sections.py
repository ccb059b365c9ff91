"""What the plots need of a record: as exact as it says, and absent rather than invented."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from delta_suite.measure import Outcome, Settings, measure
from delta_suite.metrics.registry import DirectionGram
from delta_suite.models.registry import ModelSpec
from delta_suite.records.cache import Cache
from delta_suite.records.record import Measurement, read_arrays
from delta_suite.records.sections import SHARES, cosine_triangle, energy_shares
from delta_suite.reduction.statistics import LayerStatistics


@pytest.fixture(scope="module")
def outcome(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Outcome, Settings]:
    root = tmp_path_factory.mktemp("sections")
    settings = Settings(calibration="seed", results=root, device="cpu", cache=Cache(root / "cache"))
    return measure(ModelSpec(name="tiny", path=tiny), settings), settings


def test_the_sections_are_the_directions_and_spectra_that_were_measured(outcome: tuple[Outcome, Settings]) -> None:
    record, settings = outcome
    measured = record.measurement
    arrays = read_arrays(settings.cache.arrays(measured.provenance.cache_key))
    assert measured.cosines is not None
    assert measured.spectra is not None
    for variant in measured.layers[0].metrics:
        top = arrays[f"{variant}.directions"][:, 0].astype(np.float64)
        expected = np.abs(top @ top.T)
        for first, row in enumerate(measured.cosines[variant]):
            assert row == pytest.approx(expected[first, first + 1 :], abs=0.6e-4)
        values = arrays[f"{variant}.eigenvalues"]
        for layer, shares in enumerate(measured.spectra[variant]):
            assert shares == pytest.approx((values[layer] / values[layer].sum())[: len(shares)], rel=1e-4)
            assert len(shares) == min(SHARES, int((values[layer] > 0).sum()))


def test_the_triangle_agrees_with_the_metric(outcome: tuple[Outcome, Settings]) -> None:
    measured = outcome[0].measurement
    assert measured.cosines is not None
    first, last = measured.phases["C"]
    pairs = [measured.cosines["raw"][a][b - a - 1] for a in range(first, last + 1) for b in range(a + 1, last + 1)]
    assert np.mean(np.array(pairs, dtype=float)) == pytest.approx(
        measured.scopes["C"].metrics["raw"]["intra_cosine"].value, abs=1e-4
    )


def test_a_layer_without_an_update_has_neither() -> None:
    directions = np.zeros((3, 8, 16))
    directions[0, 0, 0] = directions[2, 0, 0] = 1.0
    assert cosine_triangle(DirectionGram.of(directions)) == ((None, 1.0), (None,))
    still = LayerStatistics(4, 16, np.zeros(4), {}, 0.0, 1e-7)
    assert energy_shares([still]) == ((),)


def test_numbers_stand_on_one_line_and_texts_are_left_alone(outcome: tuple[Outcome, Settings]) -> None:
    measured = outcome[0].measurement
    odd = measured.model_copy(update={"model": measured.model.model_copy(update={"name": "a [\n 1,\n 2\n] b"})})
    text = odd.to_json()
    assert json.loads(text) == odd.model_dump(mode="json", by_alias=True)
    longest = [line for line in text.splitlines() if line.strip().startswith("[")]
    assert max(line.count(",") for line in longest) >= 9  # a row of the triangle


def test_a_record_older_than_the_sections_still_reads(outcome: tuple[Outcome, Settings]) -> None:
    old = json.loads(outcome[0].record.read_text())
    del old["cosines"], old["spectra"]
    assert Measurement.from_json(json.dumps(old), "old").cosines is None
