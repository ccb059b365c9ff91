"""Maps from a token's own state to its update, fitted on one half of the units to be scored on the other.

- `linear`: ridge regression of delta on h. Its error is that of the map from h to h + delta, too.
- `tokenwise`: ridge regression of delta on x = h / rms(h) and FEATURES random features relu(W x + b): it may bend.

Each has the ridge that is best inside the half that it is fitted on: a quarter of the units fits, another one tests, as
tokens of a text are alike and least squares alone would learn them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor

from delta_suite.reduction.eigen import eigh
from delta_suite.reduction.gram import add_gram, mirror
from delta_suite.reduction.moments import rms
from delta_suite.reduction.state_statistics import LINEAR

FEATURES = 512
"""Random features of the map `tokenwise`. On SmolLM2-135M 1,024 of them gave no more than the linear map."""

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges to choose from, in multiples of the mean variance of the features. The law's, and larger ones: random features
learn a text by heart that a linear map cannot."""

FEWEST = 160
"""Fewest tokens of a half: with fewer, a map says nothing about the stream."""

TINY = 1e-300
"""Smallest variance that a ridge is a multiple of."""


@lru_cache(maxsize=2)
def _weights(hidden: int, count: int) -> tuple[Float64[Tensor, "hidden features"], Float64[Tensor, " features"]]:
    """Return the weights of the random features: the same in each run, and for all layers."""
    draw = np.random.default_rng(0)
    weights = draw.standard_normal((hidden, count)) / hidden**0.5
    return torch.from_numpy(weights), torch.from_numpy(draw.standard_normal(count))


def features(kind: str, states: Float64[Tensor, "rows hidden"]) -> Float64[Tensor, "rows columns"]:
    """Return what a map acts on: the states, or the normalised states and their random features."""
    if kind == LINEAR:
        return states
    hidden = states.shape[1]
    weights, bias = (part.to(states.device) for part in _weights(hidden, FEATURES))
    out = states.new_empty(len(states), hidden + FEATURES)
    x = torch.div(states, rms(states), out=out[:, :hidden])
    out[:, hidden:] = torch.addmm(bias, x, weights).relu_()
    return out


@dataclass
class MapSums:
    """Sums over rows about a point near their mean, from which least squares is fitted and scored.

    Of the matrix x x^T the blocks on and above the diagonal are there (`gram.add_gram`).
    """

    count: int
    x: Float64[Tensor, " columns"]
    y: Float64[Tensor, " hidden"]
    xx: Float64[Tensor, "columns columns"]
    xy: Float64[Tensor, "columns hidden"]

    @classmethod
    def zeros(cls, like: Tensor, columns: int, hidden: int) -> MapSums:
        """Return sums over no rows."""
        shapes: tuple[tuple[int, ...], ...] = ((columns,), (hidden,), (columns, columns), (columns, hidden))
        return cls(0, *(like.new_zeros(shape) for shape in shapes))

    def add(self, x: Float64[Tensor, "rows columns"], y: Float64[Tensor, "rows hidden"]) -> None:
        """Add rows, in place."""
        self.count += len(x)
        self.x += x.sum(dim=0)
        self.y += y.sum(dim=0)
        add_gram(self.xx, x)
        self.xy.addmm_(x.T, y)

    def __add__(self, other: MapSums) -> MapSums:
        return MapSums(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def about(self, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means of x x^T and x y^T about a point."""
        x, y = self.means
        A = self.xx / self.count
        mirror(A)
        A.addr_(x, x, alpha=-1.0).addr_(x - mean_x, x - mean_x)
        return A, (self.xy / self.count).addr_(x, y, alpha=-1.0).addr_(x - mean_x, y - mean_y)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The means of x and y."""
        return self.x / self.count, self.y / self.count


class MapFit:
    """A map from features to the update, fitted on the rows of one half of the units. All is about a common point."""

    def __init__(self, quarters: Sequence[MapSums | None]) -> None:
        """Take the sums of the two quarters of the half; None where a quarter has no rows."""
        self._quarters = list(quarters)

    @property
    def problem(self) -> str | None:
        """Why the map cannot be fitted; None where it can."""
        counts = [0 if quarter is None else quarter.count for quarter in self._quarters]
        if not min(counts):
            return "maps are fitted on one half of the units, a quarter of them choosing the ridge: needs four groups"
        return None if sum(counts) >= FEWEST else f"a map needs {FEWEST} tokens, and a half has {sum(counts)}"

    def solve(self) -> None:
        """Fit the map with the ridge that is best inside the half, and forget the sums."""
        first, second = self._quarters
        assert first is not None
        assert second is not None
        ridge = _best_ridge(first, second)
        whole = first + second
        self.mean_x, self.mean_y = whole.means
        A, B = whole.about(self.mean_x, self.mean_y)
        A.diagonal().add_(_multiple(ridge, A.trace(), len(A)))
        # One ridge needs no eigenproblem: for 1,088 columns this takes a fifth of its time.
        self.map = torch.cholesky_solve(B, torch.linalg.cholesky(A))
        self._at_zero = self.mean_y - self.mean_x @ self.map
        self._quarters = []

    def errors(self, x: Float64[Tensor, "rows columns"], y: Float64[Tensor, "rows hidden"]) -> Float64[Tensor, " rows"]:
        """Return the squared error of each row."""
        return squared_norms(torch.addmm(self._at_zero, x, self.map).sub_(y))


def squared_norms(rows: Float64[Tensor, "rows _"]) -> Float64[Tensor, " rows"]:
    """Return the squared norm of each row."""
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1)
    return norms.square_()


def _multiple(ridge: float, trace: Tensor, columns: int) -> Tensor:
    """Return what is added to the diagonal: the ridge times its mean."""
    return ridge * (trace / columns).clamp_min(TINY)


def _best_ridge(train: MapSums, test: MapSums) -> float:
    """Return the ridge with which rows give a map with the least squared error on other rows.

    In the basis of the eigenvectors of A the map of a ridge is D B, D diagonal. So its error, less what is the same for
    every ridge, needs of A' and B' of the other rows sum_ij D_i D_j (B B^T)_ij A'_ij - 2 sum_i D_i (B B'^T)_ii alone.
    """
    means = train.means
    A, B = train.about(*means)
    values, vectors = eigh(A)
    values = values.clamp_min(0.0)
    other, seen_there = test.about(*means)
    seen = vectors.T @ B
    quadratic = (seen @ seen.T).mul_(vectors.T @ other @ vectors)
    linear = (seen * (vectors.T @ seen_there)).sum(dim=1)
    multiples = torch.stack([_multiple(ridge, values.sum(), len(values)) for ridge in RIDGES])
    D = 1.0 / (values + multiples[:, None])
    errors = ((D @ quadratic - 2 * linear) * D).sum(dim=1)
    return RIDGES[int(errors.argmin())]
