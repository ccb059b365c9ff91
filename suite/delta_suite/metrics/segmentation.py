"""Detect phase boundaries in the similarity of layers, and compare declared boundaries with them.

The similarity S[L, M] = ||U_L U_M^T||_F^2 / k is the inner product of two projectors, tr(P_L P_M) / k: a kernel between
layers. Kernel change-point detection (Arlot, Celisse & Harchaoui 2019) cuts the depth into segments of small scatter

    cost = sum over segments of [ sum_L S[L, L] - (1 / length) sum_{L, M} S[L, M] ],

which is the squared distance of the layers from their segment's mean, in an embedding whose inner products are S.

A segmentation of N layers is written as its boundaries: the first layer of every segment but the first, ascending.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Float64, Int64

NEAR = 1
"""Layers that two boundaries may lie apart and still be the same one."""

DRAWS = 999
"""Draws of the smooth-drift null: its p-value cannot go below 1 / (DRAWS + 1) = 0.001."""

SEGMENTATIONS = 10_000
"""The most segmentations that are ranked; of more, the declared one and a seeded sample are ranked."""

FEWEST_ORDERS = 20
"""The fewest orders of segments that are ranked: among fewer, the declared order cannot be in the best 5%."""

SEED = 20190612
"""Seed of every random choice here, so that a stored record always gives the same numbers."""

LARGEST_SHARE = 0.5
"""The number of segments is chosen from 1 up to this share of the number of layers."""

SLOPE_FROM = 0.6
"""The penalty's slope is fitted from this share of the largest number of segments on (Arlot et al. 2019, section 6)."""

PILOT = 40
"""Draws in each step of matching the null's irregularity to the data's."""

MOST_DIMENSIONS = 1e6
"""The most degrees of freedom of a drift: with more, a draw equals the mean kernel to three digits."""


@dataclass(frozen=True)
class Boundaries:
    """A comparison of a declared segmentation with the similarity of the layers."""

    declared: tuple[int, ...]
    detected: tuple[int, ...]
    """The segmentation of least cost with the declared number of segments."""
    chosen: tuple[int, ...] | None
    """The boundaries of a number of segments chosen by penalty; None with fewer than 8 layers."""
    recurrence: tuple[float, ...] | None
    """For each detected boundary, the share of replicates with a boundary within one layer of it."""
    declared_cost: float
    detected_cost: float
    total_cost: float
    """Cost of one segment over all layers."""
    orders: int
    """Number of segmentations ranked that have the declared lengths in any order, the declared one included."""
    cost_rank: float | None
    """Share of these orders whose cost is at most the declared one's; None with fewer than 20 orders."""
    others: int
    """Number of segmentations ranked that have the declared number of segments, the declared one included."""
    cost_rank_any_lengths: float
    """Share of these segmentations whose cost is at most the declared one's."""
    agreement: float
    """Share of the declared boundaries with a detected one within one layer."""
    chance_agreement: float
    """Mean agreement over the segmentations of `others`: the agreement expected by chance."""
    p: float
    """The p-value of `detected_cost / total_cost` under smooth drift; at least 1 / (draws + 1)."""
    draws: int
    """Number of draws of smooth drift."""
    drift_dimensions: float
    """Degrees of freedom of the drift; fewer make it more irregular."""
    without: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """cost_rank, agreement and p without each group of units, searched anew; p among the drifts fitted to the whole."""


def segments_of(phases: Mapping[str, tuple[int, int]], layers: int) -> tuple[int, ...]:
    """Return the boundaries of a phase map. A run of layers outside every phase forms a segment, too.

    Example:
        >>> segments_of({"C": (2, 7), "E": (8, 10)}, layers=12)
        (2, 8, 11)
    """
    starts = {first for first, _ in phases.values()} | {last + 1 for _, last in phases.values()}
    return tuple(sorted(starts - {0, layers}))


def find_boundaries(
    similarity: Float64[np.ndarray, "layers layers"],
    declared: Sequence[int],
    replicates: Float64[np.ndarray, "groups layers layers"] | None = None,
    draws: int = DRAWS,
) -> Boundaries:
    """Detect boundaries in a similarity matrix, rank the declared ones, and test the structure against smooth drift.

    `similarity` is symmetric. Comparing document halves can give it negative eigenvalues, which count as 0.
    `replicates` are the similarity without each group of documents in turn; `draws` is the number of drifts drawn.

    The number of segments is chosen by the least cost + 2 C D (2 ln(N / D) + 5) over D = 1 .. N / 2 segments, where C
    is the slope of the least cost against that shape over the largest 40% of D (the shape: Lebarbier 2005; twice the
    slope: Birgé & Massart 2007).

    Raises ValueError unless there are 2 to N - 1 declared segments, with boundaries from 1 to N - 1, ascending.

    Example:
        >>> similarity = np.kron(np.eye(2), np.ones((3, 3)))  # layers 0-2 are alike, and layers 3-5
        >>> find_boundaries(similarity, declared=(2,), draws=1).detected
        (3,)
    """
    layers = len(similarity)
    cuts = tuple(int(boundary) for boundary in declared)
    if not 1 <= len(cuts) <= layers - 2:
        raise ValueError(f"{len(cuts) + 1} segments of {layers} layers leave nothing to find")
    if list(cuts) != sorted(set(cuts)) or cuts[0] < 1 or cuts[-1] >= layers:
        raise ValueError(f"boundaries {list(cuts)} do not ascend from 1 to {layers - 1}")
    embedding = embedding_of(similarity)
    gram = embedding @ embedding.T
    detected = _best(embedding, len(cuts))
    declared_cost = _cost(embedding, cuts)
    generator = np.random.default_rng(SEED)
    orders = _same_lengths(cuts, layers, generator)
    others = _same_number(cuts, layers, generator)
    p, dimensions, drawn = against_smooth_drift(similarity, len(cuts), draws)
    recurrence, without = None, {}
    if replicates is not None:
        embeddings = [embedding_of(replicate) for replicate in replicates]
        again = [_best(each, len(cuts)) for each in embeddings]
        recurrence = tuple(
            float(np.mean([_meets(boundary, boundaries) for boundaries in again])) for boundary in detected
        )
        shares = [_share(each, cut) for each, cut in zip(embeddings, again, strict=True)]
        without = {
            "cost_rank": tuple(_rank(each @ each.T, orders, _cost(each, cuts)) for each in embeddings),
            "agreement": tuple(float(np.mean([_meets(cut, other) for cut in cuts])) for other in again),
            "p": tuple(_drift_p(share, drawn) for share in shares),
        }
    return Boundaries(
        declared=cuts,
        detected=detected,
        chosen=_chosen(embedding),
        recurrence=recurrence,
        declared_cost=declared_cost,
        detected_cost=_cost(embedding, detected),
        total_cost=_cost(embedding, ()),
        orders=len(orders),
        cost_rank=_rank(gram, orders, declared_cost) if len(orders) >= FEWEST_ORDERS else None,
        others=len(others),
        cost_rank_any_lengths=_rank(gram, others, declared_cost),
        agreement=float(np.mean([_meets(boundary, detected) for boundary in cuts])),
        chance_agreement=float(_agreements(cuts, others).mean()),
        p=p,
        draws=draws,
        drift_dimensions=dimensions,
        without=without,
    )


# --- segmentations ---------------------------------------------------------------------------------------------

_ROUNDING = 1e-9
"""Costs that differ by less than this share of the total are equal."""


def embedding_of(similarity: Float64[np.ndarray, "layers layers"]) -> np.ndarray:
    """Return one row per layer, whose inner products are the nearest positive semidefinite matrix.

    It is the symmetric root of that matrix, which does not depend on the signs that a library gives eigenvectors:
    drifts drawn through it are the same on every machine.
    """
    values, vectors = np.linalg.eigh((similarity + similarity.T) / 2)
    return np.asarray((vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T)


def _best(embedding: np.ndarray, boundaries: int) -> tuple[int, ...]:
    """Return the segmentation of least cost with this number of boundaries."""
    import ruptures  # takes a second, because it imports scipy.stats, and only claims about boundaries need it

    search = ruptures.KernelCPD(kernel="linear", min_size=1).fit(embedding)
    return tuple(search.predict(n_bkps=boundaries)[:-1])


def _cost(embedding: np.ndarray, boundaries: Sequence[int]) -> float:
    """Return the cost of one segmentation: the squared distances of layers from their segment's mean."""
    first = np.array([0, *boundaries])
    lengths = np.diff([*first, len(embedding)])
    sums = np.add.reduceat(embedding, first, axis=0)
    return float((embedding**2).sum() - ((sums**2).sum(axis=1) / lengths).sum())


def costs_of(similarity: Float64[np.ndarray, "layers layers"], segmentations: Iterable[Sequence[int]]) -> list[float]:
    """Return the cost of each segmentation, given the similarity of the layers."""
    embedding = embedding_of(similarity)
    return [_cost(embedding, boundaries) for boundaries in segmentations]


def _costs(
    gram: Float64[np.ndarray, "layers layers"], boundaries: Int64[np.ndarray, "segmentations boundaries"]
) -> Float64[np.ndarray, " segmentations"]:
    """Return the cost of each segmentation, given one per row."""
    layers = len(gram)
    sums = np.zeros((layers + 1, layers + 1))
    sums[1:, 1:] = gram.cumsum(axis=0).cumsum(axis=1)
    edges = np.pad(boundaries, ((0, 0), (1, 1)), constant_values=((0, 0), (0, layers)))
    first, end = edges[:, :-1], edges[:, 1:]
    within = sums[end, end] - sums[first, end] - sums[end, first] + sums[first, first]
    return np.asarray(np.trace(gram) - (within / (end - first)).sum(axis=1))


def _best_shares(grams: Float64[np.ndarray, "draws layers layers"], boundaries: int) -> Float64[np.ndarray, " draws"]:
    """Return the `_share` of the `_best` boundaries of many at once, given inner products.

    By dynamic programming over the last segment: one search after the other took most of the time of this module.
    """
    layers = grams.shape[1]
    sums = np.zeros((len(grams), layers + 1, layers + 1))
    sums[:, 1:, 1:] = grams.cumsum(axis=1).cumsum(axis=2)
    diagonal = sums.diagonal(axis1=1, axis2=2)
    within = diagonal[:, None, :] - sums - sums.transpose(0, 2, 1) + diagonal[:, :, None]
    lengths = np.subtract.outer(np.arange(layers + 1), np.arange(layers + 1)).T
    # What a segment from i to j saves of the scatter around the origin; none ends before it begins.
    saved = np.where(lengths > 0, within / np.maximum(lengths, 1), -np.inf)
    best = saved[:, 0]
    for _ in range(boundaries):
        best = (best[:, :, None] + saved).max(axis=1)
    traces = grams.trace(axis1=1, axis2=2)
    total = traces - saved[:, 0, layers]
    alike = total <= _ROUNDING * traces
    return np.asarray(np.where(alike, 1.0, (traces - best[:, layers]) / np.where(alike, 1.0, total)))


def _share(embedding: np.ndarray, boundaries: Sequence[int]) -> float:
    """Return the cost of a segmentation over that of one segment; 1 where all layers are equal."""
    total = _cost(embedding, ())
    alike = total <= _ROUNDING * (embedding**2).sum()
    return 1.0 if alike else _cost(embedding, boundaries) / total


def _rank(gram: np.ndarray, segmentations: np.ndarray, cost: float) -> float:
    """Return the share of segmentations whose cost is at most `cost`."""
    return float((_costs(gram, segmentations) <= cost + _ROUNDING * np.trace(gram)).mean())


def _meets(boundary: int, others: Sequence[int]) -> bool:
    """Return True if one of the others lies within NEAR layers of the boundary."""
    return any(abs(boundary - other) <= NEAR for other in others)


def _agreements(declared: Sequence[int], segmentations: np.ndarray) -> np.ndarray:
    """Return for each segmentation the share of the declared boundaries that it meets."""
    near = np.abs(segmentations[:, None, :] - np.array(declared)[None, :, None]) <= NEAR
    return np.asarray(near.any(axis=2).mean(axis=1))


def _same_lengths(declared: tuple[int, ...], layers: int, generator: np.random.Generator) -> np.ndarray:
    """Return the segmentations with the declared lengths in any order: all, or the declared one and a sample."""
    lengths = [end - first for first, end in pairwise((0, *declared, layers))]
    if _distinct_orders(lengths) <= SEGMENTATIONS:
        permuted = np.array(list(_orders(lengths)))
    else:
        shuffled = generator.permuted(np.tile(lengths, (SEGMENTATIONS - 1, 1)), axis=1)
        permuted = np.concatenate([[lengths], shuffled])
    return np.asarray(permuted[:, :-1].cumsum(axis=1))


def _distinct_orders(lengths: Sequence[int]) -> int:
    """Return the number of distinct orders of the lengths."""
    orders = math.factorial(len(lengths))
    for length in set(lengths):
        orders //= math.factorial(lengths.count(length))
    return orders


def order_count(lengths: Sequence[int]) -> int:
    """Return how many orders of segments of these lengths are ranked: all, or a sample.

    Example:
        >>> order_count([2, 2, 3]), order_count(range(1, 10))
        (3, 10000)
    """
    return min(SEGMENTATIONS, _distinct_orders(lengths))


def _orders(lengths: list[int]) -> Iterator[list[int]]:
    """Yield every distinct order of the lengths."""
    if not lengths:
        yield []
    for length in set(lengths):
        rest = lengths.copy()
        rest.remove(length)
        for order in _orders(rest):
            yield [length, *order]


def _same_number(declared: tuple[int, ...], layers: int, generator: np.random.Generator) -> np.ndarray:
    """Return the segmentations with the declared number of segments: all, or the declared one and a uniform sample."""
    if math.comb(layers - 1, len(declared)) <= SEGMENTATIONS:
        return np.array(list(combinations(range(1, layers), len(declared))))
    keys = generator.random((SEGMENTATIONS - 1, layers - 1))
    sample = 1 + np.sort(np.argsort(keys, axis=1)[:, : len(declared)], axis=1)
    return np.concatenate([[declared], sample])


def _chosen(embedding: np.ndarray) -> tuple[int, ...] | None:
    """Return the segmentation of least penalised cost (see `find_boundaries`); None with fewer than 8 layers."""
    layers = len(embedding)
    most = int(layers * LARGEST_SHARE)
    if most < 4:
        return None
    path = [(), *(_best(embedding, count) for count in range(1, most))]
    costs = np.array([_cost(embedding, cuts) for cuts in path])
    segments = np.arange(1, most + 1)
    shape = segments * (2.0 * np.log(layers / segments) + 5.0)
    large = segments >= SLOPE_FROM * most
    slope = -np.polyfit(shape[large], costs[large], 1)[0]
    penalised = costs + 2.0 * max(0.0, float(slope)) * shape
    equal = penalised.min() + _ROUNDING * (embedding**2).sum()
    best = int(np.argmax(penalised <= equal))  # the fewest segments of equal cost
    return path[best]


# --- the smooth-drift null -------------------------------------------------------------------------------------


def against_smooth_drift(
    similarity: Float64[np.ndarray, "layers layers"], boundaries: int, draws: int = DRAWS
) -> tuple[float, float, list[float]]:
    """Return the p-value of the data's phases against smooth drift, its degrees of freedom, and the drifts' statistics.

    The statistic is the least cost with this number of boundaries over the cost of one segment. With it,
    p = (1 + number of drifts whose statistic is at most the data's) / (draws + 1), so p >= 1 / (draws + 1).

    A drift is a unit vector y_L that follows a Gaussian process over depth; its similarity is (y_L . y_M)^2, scaled to
    the norms of the data's layers. The kernel depends on |L - M| alone, and is chosen so that the drift's similarity
    has the mean of the data's at each distance.

    With many degrees of freedom such a drift is even: every step turns it equally far. With few it is uneven. They are
    chosen so that the drift's similarity departs from its mean at each distance as far as the data's does. A null of
    even steps would call every uneven drift a phase; under this null, phases must be sharper than unevenness in random
    places.
    """
    generator = np.random.default_rng(SEED)
    embedding = embedding_of(similarity)
    observed = _share(embedding, _best(embedding, boundaries))
    if observed == 1.0:  # all layers are equal, so no boundary reduces the cost
        return 1.0, MOST_DIMENSIONS, [1.0] * draws
    norms = np.linalg.norm(embedding, axis=1)
    unit = embedding / np.maximum(norms, np.finfo(np.float64).tiny)[:, None]
    means, departure = _by_lag(unit @ unit.T)
    factor = embedding_of(np.sqrt(np.maximum(means, 0.0)))
    factor /= np.linalg.norm(factor, axis=1)[:, None]
    dimensions = matching_dimensions(
        departure, lambda freedom: [_by_lag(_drift(factor, freedom, generator))[1] for _ in range(PILOT)], steps=5
    )
    scale, drawn = np.outer(norms, norms), list[float]()
    for first in range(0, draws, _AT_ONCE):
        count = min(_AT_ONCE, draws - first)
        drifts = np.array([_drift(factor, dimensions, generator) for _ in range(count)])
        drawn += _best_shares(scale * drifts, boundaries).tolist()
    return _drift_p(observed, drawn), dimensions, drawn


def _drift_p(observed: float, drawn: Sequence[float]) -> float:
    """Return the p-value of a statistic among those of drifts, where small ones are extreme."""
    return (1 + sum(share <= observed + _ROUNDING for share in drawn)) / (len(drawn) + 1)


_AT_ONCE = 100
"""Drifts whose segmentations are searched at a time."""


def _by_lag(correlation: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the matrix of the means over each diagonal, and the mean squared departure from it."""
    lags = np.abs(np.subtract.outer(np.arange(len(correlation)), np.arange(len(correlation))))
    means = np.bincount(lags.ravel(), correlation.ravel()) / np.bincount(lags.ravel())
    return means[lags], float(((correlation - means[lags]) ** 2).mean())


def drift_cosines(
    factor: Float64[np.ndarray, "layers layers"], dimensions: float, generator: np.random.Generator, draws: int
) -> Float64[np.ndarray, "draws layers layers"]:
    """Draw y_L . y_M of unit vectors y_L that follow a Gaussian process with the kernel factor factor^T."""
    layers = len(factor)
    if dimensions < layers:
        noise = generator.standard_normal((draws, layers, round(dimensions)))
    else:  # Bartlett's triangle has the inner products of this many columns, and nothing else is needed
        noise = np.tril(generator.standard_normal((draws, layers, layers)), k=-1)
        diagonal = np.arange(layers)
        noise[:, diagonal, diagonal] = np.sqrt(generator.chisquare(dimensions - diagonal, size=(draws, layers)))
    rows = factor @ noise
    rows /= np.linalg.norm(rows, axis=2, keepdims=True)
    return np.asarray(rows @ rows.transpose(0, 2, 1))


def _drift(factor: np.ndarray, dimensions: float, generator: np.random.Generator) -> np.ndarray:
    """Draw (y_L . y_M)^2 of one drift."""
    return np.asarray(drift_cosines(factor, dimensions, generator, 1)[0] ** 2)


def matching_dimensions(departure: float, departures: Callable[[float], Sequence[float]], steps: int) -> float:
    """Return the degrees of freedom, 2 to 10^6, at which drifts depart from their diagonal means as far as the data do.

    departure: the data's. departures: returns those of drifts that are drawn with some degrees of freedom. They are
    variances, so they fall nearly as one over the degrees of freedom; a few steps of that rule suffice.
    """
    dimensions = 100.0
    for _ in range(steps):
        drawn = float(np.mean(departures(dimensions)))
        dimensions = min(max(dimensions * drawn / max(departure, drawn / MOST_DIMENSIONS), 2.0), MOST_DIMENSIONS)
    return dimensions
