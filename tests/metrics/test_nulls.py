"""Nulls from the same model: ranks among windows, matched lags, random directions."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from delta_suite.metrics import nulls
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.nulls import allowed_above, extreme, lag_matched, random_directions, rank_p, windows

from tests.planted_records import planted_view

LAYERS, HIDDEN, DRAWS = 6, 16, 5


def random_gram(seed: int) -> DirectionGram:
    """Return the Gram of random directions, one per layer."""
    directions = np.random.default_rng(seed).standard_normal((LAYERS, 1, HIDDEN))
    return DirectionGram.of(directions / np.linalg.norm(directions, axis=2, keepdims=True))


@pytest.mark.parametrize("quantile", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("count", [5, 19, 20, 21, 40, 100, 101])
def test_as_many_windows_may_be_as_extreme_as_the_level_allows(count: int, quantile: float) -> None:
    """With one more, the rank of the phase among all windows has a larger p."""
    allowed = allowed_above(count, quantile)
    if allowed >= 0:
        others = [1.0] * allowed + [0.0] * (count - 1 - allowed)
        assert rank_p(0.5, others, high=True) <= 1 - quantile + 1e-9
    one_more = [1.0] * (allowed + 1) + [0.0] * (count - 2 - allowed)
    assert rank_p(0.5, one_more, high=True) > 1 - quantile


def test_equal_windows_count_as_extreme_at_either_end() -> None:
    assert rank_p(0.5, [0.5, 0.1, 0.9], high=True) == 0.75
    assert rank_p(0.5, [0.5, 0.1, 0.2], high=False) == 1.0


@pytest.mark.parametrize(
    ("allowed", "high", "bound"), [(0, True, 4.0), (1, True, 3.0), (0, False, 1.0), (2, False, 3.0)]
)
def test_exactly_the_allowed_windows_lie_beyond_the_bound(allowed: int, high: bool, bound: float) -> None:
    estimates = [Estimate(value=value) for value in (3.0, 1.0, 4.0, 2.0)]
    assert extreme(estimates, allowed, high=high).value == bound


def test_windows_cover_every_layer_and_stay_inside() -> None:
    assert [list(window) for window in windows(4, 3)] == [[0, 1, 2], [1, 2, 3]]
    assert windows(3, 4) == []


def test_pairs_outside_the_phase_have_the_weights_of_its_distances() -> None:
    gram = random_gram(0)
    phase = [1, 2, 3]
    cosines = np.abs(gram.cosines)
    outside = [[(L, L + lag) for L in range(LAYERS - lag) if not {L, L + lag} <= set(phase)] for lag in (1, 2)]
    means = [np.mean([cosines[pair] for pair in pairs]) for pairs in outside]
    expected = (2 * means[0] + 1 * means[1]) / 3  # two pairs of the phase are at distance 1, one at distance 2
    assert lag_matched(gram, "intra_cosine", phase).value == pytest.approx(expected)


@pytest.mark.parametrize("name", ["intra_cosine", "intra_cosine_cross_fitted"])
def test_all_pairs_at_once_give_what_each_pair_gives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, also where a layer has no direction in one half of the documents."""
    gram = planted_view(parts=("spectra",)).gram("raw")
    assert gram.halves is not None
    gram.halves[0].cosines[0, 0] = 0.0
    at_once = lag_matched(gram, name, [2, 3])
    monkeypatch.setattr(nulls, "_cosines_of_pairs", lambda *_: None)
    assert lag_matched(gram, name, [2, 3]) == at_once
    assert at_once.replicates is not None


def test_lags_are_matched_only_where_there_are_pairs_outside() -> None:
    assert "no mean over pairs" in str(lag_matched(random_gram(0), "capture_fraction", [1, 2]).reason)
    assert "no pair outside" in str(lag_matched(random_gram(0), "intra_cosine", range(LAYERS)).reason)


def test_random_directions_replace_the_measured_ones() -> None:
    draws = [random_gram(seed) for seed in range(1, 1 + DRAWS)]
    gram = replace(random_gram(0), random=np.stack([draw.cosines for draw in draws]).astype(np.float32))
    expected = [np.mean([abs(draw.cosines[pair]) for pair in ((2, 3), (2, 4), (3, 4))]) for draw in draws]
    assert random_directions(gram, "intra_cosine", [2, 3, 4]) == pytest.approx(expected, rel=1e-5)
    assert "not made of the v_L alone" in random_directions(gram, "capture_fraction", [2, 3])
    assert "no random directions were drawn" in random_directions(random_gram(0), "intra_cosine", [2, 3])
