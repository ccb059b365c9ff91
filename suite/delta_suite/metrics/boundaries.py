"""Metrics of a whole model under its phase map: how its declared boundaries compare with those in the data."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from delta_suite.metrics.definition import DEFINED, metric
from delta_suite.metrics.direction_gram import NO_DIRECTION, DirectionGram
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import with_interval
from delta_suite.metrics.segmentation import Boundaries, find_boundaries, segments_of


def boundaries_under(gram: DirectionGram, phases: Mapping[str, tuple[int, int]]) -> Boundaries | str:
    """Return the boundaries of a model under a phase map, first and last layer by phase, or why there are none."""
    layers = gram.layers
    if missing := gram.without_direction(range(layers)):
        return NO_DIRECTION.format(missing[0])
    declared = segments_of(phases, layers)
    if not declared:
        return "one phase holds all layers, so there is no boundary"
    if len(declared) == layers - 1:
        return "each layer is a phase of its own, so there is no boundary to find"
    replicates = np.array([replicate.similarity for replicate in gram.replicates]) if gram.replicates else None
    return find_boundaries(gram.similarity, declared, replicates)


def boundary_metrics(boundaries: Boundaries | str) -> dict[str, Estimate]:
    """Return every metric of a model under its phase map, or the reason why there is none."""
    return {
        name: absent(boundaries) if isinstance(boundaries, str) else definition.compute(boundaries)
        for name, definition in DEFINED.items()
        if definition.takes == "boundaries"
    }


@metric(
    "model",
    "share of the orders of the phases' lengths that cut the depth at no higher cost than the declared order",
    takes="boundaries",
    high=1.0,
    per_layer=False,
    source="kernel cost of S: Arlot, Celisse & Harchaoui 2019",
)
def boundary_cost_rank(boundaries: Boundaries) -> Estimate:
    """Return the rank of the declared order of segments among all orders; absent with fewer than 20 of them."""
    if boundaries.cost_rank is None:
        return absent(
            f"the phases' lengths have {boundaries.orders} order{'s' if boundaries.orders != 1 else ''}, "
            "too few to rank one"
        )
    detail = {
        "orders": boundaries.orders,
        "any_lengths": boundaries.cost_rank_any_lengths,
        "cost": boundaries.declared_cost,
        "detected_cost": boundaries.detected_cost,
        "total_cost": boundaries.total_cost,
    }
    return _with_replicates(Estimate(value=boundaries.cost_rank, detail=detail), boundaries, "cost_rank")


@metric(
    "model",
    "share of the declared boundaries that a boundary of the segmentation of least cost meets within 1 layer",
    takes="boundaries",
    high=1.0,
    per_layer=False,
    source="kernel change points of S: Arlot, Celisse & Harchaoui 2019",
)
def boundary_agreement(boundaries: Boundaries) -> Estimate:
    """Return the share of the declared boundaries that the data's boundaries meet within one layer."""
    detail = {
        "by_chance": boundaries.chance_agreement,
        "declared": list(boundaries.declared),
        "detected": list(boundaries.detected),
    }
    return _with_replicates(Estimate(value=boundaries.agreement, detail=detail), boundaries, "agreement")


@metric(
    "model",
    "p-value of the least cost over that of one segment, against smooth drift over depth; 1/1000 at the least",
    takes="boundaries",
    high=1.0,
    per_layer=False,
    source="999 Gaussian drifts with the mean of S by lag, as uneven as S",
    version=2,
    p_value=True,
)
def boundary_p(boundaries: Boundaries) -> Estimate:
    """Return the p-value of phases against a smooth drift over depth."""
    detail = {
        "draws": boundaries.draws,
        "least": 1 / (boundaries.draws + 1),
        "share": boundaries.detected_cost / boundaries.total_cost if boundaries.total_cost > 0.0 else 1.0,
        "drift_dimensions": boundaries.drift_dimensions,
    }
    return _with_replicates(Estimate(value=boundaries.p, detail=detail), boundaries, "p")


def _with_replicates(estimate: Estimate, boundaries: Boundaries, name: str) -> Estimate:
    """Return the estimate with the interval over units, whose replicates search the boundaries anew."""
    without = [Estimate(value=value) for value in boundaries.without.get(name, ())]
    return with_interval(estimate, (), without, 0.0, 1.0, bias="none")
