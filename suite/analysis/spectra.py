"""Singular values and right singular directions of a matrix of updates, by way of its Gram matrix in float64.

Squaring is harmless here: float64 leaves energies exact to 1e-15 of the largest, so singular values to 1e-7 of
sigma_1 or better, and only what lies below is lost (set to 0). In exchange an eigenproblem of the smaller side
replaces the SVD: on an H100 2,047 x 5,120 takes 29 ms instead of 244 ms.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from jaxtyping import Float, Float64
from torch import Tensor

COLUMN_BLOCKS = 10
"""Blocks of columns of the hidden-side Gram; only blocks on and above the diagonal are multiplied."""

WIDE_ENOUGH_FOR_BLOCKS = 2048
"""Below this many columns one multiplication is faster than blocks of it."""


@dataclass(frozen=True)
class Spectrum:
    """eigenvalues: squared singular values, descending, min(tokens, hidden) of them. directions: unit rows (top-k
    right singular vectors; zero rows where the rank is below k), the largest component of each made positive."""

    eigenvalues: Float64[Tensor, " rank"]
    directions: Float64[Tensor, "k hidden"]


def algebra_device(device: torch.device) -> torch.device:
    """Where float64 algebra on this device's tensors runs: there, except on MPS, which has no float64."""
    return torch.device("cpu") if device.type == "mps" else device


def gram(rows: Float[Tensor, "tokens hidden"]) -> Float64[Tensor, "hidden hidden"]:
    """rows^T rows in float64; only the upper triangle of blocks is multiplied, the rest mirrored."""
    rows = rows.to(algebra_device(rows.device)).double()
    hidden = rows.shape[1]
    if hidden < WIDE_ENOUGH_FOR_BLOCKS:
        return rows.T @ rows
    out = rows.new_empty(hidden, hidden)
    edges = [hidden * i // COLUMN_BLOCKS for i in range(COLUMN_BLOCKS + 1)]
    for left, right in pairwise(edges):
        out[left:right, left:] = rows[:, left:right].T @ rows[:, left:]
        out[right:, left:right] = out[left:right, right:].T
    return out


def spectrum_of_gram(matrix: Float64[Tensor, "hidden hidden"], tokens: int, k: int) -> Spectrum:
    """From the hidden-side Gram matrix of `tokens` rows, whose rank is therefore min(tokens, hidden) at most."""
    values, vectors = torch.linalg.eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    values = _without_rounding(values)[: min(tokens, matrix.shape[0])]
    return Spectrum(values, _signed(_masked(vectors[:, :k].T, values, k)))


def spectrum_of_rows(rows: Float[Tensor, "tokens hidden"], k: int) -> Spectrum:
    """From the rows themselves, on the smaller side: tokens where tokens <= hidden."""
    tokens, hidden = rows.shape
    if tokens > hidden:
        return spectrum_of_gram(gram(rows), tokens, k)
    rows = rows.to(algebra_device(rows.device)).double()
    if tokens == 0:
        return Spectrum(rows.new_zeros(0), rows.new_zeros(k, hidden))
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    values, vectors = _without_rounding(values.flip(0)), vectors.flip(1)
    directions = vectors[:, :k].T @ rows
    scale = directions.norm(dim=1, keepdim=True)
    directions = directions / torch.where(scale > 0, scale, torch.ones_like(scale))
    return Spectrum(values, _signed(_masked(directions, values, k)))


def _without_rounding(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Eigenvalues at the level of float64 rounding of the largest are not energies: set to 0."""
    floor = values[0] * len(values) * torch.finfo(torch.float64).eps
    return torch.where(values > floor, values, torch.zeros_like(values))


def _masked(directions: Tensor, values: Tensor, k: int) -> Tensor:
    """k rows, zero where the singular value is."""
    present = min(k, len(values), len(directions))
    out = directions.new_zeros(k, directions.shape[1])
    out[:present] = directions[:present] * (values[:present] > 0)[:, None]
    return out


def _signed(directions: Tensor) -> Tensor:
    """A direction is defined up to sign; the same one is always chosen."""
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    return torch.where(largest < 0, -directions, directions)
