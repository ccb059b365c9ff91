"""Moments of a layer as they travel and are kept: a vector for each part, with the upper triangle of its Gram matrix.

The lower triangle is its mirror image, so that nothing is lost. Vectors of several sets of tokens are added as they
are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from delta_suite.reduction.merge import Part
from delta_suite.reduction.moments import TOKEN_QUANTITIES, Moments

Packed = Mapping[str, np.ndarray]
"""The moments of a layer by the name of the part: triangle, total, sums, squares and the number of tokens."""

_WITH, _WITHOUT = "sinks", "others"


def packed(parts: Mapping[Part, Moments]) -> dict[str, np.ndarray]:
    """Return the moments of a layer as vectors of float64."""
    return {
        f"{group}.{_WITH if sinks else _WITHOUT}": _vector(moments).cpu().numpy()
        for (group, sinks), moments in sorted(parts.items())
    }


def _vector(moments: Moments) -> Tensor:
    tokens = moments.total.new_tensor([moments.tokens])
    return torch.cat([moments.gram[above(moments.gram)], moments.total, moments.sums, moments.squares, tokens])


def above(square: Float64[Tensor, "size size"]) -> Bool[Tensor, "size size"]:
    """Return True on and above the diagonal."""
    return torch.ones_like(square, dtype=torch.bool).triu_()


def added(several: Iterable[Packed]) -> dict[str, np.ndarray]:
    """Return the moments of all sets of tokens together, added in the order given.

    Example:
        >>> added([{"0.others": np.array([1.0])}, {"1.others": np.array([2.0])}, {"0.others": np.array([4.0])}])
        {'0.others': array([5.]), '1.others': array([2.])}
    """
    total: dict[str, np.ndarray] = {}
    for parts in several:
        for name, vector in parts.items():
            total[name] = total[name] + vector if name in total else vector
    return total


def unpacked(parts: Packed, hidden: int, device: torch.device) -> dict[Part, Moments]:
    """Return the moments of a layer of this width, on a device that has float64."""
    return {_part(name): _moments(torch.tensor(vector).to(device), hidden) for name, vector in sorted(parts.items())}


def _part(name: str) -> Part:
    group, _, kind = name.partition(".")
    return int(group), kind == _WITH


def _moments(vector: Tensor, hidden: int) -> Moments:
    quantities = len(TOKEN_QUANTITIES)
    sizes = [len(vector) - hidden - 2 * quantities - 1, hidden, quantities, quantities, 1]
    triangle, total, sums, squares, tokens = torch.split(vector, sizes)
    return Moments(int(tokens), from_triangle(triangle, hidden), total, sums, squares)


def from_triangle(entries: Float64[Tensor, " entries"], size: int) -> Float64[Tensor, "size size"]:
    """Return the symmetric matrix of this size whose entries on and above the diagonal are given, row by row.

    Example:
        >>> from_triangle(torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64), 2)
        tensor([[1., 2.],
                [2., 3.]], dtype=torch.float64)
    """
    square = entries.new_zeros(size, size)
    square[above(square)] = entries
    return square + square.triu(1).T
