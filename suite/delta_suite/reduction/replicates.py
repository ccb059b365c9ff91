"""Spectra of one layer: of all documents, of each half of them, and without each group of them.

These are the material of every interval, and replicates cost no eigenproblem of their own. Without group g the second
moment of the updates is S - E_g (groups.py). Its spectrum is taken to first order in E_g, lambda_i - v_i^T E_g v_i, the
infinitesimal jackknife: it gives every function of the spectrum its standard error, while its bias is estimated from
the halves, which have eigenproblems of their own (metrics/intervals.py). Its leading directions are the Ritz vectors of
S - E_g in the span of LEADING directions of S, corrected to first order for what lies outside that span.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from delta_suite.reduction.eigen import Eigen, Eigensolver
from delta_suite.reduction.gram import Spectrum
from delta_suite.reduction.groups import LEADING, Groups
from delta_suite.reduction.moments import TOKEN_QUANTITIES
from delta_suite.reduction.statistics import TOP_K, LayerStatistics

RANDOM_DRAWS = 100
"""Number of random directions per layer, drawn with the covariance of its updates."""


@dataclass(frozen=True)
class LayerSpectra:
    """One layer in one variant, of all tokens, of each half of the documents, and without each group of them.

    Statistics of halves and replicates are scaled to the token count of the whole, so that all are comparable.
    Directions are unit rows, on the host; those of replicates and random ones are in float32.
    """

    statistics: LayerStatistics
    directions: Float[Tensor, "k hidden"]
    """The top-k right singular vectors of the updates."""
    random: Float[Tensor, "draws hidden"]
    """Directions drawn from a Gaussian with the covariance of the updates."""
    halves: tuple[LayerStatistics, LayerStatistics] | None = None
    """Statistics of the even and of the odd documents; None where one half has no tokens."""
    half_directions: tuple[Float[Tensor, "k hidden"], Float[Tensor, "k hidden"]] | None = None
    """Directions of the even and of the odd documents."""
    replicates: tuple[LayerStatistics, ...] = ()
    """Statistics of all documents but one group, for each group; empty where there are no intervals."""
    replicate_directions: Float[Tensor, "groups k hidden"] | None = None
    """Directions of all documents but one group, for each group."""
    replicate_half_directions: Float[Tensor, "groups k hidden"] | None = None
    """Directions of one half of the documents but one of its groups, for each group."""


def random_draws(layer: int, rank: int) -> Float32[Tensor, "draws rank"]:
    """Return standard normal draws: the same in each run, on each device, and for all variants of a layer."""
    return torch.from_numpy(np.random.default_rng(layer).standard_normal((RANDOM_DRAWS, rank), dtype=np.float32))


@dataclass(frozen=True)
class _Whole:
    """The spectrum of all documents of a layer, and the parts of it that halves and replicates need later."""

    spectra: LayerSpectra
    leading: Spectrum
    """The spectrum with LEADING directions."""
    energies: Float64[np.ndarray, "groups rank"] | None = None
    """v_i^T E_g v_i of every direction; None where no replicates are formed."""
    removed: Float64[Tensor, "groups m m"] | None = None
    """V E_g V^T of the leading directions V; None where no replicates are formed."""


def solve_layers(
    layers: Sequence[Groups],
    draws: Sequence[Callable[[], Float32[Tensor, "draws rank"]]],
    solve: Eigensolver,
    *,
    epsilon: float,
    intervals: bool = True,
) -> list[LayerSpectra]:
    """Solve the eigenproblems of several layers in one variant, and return everything that is kept of each.

    All layers must have the same tokens. `draws` gives each layer's `random_draws`, `epsilon` is the machine epsilon of
    the stream's dtype. Replicates are formed if `intervals` is set; halves are formed wherever both have tokens.
    """
    first = layers[0]
    tokens, everything = first.tokens, range(len(first.tokens))
    if sum(tokens) == 0:
        return [_without_tokens(grouped, epsilon) for grouped in layers]
    sides = [list(everything[side::2]) for side in (0, 1)]
    halved = all(any(tokens[g] for g in side) for side in sides)
    solved = solve((grouped.matrix(everything) for grouped in layers), [first.size(everything)] * len(layers))
    wholes = [
        _whole(grouped, eigen, draw(), epsilon, intervals and halved)
        for grouped, eigen, draw in zip(layers, solved, draws, strict=True)
    ]
    if not halved:
        return [whole.spectra for whole in wholes]
    del solved  # it takes as much memory as the halves will
    sizes = [first.size(side) for side in sides] * len(layers)
    solved = solve((grouped.matrix(side) for grouped in layers for side in sides), sizes)
    return [
        _with_halves(grouped, whole, sides, solved[2 * i : 2 * i + 2], epsilon)
        for i, (grouped, whole) in enumerate(zip(layers, wholes, strict=True))
    ]


def _without_tokens(grouped: Groups, epsilon: float) -> LayerSpectra:
    """Return the spectra of a layer of which no token enters."""
    hidden = grouped.totals.shape[1]
    statistics = _statistics(grouped, np.zeros(0), range(len(grouped.tokens)), epsilon)
    return LayerSpectra(statistics, torch.zeros(TOP_K, hidden, dtype=torch.float64), torch.zeros(RANDOM_DRAWS, hidden))


def _whole(
    grouped: Groups, eigen: Eigen, draws: Float32[Tensor, "draws rank"], epsilon: float, intervals: bool
) -> _Whole:
    """Return the spectra of all documents, from the eigenpairs of their matrix."""
    groups = range(len(grouped.tokens))
    spectrum = grouped.spectrum(groups, eigen, min(sum(grouped.tokens), grouped.totals.shape[1]))
    eigenvalues = spectrum.eigenvalues.cpu().numpy()
    spectra = LayerSpectra(
        _statistics(grouped, eigenvalues, groups, epsilon),
        _first(spectrum.directions, TOP_K).cpu(),
        _random_directions(spectrum, draws),
    )
    # A copy: a view would keep all directions in memory.
    leading = Spectrum(spectrum.eigenvalues, spectrum.directions[:LEADING].clone())
    if not intervals:
        return _Whole(spectra, leading)
    energies, removed = grouped.removals(groups, spectrum.directions)
    return _Whole(spectra, leading, energies.cpu().numpy()[:, : len(eigenvalues)], removed)


def _with_halves(
    grouped: Groups, whole: _Whole, sides: Sequence[list[int]], solved: Sequence[Eigen], epsilon: float
) -> LayerSpectra:
    """Return the spectra with halves, from the eigenpairs of each, and with replicates where they are wanted."""
    groups = range(len(grouped.tokens))
    halves = [grouped.spectrum(side, eigen, LEADING) for side, eigen in zip(sides, solved, strict=True)]
    a, b = (
        _statistics(grouped, half.eigenvalues.cpu().numpy(), side, epsilon)
        for half, side in zip(halves, sides, strict=True)
    )
    of_a, of_b = (_first(half.directions, TOP_K).cpu() for half in halves)
    spectra = replace(whole.spectra, halves=(a, b), half_directions=(of_a, of_b))
    if whole.energies is None or whole.removed is None:
        return spectra
    remaining = _eigenvalues_without(whole.leading.eigenvalues.cpu().numpy(), whole.energies)
    of_half = torch.zeros(len(groups), TOP_K, grouped.totals.shape[1])
    for side, half in zip(sides, halves, strict=True):
        of_half[side] = _directions_without(grouped, side, half, grouped.removals(side, half.directions)[1])
    return replace(
        spectra,
        replicates=tuple(_statistics(grouped, remaining[g], [i for i in groups if i != g], epsilon) for g in groups),
        replicate_directions=_directions_without(grouped, groups, whole.leading, whole.removed),
        replicate_half_directions=of_half,
    )


def _eigenvalues_without(
    eigenvalues: Float64[np.ndarray, " rank"], energies: Float64[np.ndarray, "groups rank"]
) -> Float64[np.ndarray, "groups rank"]:
    """Return lambda_i - v_i^T E_g v_i for each group g, in the order of the directions v_i of the whole.

    So the replicates of a figure of the first direction follow that direction. Sorted anew, the spread of two nearly
    equal eigenvalues would be that of the larger of them: in noise, where the interval of gamma covers 0.90 of the
    cases, it then covered 0.79.
    """
    remaining = eigenvalues - energies
    remaining[remaining <= _rounding(eigenvalues[0], len(eigenvalues))] = 0.0
    return np.asarray(remaining)


def _rounding(largest: float, size: int) -> float:
    """Return the energy at or below which rounding decides, where `largest` was the largest before the deletion."""
    return float(largest) * max(size, LEADING) * float(np.finfo(np.float64).eps)


def _directions_without(
    grouped: Groups, groups: Sequence[int], spectrum: Spectrum, removed: Float64[Tensor, "groups m m"]
) -> Float32[Tensor, "groups k hidden"]:
    """Return the top-k directions of S - E_g for each group g, as unit rows.

    Rows are zero where the rank is below k, as it is where all documents are in that group.
    """
    leading = spectrum.directions[: removed.shape[1]]
    diagonal = torch.diag(_first(spectrum.eigenvalues[:, None], len(leading)).flatten())
    # Small problems are solved on the host in one call: a GPU would spend its time on launching them.
    values, vectors = torch.linalg.eigh((diagonal - removed).cpu())
    values, vectors = values.flip(1)[:, :TOP_K], vectors.flip(2)[:, :, :TOP_K].to(leading.device)
    present = values > _rounding(float(spectrum.eigenvalues[0]), len(spectrum.eigenvalues))
    inside = leading.T @ vectors
    # One application of S - E_g brings in what lies outside the span, to first order in it.
    whole = grouped.times(groups, inside.transpose(0, 1).flatten(1)).view(-1, len(groups), inside.shape[2])
    removals = [grouped.removed_times(g, groups, inside[i]) for i, g in enumerate(groups)]
    outside = whole.transpose(0, 1) - torch.stack(removals)
    norms = outside.norm(dim=1, keepdim=True)
    outside = outside / torch.where(norms > 0, norms, torch.ones_like(norms))
    outside = outside * present.to(leading.device)[:, None, :]
    # QR makes them orthonormal in order; there are no more of them than dimensions.
    rows = torch.linalg.qr(outside.cpu()).Q.mT
    rows = rows * present[:, : rows.shape[1], None]
    out = torch.zeros(len(groups), TOP_K, leading.shape[1])
    out[:, : rows.shape[1]] = rows.float()
    return out


def _statistics(
    grouped: Groups, eigenvalues: Float64[np.ndarray, " rank"], groups: Sequence[int], epsilon: float
) -> LayerStatistics:
    """Return the statistics of these groups together, scaled to the token count of all."""
    tokens, count = sum(grouped.tokens), max(1, sum(grouped.tokens[g] for g in groups))
    index = list(groups)
    mean = grouped.sums[index].sum(axis=0) / count
    sd = np.sqrt(np.maximum(grouped.squares[index].sum(axis=0) / count - mean**2, 0.0))
    averages = {
        name: (float(m), float(s)) for name, m, s in zip(TOKEN_QUANTITIES, mean.tolist(), sd.tolist(), strict=True)
    }
    energy = float(eigenvalues.sum())
    total = float(grouped.products[np.ix_(index, index)].sum()) / count
    in_mean = 0.0 if grouped.centre or energy == 0 else total / energy
    scaled = eigenvalues * (tokens / count)
    hidden = int(grouped.totals.shape[1])
    return LayerStatistics(tokens, hidden, scaled, averages, in_mean, epsilon, grouped.pairs(index))


def _random_directions(spectrum: Spectrum, draws: Float32[Tensor, "draws rank"]) -> Float32[Tensor, "draws hidden"]:
    """Return unit rows that have the distribution N(0, S) before they are normalised."""
    rank = min(len(spectrum.eigenvalues), len(spectrum.directions))
    scales = spectrum.eigenvalues[:rank].sqrt()
    rows = (draws[:, :rank].to(scales.device).double() * scales) @ spectrum.directions[:rank]
    norms = rows.norm(dim=1, keepdim=True)
    return (rows / torch.where(norms > 0, norms, torch.ones_like(norms))).float().cpu()


def _first(rows: Tensor, k: int) -> Tensor:
    """Return the first k rows, padded with zero rows where there are fewer."""
    out = rows.new_zeros(k, rows.shape[1])
    out[: min(k, len(rows))] = rows[:k]
    return out
