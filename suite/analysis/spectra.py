"""Singular values and right singular directions of a matrix of updates, by way of its Gram matrix in float64.

Squaring is harmless here: float64 leaves energies exact to 1e-15 of the largest, so singular values to 1e-7 of
sigma_1 or better, and only what lies below is lost (set to 0). In exchange an eigenproblem of the smaller side
replaces the SVD: on an H100 2,047 x 5,120 takes 29 ms instead of 244 ms.

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

COLUMN_BLOCKS = 10
"""Blocks of columns of the hidden-side Gram; only blocks on and above the diagonal are multiplied."""

WIDE_ENOUGH_FOR_BLOCKS = 2048
"""Below this many columns one multiplication is faster than blocks of it."""


FAST_FLOAT64 = {(6, 0), (7, 0), (8, 0), (9, 0), (10, 0)}
"""Compute capabilities of the NVIDIA GPUs with float64 at half the rate of float32: P100, V100, A100, H100, B200.

https://docs.nvidia.com/cuda/cuda-c-programming-guide/#arithmetic-instructions
"""

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


def slow_float64(device: torch.device) -> bool:
    """Whether this device multiplies in float64 at a small part of its rate in float32, or not at all."""
    if device.type != "cuda" or torch.version.hip is not None:
        return device.type == "mps"
    return torch.cuda.get_device_capability(device) not in FAST_FLOAT64


def gram(rows: Float[Tensor, "tokens hidden"]) -> Float64[Tensor, "hidden hidden"]:
    """rows^T rows in float64; only the upper triangle of blocks is multiplied, the rest mirrored."""
    if rows.dtype != torch.float64 and slow_float64(rows.device):
        return sliced_gram(rows.float())
    rows = rows.to(algebra_device(rows.device)).double()
    hidden = rows.shape[1]
    if hidden < WIDE_ENOUGH_FOR_BLOCKS:
        return rows.T @ rows
    out = rows.new_empty(hidden, hidden)
    for left, right in _column_blocks(hidden):
        out[left:right, left:] = rows[:, left:right].T @ rows[:, left:]
        out[right:, left:right] = out[left:right, right:].T
    return out


def _column_blocks(hidden: int) -> Iterator[tuple[int, int]]:
    """First column of each block, and the one behind its last."""
    return pairwise(hidden * i // COLUMN_BLOCKS for i in range(COLUMN_BLOCKS + 1))


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


def spectrum_of_gram(matrix: Float64[Tensor, "hidden hidden"], tokens: int, k: int) -> Spectrum:
    """From the hidden-side Gram matrix of `tokens` rows, whose rank is therefore min(tokens, hidden) at most."""
    values, vectors = _eigh(matrix)
    values, vectors = values.flip(0), vectors.flip(1)
    values = _without_rounding(values)[: min(tokens, matrix.shape[0])]
    return Spectrum(values, _signed(_masked(vectors[:, :k].T.contiguous(), values, k)))


def spectrum_of_rows(rows: Float[Tensor, "tokens hidden"], k: int) -> Spectrum:
    """From the rows themselves, on the smaller side: tokens where tokens <= hidden."""
    tokens, hidden = rows.shape
    if tokens > hidden:
        return spectrum_of_gram(gram(rows), tokens, k)
    home = algebra_device(rows.device)
    if tokens == 0:
        nothing = torch.zeros(k, hidden, dtype=torch.float64, device=home)
        return Spectrum(nothing[:0, 0], nothing)
    sliced = rows.dtype != torch.float64 and slow_float64(rows.device)
    values, vectors = _eigh(sliced_gram(rows.float().T) if sliced else _tokens_gram(rows.to(home).double()))
    values, vectors = _without_rounding(values.flip(0)), vectors.flip(1)
    directions = torch.empty(min(k, tokens), hidden, dtype=torch.float64, device=home)
    for left, right in _column_blocks(hidden):  # so that no copy of all rows in float64 lies beside
        directions[:, left:right] = vectors[:, :k].T @ rows[:, left:right].to(home).double()
    scale = directions.norm(dim=1, keepdim=True)
    directions /= torch.where(scale > 0, scale, torch.ones_like(scale))
    return Spectrum(values, _signed(_masked(directions, values, k)))


def _tokens_gram(rows: Float64[Tensor, "tokens hidden"]) -> Float64[Tensor, "tokens tokens"]:
    return rows @ rows.T


def _eigh(matrix: Float64[Tensor, "n n"]) -> tuple[Float64[Tensor, " n"], Float64[Tensor, "n n"]]:
    """Eigenvalues, ascending, and vectors; on the host where the device is slow in float64."""
    if not slow_float64(matrix.device):
        values, vectors = torch.linalg.eigh(matrix)
    else:
        values, vectors = (own.to(matrix.device) for own in torch.linalg.eigh(matrix.cpu()))
    return values, vectors


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
