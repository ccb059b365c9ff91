"""Figures of phases without each group of units in turn, of all groups at once.

Under `core` there are 115 groups, and one by one their figures took most of the time of judging a record. Each value is
that of `directions`, to the last digit: sums run in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Float64

from delta_suite.metrics.direction_gram import GramStack, upper_pairs
from delta_suite.metrics.directions import equal_cosine_of, equal_cosines_near
from delta_suite.metrics.layer import ENTROPY_FLOOR, spectral_entropy_rank

Values = Float64[np.ndarray, " groups"]


def stacked_values(metric: str, stack: GramStack, layers: Sequence[int]) -> Values | None:
    """Return a metric of a phase for each gram of a stack.

    None where it has to be formed gram by gram: for other metrics, and where a layer has no direction in some gram.
    """
    first, last = layers[0], layers[-1]
    diagonals = stack.cosines.diagonal(axis1=1, axis2=2)
    if metric == "intra_cosine" and len(layers) == 1 and (diagonals[:, first] >= 0.5).all():
        return np.ones(len(diagonals))
    if metric not in _VALUES or len(layers) < 2 or last - first + 1 != len(layers) or not (diagonals >= 0.5).all():
        return None
    return _VALUES[metric](stack, slice(first, last + 1))


def mean_over_pairs(
    matrices: Float64[np.ndarray, "groups layers layers"], first: np.ndarray, second: np.ndarray
) -> Values:
    """Return the mean over these pairs of layers of each matrix."""
    return np.asarray(np.ascontiguousarray(matrices[:, first, second]).mean(axis=1))


def _intra(stack: GramStack, inside: slice) -> Values:
    cosines = np.minimum(np.abs(stack.cosines[:, inside, inside]), 1.0)
    return mean_over_pairs(cosines, *upper_pairs(cosines.shape[1]))


def _cross_fitted(stack: GramStack, inside: slice) -> Values | None:
    if stack.cross is None:
        return None
    products = stack.cross[:, inside, inside]
    return mean_over_pairs(products, *upper_pairs(products.shape[1]))


def _cross(stack: GramStack, inside: slice) -> Values | None:
    cosines = np.minimum(np.abs(np.delete(stack.cosines[:, inside], inside, axis=2)), 1.0)
    return np.asarray(cosines.reshape(len(cosines), -1).mean(axis=1)) if cosines.shape[2] else None


def _rank(stack: GramStack, inside: slice) -> Values:
    eigenvalues = np.maximum(np.linalg.eigvalsh(stack.cosines[:, inside, inside]), 0.0)
    p = eigenvalues / eigenvalues.sum(axis=1, keepdims=True)
    if (p > ENTROPY_FLOOR).all():
        return np.asarray(np.exp(-(p * np.log(p)).sum(axis=1)))
    return np.array([spectral_entropy_rank(row) for row in eigenvalues])  # sums of fewer shares run in another order


def _rank_fraction(stack: GramStack, inside: slice) -> Values:
    return np.asarray(np.minimum(1.0, _rank(stack, inside) / (inside.stop - inside.start)))


def _equal(stack: GramStack, inside: slice) -> Values:
    ranks, count = _rank(stack, inside), inside.stop - inside.start
    pairs = zip(ranks.tolist(), equal_cosines_near(ranks, count).tolist(), strict=True)
    return np.array([equal_cosine_of(rank, count, near) for rank, near in pairs])


_VALUES: Mapping[str, Callable[[GramStack, slice], Values | None]] = {
    "intra_cosine": _intra,
    "intra_cosine_cross_fitted": _cross_fitted,
    "cross_cosine": _cross,
    "block_effective_rank": _rank,
    "block_effective_rank_fraction": _rank_fraction,
    "equal_cosine": _equal,
}
