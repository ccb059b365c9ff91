"""The updates of one layer by group of units: what an eigenproblem needs, and what deleting a group changes.

Units (capture/units.py) are what is resampled: tokens of one document are no independent draws, and where domains are
declared, documents of one domain are none either. Group g lies in half a where g is even, in half b where it is odd; a
`side` is one of the halves, 0 or 1, or None for everything.

Write S for the second moment of the updates, the sum of delta delta^T over tokens, and E_g for what deleting group g
takes from it: without that group the second moment is S - E_g. Where the variant is centred, S is taken about the mean
of its tokens, and E_g holds one rank-one term more, because the tokens that stay are centred on their own mean.

`GroupedRows` (grouped_rows.py) keeps the updates themselves; `GroupedMoments` (grouped_moments.py) keeps their moments,
where the stream comes in several shards. Both have the same interface, `Groups`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from delta_suite.reduction.eigen import Eigen
from delta_suite.reduction.gram import Spectrum

LEADING = 64
"""Number of leading directions of S in whose span the directions of S - E_g are sought first."""


@dataclass(frozen=True)
class GroupSums:
    """Sums over the tokens of each group."""

    tokens: list[int]
    """Number of tokens of each group."""
    sums: Float64[Tensor, "groups quantities"]
    """Sums of the token quantities (`moments.TOKEN_QUANTITIES`)."""
    squares: Float64[Tensor, "groups quantities"]
    """Sums of their squares."""
    totals: Float64[Tensor, "groups hidden"]
    """Summed updates."""


@dataclass(frozen=True)
class Removals:
    """Parts of the second moment that deleting each group takes, in a basis of r directions v_i."""

    energies: Float64[Tensor, "groups r"]
    """v_i^T E_g v_i."""
    blocks: Float64[Tensor, "groups m m"]
    """V E_g V^T of the first LEADING directions V."""
    pairs: Float64[Tensor, "groups 3"]
    """tr G_g, tr G_g S and tr G_g G_g, where G_g is the Gram matrix of the group, about the mean of the side where the
    variant is centred; only of groups of units, and of everything."""
    borders: Float32[Tensor, "groups m rest"] | None = None
    """V E_g R^T, R the directions that are not leading; only of everything."""
    shifts: Float32[Tensor, "groups rest"] | None = None
    """Shifts of their eigenvalues by each other (`mixing`); only of groups of units, and of everything."""


NO_GAP = 1e-15
"""Half gap of equal eigenvalues."""

MIXED_BLOCKS = 4
"""Fewest blocks of rows in which a symmetric matrix is mixed: with four of them 3/8 of its entries are left out."""

MIXED_AT_ONCE = 1 << 22
"""Most entries of a large matrix that are mixed at a time: they and two copies stay in the cache of a GPU."""


def mixing(
    removed: Float[Tensor, "... one other"], halves: Float[Tensor, "... one other"]
) -> Float[Tensor, "... one other"]:
    """Return by how much each pair of directions i, j moves apart, where E_ij is removed: +- this for lambda_i and _j.

    To second order it is E_ij^2 / (lambda_i - lambda_j). Where the two are nearly equal it is what the 2 x 2 problem
    gives, sqrt(h^2 + E_ij^2) - |h| with h half their gap, which agrees where they are not, and never exceeds E_ij. So
    the eigenvalues keep their sum, and sums of smooth functions of them are right to second order. An infinite gap, as
    that of a direction to itself, moves nothing. halves: half of each gap, none of them zero (`half_gaps`).

    Example:
        >>> mixing(torch.tensor([[3.0]]), torch.tensor([[4.0]])).tolist()
        [[1.0]]
    """
    square = removed.square()
    reach = torch.addcmul(square, halves, halves).sqrt_().copysign_(halves).add_(halves)
    return square.div_(reach)


def half_gaps(one: Float64[Tensor, "... one"], other: Float64[Tensor, "... other"]) -> Float32[Tensor, "... one other"]:
    """Return half of lambda_i - lambda_j; next to nothing where that is zero, so that it can be divided by."""
    halves = (one[..., :, None] - other[..., None, :]).mul_(0.5).float()
    return halves.masked_fill_(halves == 0, NO_GAP)


def half_gaps_of(values: Float64[Tensor, " rank"]) -> Float32[Tensor, "rank rank"]:
    """Return half the gaps of descending eigenvalues to later ones; infinity to earlier ones and of each to itself."""
    halves = half_gaps(values, values)
    return halves.masked_fill_(torch.ones_like(halves, dtype=torch.bool).tril_(), torch.inf)


def upper_blocks(size: int) -> list[tuple[int, int]]:
    """Return the first row of each block in which a symmetric matrix is mixed, and the one after its last."""
    rows = max(1, min(-(-size // MIXED_BLOCKS), MIXED_AT_ONCE // max(1, size)))
    return [(start, min(start + rows, size)) for start in range(0, size, rows)]


def mixed(removed: Float[Tensor, "*batch r r"], halves: Float[Tensor, "r r"]) -> Float[Tensor, "*batch r"]:
    """Return the sum of `mixing` over the rows of symmetric matrices, from their upper parts alone.

    What pushes one of two directions up pushes the other down. What lies left of the `upper_blocks` is not read.
    halves: `half_gaps_of` the directions.

    Example:
        >>> mixed(torch.tensor([[0.0, 3.0], [3.0, 0.0]]), half_gaps_of(torch.tensor([8.0, 0.0]))).tolist()
        [1.0, -1.0]
    """
    out = removed.new_zeros(removed.shape[:-1])
    for start, stop in upper_blocks(removed.shape[-1]):
        moved = mixing(removed[..., start:stop, start:], halves[start:stop, start:])
        out[..., start:stop] += moved.sum(dim=-1)
        out[..., start:] -= moved.sum(dim=-2)
    return out


class Groups(ABC):
    """The updates of one layer in one variant, by group of units."""

    def __init__(self, sums: GroupSums, centre: bool) -> None:
        """Take the sums of each group, and whether the variant takes rows less their mean."""
        self.tokens, self.totals, self.centre = sums.tokens, sums.totals, centre
        self.hidden = int(self.totals.shape[1])
        self._means: dict[int | None, Tensor] = {}
        # Everything that statistics need goes to the host in one copy: asked one by one, a GPU would stop for each.
        parts = [sums.sums, sums.squares, self.totals @ self.totals.T]
        packed = torch.cat([part.to(self.totals.device) for part in parts], dim=1).cpu().numpy()
        ends = np.cumsum([part.shape[1] for part in parts])
        self.sums, self.squares, self.products = np.split(packed, ends[:-1], axis=1)
        """`products`: inner products of the groups' summed updates, (groups, groups)."""

    def within(self, side: int | None) -> list[int]:
        """Return the groups of a side."""
        return list(range(len(self.tokens)) if side is None else range(side, len(self.tokens), 2))

    def count(self, side: int | None) -> int:
        """Return the number of tokens of a side."""
        return sum(self.tokens[g] for g in self.within(side))

    def mean(self, side: int | None) -> Float64[Tensor, " hidden"]:
        """Return the mean update of a side."""
        if side not in self._means:
            self._means[side] = self.totals[self.within(side)].sum(dim=0) / max(1, self.count(side))
        return self._means[side]

    def centred_totals(self) -> Float64[Tensor, "groups hidden"]:
        """Return the summed updates of each group about the mean of all."""
        counts = torch.tensor(self.tokens, dtype=torch.float64, device=self.totals.device)
        return self.totals - torch.outer(counts, self.mean(None))

    @abstractmethod
    def matrix(self, side: int | None) -> Float64[Tensor, "n n"]:
        """Return the matrix whose eigenpairs give the spectrum of a side.

        Where the variant is centred it is taken about the mean of the side. The caller may overwrite it.
        """

    @abstractmethod
    def through(self) -> Float64[Tensor, "groups 4"]:
        """Return what `disjoint.centred_pairs` takes of each group, about the mean of all."""

    @abstractmethod
    def size(self, side: int | None) -> int:
        """Return n, the size of the matrix of a side."""

    @abstractmethod
    def spectrum(self, side: int | None, eigen: Eigen, k: int) -> Spectrum:
        """Return the spectrum of a side, with k directions, from the eigenpairs of its matrix."""

    @abstractmethod
    def removals(self, side: int | None, spectrum: Spectrum) -> Removals:
        """Return what deleting each group of a side takes from its second moment, in the spectrum's directions."""

    @abstractmethod
    def times(self, side: int | None, vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        """Return S, the second moment of a side, times vectors."""

    @abstractmethod
    def removed_times(
        self, group: int, side: int | None, vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """Return E_g, what deleting `group` takes from the second moment of a side, times vectors."""
