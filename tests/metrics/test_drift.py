"""Smooth drifts as the null of a phase: drifts are seldom called a phase, phases are found, also two layers off."""

from __future__ import annotations

import math

import numpy as np
import pytest
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.drift import FEWEST_LAYERS, SHORTEST, against_drifts, edge_contrast, outside_fit, smooth_drifts
from delta_suite.metrics.nulls import windows

from tests.reference import edge_contrast as contrast_by_definition

DRAWS = 39
"""Draws where false positives are counted: p <= 0.05 has the level 2 / 40, the same as with 999 draws."""

DEPTHS = {20: range(3, 10), 30: range(5, 15)}
"""The shallowest models that are compared with drifts, and one as deep as SmolLM2-135M, with their phase C."""


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1)[:, None])


def drifting(kind: str, layers: int, rng: np.random.Generator) -> np.ndarray:
    """Return |cos| of directions that drift over depth without an edge."""
    depth, dimensions = np.arange(layers, dtype=np.float64), 32
    if kind == "slow at a random depth":
        depth = np.cumsum(0.2 + 2 * np.sin(math.pi * (depth / layers + rng.random())) ** 2)
    elif kind == "fast at both ends":
        depth = np.cumsum(0.2 + 2 * np.abs((2 * depth + 1) / layers - 1) ** 2)
    distance = np.abs(np.subtract.outer(depth, depth))
    if kind == "independent":
        kernel = np.eye(layers)
    elif kind == "rough":
        kernel = np.exp(-distance / 5)
    else:
        length = {"uneven": 6.0, "slow": 12.0}.get(kind, 4.0)
        dimensions = 6 if kind == "uneven" else dimensions
        kernel = np.exp(-((distance / length) ** 2) / 2)
    path = unit(np.linalg.cholesky(kernel + 1e-9 * np.eye(layers)) @ rng.standard_normal((layers, dimensions)))
    return np.asarray(np.abs(path @ path.T))


KINDS = ("slow at a random depth", "fast at both ends", "independent", "rough", "uneven", "slow")


def phased(layers: int, phase: range, rng: np.random.Generator, cosine: float = 0.5) -> np.ndarray:
    """Return |cos| of directions that share one inside the phase, and are unrelated elsewhere."""
    rows = unit(rng.standard_normal((layers, 32)))
    common, *others = np.linalg.qr(rng.standard_normal((32, 1 + len(phase))))[0].T
    for layer, other in zip(phase, others, strict=True):
        rows[layer] = math.sqrt(cosine) * common + math.sqrt(1 - cosine) * other
    return np.asarray(np.abs(rows @ rows.T))


@pytest.mark.repeats
def test_smooth_drifts_are_seldom_called_a_phase() -> None:
    """There are 144 drifts of six kinds at two depths."""
    called = {
        (kind, layers): sum(
            smooth_drifts(drifting(kind, layers, np.random.default_rng([seed, layers])), phase, DRAWS).p <= 0.05
            for seed in range(12)
        )
        for kind in KINDS
        for layers, phase in DEPTHS.items()
    }
    assert sum(called.values()) / (12 * len(called)) <= 0.07, called
    assert max(called.values()) <= 3, called  # 12 at 5% exceed 3 in 0.2% of seeds


@pytest.mark.repeats
def test_planted_phases_are_found_up_to_two_layers_off() -> None:
    for layers, phase in DEPTHS.items():
        for off in range(-2, 3):
            planted = range(phase[0] + off, phase[-1] + 1 + off)
            found = sum(
                smooth_drifts(phased(layers, planted, np.random.default_rng([seed, off + 2])), phase, DRAWS).p <= 0.05
                for seed in range(4)
            )
            assert found == 4, (layers, off)


def test_windows_that_leave_out_the_overlapping_ones_are_no_null() -> None:
    """The reason why they are not used: drifts are called a phase five times as often as at the level asked for."""
    layers, phase, called, drifts = 64, range(10, 32), 0, 0
    runs = windows(layers, len(phase))
    for kind in ("uneven", "rough", "independent"):
        for seed in range(40):
            cosines = drifting(kind, layers, np.random.default_rng([seed, 64]))
            shares = np.array([cosines[run[0] : run[-1] + 1, run[0] : run[-1] + 1].mean() for run in runs])
            best = np.array([shares[max(0, first - 2) : first + 3].max() for first in range(len(runs))])
            apart = [run[0] for run in runs if 2 * len(set(run) & set(phase)) <= len(phase)]
            p = (1 + sum(best[first] >= best[phase[0]] for first in apart)) / (1 + len(apart))
            called += p <= 0.05
            drifts += 1
    assert called / drifts > 0.15


def test_the_contrast_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    for layers, phase in ((12, range(3, 7)), (9, range(0, 4)), (9, range(5, 9)), (5, range(0, 4))):
        cosines = drifting("uneven", layers, rng)
        assert edge_contrast(cosines, phase) == pytest.approx(contrast_by_definition(cosines, phase), rel=1e-12)


def test_figures_do_not_depend_on_the_run() -> None:
    cosines = drifting("uneven", 20, np.random.default_rng(1))
    first, again = (smooth_drifts(cosines, DEPTHS[20], DRAWS) for _ in range(2))
    assert first.statistic == again.statistic
    assert np.array_equal(first.drawn, again.drawn)


def test_the_ends_of_the_null_are_where_its_p_reaches_the_level() -> None:
    drifts = smooth_drifts(drifting("rough", 20, np.random.default_rng(2)), DEPTHS[20])
    high, low = drifts.edge(0.95, high=True), drifts.edge(0.95, high=False)
    assert (1 + (drifts.drawn >= high).sum()) / 1000 > 0.05 >= (1 + (drifts.drawn > high).sum()) / 1000
    assert (1 + (drifts.drawn <= low).sum()) / 1000 > 0.05 >= (1 + (drifts.drawn < low).sum()) / 1000


def test_what_drifts_cannot_be_held_against_says_why() -> None:
    gram = DirectionGram(32, phased(24, range(5, 12), np.random.default_rng(3)))
    assert "no mean of cosines" in str(against_drifts(gram, "effective_rank", range(5, 12)))
    assert "one document" in str(against_drifts(gram, "intra_cosine_cross_fitted", range(5, 12)))
    gone = gram.cosines.copy()
    gone[3, :] = gone[:, 3] = 0.0
    assert "layer 3 is zero" in str(against_drifts(DirectionGram(32, gone), "intra_cosine", range(5, 12)))
    assert f"needs {FEWEST_LAYERS} layers" in str(outside_fit(FEWEST_LAYERS - 1, range(3, 9)))
    assert f"needs a phase of {SHORTEST}" in str(outside_fit(30, range(SHORTEST - 1)))
    assert "no edge" in str(outside_fit(30, range(30)))
    for phase in (range(1), range(24)):
        with pytest.raises(ValueError, match="no pairs inside, or no edge"):
            smooth_drifts(gram.cosines, phase)
