"""Phase maps against the rule of the reference script, and the rules for declared maps."""

from itertools import pairwise

import pytest
from delta_suite.errors import ModelsFileError
from delta_suite.models.phases import DEFAULT_64, phase_map, phase_of
from hypothesis import given, settings
from hypothesis import strategies as st


def reference(layer: int, layers: int) -> str:
    """Return the phase by `phase_of` of the reference script (shared/seed/delta_svd.txt)."""
    if layers == 64:
        bounds = {"A": 6, "B": 9, "C": 31, "D": 46, "E": 58}
        return next((name for name, last in bounds.items() if layer <= last), "tail")
    fractions = {"A": 0.11, "B": 0.15, "C": 0.5, "D": 0.75, "E": 0.92}
    return next((name for name, bound in fractions.items() if layer / layers < bound), "tail")


@settings(deadline=None)
@given(st.integers(1, 200))
def test_the_default_map_is_that_of_the_reference_script(layers: int) -> None:
    phases = phase_map(layers)
    assert [phase_of(layer, phases) for layer in range(layers)] == [reference(layer, layers) for layer in range(layers)]


@settings(deadline=None)
@given(st.integers(1, 200))
def test_the_phases_follow_each_other_without_gap(layers: int) -> None:
    ends = list(phase_map(layers).values())
    assert ends[0][0] == 0
    assert ends[-1][1] == layers - 1
    assert all(start == last + 1 for (_, last), (start, _) in pairwise(ends))


def test_the_map_of_the_embedded_model() -> None:
    assert phase_map(30) == {"A": (0, 3), "B": (4, 4), "C": (5, 14), "D": (15, 22), "E": (23, 27), "tail": (28, 29)}


def test_64_layers_have_the_published_map() -> None:
    assert phase_map(64) == DEFAULT_64 == {
        "A": (0, 6), "B": (7, 9), "C": (10, 31), "D": (32, 46), "E": (47, 58), "tail": (59, 63)
    }  # fmt: skip


def test_a_layer_on_a_bound_is_in_the_next_phase() -> None:
    assert phase_of(3, phase_map(20)) == "C"  # 3 / 20 is 0.15


def test_phases_without_layers_are_absent() -> None:
    assert phase_map(2) == {"A": (0, 0), "D": (1, 1)}


def test_a_declared_map_is_ordered_by_layer_and_may_leave_layers_out() -> None:
    phases = phase_map(12, {"late": (8, 11), "early": (0, 3)})
    assert list(phases) == ["early", "late"]
    assert phase_of(5, phases) == "-"


@pytest.mark.parametrize(
    ("declared", "expected"),
    [
        ({"A": (0, 6), "B": (5, 9)}, r"A = \[0, 6\] and B = \[5, 9\] overlap"),
        ({"A": (0, 32)}, r"A = \[0, 32\] reaches past the last layer, 31 of 32"),
        ({"A": (4, 2)}, r"A = \[4, 2\] ends before it starts"),
        ({"A": (-1, 2)}, r"A = \[-1, 2\] starts below layer 0"),
        ({"a b": (0, 2)}, r"'a b' may hold letters"),
        ({"2nd": (0, 2)}, r"'2nd' may hold letters, digits, - and _ alone, a letter first"),
        ({"model": (0, 2)}, r"'model' is the scope of a claim on the whole model"),
    ],
)
def test_a_wrong_declared_map_is_refused(declared: dict[str, tuple[int, int]], expected: str) -> None:
    with pytest.raises(ModelsFileError, match=expected):
        phase_map(32, declared)
