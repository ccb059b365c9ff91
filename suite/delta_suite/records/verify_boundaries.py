"""Check the boundaries of a record against its phase map, their own search, and the similarity of its layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from delta_suite.metrics.intervals import interval
from delta_suite.metrics.segmentation import FEWEST_ORDERS, NEAR, SEGMENTATIONS, costs_of, order_count, segments_of
from delta_suite.records.arrays import Arrays, square
from delta_suite.records.problem import WRITTEN, Problem, equal_numbers, quoted
from delta_suite.records.record import BoundaryRecord, Record
from delta_suite.records.verify_layers import pair_index


def boundary_problems(
    record: Record, arrays: Arrays | None, variant: str, boundary: BoundaryRecord
) -> Iterator[Problem]:
    """Yield where the boundaries of a variant contradict the phase map, their search, or the similarity of layers."""
    where = f"boundaries, {variant}"
    layers = record.model.layers
    metrics, search = boundary.metrics, boundary.search
    for name, estimate in metrics.items():
        if estimate.value is not None and estimate.reason is not None:
            yield Problem(f"{where}, {name}", f"it has the value {quoted(estimate.value)}, and a reason to have none")
    if all(estimate.value is None for estimate in metrics.values()):
        if arrays is not None and 1 < len(segments_of(record.phases, layers)) + 1 < layers:
            diagonal, _ = pair_index(layers)
            if (arrays[f"{variant}.cosines"][diagonal] >= 0.5).all():
                yield Problem(where, "they are absent, and can be found in the arrays")
        return
    declared = segments_of(record.phases, layers)
    if boundary.declared != declared:
        yield Problem(where, f"declared at {quoted(boundary.declared)}, and the phases begin at {quoted(declared)}")
        return
    for what, cuts in (("detected", boundary.detected), ("chosen", (search and search.chosen) or ())):
        if list(cuts) != sorted({cut for cut in cuts if 1 <= cut < layers}):
            yield Problem(where, f"{what} at {quoted(cuts)}, which do not ascend from 1 to {layers - 1}")
            return
    if len(boundary.detected) != len(declared):
        yield Problem(where, f"{len(boundary.detected)} are detected for {len(declared)} declared")
        return
    near = [min(abs(cut - other) for other in boundary.detected) <= NEAR for cut in declared]
    agreement = metrics.get("boundary_agreement")
    if agreement is not None and not equal_numbers(agreement.value, sum(near) / len(near)):
        yield Problem(where, f"{sum(near)} of {len(near)} agree, and the agreement is {quoted(agreement.value)}")
    recurrence = boundary.recurrence
    if recurrence is not None:
        counts = [share * record.resampling.groups for share in recurrence]
        if len(recurrence) != len(declared) or not all(0 <= share <= 1 for share in recurrence):
            yield Problem(where, f"the recurrence is {quoted(recurrence)}")
        elif any(abs(count - round(count)) > 1e-6 for count in counts):
            yield Problem(
                where, f"the recurrence {quoted(recurrence)} is no share of {record.resampling.groups} groups"
            )
    if search is not None:
        yield from _search_problems(record, arrays, variant, boundary)
        yield from _replicate_problems(record, boundary, where)


def _search_problems(
    record: Record, arrays: Arrays | None, variant: str, boundary: BoundaryRecord
) -> Iterator[Problem]:
    """Yield where costs, ranks and draws of the search contradict each other, or the similarity of layers."""
    search, metrics, where = boundary.search, boundary.metrics, f"boundaries, {variant}"
    assert search is not None
    costs = {"detected": search.detected_cost, "declared": search.declared_cost, "total": search.total_cost}
    slack = 1e-8 * (abs(search.total_cost) + record.model.layers)
    if not -slack <= search.detected_cost <= search.declared_cost + slack <= search.total_cost + 2 * slack:
        yield Problem(where, f"the costs {quoted(costs)} do not ascend")
    for what, share in (("any lengths", search.cost_rank_any_lengths), ("chance", search.chance_agreement)):
        if not 0 <= share <= 1:
            yield Problem(where, f"the share of {what} is {quoted(share)}")
    counts = (search.orders, search.others, search.draws)
    if not all(1 <= count < 2**31 for count in counts) or not 0 <= search.cost_rank_any_lengths <= 1:
        yield Problem(where, f"{search.orders} orders, {search.others} others and {search.draws} draws")
        return
    edges = [0, *boundary.declared, record.model.layers]
    for what, count, possible in (
        ("orders", search.orders, order_count([end - first for first, end in pairwise(edges)])),
        ("others", search.others, min(SEGMENTATIONS, math.comb(record.model.layers - 1, len(boundary.declared)))),
    ):
        if count != possible:
            yield Problem(where, f"{count} {what} were ranked, and there are {possible}")
    grids = {
        "boundary_p": search.draws + 1,
        "boundary_cost_rank": search.orders,
    }
    for name, steps in grids.items():
        estimate = metrics.get(name)
        if estimate is not None and estimate.value is not None:
            if name == "boundary_cost_rank" and steps < FEWEST_ORDERS:
                yield Problem(f"{where}, {name}", f"it ranks one of {steps} orders, and {FEWEST_ORDERS} are the fewest")
            share = estimate.value * steps
            if abs(share - round(share)) > WRITTEN * steps or round(share) < 1:
                yield Problem(f"{where}, {name}", f"{quoted(estimate.value)} is no share of {steps}")
    ranked = search.cost_rank_any_lengths * search.others
    if abs(ranked - round(ranked)) > WRITTEN * search.others or round(ranked) < 1:
        yield Problem(where, f"the rank {quoted(search.cost_rank_any_lengths)} is no share of {search.others}")
    details: dict[str, dict[str, object]] = {
        "boundary_cost_rank": {
            "orders": search.orders,
            "any_lengths": search.cost_rank_any_lengths,
            "cost": search.declared_cost,
            "detected_cost": search.detected_cost,
            "total_cost": search.total_cost,
        },
        "boundary_agreement": {
            "by_chance": search.chance_agreement,
            "declared": list(boundary.declared),
            "detected": list(boundary.detected),
        },
        "boundary_p": {
            "draws": search.draws,
            "least": 1 / (search.draws + 1),
            "share": search.detected_cost / search.total_cost if search.total_cost > 0 else 1.0,
        },
    }
    for name, expected in details.items():
        estimate = metrics.get(name)
        if estimate is None or estimate.value is None:
            continue
        for key, value in expected.items():
            stated = (estimate.detail or {}).get(key)
            if key in (estimate.detail or {}) and not equal_numbers(stated, value):
                yield Problem(f"{where}, {name}", f"its {key} is {quoted(stated)}, and the search says {quoted(value)}")
    drift = ((boundary_p.detail if (boundary_p := metrics.get("boundary_p")) else None) or {}).get("drift_dimensions")
    if isinstance(drift, int | float) and not 0 < drift < 2**31:
        yield Problem(f"{where}, boundary_p", f"its drifts have {quoted(drift)} dimensions")
    if arrays is None:
        return
    cuts = {"detected": boundary.detected, "declared": boundary.declared, "total": ()}
    overlaps = arrays.get(f"{variant}.cross_overlaps", arrays[f"{variant}.overlaps"])
    followed = costs_of(square(overlaps, record.model.layers), cuts.values())
    for what, cost in zip(cuts, followed, strict=True):
        # Costs are differences of sums over the trace, and the eigenvalues of S are exact to its rounding.
        if abs(cost - costs[what]) > WRITTEN * record.model.layers:
            yield Problem(
                where, f"the {what} cost is {quoted(costs[what])}, and the overlaps beside it give {quoted(cost)}"
            )


def _replicate_problems(record: Record, boundary: BoundaryRecord, where: str) -> Iterator[Problem]:
    """Yield where replicates are no shares of what was counted, or do not give the metric's interval."""
    search, groups = boundary.search, record.resampling.groups
    assert search is not None
    steps = {
        "boundary_p": search.draws + 1,
        "boundary_cost_rank": search.orders,
        "boundary_agreement": len(boundary.declared),
    }
    without = boundary.replicates or {}
    for name, estimate in boundary.metrics.items():
        place, replicates = f"{where}, {name}", without.get(name)
        if replicates is None:
            if estimate.interval is not None:
                yield Problem(place, "it has an interval, and no replicates")
            continue
        if len(replicates) != groups or name not in steps or estimate.value is None:
            yield Problem(place, f"it has {len(replicates)} replicates, and the record {groups} groups")
            continue
        shares = np.array(replicates)
        counts = shares * steps[name]
        wrong = ~((shares >= 0) & (shares <= 1)) | (np.abs(counts - counts.round()) > WRITTEN * steps[name])
        for share in shares[wrong]:
            yield Problem(place, f"its replicate {quoted(share)} is no share of {steps[name]}")
        expected = interval(estimate.value, replicates, 0.0, 1.0)
        stated = estimate.interval or (math.nan, math.nan)
        if not equal_numbers(estimate.corrected, estimate.value) or any(
            not abs(end - other) <= 16 * WRITTEN for end, other in zip(stated, expected, strict=True)
        ):
            yield Problem(place, f"its interval is {quoted(stated)}, and its replicates give {quoted(expected)}")
