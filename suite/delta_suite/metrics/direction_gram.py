"""Inner products between the leading directions of all layers, the input of every pair and phase metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from jaxtyping import Float, Float32, Float64

NO_DIRECTION = "the update of layer {} is zero, so it has no direction"
"""The reason why figures of directions are absent, with the layer's number."""


@dataclass(frozen=True)
class Products:
    """Inner products of all k directions: `whole[L, i, M, j]` is (direction i of layer L) . (direction j of layer M).

    A layer of rank below k has zeros for the directions it lacks.
    """

    whole: Float[np.ndarray, "layers k layers k"]
    aa: Float[np.ndarray, "layers k layers k"] | None = None
    """Between directions fitted on half a."""
    ab: Float[np.ndarray, "layers k layers k"] | None = None
    """Between directions fitted on half a (rows) and on half b (columns)."""
    bb: Float[np.ndarray, "layers k layers k"] | None = None

    def single(self) -> Products:
        """Return the products in float32: there is a set of them for each group that is left out."""
        return Products(*(None if part is None else part.astype(np.float32) for part in _parts(self)))  # type: ignore[arg-type]


def _parts(products: Products) -> tuple[np.ndarray | None, ...]:
    return products.whole, products.aa, products.ab, products.bb


def inner_products(
    rows: Float[np.ndarray, "layers k hidden"], others: Float[np.ndarray, "layers k hidden"]
) -> Float64[np.ndarray, "layers k layers k"]:
    """Return the inner products of two sets of directions."""
    layers, k, hidden = rows.shape
    one, other = (each.reshape(layers * k, hidden).astype(np.float64) for each in (rows, others))
    return np.asarray((one @ other.T).reshape(layers, k, layers, k))


@dataclass(frozen=True)
class GramStack:
    """Grams without each group in turn, stacked: figures of all of them are formed at once."""

    cosines: Float64[np.ndarray, "groups layers layers"]
    cross: Float64[np.ndarray, "groups layers layers"] | None


@dataclass(frozen=True)
class DirectionGram:
    """The inner products of all layers' directions that pair and phase metrics need, with replicates.

    `products` are large and are kept in the cache alone; everything else is in the arrays beside a record.

    Example:
        >>> gram = DirectionGram.of(np.eye(4)[:2, None])  # two layers, one direction each, four dimensions
        >>> gram.cosines.tolist(), gram.overlaps.tolist()
        ([[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]])
    """

    hidden: int
    cosines: Float64[np.ndarray, "layers layers"]
    """v_L . v_M, signed; the diagonal is 0 for a layer whose update is zero, else 1."""
    overlaps: Float64[np.ndarray, "layers layers"] | None = None
    """||U_L U_M^T||_F^2 / k of the top-k subspaces, 0 to 1."""
    angles: Float64[np.ndarray, "layers layers"] | None = None
    """Mean of the k principal angles between the top-k subspaces, in radians."""
    halves: tuple[DirectionGram, DirectionGram] | None = None
    """The grams of half a and of half b of the units, which hold cosines alone."""
    cross: Float64[np.ndarray, "layers layers"] | None = None
    """|v_L^a . v_M^b|, averaged with the halves exchanged."""
    cross_overlaps: Float64[np.ndarray, "layers layers"] | None = None
    """Overlaps of subspaces fitted on different halves, averaged in the same way."""
    products: Products | None = None
    replicates: Sequence[DirectionGram] = ()
    """The grams without each group of units in turn."""
    documents: Sequence[DirectionGram] = ()
    """The grams without each group of documents in turn, where the unit is the domain."""
    random: Float32[np.ndarray, "draws layers layers"] | None = None
    """Cosines of directions drawn at random with the covariance of each layer's updates."""

    @classmethod
    def of(cls, directions: np.ndarray, halves: tuple[np.ndarray, np.ndarray] | None = None) -> DirectionGram:
        """Return the gram of unit directions (layers, k, hidden), and of those of the two halves if given."""
        hidden = directions.shape[2]
        whole = inner_products(directions, directions)
        if halves is None:
            return cls.from_products(hidden, Products(whole))
        a, b = halves
        products = Products(whole, inner_products(a, a), inner_products(a, b), inner_products(b, b))
        return cls.from_products(hidden, products)

    @classmethod
    def from_products(cls, hidden: int, products: Products) -> DirectionGram:
        """Return the gram with cosines, overlaps and angles computed from the inner products."""
        halves = cross = cross_overlaps = None
        if products.aa is not None and products.ab is not None and products.bb is not None:
            halves = (cls(hidden, products.aa[:, 0, :, 0]), cls(hidden, products.bb[:, 0, :, 0]))
            cross = symmetric(np.minimum(np.abs(products.ab[:, 0, :, 0]), 1.0))
            cross_overlaps = layer_similarity(products.ab)
        whole = products.whole
        return cls(
            hidden,
            whole[:, 0, :, 0],
            np.minimum(layer_similarity(whole), 1.0),
            _mean_angles(whole),
            halves,
            cross,
            cross_overlaps,
            products,
        )

    @property
    def layers(self) -> int:
        """The number of layers."""
        return int(self.cosines.shape[0])

    @cached_property
    def stack(self) -> GramStack | None:
        """The grams without each group of units, and of documents, as stacks; None where there are none, or halves."""
        grams = (*self.replicates, *self.documents)
        if not grams or any(gram.halves is not None for gram in grams):
            return None
        crosses = [gram.cross for gram in grams if gram.cross is not None]
        cross = np.stack(crosses) if len(crosses) == len(grams) else None
        return GramStack(np.stack([gram.cosines for gram in grams]), cross)

    @property
    def similarity(self) -> Float64[np.ndarray, "layers layers"]:
        """The subspace overlaps, between document halves where there are halves, so that shared tokens add nothing.

        Raises ValueError if the gram holds cosines alone.
        """
        similarity = self.overlaps if self.cross_overlaps is None else self.cross_overlaps
        if similarity is None:
            raise ValueError("this gram holds cosines alone")
        return similarity

    def without_direction(self, layers: Sequence[int]) -> list[int]:
        """Return the layers among these whose update is zero, so that v_L does not exist."""
        return [layer for layer in layers if self.cosines[layer, layer] < 0.5]  # 1 or 0, up to rounding

    def without_half(self, layers: Sequence[int]) -> list[int]:
        """Return the layers among these for which one half of the documents gives no direction."""
        return sorted({layer for half in self.halves or () for layer in half.without_direction(layers)})


def layer_similarity(products: Float64[np.ndarray, "layers k layers k"]) -> Float64[np.ndarray, "layers layers"]:
    """Return ||U_L U_M^T||_F^2 / k from inner products of directions, averaged over (L, M) and (M, L); 0 to 1."""
    return symmetric((products**2).sum(axis=(1, 3)) / products.shape[1])


@lru_cache
def upper_pairs(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of both members of each pair among `count` layers, once for the many figures over them.

    Example:
        >>> first, second = upper_pairs(3)
        >>> first.tolist(), second.tolist()
        ([0, 0, 1], [1, 2, 2])
    """
    first, second = np.triu_indices(count, k=1)
    first.flags.writeable = second.flags.writeable = False
    return first, second


def among(matrix: Float64[np.ndarray, "layers layers"], layers: Sequence[int]) -> Float64[np.ndarray, "n n"]:
    """Return the part of a matrix that belongs to these layers: of a contiguous set, without a list of places."""
    first, last = layers[0], layers[-1]
    if last - first + 1 == len(layers):
        return matrix[first : last + 1, first : last + 1].copy()
    return np.asarray(matrix[np.ix_(layers, layers)])


def symmetric(matrix: np.ndarray) -> np.ndarray:
    """Return the mean of a square matrix and its transpose."""
    return np.asarray((matrix + matrix.T) / 2)


def _mean_angles(products: np.ndarray) -> np.ndarray:
    """Return the mean principal angle of each pair of layers, from the singular values of their k x k blocks."""
    layers = len(products)
    first, second = np.triu_indices(layers)
    singular = np.linalg.svd(products[first, :, second, :], compute_uv=False)
    out = np.zeros((layers, layers))
    out[first, second] = out[second, first] = np.arccos(np.minimum(singular, 1.0)).mean(axis=1)
    return out
