"""Orthonormal bases of few columns: by Cholesky factors on a GPU, by Householder reflections elsewhere."""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

NEARLY = 0.1
"""How far the Gram matrix of columns that were divided once may be from that of orthonormal ones, in any entry. Where
it is farther, the columns were too nearly dependent."""


def orthonormal(columns: Float64[Tensor, "*batch n k"]) -> Float64[Tensor, "*batch n k_or_n"]:
    """Return orthonormal columns, of which the first i span what the first i given ones do, for every i.

    On a GPU a Householder factorisation of a few columns is a chain of small kernels for each matrix: 21 matrices of
    859 x 8 took 14 ms on an H100. The columns are divided there by the Cholesky factor of their Gram matrix, twice
    (CholeskyQR2: Yamamoto, Nakatsukasa, Yanagisawa & Fukaya 2015, ETNA 44), which is as exact unless the columns are
    nearly dependent, and then they are factored as elsewhere.

    Example:
        >>> orthonormal(torch.tensor([[3.0, 1.0], [0.0, 2.0]], dtype=torch.float64)).abs()
        tensor([[1., 0.],
                [0., 1.]], dtype=torch.float64)
    """
    return by_cholesky(columns) if columns.is_cuda else by_householder(columns)


def by_householder(columns: Float64[Tensor, "*batch n k"]) -> Float64[Tensor, "*batch n k_or_n"]:
    """Return orthonormal columns, or n of them where there are more columns than that."""
    basis: Tensor = torch.linalg.qr(columns).Q
    return basis


def by_cholesky(columns: Float64[Tensor, "*batch n k"]) -> Float64[Tensor, "*batch n k_or_n"]:
    """Return orthonormal columns, by Householder reflections where they are nearly dependent."""
    once = _divided(columns, columns.mT @ columns)
    gram = once.mT @ once
    apart = (gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax()
    if not float(apart) < NEARLY:  # or it is NaN, as after a factorisation that failed
        return by_householder(columns)
    return _divided(once, gram)


def _divided(columns: Float64[Tensor, "*batch n k"], gram: Float64[Tensor, "*batch k k"]) -> Tensor:
    """Return the columns times the inverse of the transposed Cholesky factor of their Gram matrix."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    unit = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(factor, unit.expand_as(factor), upper=False)
    inverse = torch.where((failed == 0)[..., None, None], inverse, torch.nan)
    return columns @ inverse.mT
