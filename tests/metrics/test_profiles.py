"""Figures of a profile over depth against scipy, and their intervals on planted profiles."""

from __future__ import annotations

import numpy as np
import pytest
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import standard_error
from delta_suite.metrics.profiles import FEWEST, SHAPES, profile_figure, rank_correlation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

LAYERS, GROUPS = 20, 17
DEPTH = [layer / LAYERS for layer in range(LAYERS)]


def measured(truth: np.ndarray, noise: float, draw: np.random.Generator) -> list[Estimate]:
    """Return the layers' means over groups whose error is `noise`, with the means without each group."""
    groups = truth + noise * np.sqrt(GROUPS) * draw.standard_normal((GROUPS, LAYERS))
    without = (groups.sum(axis=0) - groups) / (GROUPS - 1)
    return [
        Estimate(value=float(value), replicates=tuple(rows.tolist()))
        for value, rows in zip(groups.mean(axis=0), without.T, strict=True)
    ]


def coverage(shape: str, truth: np.ndarray, noise: float, draws: int = 200) -> float:
    """Return how often the interval of a figure holds its true value."""
    draw, right = np.random.default_rng(0), SHAPES[shape](truth, truth, np.array(DEPTH))
    intervals = [
        profile_figure(shape, layers, layers, DEPTH).interval
        for layers in (measured(truth, noise, draw) for _ in range(draws))
    ]
    return float(np.mean([each is not None and each[0] - 1e-9 <= right <= each[1] + 1e-9 for each in intervals]))


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_the_rank_correlation_is_that_of_scipy_with_ties(pairs: list[tuple[int, int]]) -> None:
    first, second = np.array(pairs, dtype=np.float64).T
    with np.errstate(invalid="ignore", divide="ignore"):
        constant = len(set(first)) == 1 or len(set(second)) == 1
        expected = np.nan if constant else spearmanr(first, second).statistic
    assert rank_correlation(first, second) == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_planted_figures_are_found() -> None:
    profile = [Estimate(value=value) for value in (3.0, 5.0, 9.0, 4.0, 1.0, 2.0, 2.5, 2.6)]
    falling = [Estimate(value=-each.value) for each in profile if each.value is not None]
    depth = [layer / 8 for layer in range(8)]
    figures = {shape: profile_figure(shape, profile, falling, depth).value for shape in SHAPES}
    assert figures["peak"] == 2 / 8
    assert figures["valley"] == 4 / 8
    assert figures["correlation"] == -1
    assert figures["trend"] == pytest.approx(spearmanr(range(8), [each.value for each in profile]).statistic)


@pytest.mark.repeats
@pytest.mark.parametrize(
    ("shape", "noise", "least"), [("peak", 0.2, 0.92), ("peak", 1.0, 0.92), ("trend", 0.1, 0.9), ("trend", 0.4, 0.88)]
)
def test_intervals_cover_on_planted_profiles(shape: str, noise: float, least: float) -> None:
    layers = np.arange(LAYERS)
    truth = -((layers - 12) ** 2) / 4.0 if shape == "peak" else np.sin(layers / 3) * 4 + layers * 0.2
    assert coverage(shape, truth, noise) >= least


def test_where_a_figure_is_certain_its_interval_is_a_point() -> None:
    layers = measured(np.arange(LAYERS) * 10.0, 0.01, np.random.default_rng(2))
    figure = profile_figure("trend", layers, layers, DEPTH)
    assert (figure.value, figure.interval) == (1.0, (1.0, 1.0))
    assert standard_error(figure.replicates or ()) == 0


def test_figures_that_do_not_exist_have_a_reason() -> None:
    flat = [Estimate(value=2.0)] * LAYERS
    assert profile_figure("trend", flat, flat, DEPTH).reason == "no trend: a metric is the same in all of these layers"
    few = flat[: FEWEST - 1]
    assert profile_figure("trend", few, few, DEPTH[: FEWEST - 1]).reason == (
        "a trend over layers needs 4 of them, and the scope has 3"
    )
    assert profile_figure("peak", few, few, DEPTH[: FEWEST - 1]).value == 0.0


def test_layers_without_replicates_give_a_value_without_an_interval() -> None:
    layers = measured(np.arange(LAYERS) * 1.0, 0.1, np.random.default_rng(3))
    gone = [layers[0].model_copy(update={"replicates": None}), *layers[1:]]
    figure = profile_figure("trend", gone, gone, DEPTH)
    assert figure.value is not None
    assert figure.interval is None
