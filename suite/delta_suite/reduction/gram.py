"""Singular values and right singular directions of a matrix of updates, from its Gram matrix in float64.

Squaring is harmless here: float64 leaves energies exact to 1e-15 of the largest, so singular values to 1e-7 of sigma_1
or better, and only singular values below that are lost (set to 0). In exchange an eigenproblem of the smaller side
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
"""Number of blocks into which the columns of wide rows are split. Only the blocks of the hidden-side Gram matrix on and
above the diagonal are multiplied: for 8,192 x 5,120 on an H100 4.4 ms in 16 blocks, 4.5 in 10, 4.9 in 5, 7.5 in one,
and 4.8 by halving recursively."""

WIDE_ENOUGH_FOR_BLOCKS = 2048
"""Below this many columns a single multiplication is faster than blocks, on a GPU."""

HOST_BLOCKS, WIDE_ENOUGH_ON_HOST = 4, 512
"""Blocks of narrower rows on a CPU, whose products are bound by arithmetic, and the fewest columns: of 2,048 x 1,088 4
blocks took 66 ms, 8 took 76, one 87."""

SLICES, SLICE_BITS = 3, 8
"""A float32 row is split into SLICES whole numbers of SLICE_BITS bits, sign included, which float32, TF32 and bfloat16
hold without rounding."""

EXACT_TERMS = 1024
"""Number of products of two slices, at most 2^14 each, whose sum float32 holds without rounding: 2^24 / 2^14."""


@dataclass(frozen=True)
class Spectrum:
    """Squared singular values and leading right singular vectors of a matrix of updates."""

    eigenvalues: Float64[Tensor, " rank"]
    """Squared singular values, descending; rank is min(tokens, hidden)."""
    directions: Float64[Tensor, "k hidden"]
    """The top-k right singular vectors as unit rows, each with its largest component positive; rows beyond the rank are
    zero."""


def algebra_device(device: torch.device) -> torch.device:
    """Return the device for float64 algebra on tensors of `device`: the same one, except for MPS, which has no float64.

    Example:
        >>> algebra_device(torch.device("mps"))
        device(type='cpu')
    """
    return torch.device("cpu") if device.type == "mps" else device


def gram(rows: Float[Tensor, "tokens hidden"]) -> Float64[Tensor, "hidden hidden"]:
    """Return rows^T rows in float64.

    Example:
        >>> gram(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.],
                [2., 4.]], dtype=torch.float64)
    """
    hidden = rows.shape[1]
    out = torch.zeros(hidden, hidden, dtype=torch.float64, device=algebra_device(rows.device))
    add_gram(out, rows)
    mirror(out)
    return out


def add_gram(out: Float64[Tensor, "hidden hidden"], rows: Float[Tensor, "tokens hidden"]) -> None:
    """Add rows^T rows to the blocks of `out` on and above the diagonal; call `mirror` once all rows are added."""
    if rows.dtype != torch.float64 and slow_float64(rows.device):
        out += sliced_gram(rows.float())
        return
    rows = rows.to(out.device).double()
    for start, stop in _column_blocks(rows.shape[1], out.device):
        out[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def mirror(matrix: Float64[Tensor, "hidden hidden"]) -> None:
    """Copy the blocks above the diagonal to their mirror places below it, in place."""
    for start, stop in _column_blocks(len(matrix), matrix.device):
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T


def in_blocks(hidden: int, device: torch.device | None = None) -> bool:
    """Return True if products of so many columns are faster in blocks.

    device: that of a Gram matrix, whose narrow blocks pay on the host.
    """
    on_host = device is not None and device.type == "cpu"
    return hidden >= (WIDE_ENOUGH_ON_HOST if on_host else WIDE_ENOUGH_FOR_BLOCKS)


def _column_blocks(hidden: int, device: torch.device | None = None) -> Iterator[tuple[int, int]]:
    """Yield the first column of each block and the one after its last; narrow rows are one block."""
    blocks = COLUMN_BLOCKS if hidden >= WIDE_ENOUGH_FOR_BLOCKS else HOST_BLOCKS if in_blocks(hidden, device) else 1
    return pairwise(hidden * i // blocks for i in range(blocks + 1))


def sliced_gram(rows: Float32[Tensor, "tokens hidden"]) -> Float64[Tensor, "hidden hidden"]:
    """Return rows^T rows without multiplying in float64.

    Rows are rounded to 24 bits below the largest entry of their column; their product is then exact. Each column is
    written as a power of two times SLICES whole numbers of SLICE_BITS bits, most significant first. The products of two
    slices are then sums of whole numbers, exact in float32 for EXACT_TERMS rows at a time, and added in float64 (Ozaki,
    Ogita, Oishi & Rump 2012, Numerical Algorithms 59). All six products count: rounding drops a part of the rows, 2^-24
    of their largest entry, and moves no singular value by more; dropping a product would drop a part of the Gram
    matrix, and move the small singular values by its square root.
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
        parts = [part[start : start + EXACT_TERMS] for part in slices]
        for one, other in combinations_with_replacement(range(SLICES), 2):
            product = (parts[one].T @ parts[other]).to(home)
            (squares if one == other else crossed).add_(product, alpha=units[one] * units[other])
    scale = torch.ldexp(torch.ones(len(exponent), dtype=torch.float64, device=home), exponent)
    out: Tensor = (squares + crossed + crossed.T) * scale[:, None] * scale
    return out


def tokens_gram(rows: Float[Tensor, "tokens hidden"]) -> Float64[Tensor, "tokens tokens"]:
    """Return rows rows^T in float64, the smaller of the two products where tokens <= hidden."""
    if rows.dtype != torch.float64 and slow_float64(rows.device):
        return sliced_gram(rows.float().T)
    return times_transposed(rows, rows)


def times_transposed(
    rows: Float[Tensor, "tokens hidden"], others: Float[Tensor, "others hidden"]
) -> Float64[Tensor, "tokens others"]:
    """Return rows others^T in float64 without copying all rows to float64 at once."""
    out = torch.zeros(len(rows), len(others), dtype=torch.float64, device=algebra_device(rows.device))
    for start, stop in _column_blocks(rows.shape[1]):
        columns = rows[:, start:stop].to(out.device).double()
        other = columns if others is rows else others[:, start:stop].to(out.device).double()
        out.addmm_(columns, other.T)
    return out


def spectrum_of_gram(eigen: Eigen, tokens: int, k: int) -> Spectrum:
    """Return the spectrum, with k directions, from the eigenpairs of gram(rows).

    `tokens` is the number of rows: the rank is at most min(tokens, hidden), so further eigenvalues are dropped.
    """
    values, vectors = eigen
    values = _without_rounding(values.flip(0))[: min(tokens, len(values))]
    return Spectrum(values, signed(_masked(_leading(vectors, k).contiguous(), values, k)))


def spectrum_of_tokens_gram(eigen: Eigen, rows: Float[Tensor, "tokens hidden"], k: int) -> Spectrum:
    """Return the spectrum, with k directions, from rows (tokens <= hidden) and the eigenpairs of their tokens_gram."""
    values, vectors = eigen
    hidden = rows.shape[1]
    values, leading = _without_rounding(values.flip(0)), _leading(vectors, k)
    directions = leading.new_empty(len(leading), hidden)
    for start, stop in _column_blocks(hidden):
        directions[:, start:stop] = leading @ rows[:, start:stop].to(leading.device).double()
    scale = directions.norm(dim=1, keepdim=True)
    directions /= torch.where(scale > 0, scale, torch.ones_like(scale))
    return Spectrum(values, signed(_masked(directions, values, k)))


def _leading(vectors: Float64[Tensor, "n n"], k: int) -> Float64[Tensor, "leading n"]:
    """Return the last k columns, or all if there are fewer, as rows in reverse order."""
    return vectors[:, max(0, vectors.shape[1] - k) :].T.flip(0)


def _without_rounding(values: Float64[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """Set eigenvalues to 0 that are within float64 rounding of the largest: they are not energies."""
    floor = values[0] * len(values) * torch.finfo(torch.float64).eps
    return torch.where(values > floor, values, torch.zeros_like(values))


def _masked(directions: Tensor, values: Tensor, k: int) -> Tensor:
    """Return k rows, zero where the singular value is zero."""
    present = min(k, len(values), len(directions))
    out = directions
    if len(directions) != k:
        out = directions.new_zeros(k, directions.shape[1])
        out[:present] = directions[:present]
    out[:present] *= (values[:present] > 0)[:, None]
    out[present:] = 0.0
    return out


def signed(directions: Tensor) -> Tensor:
    """Choose the sign of each direction so that its largest component is positive. Overwrites the directions."""
    negative = -directions.amin(dim=1, keepdim=True) > directions.amax(dim=1, keepdim=True)
    return directions.mul_(torch.where(negative, -1.0, 1.0))
