"""Metrics of directions: of one layer, of a pair of layers, and of a phase.

Notation. v_L is the top right singular vector of layer L's update; k = 8 directions are kept per layer; a and b are the
two halves of the units (capture/units.py): of the domains where they are declared, else of the documents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from delta_suite.metrics.definition import metric
from delta_suite.metrics.direction_gram import NO_DIRECTION, DirectionGram, among, upper_pairs
from delta_suite.metrics.estimate import ONE_DOCUMENT, Estimate, absent
from delta_suite.metrics.layer import spectral_entropy_rank
from delta_suite.reduction.statistics import TOP_K

DISATTENUATION_FLOOR = 0.6
"""A cosine is corrected for attenuation only where both reliabilities exceed this: below, the correction is noise."""

HALF_WITHOUT_UPDATE = "one half of the units leaves layer {} without an update, so it has no direction there"
"""The reason of a metric that compares the halves, with the number of the layer."""

PRODUCTS_NEEDED = "the inner products of all 8 directions are not at hand"
"""The reason of an absent subspace metric: a record stores the cosines of the top directions alone."""

NEEDS_PRODUCTS = ("capture_fraction", "capture_fraction_held_out", "shared_fraction")
"""Metrics of the stacked top-8 directions of a phase; a record keeps their replicates for its own phases."""


@metric(
    "layer",
    "r_L = |v_L^a . v_L^b|, v_L fitted on halves a and b of the units",
    takes="directions",
    high=1.0,
    source="split-half reliability; below 0.9 a layer has no direction to speak of",
    bias="none",
)
def reliability(gram: DirectionGram, layer: int) -> Estimate:
    """Return how well the two halves agree on a layer's direction; absent with one document."""
    if gram.cross is None:
        return absent(ONE_DOCUMENT)
    if gram.without_half([layer]):
        return absent(HALF_WITHOUT_UPDATE.format(layer))
    return Estimate(value=min(1.0, float(gram.cross[layer, layer])))


# --- two layers ------------------------------------------------------------------------------------------------


@metric(
    "pair", "|v_L . v_{L+1}|", takes="directions", high=1.0, adjacent=True, source="reference script: top1_cos_adjacent"
)
def adjacent_cosine(gram: DirectionGram, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the absolute cosine of the directions of each pair of layers, one per pair."""
    return np.asarray(np.minimum(1.0, np.abs(gram.cosines[first, second])))


@metric(
    "pair",
    "||U_L U_M^T||_F^2 / k over the top k = 8 directions",
    takes="directions",
    high=1.0,
    source="Björck & Golub 1973",
    version=2,
    bias="none",
)
def subspace_overlap(gram: DirectionGram, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the overlap of the top-8 subspaces of each pair of layers, one per pair."""
    assert gram.overlaps is not None
    return np.asarray(gram.overlaps[first, second])


@metric(
    "pair",
    "mean of the k = 8 principal angles arccos sigma_i(U_L U_M^T)",
    takes="directions",
    unit="radians",
    high=math.pi / 2,
    source="Björck & Golub 1973",
    version=2,
    bias="none",
)
def principal_angle(gram: DirectionGram, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the mean principal angle of the top-8 subspaces of each pair of layers, one per pair."""
    assert gram.angles is not None
    return np.asarray(gram.angles[first, second])


# --- a phase ---------------------------------------------------------------------------------------------------


@metric(
    "phase",
    "mean of |v_L . v_M| over pairs in the phase; 1 for one layer",
    takes="directions",
    high=1.0,
    source="reference script",
)
def intra_cosine(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the mean absolute cosine of the directions of two layers of the phase.

    Example:
        >>> gram = DirectionGram(hidden=2, cosines=np.array([[1.0, -0.6], [-0.6, 1.0]]))
        >>> intra_cosine(gram, [0, 1]).value
        0.6
    """
    if len(layers) == 1:
        return Estimate(value=1.0, per_layer={layers[0]: 1.0})  # the reference's convention
    cosines = np.minimum(np.abs(among(gram.cosines, layers)), 1.0)
    pairs = cosines[upper_pairs(len(layers))]
    with_others = (cosines.sum(axis=1) - np.diag(cosines)) / (len(layers) - 1)
    return Estimate(value=float(pairs.mean()), per_layer=_by_layer(layers, with_others))


@metric(
    "phase",
    "mean over pairs of |v_L^a . v_M^b|, each layer fitted on another half of the units",
    takes="directions",
    high=1.0,
    source="cross-fit: tokens that two layers share cannot make them agree",
    version=2,
    bias="groups",
)
def intra_cosine_cross_fitted(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the mean absolute cosine between layers that are fitted on different halves."""
    if gram.cross is None:
        return absent(ONE_DOCUMENT)
    products = among(gram.cross, layers)
    if len(layers) == 1:
        return absent("one layer has no pairs")
    if missing := gram.without_half(layers):
        return absent(HALF_WITHOUT_UPDATE.format(missing[0]))
    with_others = (products.sum(axis=1) - np.diag(products)) / (len(layers) - 1)
    pairs = products[upper_pairs(len(layers))]
    return Estimate(value=float(pairs.mean()), per_layer=_by_layer(layers, with_others))


@metric(
    "phase",
    "mean over pairs of |v_L^a . v_M^b| / sqrt(r_L r_M), where r_L and r_M exceed 0.6",
    takes="directions",
    source="Spearman 1904, correction for attenuation",
    most=1.0 / DISATTENUATION_FLOOR,
    bias="none",
)
def intra_cosine_disattenuated(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the cross-fitted cosine corrected for the layers' reliabilities; it may exceed 1 by chance."""
    if gram.cross is None:
        return absent(ONE_DOCUMENT)
    products = among(gram.cross, layers)
    reliable = np.diag(products)
    usable = reliable > DISATTENUATION_FLOOR
    if usable.sum() < 2:
        return absent(f"{usable.sum()} of {len(layers)} layers have a reliability above {DISATTENUATION_FLOOR}")
    corrected = products[np.ix_(usable, usable)] / np.sqrt(np.outer(reliable[usable], reliable[usable]))
    with_others = (corrected.sum(axis=1) - 1.0) / (usable.sum() - 1)
    per_layer: dict[int, float | None] = dict.fromkeys(layers)
    per_layer |= _by_layer([layer for layer, used in zip(layers, usable, strict=True) if used], with_others)
    return Estimate(value=float(corrected[upper_pairs(len(corrected))].mean()), per_layer=per_layer)


@metric(
    "phase", "mean of |v_L . v_M|, L in the phase, M outside", takes="directions", high=1.0, source="reference script"
)
def cross_cosine(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the mean absolute cosine between layers of the phase and layers outside it."""
    inside = set(layers)
    others = [layer for layer in range(gram.layers) if layer not in inside]
    if not others:
        return absent("no layer lies outside")
    if missing := gram.without_direction(others):
        return absent(NO_DIRECTION.format(missing[0]))
    cosines = np.minimum(np.abs(gram.cosines[np.ix_(layers, others)]), 1.0)
    return Estimate(value=float(cosines.mean()), per_layer=_by_layer(layers, cosines.mean(axis=1)))


@metric(
    "phase",
    "exp(-sum p_i ln p_i) of the N stacked v_L",
    takes="directions",
    unit="directions",
    low=1.0,
    most="layers",
    per_layer=False,
    source="reference script, docstring: rank of the block",
)
def block_effective_rank(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the effective rank of the stacked directions: the number of directions that the phase uses.

    Example:
        >>> gram = DirectionGram(hidden=4, cosines=np.eye(3))
        >>> round(block_effective_rank(gram, [0, 1, 2]).value, 6)
        3.0
    """
    squared_singular_values = np.linalg.eigvalsh(among(gram.cosines, layers))
    return Estimate(value=spectral_entropy_rank(np.maximum(squared_singular_values, 0.0)))


@metric(
    "phase",
    "block_effective_rank / N",
    takes="directions",
    high=1.0,
    per_layer=False,
    source="block_effective_rank over the number of layers",
)
def block_effective_rank_fraction(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the effective rank of the stacked directions over the number of layers."""
    rank = block_effective_rank(gram, layers).value
    assert rank is not None
    return Estimate(value=min(1.0, rank / len(layers)))


_BISECTIONS = 60
"""Halvings of the interval of equal cosines, after which it is shorter than the spacing of float64."""


_NEAR = 2.0**-44
"""Length of the interval that the halvings begin with where the cosine is nearly known: far above rounding."""


_LAST_STEP = 1e-10
"""Length of Newton's step after which no other is needed: its error is of the order of the square."""


def equal_cosine_of(rank: float, layers: int, near: float | None = None) -> float:
    """Return the cosine c for which `layers` directions of pairwise |cos| c have this effective rank, 0 to 1.

    Such directions have the Gram matrix (1 - c) I + c J, so its eigenvalues over N are (1 + (N - 1) c) / N once and
    (1 - c) / N otherwise, and the exponential of their entropy falls from N at c = 0 to 1 at c = 1.

    Example:
        >>> round(equal_cosine_of(0.35 * 22, 22), 3), round(equal_cosine_of(0.8 * 12, 12), 3)
        (0.534, 0.255)

    near: the cosine but for rounding, from `equal_cosines_near`; the result is the same without it, and takes longer.
    """
    low, high, sought, others, log = 0.0, 1.0, math.log(rank), layers - 1, math.log

    def above(cosine: float) -> bool:
        first, other = (1.0 + others * cosine) / layers, (1.0 - cosine) / layers
        return -first * log(first) - others * (other * log(other) if other > 0.0 else 0.0) > sought

    if near is not None and 0.05 < near < 0.99:  # elsewhere the entropy is flat, and rounding decides earlier
        start = math.floor(near / _NEAR) * _NEAR  # the interval of this length that halving 0 to 1 comes to
        if above(start) and not above(start + _NEAR):
            low, high = start, start + _NEAR
    for _ in range(_BISECTIONS):
        cosine = (low + high) / 2
        if cosine in (low, high):
            break  # no number lies in between
        if above(cosine):
            low = cosine
        else:
            high = cosine
    return (low + high) / 2


def equal_cosines_near(ranks: Float64[np.ndarray, " *cases"], layers: int) -> Float64[np.ndarray, " *cases"]:
    """Return `equal_cosine_of` of many ranks at once, but for rounding: by Newton's steps, or halvings."""
    sought = np.log(ranks)
    low, high = np.zeros_like(ranks), np.ones_like(ranks)
    cosines = np.full_like(ranks, 0.5)
    for _ in range(_BISECTIONS):
        first, other = (1.0 + (layers - 1) * cosines) / layers, (1.0 - cosines) / layers
        logs = np.log(first), np.log(np.where(other > 0, other, 1.0))
        excess = -first * logs[0] - (layers - 1) * other * logs[1] - sought
        low, high = np.where(excess > 0, cosines, low), np.where(excess > 0, high, cosines)
        slope = (layers - 1) / layers * (logs[1] - logs[0])
        newton = cosines - excess / np.where(slope < 0, slope, -1.0)
        # The last steps are of the size of rounding, which may put the ends of the interval on one side of the root.
        last = np.abs(newton - cosines) <= _LAST_STEP
        following = np.where(last | ((newton > low) & (newton < high)), newton, (low + high) / 2)
        converged = bool(last.all())
        cosines = following
        if converged:
            break
    return cosines


@metric(
    "phase",
    "the c for which N directions with pairwise |cos| c have the phase's block_effective_rank",
    takes="directions",
    high=1.0,
    per_layer=False,
    source="block_effective_rank, stated so that it means the same for every number of layers",
)
def equal_cosine(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the cosine that equally similar directions would need for the effective rank of the phase's directions.

    Example:
        >>> gram = DirectionGram(hidden=4, cosines=np.array([[1.0, 0.6], [0.6, 1.0]]))
        >>> round(equal_cosine(gram, [0, 1]).value, 6)
        0.6
    """
    if len(layers) == 1:
        return absent("one layer has no pairs")
    rank = block_effective_rank(gram, layers).value
    assert rank is not None
    return Estimate(value=equal_cosine_of(rank, len(layers)))


def _captured(basis: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Return the squared lengths of unit vectors inside the top-k right singular directions of a stack of rows.

    With rows R = U S V^T, `basis` is R R^T, and `products` is R v with one column for each vector v. The projection of
    v on V_i is (U_i . R v) / S_i.
    """
    from scipy.linalg import eigh

    # Solving for the top k alone takes half the time, and there is one problem per layer, half and group.
    size = len(basis)
    values, vectors = eigh(basis, subset_by_index=(max(0, size - TOP_K), size - 1), check_finite=False)
    present = values > size * np.finfo(np.float64).eps * values[-1]
    projections = (vectors[:, present].T @ products) ** 2 / values[present][:, None]
    return np.asarray(np.minimum(projections.sum(axis=0), 1.0))


@metric(
    "phase",
    "mean over L of ||B v_L||^2, B the top 8 right singular directions of the phase's stacked top-8 directions",
    takes="directions",
    high=1.0,
    source="reference script: capture",
    version=2,
    bias="none",
)
def capture_fraction(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the mean squared length of a layer's direction inside the 8 directions that the phase shares best."""
    if len(layers) == 1:
        return absent("one layer spans its own basis")
    if gram.products is None:
        return absent(PRODUCTS_NEEDED)
    stack = _stack(gram.products.whole, layers, layers)
    captured = _captured(stack, stack[:, :: gram.products.whole.shape[1]])
    return Estimate(value=float(captured.mean()), per_layer=_by_layer(layers, captured))


@metric(
    "phase",
    "capture_fraction with B from the other layers of the phase, fitted on the other half of the units",
    takes="directions",
    high=1.0,
    source="capture_fraction, cross-fitted over layers and documents",
    bias="none",
)
def capture_fraction_held_out(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the capture fraction with the basis from other layers and from the other half."""
    if len(layers) == 1:
        return absent("no other layer in the phase to form a basis from")
    if gram.halves is None:
        return absent(ONE_DOCUMENT)
    products = gram.products
    if products is None or products.aa is None or products.ab is None or products.bb is None:
        return absent(PRODUCTS_NEEDED)
    if missing := gram.without_half(layers):
        return absent(HALF_WITHOUT_UPDATE.format(missing[0]))
    captured = []
    for layer in layers:
        others = [other for other in layers if other != layer]
        a_in_b = _captured(_stack(products.bb, others, others), _stack(products.ab, [layer], others)[:1].T)
        b_in_a = _captured(_stack(products.aa, others, others), _stack(products.ab, others, [layer])[:, :1])
        captured.append(float(a_in_b[0] + b_in_a[0]) / 2)
    return Estimate(value=float(np.mean(captured)), per_layer=_by_layer(layers, np.array(captured)))


@metric(
    "phase",
    "largest eigenvalue of (1/N) sum V_L V_L^T; noise edge (1 + sqrt(8 N / d))^2 / N",
    takes="directions",
    high=1.0,
    per_layer=False,
    source="mean projector; Marchenko & Pastur 1967 for the edge",
    version=2,
    bias="none",
)
def shared_fraction(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    """Return the mean squared length of the most shared direction inside the layers' top-8 subspaces, 0 to 1."""
    if gram.products is None:
        return absent(PRODUCTS_NEEDED)
    values = np.linalg.eigvalsh(_stack(gram.products.whole, layers, layers) / len(layers))[::-1][:TOP_K]
    edge = (1.0 + math.sqrt(TOP_K * len(layers) / gram.hidden)) ** 2 / len(layers)
    detail = {"noise_edge": edge, "eigenvalues": np.clip(values, 0.0, 1.0).tolist()}
    return Estimate(value=float(np.clip(values[0], 0.0, 1.0)), detail=detail)


def _stack(gram: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
    """Return the inner products of two sets of layers' directions, (len(rows) k, len(columns) k)."""
    k = gram.shape[1]
    return np.asarray(gram[rows][:, :, columns].reshape(len(rows) * k, len(columns) * k), dtype=np.float64)


def _by_layer(layers: Sequence[int], values: np.ndarray) -> dict[int, float | None]:
    """Return the values by layer."""
    return {layer: float(value) for layer, value in zip(layers, values, strict=True)}
