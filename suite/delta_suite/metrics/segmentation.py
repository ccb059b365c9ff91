"""Phase boundaries detected in the layers' similarity, and what the declared ones are worth beside them.

The similarity S[L, M] = ||U_L U_M^T||_F^2 / k is the inner product of two projectors, tr(P_L P_M) / k: a kernel between
layers. Kernel change-point detection (Arlot, Celisse & Harchaoui 2019) cuts the depth into segments of small scatter

    cost = sum over segments of [ sum_L S[L, L] - (1 / length) sum_{L, M} S[L, M] ],

which is the squared distance of the layers from their segment's mean, in an embedding whose inner products are S.

A segmentation of N layers is written as its boundaries: the first layer of every segment but the first, ascending.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
from jaxtyping import Float64, Int64

NEAR = 1
"""Layers that two boundaries may lie apart and still be the same one."""

DRAWS = 999
"""Draws of the smooth-drift null: its p-value cannot go below 1 / (DRAWS + 1) = 0.001."""

SEGMENTATIONS = 10_000
"""At most so many segmentations are ranked: all where there are no more, else the declared one and a seeded sample."""

FEWEST_ORDERS = 20
"""With fewer orders of the segments the declared one cannot be among the best 5%, and is not ranked."""

SEED = 20190612
"""Seed of every random choice here, so that a stored record gives the same numbers again."""

LARGEST_SHARE = 0.5
"""Segmentations of up to this share of the layers are formed when the number of segments is chosen."""

SLOPE_FROM = 0.6
"""The penalty's slope is fitted from this share of them on (Arlot, Celisse & Harchaoui 2019, section 6)."""

PILOT = 40
"""Draws that one step of matching the null's irregularity takes."""

MOST_DIMENSIONS = 1e6
"""Above, a draw is the mean kernel itself to three digits."""


@dataclass(frozen=True)
class Boundaries:
    """A comparison of a declared segmentation with the similarity of the layers."""

    layers: int
    declared: tuple[int, ...]
    detected: tuple[int, ...]
    """The segmentation of least cost with the declared number of segments."""
    chosen: tuple[int, ...] | None
    """The boundaries of a number of segments chosen by penalty; None with fewer than 8 layers."""
    recurrence: tuple[float, ...] | None
    """For each detected boundary, the share of the replicates that find it again within one layer."""
    replicates: int
    declared_cost: float
    detected_cost: float
    total_cost: float
    """Cost of one segment over all layers."""
    orders: int
    """Segmentations with the declared lengths, in any order, that were ranked; the declared one is among them."""
    cost_rank: float | None
    """Share of these whose cost is no larger than the declared one's; None with fewer than 20 orders."""
    others: int
    """Segmentations with the declared number of segments that were ranked, the declared one among them."""
    cost_rank_any_lengths: float
    """Share of these whose cost is no larger than the declared one's."""
    agreement: float
    """Share of the declared boundaries that a detected one meets within one layer."""
    chance_agreement: float
    """The mean of the same over the segmentations of `others`: what detected boundaries would meet by chance."""
    p: float
    """Quantile of `detected_cost / total_cost` under smooth drift; at least 1 / (draws + 1)."""
    draws: int
    drift_dimensions: float
    """Degrees of freedom of the drift: the smaller, the more irregular."""


def segments_of(phases: Mapping[str, tuple[int, int]], layers: int) -> tuple[int, ...]:
    """The boundaries of a phase map; a run of layers that belongs to no phase is a segment of its own."""
    starts = {first for first, _ in phases.values()} | {last + 1 for _, last in phases.values()}
    return tuple(sorted(starts - {0, layers}))


def find_boundaries(
    similarity: Float64[np.ndarray, "layers layers"],
    declared: Sequence[int],
    replicates: Float64[np.ndarray, "groups layers layers"] | None = None,
    draws: int = DRAWS,
) -> Boundaries:
    """Detect boundaries in a similarity matrix, rank the declared ones, and test the structure against smooth drift.

    similarity: symmetric; its negative eigenvalues, which cross-fitting leaves, count as 0. replicates: the same
    measured without each group of documents in turn.

    The number of segments is chosen by the least cost + 2 C D (2 ln(N / D) + 5) over D = 1 .. N / 2 segments, where C
    is the slope of the least cost against that shape over the largest 40% of D (the shape: Lebarbier 2005; twice the
    slope: Birgé & Massart 2007).

    Raises ValueError unless there are 2 to N - 1 declared segments, with boundaries from 1 to N - 1, ascending.
    """
    layers = len(similarity)
    cuts = tuple(int(boundary) for boundary in declared)
    if not 1 <= len(cuts) <= layers - 2:
        raise ValueError(f"{len(cuts) + 1} segments of {layers} layers leave nothing to find")
    if list(cuts) != sorted(set(cuts)) or cuts[0] < 1 or cuts[-1] >= layers:
        raise ValueError(f"boundaries {list(cuts)} do not ascend from 1 to {layers - 1}")
    embedding = _embedding(similarity)
    gram = embedding @ embedding.T
    detected = _best(embedding, len(cuts))
    declared_cost = _cost(embedding, cuts)
    generator = np.random.default_rng(SEED)
    orders = _same_lengths(cuts, layers, generator)
    others = _same_number(cuts, layers, generator)
    recurrence = None
    if replicates is not None:
        again = [_best(_embedding(replicate), len(cuts)) for replicate in replicates]
        recurrence = tuple(
            float(np.mean([_meets(boundary, boundaries) for boundaries in again])) for boundary in detected
        )
    p, dimensions = against_smooth_drift(similarity, len(cuts), draws)
    return Boundaries(
        layers=layers,
        declared=cuts,
        detected=detected,
        chosen=_chosen(embedding),
        recurrence=recurrence,
        replicates=0 if replicates is None else len(replicates),
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
    )


# --- segmentations ---------------------------------------------------------------------------------------------

_ROUNDING = 1e-9
"""Costs closer than this share of the whole are the same."""


def _embedding(similarity: np.ndarray) -> np.ndarray:
    """One row per layer, whose inner products are the nearest positive semidefinite matrix."""
    values, vectors = np.linalg.eigh((similarity + similarity.T) / 2)
    return np.asarray(vectors * np.sqrt(np.maximum(values, 0.0)))


def _best(embedding: np.ndarray, boundaries: int) -> tuple[int, ...]:
    """The segmentation of least cost with so many boundaries."""
    import ruptures  # a second, as it takes scipy.stats with it, and only a claim about boundaries needs it

    search = ruptures.KernelCPD(kernel="linear", min_size=1).fit(embedding)
    return tuple(search.predict(n_bkps=boundaries)[:-1])


def _cost(embedding: np.ndarray, boundaries: Sequence[int]) -> float:
    """The cost of one segmentation: squared distances from the segments' means."""
    first = np.array([0, *boundaries])
    lengths = np.diff([*first, len(embedding)])
    sums = np.add.reduceat(embedding, first, axis=0)
    return float((embedding**2).sum() - ((sums**2).sum(axis=1) / lengths).sum())


def _costs(
    gram: Float64[np.ndarray, "layers layers"], boundaries: Int64[np.ndarray, "segmentations boundaries"]
) -> Float64[np.ndarray, " segmentations"]:
    """The cost of each segmentation, one in a row."""
    layers = len(gram)
    sums = np.zeros((layers + 1, layers + 1))
    sums[1:, 1:] = gram.cumsum(axis=0).cumsum(axis=1)
    edges = np.pad(boundaries, ((0, 0), (1, 1)), constant_values=((0, 0), (0, layers)))
    first, end = edges[:, :-1], edges[:, 1:]
    within = sums[end, end] - sums[first, end] - sums[end, first] + sums[first, first]
    return np.asarray(np.trace(gram) - (within / (end - first)).sum(axis=1))


def _best_share(embedding: np.ndarray, boundaries: int) -> float:
    """The least cost with so many boundaries over that of one segment; 1 where all layers are alike."""
    total = _cost(embedding, ())
    alike = total <= _ROUNDING * (embedding**2).sum()
    return 1.0 if alike else _cost(embedding, _best(embedding, boundaries)) / total


def _rank(gram: np.ndarray, segmentations: np.ndarray, cost: float) -> float:
    return float((_costs(gram, segmentations) <= cost + _ROUNDING * np.trace(gram)).mean())


def _meets(boundary: int, others: Sequence[int]) -> bool:
    return any(abs(boundary - other) <= NEAR for other in others)


def _agreements(declared: Sequence[int], segmentations: np.ndarray) -> np.ndarray:
    """For each segmentation the share of the declared boundaries that it meets."""
    near = np.abs(segmentations[:, None, :] - np.array(declared)[None, :, None]) <= NEAR
    return np.asarray(near.any(axis=2).mean(axis=1))


def _same_lengths(declared: tuple[int, ...], layers: int, generator: np.random.Generator) -> np.ndarray:
    """Segmentations with the declared lengths in any order: all, or the declared one and a sample."""
    lengths = [end - first for first, end in pairwise((0, *declared, layers))]
    orders = math.factorial(len(lengths))
    for length in set(lengths):
        orders //= math.factorial(lengths.count(length))
    if orders <= SEGMENTATIONS:
        permuted = np.array(list(_orders(lengths)))
    else:
        shuffled = generator.permuted(np.tile(lengths, (SEGMENTATIONS - 1, 1)), axis=1)
        permuted = np.concatenate([[lengths], shuffled])
    return np.asarray(permuted[:, :-1].cumsum(axis=1))


def _orders(lengths: list[int]) -> Iterator[list[int]]:
    """Every distinct order."""
    if not lengths:
        yield []
    for length in set(lengths):
        rest = lengths.copy()
        rest.remove(length)
        for order in _orders(rest):
            yield [length, *order]


def _same_number(declared: tuple[int, ...], layers: int, generator: np.random.Generator) -> np.ndarray:
    """Segmentations with the declared number of segments: all, or the declared one and a sample, each as likely."""
    if math.comb(layers - 1, len(declared)) <= SEGMENTATIONS:
        return np.array(list(combinations(range(1, layers), len(declared))))
    keys = generator.random((SEGMENTATIONS - 1, layers - 1))
    sample = 1 + np.sort(np.argsort(keys, axis=1)[:, : len(declared)], axis=1)
    return np.concatenate([[declared], sample])


def _chosen(embedding: np.ndarray) -> tuple[int, ...] | None:
    """The segmentation of least penalised cost, see `find_boundaries`."""
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
    best = int(np.argmax(penalised <= equal))  # the fewest segments
    return path[best]


# --- the smooth-drift null -------------------------------------------------------------------------------------


def against_smooth_drift(
    similarity: Float64[np.ndarray, "layers layers"], boundaries: int, draws: int = DRAWS
) -> tuple[float, float]:
    """p-value of the least cost with so many boundaries, over that of one segment; and the drift's dimensions.

    p = (1 + draws of a drift without phases whose share is no larger) / (draws + 1), so never below 1 / (draws + 1).

    A drift is a direction y_L that is a Gaussian process over depth, and its similarity that of the projectors on it,
    (y_L . y_M)^2. Its kernel depends on |L - M| alone, so that this is the mean over each diagonal of the data's
    similarity; both are scaled to the norms of the data's layers. In many dimensions such a drift is even (each step
    turns it as far as any other), in few it is uneven, so the dimensions are chosen for it to depart from its own
    diagonals' means as far as the data do. Even steps alone would call every uneven drift a phase; matched so, the
    null spends the data's own unevenness on steps in no order, and phases must be sharper than that.
    """
    generator = np.random.default_rng(SEED)
    embedding = _embedding(similarity)
    observed = _best_share(embedding, boundaries)
    if observed == 1.0:  # all layers are alike: no cut gains anything
        return 1.0, MOST_DIMENSIONS
    norms = np.linalg.norm(embedding, axis=1)
    unit = embedding / np.maximum(norms, np.finfo(np.float64).tiny)[:, None]
    means, departure = _by_lag(unit @ unit.T)
    factor = _embedding(np.sqrt(np.maximum(means, 0.0)))
    factor /= np.linalg.norm(factor, axis=1)[:, None]
    dimensions = _matching_dimensions(factor, departure, generator)
    no_larger = 0
    for _ in range(draws):
        gram = np.outer(norms, norms) * _drift(factor, dimensions, generator)
        rows = np.linalg.cholesky(gram + _JITTER * gram.trace() * np.eye(len(gram)))
        no_larger += _best_share(rows, boundaries) <= observed + _ROUNDING
    return (1 + no_larger) / (draws + 1), dimensions


_JITTER = 1e-12
"""Share of the trace that lets a singular Gram be factored; far below what costs are compared to."""


def _by_lag(correlation: np.ndarray) -> tuple[np.ndarray, float]:
    """The mean over each diagonal, as a matrix, and the mean squared departure from it."""
    lags = np.abs(np.subtract.outer(np.arange(len(correlation)), np.arange(len(correlation))))
    means = np.bincount(lags.ravel(), correlation.ravel()) / np.bincount(lags.ravel())
    return means[lags], float(((correlation - means[lags]) ** 2).mean())


def _drift(factor: np.ndarray, dimensions: float, generator: np.random.Generator) -> np.ndarray:
    """(y_L . y_M)^2 of unit vectors y, one a layer: a Gaussian process with the kernel factor factor^T."""
    layers = len(factor)
    if dimensions < layers:
        noise = generator.standard_normal((layers, round(dimensions)))
    else:  # only inner products count, and Bartlett's triangle has those of any number of columns
        noise = np.tril(generator.standard_normal((layers, layers)), k=-1)
        np.fill_diagonal(noise, np.sqrt(generator.chisquare(dimensions - np.arange(layers))))
    rows = factor @ noise
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    return np.asarray((rows @ rows.T) ** 2)


def _matching_dimensions(factor: np.ndarray, departure: float, generator: np.random.Generator) -> float:
    """The degrees of freedom at which drifts depart from their diagonals' means as far as the data do; 2 to 10^6.

    The departure is a variance, so it falls as one over the dimensions, nearly: a few steps of that rule settle it.
    """
    dimensions = 100.0
    for _ in range(5):
        drawn = float(np.mean([_by_lag(_drift(factor, dimensions, generator))[1] for _ in range(PILOT)]))
        dimensions = min(max(dimensions * drawn / max(departure, drawn / MOST_DIMENSIONS), 2.0), MOST_DIMENSIONS)
    return dimensions
