"""Check that the arrays beside a record are those of its layers, phases and groups, and that they hold what can be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from delta_suite.metrics.registry import METRICS
from delta_suite.records.arrays import KINDS, MATRICES, STATES, Arrays, pairs_of_layers, square, variant_and_kind
from delta_suite.records.problem import SINGLE, WRITTEN, Problem
from delta_suite.records.record import SCHEMA, Record
from delta_suite.records.verify_layers import pair_index, tokens_of
from delta_suite.reduction.statistics import TOP_K
from delta_suite.reduction.variants import VARIANTS

RANGES = {
    "cosines": (-1.0, 1.0),
    "cosines_a": (-1.0, 1.0),
    "cosines_b": (-1.0, 1.0),
    "overlaps": (0.0, 1.0),
    "cross": (0.0, 1.0),
    "cross_overlaps": (0.0, 1.0),
    "angles": (0.0, math.pi / 2),
}
"""The range of each matrix of pairs of layers."""

OF_HALVES = ("cosines_a", "cosines_b", "cross", "cross_overlaps")
"""The matrices that are there where the units have halves."""

UNIT = 16 * SINGLE
"""How far an inner product of two unit vectors of float32 may exceed 1: each is off by half of SINGLE an entry, and the
error of a sum of squares stays below a few of them."""


def array_problems(record: Record, arrays: Arrays) -> Iterator[Problem]:
    """Yield which arrays are missing, have another shape than the record implies, or hold what cannot be."""
    if record.schema_version != SCHEMA:
        for name, array in arrays.items():
            if np.isinf(array).any():
                yield Problem(name, "it holds an infinite number")
        return
    layers, groups = record.model.layers, _groups(record)
    pairs, phases = layers * (layers + 1) // 2, len(record.scopes)
    today = {
        name for name, version in record.variants.items() if name in VARIANTS and VARIANTS[name].version == version
    }
    for variant in sorted(today):
        for kind in ("eigenvalues", "cosines", "overlaps", "angles"):
            if f"{variant}.{kind}" not in arrays:
                yield Problem(f"{variant}.{kind}", "the array is missing")
        yield from _missing_matrices(arrays, variant)
    for name, array in arrays.items():
        variant, kind = variant_and_kind(name)
        head, _, rest = kind.partition(".")
        shape: tuple[int, ...] | None = None
        if name == "law.transfer":
            shape = (layers, layers)
        elif variant == "law" and head == "units":
            shape = (len(record.law.phases) if record.law else 0, array.shape[-1] if array.ndim else 0)
        elif variant not in today:
            continue
        elif kind in {"eigenvalues", STATES}:
            rank = min(max(0, tokens_of(record, variant)), record.model.hidden)
            shape = (layers, rank)
        elif head in KINDS and rest in METRICS:
            shape = (groups[head], layers)
        elif head == "halves" and rest in METRICS:
            shape = (2, layers)
        elif head.removeprefix("scope_") in KINDS and rest in METRICS:
            shape = (phases, groups[head.removeprefix("scope_")])
        elif head == "random":
            shape = (phases, array.shape[-1] if array.ndim else 0)
        elif head in RANGES:
            shape = (groups[rest], pairs) if rest in KINDS else (pairs,)
        if shape is None:
            continue  # of a later version, and read by nobody
        if array.shape != shape:
            yield Problem(name, f"its shape is {array.shape}, and the record's layers and groups make it {shape}")
        else:
            yield from _content_problems(name, head, rest, array, layers)


def _missing_matrices(arrays: Arrays, variant: str) -> Iterator[Problem]:
    """Yield the matrices that are missing beside others: all are written together, and so are those without a group.

    Without those of one matrix, what compares it with another record would be formed from another matrix.
    """
    whole = [name for name in MATRICES if f"{variant}.{name}" in arrays]
    together = [[f"{variant}.{name}" for name in OF_HALVES]]
    together += [[f"{variant}.{name}.{kind}" for name in whole] for kind in KINDS]
    for names in together:
        missing = [name for name in names if name not in arrays]
        if len(missing) < len(names):
            yield from (Problem(name, "the array is missing, and others like it are there") for name in missing)


def _groups(record: Record) -> dict[str, int]:
    """Return the number of groups of each kind that are left out in turn."""
    return dict(zip(KINDS, (record.resampling.groups, record.resampling.document_groups or 0), strict=True))


def _content_problems(name: str, head: str, rest: str, array: np.ndarray, layers: int) -> Iterator[Problem]:
    """Yield what an array of the right shape holds that cannot be."""
    if array.size == 0 or head not in {"eigenvalues", STATES, "random", *RANGES}:
        return
    least, most = float(array.min()), float(array.max())
    if head in RANGES:
        low, high = RANGES[head]
        if array.dtype == np.float16:  # less the whole
            low, high = low - high, high - low
        if not (low - UNIT <= least and most <= high + UNIT):
            yield Problem(name, f"it holds {least:.9g} to {most:.9g}, outside {low:.9g} to {high:.9g}")
        elif head == "cosines" and not rest:
            yield from _cosine_problems(name, array, layers)
    elif head in {"eigenvalues", STATES}:
        if not least >= 0.0:
            yield Problem(name, f"it holds {least:.9g}, and no eigenvalue is negative or absent")
        elif (np.diff(array, axis=1) > SINGLE * array[:, :-1]).any():
            yield Problem(name, "the eigenvalues of a layer do not descend")
    elif head == "random" and rest in METRICS:
        low, high = METRICS[rest].low, METRICS[rest].high
        if not (np.isnan(least) or (low - UNIT * layers <= least and most <= high + UNIT * layers)):
            yield Problem(name, f"it holds {least:.9g} to {most:.9g}, outside {low:.9g} to {high:.9g}")


def _cosine_problems(name: str, cosines: np.ndarray, layers: int) -> Iterator[Problem]:
    """Yield where cosines are not those of unit vectors: 1 or 0 with themselves, and positive semidefinite together."""
    diagonal, _ = pair_index(layers)
    if not ((np.abs(cosines[diagonal] - 1) <= UNIT) | (cosines[diagonal] == 0.0)).all():
        yield Problem(name, "a layer's cosine with itself is neither 1 nor 0")
        return
    if np.linalg.eigvalsh(square(cosines, layers))[0] < -UNIT * layers:
        yield Problem(name, "no directions have these cosines: the matrix has a negative eigenvalue")


# --- directions in the cache -----------------------------------------------------------------------------------


def direction_problems(record: Record, arrays: Arrays, directions: Arrays) -> Iterator[Problem]:
    """Yield where the directions of a cache entry are not of its shape, or are not those of its cosines."""
    layers, hidden, groups = record.model.layers, record.model.hidden, _groups(record)
    for variant in record.variants:
        if f"{variant}.directions" not in directions:
            yield Problem(f"{variant}.directions", "the array is missing")
    for name, array in directions.items():
        variant, kind = variant_and_kind(name)
        if kind in {"directions", "directions_a", "directions_b"}:
            shape: tuple[int, ...] = (layers, TOP_K, hidden)
        elif kind == "random":
            shape = (array.shape[0] if array.ndim else 0, layers, layers)
        elif (left_out := kind.partition("_")[0]) in KINDS:
            shape = (groups[left_out], layers, TOP_K, layers, TOP_K)
        else:
            continue
        if array.shape != shape:
            yield Problem(name, f"its shape is {array.shape}, and the record's layers and groups make it {shape}")
        elif not np.isfinite(array).all():
            yield Problem(name, "it holds a number that is not finite")
        elif kind == "directions" and f"{variant}.cosines" in arrays:
            top = array[:, 0].astype(np.float64)
            first, second = pairs_of_layers(layers)
            apart = float(np.abs((top @ top.T)[first, second] - arrays[f"{variant}.cosines"]).max())
            if not apart <= WRITTEN:
                yield Problem(name, f"the cosines of the first directions are up to {apart:.3g} from {variant}.cosines")
