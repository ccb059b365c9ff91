"""Singular values and right singular directions of a matrix of updates, by way of its Gram matrix in float64.

Squaring is harmless here: float64 leaves energies exact to 1e-15 of the largest, so singular values to 1e-7 of
sigma_1 or better, and only what lies below is lost (set to 0). In exchange an eigenproblem of the smaller side
replaces the SVD: on an H100 2,047 x 5,120 takes 29 ms instead of 244 ms, and half of that beside others (eigen.py).

Where float64 is slow (consumer GPUs: 1/32 or 1/64 of float32) or missing (MPS), the Gram matrix is added up from exact
float32 products of slices of the rows, and the eigenproblem goes to the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement, pairwise

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from delta_suite.reduction.eigen import Eigen, slow_float64

COLUMN_BLOCKS = 16
"""Blocks of columns of wide rows. Of the hidden-side Gram only those on and above the diagonal are multiplied: for
8,192 x 5,120 on an H100 4.4 ms in 16 blocks, 4.5 in 10, 4.9 in 5, 7.5 in one; halved again and again 4.8."""

WIDE_ENOUGH_FOR_BLOCKS = 2048
"""Below this many columns one multiplication is faster than blocks of it."""

SLICES, SLICE_BITS = 3, 8
"""Of a float32 row: whole numbers of 8 bits with their sign, which float32, TF32 and bfloat16 hold without rounding."""

EXACT_TERMS = 1024
"""Products of two slices, at most 2^14 each, whose sum float32 holds without rounding: 2^24 / 2^14."""


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
    """rows^T rows in float64."""
    hidden = rows.shape[1]
    out = torch.zeros(hidden, hidden, dtype=torch.float64, device=algebra_device(rows.device))
    add_gram(out, rows)
    mirror(out)
    return out


def add_gram(out: Float64[Tensor, "hidden hidden"], rows: Float[Tensor, "tokens hidden"]) -> None:
    """Add rows^T rows in place: to the blocks on and above the diagonal. `mirror` does the rest when all are added."""
    if rows.dtype != torch.float64 and slow_float64(rows.device):
        out += sliced_gram(rows.float())
        return
    rows = rows.to(out.device).double()
    for left, right in _column_blocks(rows.shape[1]):
        out[left:right, left:].addmm_(rows[:, left:right].T, rows[:, left:])


def mirror(matrix: Float64[Tensor, "hidden hidden"]) -> None:
    """Write the blocks above the diagonal to where they belong below it."""
    for left, right in _column_blocks(len(matrix)):
        matrix[right:, left:right] = matrix[left:right, right:].T


def _column_blocks(hidden: int) -> Iterator[tuple[int, int]]:
    """First column of each block, and the one behind its last; one block where the rows are narrow."""
    blocks = COLUMN_BLOCKS if hidden >= WIDE_ENOUGH_FOR_BLOCKS else 1
    return pairwise(hidden * i // blocks for i in range(blocks + 1))


def sliced_gram(rows: Float32[Tensor, "tokens hidden"]) -> Float64[Tensor, "hidden hidden"]:
    """rows^T rows without multiplying in float64: rows rounded to 24 bits below their column's largest, then exactly.

    Each column is written as a power of two times SLICES whole numbers of SLICE_BITS bits, most significant first. The
    products of two slices are then sums of whole numbers, exact in float32 for EXACT_TERMS rows at a time, and added in
    float64 (Ozaki, Ogita, Oishi & Rump 2012, Numerical Algorithms 59). All six products count: what is rounded away is
    a part of the rows, 2^-24 of their largest, and moves no singular value by more; a dropped product would be a part
    of the Gram matrix, and move the small singular values by its square root.
    """
    home = algebra_device(rows.device)
    largest = rows.abs().amax(dim=0) if len(rows) else rows.new_zeros(rows.shape[1])
    exponent = torch.frexp(largest.to(home)).exponent.clamp(-100, 100)  # far enough from the ends of float32
    rest = torch.ldexp(rows, -exponent.to(rows.device))
    slices, units = [], [2.0 ** (1 - SLICE_BITS * (index + 1)) for index in range(SLICES)]
    for unit in units:
        slices.append((rest / unit).round())
        rest = rest - slices[-1] * unit
    squares, crossed = torch.zeros(2, rows.shape[1], rows.shape[1], dtype=torch.float64, device=home)
    for start in range(0, len(rows), EXACT_TERMS):
        some = [own[start : start + EXACT_TERMS] for own in slices]
        for one, other in combinations_with_replacement(range(SLICES), 2):
            product = (some[one].T @ some[other]).to(home)
            (squares if one == other else crossed).add_(product, alpha=units[one] * units[other])
    scale = torch.ldexp(torch.ones(len(exponent), dtype=torch.float64, device=home), exponent)
    out: Tensor = (squares + crossed + crossed.T) * scale[:, None] * scale
    return out


def tokens_gram(rows: Float[Tensor, "tokens hidden"]) -> Float64[Tensor, "tokens tokens"]:
    """rows rows^T in float64: the smaller side where tokens <= hidden."""
    if rows.dtype != torch.float64 and slow_float64(rows.device):
        return sliced_gram(rows.float().T)
    return times_transposed(rows, rows)


def times_transposed(
    rows: Float[Tensor, "tokens hidden"], others: Float[Tensor, "others hidden"]
) -> Float64[Tensor, "tokens others"]:
    """rows others^T in float64, without a copy of all the rows in float64 beside them."""
    out = torch.zeros(len(rows), len(others), dtype=torch.float64, device=algebra_device(rows.device))
    for left, right in _column_blocks(rows.shape[1]):
        some = rows[:, left:right].to(out.device).double()
        other = some if others is rows else others[:, left:right].to(out.device).double()
        out.addmm_(some, other.T)
    return out


def spectrum_of_gram(eigen: Eigen, tokens: int, k: int) -> Spectrum:
    """From the eigenpairs of gram(rows) of `tokens` rows, whose rank is therefore min(tokens, hidden) at most."""
    values, vectors = eigen
    values = _without_rounding(values.flip(0))[: min(tokens, len(values))]
    return Spectrum(values, _signed(_masked(_leading(vectors, k).contiguous(), values, k)))


def spectrum_of_tokens_gram(eigen: Eigen, rows: Float[Tensor, "tokens hidden"], k: int) -> Spectrum:
    """From the eigenpairs of tokens_gram(rows), tokens <= hidden, and the rows."""
    values, vectors = eigen
    hidden = rows.shape[1]
    values, leading = _without_rounding(values.flip(0)), _leading(vectors, k)
    directions = leading.new_empty(len(leading), hidden)
    for left, right in _column_blocks(hidden):
        directions[:, left:right] = leading @ rows[:, left:right].to(leading.device).double()
    scale = directions.norm(dim=1, keepdim=True)
    directions /= torch.where(scale > 0, scale, torch.ones_like(scale))
    return Spectrum(values, _signed(_masked(directions, values, k)))


def _leading(vectors: Float64[Tensor, "n n"], k: int) -> Float64[Tensor, "leading n"]:
    """The last k columns at most, the last first, as rows."""
    return vectors[:, max(0, vectors.shape[1] - k) :].T.flip(0)


def _without_rounding(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Eigenvalues at the level of float64 rounding of the largest are not energies: set to 0."""
    floor = values[0] * len(values) * torch.finfo(torch.float64).eps
    return torch.where(values > floor, values, torch.zeros_like(values))


def _masked(directions: Tensor, values: Tensor, k: int) -> Tensor:
    """k rows, zero where the singular value is."""
    present = min(k, len(values), len(directions))
    out = directions
    if len(directions) != k:
        out = directions.new_zeros(k, directions.shape[1])
        out[:present] = directions[:present]
    out[:present] *= (values[:present] > 0)[:, None]
    out[present:] = 0.0
    return out


def _signed(directions: Tensor) -> Tensor:
    """A direction is defined up to sign; the same one is always chosen."""
    negative = -directions.amin(dim=1, keepdim=True) > directions.amax(dim=1, keepdim=True)
    return directions.mul_(torch.where(negative, -1.0, 1.0))
