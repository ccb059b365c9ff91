"""Figures of many groups at once: the same to the last digit as one by one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from delta_suite.metrics import nulls
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.directions import equal_cosine_of, equal_cosines_near
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import phase_metric
from delta_suite.metrics.registry import METRICS
from delta_suite.metrics.segmentation import _best, _best_shares, _share, embedding_of
from delta_suite.metrics.stacked import stacked_values

STACKED = (
    "intra_cosine",
    "intra_cosine_cross_fitted",
    "cross_cosine",
    "block_effective_rank",
    "block_effective_rank_fraction",
    "equal_cosine",
)
LAYERS = 12


def gram_of(draw: np.random.Generator, groups: int = 0) -> DirectionGram:
    """A gram of directions in 20 dimensions that share one, as a record keeps it: replicates without halves."""
    directions = draw.standard_normal((LAYERS, 20)) + 2 * draw.standard_normal(20)
    directions /= np.linalg.norm(directions, axis=1)[:, None]
    cosines = directions @ directions.T
    replicates = tuple(gram_of(draw) for _ in range(groups))
    return DirectionGram(20, cosines, cross=np.abs(cosines) * 0.9, replicates=replicates, documents=replicates[:5])


def one_by_one(gram: DirectionGram) -> DirectionGram:
    slow = replace(gram)
    slow.__dict__["stack"] = None
    return slow


def all_of(estimate: Estimate) -> tuple[object, ...]:
    return estimate.model_dump(), estimate.replicates, estimate.replicates_documents


@pytest.mark.parametrize("layers", [range(2, 4), range(3, 8), range(LAYERS)])
def test_each_value_is_that_of_the_gram_by_itself(layers: range) -> None:
    gram = gram_of(np.random.default_rng(3), groups=23)
    for name in STACKED:
        metric = METRICS[name]
        assert all_of(phase_metric(gram, layers, metric)) == all_of(phase_metric(one_by_one(gram), layers, metric)), (
            name
        )
    for name in ("intra_cosine", "intra_cosine_cross_fitted"):
        assert all_of(nulls.lag_matched(gram, name, layers)) == all_of(
            nulls.lag_matched(one_by_one(gram), name, layers)
        )
    assert gram.stack is not None
    assert stacked_values("intra_cosine", gram.stack, layers) is not None


def test_where_a_layer_has_no_direction_in_some_group_nothing_is_formed_at_once() -> None:
    gram = gram_of(np.random.default_rng(4), groups=6)
    cosines = gram.replicates[2].cosines.copy()
    cosines[4] = cosines[:, 4] = 0.0
    lacking = replace(gram.replicates[2], cosines=cosines)
    gram = replace(gram, replicates=(*gram.replicates[:2], lacking), documents=())
    assert gram.stack is not None
    assert stacked_values("intra_cosine", gram.stack, range(3, 8)) is None
    assert phase_metric(gram, range(3, 8), METRICS["intra_cosine"]).interval is None


@pytest.mark.parametrize("layers", [2, 3, 5, 22, 126])
def test_an_equal_cosine_does_not_depend_on_where_its_search_begins(layers: int) -> None:
    draw = np.random.default_rng(layers)
    ranks = 1 + (layers - 1) * draw.random(200) ** 2
    near = equal_cosines_near(ranks, layers)
    exact = np.array([equal_cosine_of(rank, layers) for rank in ranks.tolist()])
    assert [equal_cosine_of(*pair) for pair in zip(ranks.tolist(), [layers] * 200, near.tolist(), strict=True)] == [
        *exact
    ]
    assert np.abs(near - exact).max() < 1e-9
    ends = equal_cosines_near(np.array([1.0, float(layers)]), layers)
    assert np.abs(ends - [1.0, 0.0]).max() < 1e-7  # flat at 0: the entropy does not tell smaller ones apart
    assert not math.isnan(equal_cosine_of(1.0, layers, 1.0))


@pytest.mark.parametrize("boundaries", [1, 3, 6])
def test_the_least_costs_of_many_are_those_of_each(boundaries: int) -> None:
    draw = np.random.default_rng(boundaries)
    rows = draw.standard_normal((7, 8, 8)).cumsum(axis=1)
    grams = rows @ rows.transpose(0, 2, 1)
    each = [_share(embedding, _best(embedding, boundaries)) for embedding in map(embedding_of, grams)]
    np.testing.assert_allclose(_best_shares(grams, boundaries), each, atol=1e-12)
    alike = np.ones((1, 8, 8))
    assert _best_shares(alike, boundaries).tolist() == [1.0]
