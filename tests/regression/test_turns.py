"""How far directions turned, against planted angles and how far the document halves are apart."""

from __future__ import annotations

import math

import numpy as np
import pytest
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.regression.comparison import Comparison, Status
from delta_suite.regression.turns import TURNS, compare_turns, direction_figures, turns

from tests.regression.planted import LAYERS, planted


def compared(turn: float, *, other: bool = False, seed: int = 1, **tolerances: float) -> list[Comparison]:
    """Compare a planted model with itself turned by so many degrees."""
    old, new = planted(), planted(turn=turn, seed=seed, calibration=("b" if other else "a") * 64)
    directions = direction_figures(old), direction_figures(new)
    return compare_turns(old, new, directions, tolerances=tolerances, other_documents=other)


def test_turns_are_angles() -> None:
    eye = np.eye(16)[:8]
    turned = eye.copy()
    turned[0] = math.cos(math.radians(30)) * eye[0] + math.sin(math.radians(30)) * np.eye(16)[8]
    degrees = turns(np.stack([eye, eye, eye, eye * 0]), np.stack([turned, -eye, eye[[1, 0, *range(2, 8)]], eye]))
    assert degrees["direction_turn"][:3] == pytest.approx([30.0, 0.0, 90.0], abs=1e-5)
    assert degrees["subspace_turn"][:3] == pytest.approx([30.0 / 8, 0.0, 0.0], abs=1e-5)
    assert degrees["direction_turn"][3] is None
    in_half_precision = turns(eye[None].astype(np.float16), turned[None])
    assert in_half_precision["direction_turn"][0] == pytest.approx(30.0, abs=0.05)


def test_a_layer_with_another_number_of_directions_has_no_subspace_turn() -> None:
    eye = np.eye(16)[:8]
    fewer = eye.copy()
    fewer[7] = 0
    degrees = turns(eye[None], fewer[None])
    assert (degrees["direction_turn"], degrees["subspace_turn"]) == ([0.0], [None])


def test_the_halves_turn_is_the_angle_between_their_directions() -> None:
    view = planted()
    assert view.directions is not None
    figures = direction_figures(view)
    arrays = view.directions.content
    gram = DirectionGram.of(arrays["raw.directions"], (arrays["raw.directions_a"], arrays["raw.directions_b"]))
    assert gram.cross is not None
    assert figures["raw.halves.direction_turn"] == pytest.approx(np.degrees(np.arccos(np.diag(gram.cross))))
    both = turns(arrays["raw.directions_a"], arrays["raw.directions_b"])
    assert figures["raw.halves.subspace_turn"] == pytest.approx(np.array(both["subspace_turn"], dtype=float), abs=1e-3)


def test_a_turn_counts_once_it_exceeds_that_between_the_halves() -> None:
    apart = direction_figures(planted())["raw.halves.direction_turn"]
    beyond, within = 2.0 * float(apart.max()), 0.5 * float(apart.min())
    for degrees, status in ((0.0, Status.SAME), (within, Status.SAME), (beyond, Status.DRIFT)):
        turned = [
            each for each in compared(degrees, seed=0) if each.metric == "direction_turn" and each.variant == "raw"
        ]
        assert [each.status for each in turned] == [status] * LAYERS
        assert [each.difference for each in turned] == pytest.approx([degrees] * LAYERS, abs=0.01)
    assert [each.tolerance for each in turned] == pytest.approx(list(apart))


def test_a_stated_tolerance_is_in_degrees() -> None:
    allowed = [each for each in compared(60.0, direction_turn=65.0) if each.metric == "direction_turn"]
    assert not any(each.fails for each in allowed)
    assert all(each.stated for each in allowed)
    assert all(each.fails for each in compared(4.0, direction_turn=1.0) if each.metric == "direction_turn")


def test_on_other_documents_more_is_allowed() -> None:
    paired, unpaired = compared(30.0), compared(30.0, other=True)
    for same, others in zip(paired, unpaired, strict=True):
        assert same.tolerance is not None
        assert others.tolerance is not None
        assert others.tolerance > 2 * same.tolerance


def test_without_halves_other_documents_are_not_measured() -> None:
    old, new = planted(), planted(calibration="b" * 64)
    bare = {name: array for name, array in direction_figures(new).items() if ".halves." not in name}
    comparisons = compare_turns(old, new, (direction_figures(old), bare), other_documents=True)
    assert {each.status for each in comparisons} == {Status.NOT_MEASURED}
    assert "a calibration has no halves" in str(comparisons[0].reason)


@pytest.mark.parametrize(("missing", "telling"), [(0, "the baseline has none beside it"), (1, "the cache has lost")])
def test_without_directions_the_turning_is_not_measured(missing: int, telling: str) -> None:
    view = planted()
    sides = [direction_figures(view), direction_figures(view)]
    sides[missing] = {}
    comparisons = compare_turns(view, view, (sides[0], sides[1]))
    assert {(each.item, each.status) for each in comparisons} == {
        (f"layers/{metric}", Status.NOT_MEASURED) for metric in TURNS
    }
    assert telling in str(comparisons[0].reason)


def test_what_is_not_comparable_does_not_turn() -> None:
    old, new = planted(), planted(calibration="b" * 64)
    comparisons = compare_turns(old, new, (direction_figures(old), direction_figures(new)))
    assert all(each.status is Status.NOT_COMPARABLE and each.fails for each in comparisons)
