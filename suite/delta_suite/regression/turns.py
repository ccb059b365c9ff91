"""How far the directions of each layer turned between two checkpoints, against how far the two document halves are
apart."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from delta_suite.errors import RecordError
from delta_suite.records.arrays import Arrays
from delta_suite.records.view import RecordView
from delta_suite.regression.comparison import (
    COMPARED_VARIANTS,
    FALSE_ALARMS,
    LAYERS,
    Comparison,
    Status,
    obstacle,
    stated_tolerance,
)

TURNS = {
    "direction_turn": "angle between the two v_L",
    "subspace_turn": "mean of the principal angles between the two top-8 subspaces",
}
"""How far the directions turned between two checkpoints, in degrees; compared like metrics, layer by layer."""

TURN_ROUNDING = 0.1
"""Degrees. A direction kept in float16 is off by 0.02 degrees."""


def direction_figures(view: RecordView) -> dict[str, np.ndarray]:
    """Return what the turning is computed from, for each compared variant; empty where the cache has lost it.

    `V.directions` (layers, k, hidden), and `V.halves.METRIC` (layers,): degrees between the document halves.
    """
    arrays: dict[str, np.ndarray] = {}
    for variant in COMPARED_VARIANTS:
        try:
            gram = view.full_gram(variant)
        except (RecordError, KeyError):
            continue
        assert view.directions is not None
        arrays[f"{variant}.directions"] = view.directions.content[f"{variant}.directions"]
        products = None if gram.products is None else gram.products.ab
        if products is not None:
            blocks = [products[layer, :, layer, :] for layer in range(gram.layers)]
            arrays[f"{variant}.halves.direction_turn"] = np.array([_degrees(np.abs(b[:1, :1])) for b in blocks])
            arrays[f"{variant}.halves.subspace_turn"] = np.array([_degrees(np.linalg.svd(b)[1]) for b in blocks])
    return arrays


def turns(old: np.ndarray, new: np.ndarray) -> dict[str, list[float | None]]:
    """Return the degrees that v_L and the top-k subspace of each layer turned, from directions (layers, k, hidden).

    The subspace's is the mean of its principal angles (Björck & Golub 1973). None where a layer has no direction, or
    another number of them than before.
    """
    degrees: dict[str, list[float | None]] = {name: [] for name in TURNS}
    for before, after in zip(old.astype(np.float64), new.astype(np.float64), strict=True):
        a, b = (rows[np.linalg.norm(rows, axis=1) > 0.5] for rows in (before, after))
        if len(a) == 0 or len(b) == 0:
            degrees["direction_turn"].append(None)
            degrees["subspace_turn"].append(None)
            continue
        cosine = abs(float(a[0] @ b[0])) / float(np.linalg.norm(a[0]) * np.linalg.norm(b[0]))
        degrees["direction_turn"].append(_degrees(np.array([cosine])))
        if len(a) != len(b):
            degrees["subspace_turn"].append(None)
            continue
        bases = [np.linalg.qr(rows.T)[0] for rows in (a, b)]  # float16 leaves them not quite orthonormal
        degrees["subspace_turn"].append(_degrees(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)))
    return degrees


def _degrees(cosines: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip(cosines, 0.0, 1.0))).mean())


def compare_turns(
    old: RecordView,
    new: RecordView,
    directions: tuple[Arrays, Arrays],
    *,
    tolerances: Mapping[str, float] | None = None,
    other_documents: bool = False,
) -> list[Comparison]:
    """Compare how far each layer's directions turned with how far those of the document halves are apart.

    directions: of both sides, as `direction_figures` gives them; without them the turning is not measured.
    """
    refusal = obstacle(old, new, other_documents=other_documents)
    paired = old.record.calibration.sha256 == new.record.calibration.sha256
    variants = [name for name in COMPARED_VARIANTS if name in old.record.variants or name in new.record.variants]
    factor = 1.0 if paired else _turn_factor(len(TURNS) * len(variants) * old.model.layers)
    comparisons = []
    for variant in variants:
        before, after = (side.get(f"{variant}.directions") for side in directions)
        degrees = {} if refusal is not None or before is None or after is None else turns(before, after)
        for metric in TURNS:
            comparison = Comparison(LAYERS, metric, variant, Status.NOT_MEASURED)
            if refusal is not None:
                comparisons.append(replace(comparison, status=Status.NOT_COMPARABLE, reason=refusal))
            elif not degrees:
                where = "the baseline has none beside it" if before is None else "the cache has lost this measurement's"
                comparisons.append(replace(comparison, reason=f"the directions cannot be compared: {where}"))
            for layer, turn in enumerate(degrees.get(metric, [])):
                layer_turn = replace(comparison, scope=f"layer:{layer}", new=turn, difference=turn)
                apart = [_apart(side, variant, metric, layer) for side in directions]
                stated = stated_tolerance(layer_turn, tolerances or {})
                comparisons.append(_decided(layer_turn, apart, factor, paired=paired, stated=stated))
    return comparisons


def _decided(
    comparison: Comparison, apart: Sequence[float | None], factor: float, *, paired: bool, stated: float | None
) -> Comparison:
    """Return the comparison of one layer's turn with its status.

    apart: degrees between the document halves of both sides.
    """
    known = [degrees for degrees in apart if degrees is not None]
    if comparison.difference is None:
        return replace(comparison, reason="the layer has no direction, or another number of them")
    if not paired and len(known) < len(apart) and stated is None:
        return replace(comparison, difference=None, reason="the documents are others, and a calibration has no halves")
    noise = max(known, default=0.0) if paired else math.sqrt(sum(degrees**2 for degrees in known) / 2)
    width = max(TURN_ROUNDING, factor * noise)
    tolerance = width if stated is None else stated
    status = Status.SAME if comparison.difference <= min(width, tolerance) else Status.DRIFT
    return replace(comparison, status=status, tolerance=tolerance, stated=stated is not None)


def _turn_factor(family: int) -> float:
    """Return how many times the rms turn between their halves two samples turn at most, all layers at once.

    Two samples of n documents are apart by 1/sqrt(2) of what two halves of n / 2 are, in the mean. A turn has few
    degrees of freedom, as mostly it goes towards the next direction or two, so the ratio of squares is taken as
    F(2, 4), whose upper tail is (1 + F / 2)^-2.
    """
    tail = FALSE_ALARMS / 2 / family
    quantile = 2 * (tail**-0.5 - 1)
    return math.sqrt(quantile / 2)


def _apart(side: Arrays, variant: str, metric: str, layer: int) -> float | None:
    degrees = side.get(f"{variant}.halves.{metric}")
    return None if degrees is None else float(degrees[layer])
