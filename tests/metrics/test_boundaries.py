"""Boundaries detected in similarity: planted phases are detected, and a smooth drift is not called phases."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
from delta_suite.metrics.boundaries import boundaries_under, boundary_metrics
from delta_suite.metrics.direction_gram import DirectionGram, layer_similarity
from delta_suite.metrics.intervals import interval
from delta_suite.metrics.segmentation import DRAWS, Boundaries, against_smooth_drift, find_boundaries, segments_of

LAYERS, HIDDEN, K = 30, 64, 8
CUTS = (4, 5, 15, 23, 28)
"""Boundaries of a model of 30 layers under the default phase map."""

FEW = 39
"""Draws in tests that count false positives: p <= 0.05 has the level 2 / 40, the same as with 999 draws."""


def frames(columns: np.ndarray) -> np.ndarray:
    """Return one orthonormal frame per layer, from (layers, hidden, k) to (layers, k, hidden)."""
    return np.swapaxes(np.linalg.qr(columns)[0], 1, 2)


def smooth_drift(rng: np.random.Generator, length: float, depth: np.ndarray | None = None) -> np.ndarray:
    """Return frames whose entries are smooth Gaussian processes over depth, with a correlation length in layers."""
    depth = np.arange(LAYERS) if depth is None else depth
    kernel = np.exp(-(np.subtract.outer(depth, depth) ** 2) / (2 * length**2)) + 1e-9 * np.eye(LAYERS)
    return frames(np.einsum("lm,mdk->ldk", np.linalg.cholesky(kernel), rng.standard_normal((LAYERS, HIDDEN, K))))


def rough_drift(rng: np.random.Generator, speeds: Sequence[float]) -> np.ndarray:
    """Return frames that turn a little at each layer, into directions that no other step has."""
    state = rng.standard_normal((HIDDEN, K))
    states = [state]
    for speed in speeds:
        state = math.sqrt(1 - speed**2) * state + speed * rng.standard_normal((HIDDEN, K))
        states.append(state)
    return frames(np.array(states))


def phases(rng: np.random.Generator, cuts: Sequence[int] = CUTS, within: float = 0.5) -> np.ndarray:
    """Return frames that scatter around one centre per phase."""
    centres = [rng.standard_normal((HIDDEN, K)) for _ in range(len(cuts) + 1)]
    layer_centres = np.array([centres[np.searchsorted(cuts, layer, side="right")] for layer in range(LAYERS)])
    return frames(layer_centres + within * rng.standard_normal(layer_centres.shape))


def between_halves(rng: np.random.Generator, directions: np.ndarray, error: float = 0.5) -> DirectionGram:
    """Return the Gram of frames that are estimated twice with noise, as from two halves of documents."""

    def estimated() -> np.ndarray:
        noise = error / math.sqrt(HIDDEN) * rng.standard_normal((len(directions), HIDDEN, K))
        return frames(np.swapaxes(directions, 1, 2) + noise)

    return DirectionGram.of(directions, (estimated(), estimated()))


def similarity(directions: np.ndarray) -> np.ndarray:
    return DirectionGram.of(directions).similarity


def boundaries_in(directions: np.ndarray, cuts: Sequence[int] = CUTS, draws: int = 19) -> Boundaries:
    return find_boundaries(similarity(directions), cuts, draws=draws)


def cost_by_definition(gram: np.ndarray, cuts: Sequence[int]) -> float:
    edges = [0, *cuts, len(gram)]
    blocks = [gram[a:b, a:b] for a, b in itertools.pairwise(edges)]
    return float(sum(np.trace(block) - block.sum() / len(block) for block in blocks))


# --- detection -------------------------------------------------------------------------------------------------


def test_similarity_is_the_overlap_of_subspaces() -> None:
    layer_frames = smooth_drift(np.random.default_rng(0), 3)
    expected = [[np.linalg.norm(a @ b.T) ** 2 / K for b in layer_frames] for a in layer_frames]
    assert similarity(layer_frames) == pytest.approx(np.array(expected))


def test_planted_phases_are_detected_and_ranked_first() -> None:
    result = boundaries_in(phases(np.random.default_rng(1)), draws=DRAWS)
    assert result.detected == result.chosen == CUTS
    assert result.agreement == 1.0
    assert result.cost_rank == 1 / 720
    assert result.cost_rank_any_lengths == 1 / result.others
    assert 1 / (DRAWS + 1) <= result.p <= 0.01


def test_declared_boundaries_that_were_not_planted_rank_low() -> None:
    elsewhere = (7, 12, 18, 22, 26)
    result = boundaries_in(phases(np.random.default_rng(2), elsewhere))
    assert result.detected == elsewhere
    assert result.cost_rank is not None
    assert result.cost_rank > 0.05
    assert result.agreement == 0.2  # 23 alone is within one layer of 22
    assert result.p == 0.05


@pytest.mark.parametrize("segments", [2, 3, 4])
def test_detected_and_declared_boundaries_are_ranked_among_all_segmentations(segments: int) -> None:
    """There are few layers, so that every segmentation can be enumerated."""
    gram = similarity(smooth_drift(np.random.default_rng(segments), 2))[:9, :9]
    every = list(itertools.combinations(range(1, 9), segments - 1))
    costs = {cuts: cost_by_definition(gram, cuts) for cuts in every}
    declared = every[len(every) // 3]
    result = find_boundaries(gram, declared, draws=1)
    assert result.detected == min(costs, key=costs.__getitem__)
    assert result.detected_cost == pytest.approx(min(costs.values()))
    assert result.declared_cost == pytest.approx(costs[declared])
    assert result.total_cost == pytest.approx(cost_by_definition(gram, ()))
    assert result.others == len(every)
    no_worse = [cuts for cuts in every if costs[cuts] <= costs[declared] + 1e-9]
    assert result.cost_rank_any_lengths == pytest.approx(len(no_worse) / len(every))
    near = [np.mean([min(abs(a - b) for b in cuts) <= 1 for a in declared]) for cuts in every]
    assert result.chance_agreement == pytest.approx(np.mean(near))


def test_orders_are_those_of_the_lengths() -> None:
    gram = similarity(smooth_drift(np.random.default_rng(5), 2))[:12, :12]
    cuts = (1, 3, 6, 7)  # lengths 1, 2, 3, 1, 5
    orders = set(itertools.permutations((1, 2, 3, 1, 5)))
    costs = [cost_by_definition(gram, np.cumsum(order)[:-1]) for order in orders]
    result = find_boundaries(gram, cuts, draws=1)
    assert result.orders == len(orders) == 60
    assert result.cost_rank == pytest.approx(np.mean(np.array(costs) <= cost_by_definition(gram, cuts) + 1e-9))


def test_too_many_orders_are_sampled_with_the_declared_one_among_them() -> None:
    cuts = (1, 3, 6, 10, 15, 21, 28)  # lengths 1 to 7, and 2: 8! / 2 orders
    result = boundaries_in(phases(np.random.default_rng(6), cuts), cuts)
    assert result.orders == 10_000
    assert result.cost_rank == 1 / 10_000


def test_recurrence_counts_the_replicates_with_the_boundary() -> None:
    rng = np.random.default_rng(7)
    whole = similarity(phases(rng, (10, 20)))
    shifted = [similarity(phases(rng, cuts)) for cuts in ((10, 20), (11, 20), (13, 20), (9, 24))]
    result = find_boundaries(whole, (10, 20), np.array(shifted), draws=1)
    assert result.detected == (10, 20)
    assert result.recurrence == (0.75, 0.75)
    assert result.without["agreement"] == (1.0, 1.0, 0.5, 0.5)
    shares = [cost_by_definition(each, boundaries_of(each)) / cost_by_definition(each, ()) for each in shifted]
    _, _, drawn = against_smooth_drift(whole, 2, draws=1)
    assert result.without["p"] == tuple((1 + (drawn[0] <= share)) / 2 for share in shares)
    assert result.without["cost_rank"] == (1.0,) * 4  # phases of one length have one order


def test_metrics_of_boundaries_have_the_interval_of_their_replicates() -> None:
    rng = np.random.default_rng(17)
    gram = between_halves(rng, phases(rng))
    gram = replace(
        gram, replicates=tuple(between_halves(rng, phases(rng, within=within)) for within in (0.4, 0.5, 2.0))
    )
    estimates = boundary_metrics(
        boundaries_under(gram, {"A": (0, 3), "B": (4, 4), "C": (5, 14), "D": (15, 22), "E": (23, 27), "tail": (28, 29)})
    )
    for name, estimate in estimates.items():
        assert estimate.replicates is not None
        assert len(estimate.replicates) == 3, name
        assert estimate.interval == interval(estimate.value or 0.0, estimate.replicates, 0.0, 1.0)
        assert estimate.corrected == estimate.value
    assert (
        boundary_metrics(boundaries_under(replace(gram, replicates=()), {"A": (0, 9), "B": (10, 29)}))[
            "boundary_p"
        ].interval
        is None
    )


def boundaries_of(gram: np.ndarray) -> tuple[int, ...]:
    """Return the two boundaries of least cost, found by trying all."""
    return min(itertools.combinations(range(1, len(gram)), 2), key=lambda cuts: cost_by_definition(gram, cuts))


def test_noise_has_no_boundaries_by_penalty() -> None:
    rng = np.random.default_rng(8)
    assert boundaries_in(frames(rng.standard_normal((LAYERS, HIDDEN, K)))).chosen == ()
    assert find_boundaries(np.ones((LAYERS, LAYERS)), CUTS, draws=1).chosen == ()


def test_equal_layers_have_no_structure() -> None:
    result = find_boundaries(np.ones((LAYERS, LAYERS)), CUTS, draws=19)
    assert result.p == 1.0
    assert result.cost_rank == 1.0


def test_the_same_matrix_gives_the_same_numbers_again() -> None:
    layer_frames = smooth_drift(np.random.default_rng(9), 3)
    assert boundaries_in(layer_frames) == boundaries_in(layer_frames)


# --- smooth drift ----------------------------------------------------------------------------------------------


def uneven(rng: np.random.Generator) -> np.ndarray:
    """Return depths with steps whose length changes smoothly, up to elevenfold."""
    return np.cumsum(0.2 + 2 * np.sin(math.pi * (np.arange(LAYERS) / LAYERS + rng.random())) ** 2)


def called_phases(similarity: np.ndarray) -> bool:
    """Return True if smooth drift is rejected."""
    return against_smooth_drift(similarity, len(CUTS), FEW)[0] <= 0.05


def called_of(drift: Callable[[np.random.Generator], np.ndarray]) -> int:
    """Return how many of 34 drifts are called phases."""
    return sum(called_phases(drift(np.random.default_rng(seed))) for seed in range(34))


@pytest.mark.repeats
def test_smooth_drifts_are_seldom_called_phases() -> None:
    """There are 170 drifts of five kinds, 34 of each."""
    kinds = {
        "smooth": lambda rng: similarity(smooth_drift(rng, 2)),
        "slow": lambda rng: similarity(smooth_drift(rng, 10)),
        "rough": lambda rng: similarity(rough_drift(rng, [0.4] * (LAYERS - 1))),
        "rough, between halves": lambda rng: between_halves(rng, rough_drift(rng, [0.3] * (LAYERS - 1))).similarity,
        "uneven": lambda rng: similarity(smooth_drift(rng, 4, uneven(rng))),
    }
    small = {name: called_of(drift) for name, drift in kinds.items()}
    assert sum(small.values()) / (34 * len(kinds)) <= 0.07, small
    assert max(small.values()) <= 5, small  # 34 at 5% exceed 5 in 0.7% of seeds


@pytest.mark.xfail(
    strict=True, reason="6 of 34, and 9 of 60 of other seeds: docs/weaknesses.md, boundary_p is too small"
)
def test_smooth_drifts_between_halves_are_seldom_called_phases() -> None:
    assert called_of(lambda rng: between_halves(rng, smooth_drift(rng, 5)).similarity) <= 5


@pytest.mark.repeats
def test_planted_phases_are_seldom_called_drift() -> None:
    within = {0.5: 0, 1.0: 0, 2.0: 0}  # the noise around a phase's centre, over the size of the centre
    for noise, seed in itertools.product(within, range(20)):
        within[noise] += called_phases(similarity(phases(np.random.default_rng(seed), within=noise)))
    between = sum(
        called_phases(between_halves(rng, phases(rng)).similarity) for rng in map(np.random.default_rng, range(20))
    )
    assert within[0.5] == within[1.0] == between == 20
    assert within[2.0] >= 16


# --- under a phase map -----------------------------------------------------------------------------------------


def test_a_phase_map_with_gaps_has_segments_for_them() -> None:
    assert segments_of({"C": (2, 7), "E": (8, 10)}, 12) == (2, 8, 11)
    assert segments_of({"all": (0, 11)}, 12) == ()


def test_halves_are_compared_where_there_are_halves() -> None:
    gram = between_halves(np.random.default_rng(10), phases(np.random.default_rng(10)))
    assert gram.products is not None
    assert gram.products.ab is not None
    assert np.array_equal(gram.similarity, layer_similarity(gram.products.ab))
    assert np.diag(gram.similarity).max() < 1.0  # no layer agrees with itself but for its reliability


def test_metrics_carry_the_figures_to_read_them_against() -> None:
    gram = DirectionGram.of(phases(np.random.default_rng(11)))
    under = {"A": (0, 3), "B": (4, 4), "C": (5, 14), "D": (15, 22), "E": (23, 27), "tail": (28, 29)}
    result = boundaries_under(replace(gram, replicates=(gram, gram)), under)
    assert isinstance(result, Boundaries)
    assert result.recurrence == (1.0,) * 5
    metrics = boundary_metrics(result)
    assert {name: estimate.value for name, estimate in metrics.items()} == {
        "boundary_cost_rank": 1 / 720,
        "boundary_agreement": 1.0,
        "boundary_p": result.p,
    }
    details = {name: estimate.detail or {} for name, estimate in metrics.items()}
    assert details["boundary_p"]["least"] == 0.001 <= result.p
    assert details["boundary_agreement"]["by_chance"] == result.chance_agreement
    assert details["boundary_cost_rank"]["orders"] == 720


@pytest.mark.parametrize(
    ("phase_map", "telling"),
    [
        ({"all": (0, 29)}, "one phase holds all layers"),
        ({f"p{layer}": (layer, layer) for layer in range(30)}, "each layer is a phase"),
    ],
)
def test_a_phase_map_without_boundaries_to_test_gives_no_value(
    phase_map: dict[str, tuple[int, int]], telling: str
) -> None:
    estimates = boundary_metrics(boundaries_under(DirectionGram.of(phases(np.random.default_rng(12))), phase_map))
    assert len(estimates) == 3
    for estimate in estimates.values():
        assert estimate.value is None
        assert telling in str(estimate.reason)


def test_a_layer_without_an_update_is_named() -> None:
    layer_frames = phases(np.random.default_rng(13))
    layer_frames[17] = 0.0
    result = boundaries_under(DirectionGram.of(layer_frames), {"A": (0, 9), "B": (10, 29)})
    assert "layer 17" in str(result)


def test_few_phases_are_not_ranked_by_their_order() -> None:
    result = boundaries_in(phases(np.random.default_rng(14), (10, 21)), (10, 21))
    rank = boundary_metrics(result)["boundary_cost_rank"]
    assert rank.value is None
    assert "6 orders, too few" in str(rank.reason)


@pytest.mark.parametrize("cuts", [(), (0, 4), (5, 4), (4, 4), (4, 30)])
def test_boundaries_that_cut_nothing_are_refused(cuts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"segments of|do not ascend"):
        find_boundaries(np.eye(LAYERS), cuts)


def test_ruptures_is_imported_only_to_search() -> None:
    """Importing it takes a second, because it imports scipy.stats."""
    code = "import sys, delta_suite.claims.judge; print({'ruptures', 'scipy', 'torch'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
