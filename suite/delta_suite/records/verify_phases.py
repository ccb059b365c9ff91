"""Check the figures of phases, the law and the boundaries against the matrices beside the record, and each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64

from delta_suite.metrics.directions import DISATTENUATION_FLOOR, NEEDS_PRODUCTS, equal_cosines_near
from delta_suite.metrics.estimators import one_thread
from delta_suite.metrics.layer import ENTROPY_FLOOR
from delta_suite.metrics.registry import METRICS
from delta_suite.records.arrays import KINDS, Arrays, matrices_without, square
from delta_suite.records.problem import SINGLE, WRITTEN, Figures, Part, Problem, Resampled, Resamples, quoted
from delta_suite.records.record import Record, ScopeRecord

HALF = float(np.finfo(np.float16).eps)
"""Relative spacing of float16, in which replicates of matrices are kept, less the whole: 2^-10."""

Scopes = Sequence[tuple[str, ScopeRecord]]


@dataclass(frozen=True)
class _Figure:
    """What follows from the arrays for one phase: the whole, its halves, its replicates, and each layer's part.

    The first axis is of variants, which are formed together: for models of few layers a call takes longer than its sum.
    """

    cases: Float64[np.ndarray, "variants cases"]
    """The whole first, then halves where they count, then replicates; NaN where there is no value."""
    per_layer: Float64[np.ndarray, "variants layers"] | None = None
    unstable: Bool[np.ndarray, " variants"] | None = None
    """True where the arrays do not tell what enters a replicate."""
    rounding: Float64[np.ndarray, " variants"] | None = None
    """How far a replicate may be off that is formed from float32, where `_rounding` does not say."""


@dataclass(frozen=True)
class _Matrices:
    """The matrices of variants over their layers: the whole first, then both halves (cosines alone), then replicates.

    Their axes are variants, cases, layers and layers.
    """

    cosines: np.ndarray
    halves: int
    overlaps: np.ndarray
    angles: np.ndarray
    cross: np.ndarray | None

    @classmethod
    def of(cls, arrays: Arrays, variants: Sequence[str], layers: int, kind: str) -> _Matrices:
        """Return the matrices of variants that have the same ones."""
        held = _held(arrays, variants[0])

        def matrices(*names: str) -> np.ndarray:
            rows = [
                np.concatenate([_rows(arrays, f"{variant}.{name}") for name in names if f"{variant}.{name}" in arrays])
                for variant in variants
            ]
            return square(np.array(rows), layers)

        halves = ["cosines_a", "cosines_b"] if {"cosines_a", "cosines_b"} <= held else []
        return cls(
            matrices("cosines", *halves, f"cosines.{kind}"),
            len(halves),
            matrices("overlaps", f"overlaps.{kind}"),
            matrices("angles", f"angles.{kind}"),
            matrices("cross", f"cross.{kind}") if "cross" in held else None,
        )


_TOGETHER = 200_000
"""Numbers of a matrix and its cases up to which those of further variants are formed with it."""


def _held(arrays: Arrays, variant: str) -> frozenset[str]:
    """Return which matrices, and which without each group, the arrays hold of a variant."""
    names = [name for matrix in _STORED for name in (matrix, *(f"{matrix}.{kind}" for kind in KINDS))]
    return frozenset(name for name in names if f"{variant}.{name}" in arrays)


_STORED = ("cosines", "cosines_a", "cosines_b", "overlaps", "angles", "cross")


def _rows(arrays: Arrays, name: str) -> np.ndarray:
    """Return an array of pairs, or one for each group that is left out."""
    matrix, _, kind = name.rpartition(".")
    without = matrices_without(arrays, matrix, kind) if kind in KINDS else None
    return np.atleast_2d(arrays[name]) if without is None else without


def _figures(matrices: _Matrices, first: int, last: int) -> dict[str, _Figure]:
    """Return every figure of a phase that follows from the matrices, as `metrics.directions` defines them."""
    inside = slice(first, last + 1)
    count, layers = last + 1 - first, matrices.cosines.shape[-1]
    others = [layer for layer in range(layers) if not first <= layer <= last]
    signed = matrices.cosines[..., inside, inside]
    cosines = np.minimum(np.abs(matrices.cosines), 1.0)
    lacking = matrices.cosines.diagonal(axis1=2, axis2=3) < 0.5
    gone = np.where(lacking[..., inside].any(axis=2), np.nan, 0.0)
    whole = np.delete(gone, range(1, 1 + matrices.halves), axis=1)
    neighbours = np.abs(np.subtract.outer(np.arange(count), np.arange(count))) == 1
    pairs = ~np.eye(count, dtype=bool)
    out: dict[str, _Figure] = {}

    def over(values: np.ndarray, missing: np.ndarray, chosen: np.ndarray) -> _Figure:
        if count == 1:
            return _Figure(np.full(missing.shape, np.nan))
        sums = np.where(chosen, values, 0.0).sum(axis=3)
        return _Figure(sums.sum(axis=2) / chosen.sum() + missing, sums[:, 0] / chosen.sum(axis=1) + missing[:, :1])

    out["adjacent_cosine"] = over(cosines[..., inside, inside], gone, neighbours)
    out["subspace_overlap"] = over(matrices.overlaps[..., inside, inside], whole, pairs)
    out["principal_angle"] = over(matrices.angles[..., inside, inside], whole, pairs)
    out["intra_cosine"] = (
        _Figure(1.0 + gone, np.ones((len(gone), 1))) if count == 1 else over(cosines[..., inside, inside], gone, pairs)
    )
    if others:
        missing = gone + np.where(lacking[..., others].any(axis=2), np.nan, 0.0)
        parts = cosines[..., inside, others].mean(axis=3)
        out["cross_cosine"] = _Figure(parts.mean(axis=2) + missing, parts[:, 0] + missing[:, :1])
    else:
        out["cross_cosine"] = _Figure(gone * np.nan)
    values = np.maximum(np.linalg.eigvalsh(signed), 0.0)
    p = values / np.maximum(values.sum(axis=2, keepdims=True), np.finfo(np.float64).tiny)
    ranks = np.exp(-(p * np.log(np.where(p > ENTROPY_FLOOR, p, 1.0))).sum(axis=2)) + gone
    out["block_effective_rank"] = _Figure(ranks)
    out["block_effective_rank_fraction"] = _Figure(np.minimum(1.0, ranks / count))
    out["equal_cosine"] = _equal_cosines(ranks, p, count)
    if matrices.cross is not None:
        out |= _cross_figures(matrices, inside, whole, pairs)
    return out


def _cross_figures(matrices: _Matrices, inside: slice, gone: np.ndarray, pairs: np.ndarray) -> dict[str, _Figure]:
    """Return the figures of a phase that compare the halves of the units."""
    assert matrices.cross is not None
    products = matrices.cross[..., inside, inside]
    count = len(pairs)
    reliable = products.diagonal(axis1=2, axis2=3)
    diagonals = matrices.cosines[:, 1 : 1 + matrices.halves, inside, inside].diagonal(axis1=2, axis2=3)
    halved = gone.copy()
    halved[:, 0] += np.where((diagonals < 0.5).any(axis=(1, 2)), np.nan, 0.0)
    # A half without an update has a direction of zeros there; of replicates nothing else tells that it has none.
    unknown = np.asarray((reliable[:, 1:] <= 2 * HALF).any(axis=(1, 2)))
    out = {}
    if count == 1:
        out["intra_cosine_cross_fitted"] = _Figure(np.full(gone.shape, np.nan))
    else:
        sums = np.where(pairs, products, 0.0).sum(axis=3)
        out["intra_cosine_cross_fitted"] = _Figure(
            sums.sum(axis=2) / pairs.sum() + halved, sums[:, 0] / (count - 1) + halved[:, :1], unknown
        )
    usable = reliable > DISATTENUATION_FLOOR
    both = usable[..., :, None] & usable[..., None, :] & pairs
    scale = np.sqrt(np.where(both, reliable[..., :, None] * reliable[..., None, :], 1.0))
    sums = np.where(both, products / scale, 0.0).sum(axis=3)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = sums.sum(axis=2) / both.sum(axis=(2, 3)) + gone
        parts = sums[:, 0] / both[:, 0].sum(axis=2) + gone[:, :1]
    # A replicate whose reliability is at the floor is on either side of it by how float32 rounds.
    near = np.asarray((np.abs(reliable[:, 1:] - DISATTENUATION_FLOOR) <= SINGLE).any(axis=(1, 2)))
    out["intra_cosine_disattenuated"] = _Figure(values, parts, near)
    return out


@dataclass(frozen=True)
class Followed:
    """The figures that follow from the arrays for one variant and one kind of groups."""

    phases: Sequence[Mapping[str, _Figure]]
    """The figures of each phase, of several variants."""
    variant: int
    """The place of this variant among them."""
    halves: int
    """The number of halves among the cases of figures of cosines."""


def followed_figures(record: Record, arrays: Arrays, variants: Sequence[str], kind: str) -> dict[str, Followed]:
    """Return what follows from the arrays for each variant. kind: of the groups that are left out."""
    alike: dict[frozenset[str], list[str]] = {}
    for variant in variants:
        alike.setdefault(_held(arrays, variant), []).append(variant)
    layers, scopes = record.model.layers, [scope.layers for scope in record.scopes.values()]
    out: dict[str, Followed] = {}
    with one_thread():
        for held in alike.values():
            cases = 3 + len(arrays.get(f"{held[0]}.cosines.{kind}", ()))
            count = max(1, _TOGETHER // (cases * layers**2))
            for together in (held[first : first + count] for first in range(0, len(held), count)):
                matrices = _Matrices.of(arrays, together, layers, kind)
                figures = [_figures(matrices, *scope) for scope in scopes]
                out |= {variant: Followed(figures, index, matrices.halves) for index, variant in enumerate(together)}
    return out


def phase_problems(
    record: Record,
    arrays: Arrays,
    variant: str,
    phases: Figures,
    spans: Mapping[str, slice],
    followed: Mapping[str, Mapping[str, Followed]] | None,
    resampled: Resampled,
) -> Iterator[Problem]:
    """Yield where figures of phases contradict the arrays; their intervals are checked with others.

    spans, resampled: as for layers. followed: by kind of groups and variant; None for the record of a baseline that was
    added to.
    """
    if not record.scopes or not spans:
        return
    groups = dict(zip(KINDS, (record.resampling.groups, record.resampling.document_groups), strict=True))
    for kind, count in groups.items():
        if count is not None:
            of_kind = phases if kind == "units" else phases.over_documents()
            of_variant = None if followed is None else followed[kind][variant]
            yield from _kind_problems(record, arrays, variant, of_kind, spans, kind, count, of_variant, resampled)


def _kind_problems(
    record: Record,
    arrays: Arrays,
    variant: str,
    phases: Figures,
    spans: Mapping[str, slice],
    kind: str,
    groups: int,
    followed: Followed | None,
    resampled: Resampled,
) -> Iterator[Problem]:
    """Yield where figures contradict the arrays; their intervals over one kind of groups are added to the resampled."""
    scopes = list(record.scopes.items())
    counts = np.array([scope.layers[1] - scope.layers[0] + 1 for _, scope in scopes])
    resamples: dict[str, Part] = {}
    values: dict[str, np.ndarray] = {}
    for name in spans:
        stored = arrays.get(f"{variant}.scope_{kind}.{name}")
        if followed is None or name in NEEDS_PRODUCTS:
            if stored is not None or followed is not None:
                resamples[name] = (None if stored is None else stored.T, None, _rounding(name, counts))
            continue
        if name not in followed.phases[0]:  # it compares halves, and there are none
            values[name] = np.full(len(scopes), np.nan)
            continue
        figures, index = [row[name] for row in followed.phases], followed.variant
        cases = np.array([figure.cases[index] for figure in figures]).T
        halves = followed.halves if METRICS[name].bias == "halves" else 0  # figures of cosines, which halves have
        values[name] = cases[0]
        rest = cases[1 + halves :]
        general = _rounding(name, counts)
        rounding = [
            error if figure.rounding is None else figure.rounding[index]
            for figure, error in zip(figures, general, strict=True)
        ]
        unstable = [figure.unstable is not None and figure.unstable[index] for figure in figures]
        errors = np.where(unstable, np.inf, rounding)
        resamples[name] = (rest if len(rest) else None, cases[1 : 1 + halves] if halves else None, errors)
        if kind == "units":
            parts = [None if figure.per_layer is None else figure.per_layer[index] for figure in figures]
            yield from _part_problems(name, scopes, variant, parts)
    if values and kind == "units":
        chosen, expected = phases.joined([spans[name] for name in values]), np.concatenate(list(values.values()))
        tolerance = WRITTEN * np.maximum(1.0, np.abs(expected))
        yield from chosen.differing("the value", chosen.value, expected, tolerance, "the cosines beside it")
    if resamples:
        chosen = phases.joined([spans[name] for name in resamples])
        joined = Resamples.join(list(resamples.values()), len(scopes), groups)
        narrower = kind == "documents"
        centred = followed is not None and not narrower
        resampled.add(chosen, joined, centred=centred, narrower=narrower)


def _rounding(name: str, counts: np.ndarray) -> np.ndarray:
    """Return how far replicates of a figure may be off that are formed from matrices of float32, in phases of N layers.

    Entries of float32 move an eigenvalue by N SINGLE / 2 at most, a share by SINGLE / 2, and an entropy by N times that
    and the steepest slope, ln p at the floor. A quotient by reliabilities above 0.6 has less than four times the error.
    """
    if name == "block_effective_rank":
        return np.asarray(counts**2 * SINGLE * -np.log(ENTROPY_FLOOR))
    if name == "block_effective_rank_fraction":
        return np.asarray(counts * SINGLE * -np.log(ENTROPY_FLOOR))
    return np.asarray(np.full(len(counts), 4 * SINGLE if name == "intra_cosine_disattenuated" else SINGLE))


def _equal_cosines(ranks: np.ndarray, p: np.ndarray, count: int) -> _Figure:
    """Return the equal cosines of the cases, and how far float32 may move them: as far as the rank that it moves.

    Each of the N shares is off by SINGLE / 2 at most, and an entropy by -ln p + 1 times that.
    """
    if count == 1:
        return _Figure(ranks * np.nan)
    known = ~np.isnan(ranks)
    steepest = 1.0 - np.log(np.maximum(p[known].min(axis=1), ENTROPY_FLOOR))
    errors = ranks[known] * count * SINGLE / 2 * steepest
    out, moved = ranks.copy(), np.zeros(ranks.shape)
    lower = np.maximum(1.0, ranks[known] - errors)
    out[known], moved_to = equal_cosines_near(np.stack([ranks[known], lower]), count)
    moved[known] = moved_to - out[known]
    return _Figure(out, rounding=moved.max(axis=1))


def _part_problems(name: str, scopes: Scopes, variant: str, parts: Sequence[np.ndarray | None]) -> Iterator[Problem]:
    """Yield where the numbers that layers contribute to a phase are not those of the arrays."""
    for (phase, scope), expected in zip(scopes, parts, strict=True):
        stated = scope.metrics[variant][name].per_layer
        if stated is None or expected is None:
            continue
        layers = range(scope.layers[0], scope.layers[1] + 1)
        for layer, value in zip(layers, expected, strict=True):
            number_there = stated.get(layer)
            there = np.nan if number_there is None else number_there
            if not (abs(there - value) <= WRITTEN * max(1.0, abs(value)) or (np.isnan(there) and np.isnan(value))):
                yield Problem(
                    f"phase {phase}, {variant}, {name}",
                    f"layer {layer} contributes {quoted(there)}, and the cosines beside it give {quoted(float(value))}",
                )
