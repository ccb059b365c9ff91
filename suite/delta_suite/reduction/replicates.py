"""Spectra of one layer: of all tokens, of each half of the units, and without each group of them.

These are the material of every interval, and replicates cost no eigenproblem of their own. Without group g the second
moment of the updates is S - E_g (groups.py). Its eigenvalues are taken to second order in E_g, the leading ones exactly
in the span of LEADING directions of S. First order gave effective_rank_roy and top10_energy error bars of 0.64 to 1.4
times the exact ones. Its leading directions are the Ritz vectors of S - E_g in that span, corrected to first order for
what lies outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor

from delta_suite.reduction.disjoint import centred_pairs
from delta_suite.reduction.eigen import Eigen, Eigensolver
from delta_suite.reduction.gram import Spectrum
from delta_suite.reduction.groups import LEADING, Groups, Removals, half_gaps, mixing
from delta_suite.reduction.lanes import entries_at_once
from delta_suite.reduction.leading import leading_spectrum
from delta_suite.reduction.moments import TOKEN_QUANTITIES
from delta_suite.reduction.orthonormal import orthonormal
from delta_suite.reduction.statistics import TOP_K, LayerStatistics

RANDOM_DRAWS = 100
"""Number of random directions per layer, drawn with the covariance of its updates."""


SMALL = 4
"""Eigenproblems of at most so many times LEADING rows are solved; they take no longer than block iterations."""


@dataclass(frozen=True)
class Replicates:
    """One layer in one variant without each group in turn, scaled to the token count of the whole."""

    statistics: tuple[LayerStatistics, ...]
    directions: Float32[Tensor, "groups k hidden"]
    half_directions: Float32[Tensor, "groups k hidden"]
    """Directions of the half that a group lies in, without the group."""


@dataclass(frozen=True)
class LayerSpectra:
    """One layer in one variant, of all tokens, of each half of the units, and without each group of them.

    Statistics of halves and replicates are scaled to the token count of the whole, so that all are comparable.
    Directions are unit rows, on the host; those of replicates and random ones are in float32.
    """

    statistics: LayerStatistics
    directions: Float[Tensor, "k hidden"]
    """The top-k right singular vectors of the updates; no rows where eigenvalues alone were asked for, as below."""
    random: Float[Tensor, "draws hidden"]
    """Directions drawn from a Gaussian with the covariance of the updates."""
    halves: tuple[LayerStatistics, LayerStatistics] | None = None
    """Statistics of half a and of half b, of whose spectra the leading part alone may be known; None where one half has
    no tokens."""
    half_directions: tuple[Float[Tensor, "k hidden"], Float[Tensor, "k hidden"]] | None = None
    """Directions of half a and of half b."""
    replicates: Replicates | None = None
    """The layer without each group of units; None where there are no intervals."""
    documents: Replicates | None = None
    """The layer without each group of documents, where the unit is the domain."""

    @property
    def resamples(self) -> tuple[tuple[LayerStatistics, ...], ...]:
        """The statistics of halves, without each group of units, and without each group of documents."""
        without = (self.replicates, self.documents)
        return self.halves or (), *(() if each is None else each.statistics for each in without)


def random_draws(layer: int, rank: int) -> Float32[Tensor, "draws rank"]:
    """Return standard normal draws: the same in each run, on each device, and for all variants of a layer."""
    return torch.from_numpy(np.random.default_rng(layer).standard_normal((RANDOM_DRAWS, rank), dtype=np.float32))


Ritz = tuple[Float64[Tensor, "_ m"], Float64[Tensor, "_ m m"]]
"""Eigenvalues, descending, and eigenvectors (columns) of S - E_g in the span of the leading directions of S."""


@dataclass(frozen=True)
class _Whole:
    """The spectrum of all tokens of a layer, and the parts of it that halves and replicates need later."""

    spectra: LayerSpectra
    leading: Spectrum
    """The spectrum with LEADING directions."""
    removed: tuple[Removals, ...]
    """What each group takes, in each grouping; empty where there is one group."""
    without: tuple[tuple[Ritz, Float32[Tensor, "_ k hidden"]], ...]
    """The leading eigenpairs without each group, and the directions in hidden space, in each grouping."""
    pairs: _Pairs | None
    """Sums over the groups of units; None where there is one group."""


@dataclass(frozen=True)
class _Pairs:
    """What sums over pairs of different groups are formed of, for all groups and without each."""

    traces: Float64[np.ndarray, " groups"]
    """tr G_a, about the mean of all where the variant is centred, as the others."""
    with_whole: Float64[np.ndarray, " groups"]
    """tr G_a S."""
    squares: Float64[np.ndarray, " groups"]
    """tr G_a G_a."""
    square: float
    """tr S S, where S is the sum of all G_a."""
    products: Float64[np.ndarray, "groups groups"]
    """Inner products of the groups' summed updates."""
    through: Float64[np.ndarray, "groups 4"] | None
    """What `disjoint.centred_pairs` takes; None where the variant is not centred."""

    @classmethod
    def of(cls, grouped: Groups, eigenvalues: Float64[np.ndarray, " rank"], removed: Removals) -> _Pairs:
        """Return the sums of a layer, whose eigenvalues are those of S."""
        traces, with_whole, squares = removed.pairs.cpu().numpy().T
        products, through = grouped.products, None
        if grouped.centre:
            totals = grouped.centred_totals()
            products, through = (totals @ totals.T).cpu().numpy(), grouped.through().cpu().numpy()
        return cls(traces, with_whole, squares, float((eigenvalues**2).sum()), products, through)

    def between(self, grouped: Groups, without: int | None = None) -> tuple[float, float] | None:
        """Return the sums of tr G_a tr G_b and of tr G_a G_b over pairs of different groups, of all or without one.

        Where the variant is centred they are those of `disjoint.centred_pairs`.
        """
        if sum(tokens > 0 for g, tokens in enumerate(grouped.tokens) if g != without) < 2:
            return None
        of_grams = self.square - float(self.squares.sum())
        if without is not None:
            of_grams -= 2 * float(self.with_whole[without] - self.squares[without])
        if self.through is not None:
            return centred_pairs(grouped.tokens, self.traces, of_grams, self.products, self.through, without)
        of_traces = float(self.traces.sum() ** 2 - (self.traces**2).sum())
        if without is not None:
            of_traces -= 2 * float(self.traces[without] * (self.traces.sum() - self.traces[without]))
        return of_traces, of_grams


def solve_layers(
    layers: Sequence[Sequence[Groups]],
    draws: Sequence[Callable[[], Float32[Tensor, "draws rank"]]],
    solve: Eigensolver,
    *,
    epsilon: float,
    directions: bool = True,
) -> list[LayerSpectra]:
    """Solve the eigenproblems of several layers in one variant, and return everything that is kept of each.

    All layers must have the same tokens. Each is given by groups of units, and where the unit is the domain by groups
    of documents, too. `draws` gives each layer's `random_draws`, `epsilon` is the machine epsilon of the stream's
    dtype. Halves and replicates are formed where both halves have tokens. Without `directions` there are eigenvalues
    alone: of all tokens and without each group.
    """
    first = layers[0][0]
    if first.count(None) == 0:
        return [_without_tokens(groupings[0], epsilon) for groupings in layers]
    halved = all(first.count(side) for side in (0, 1))
    solved = solve((groupings[0].matrix(None) for groupings in layers), [first.size(None)] * len(layers))
    if not directions:
        return [
            _eigenvalues(groupings, eigen, epsilon, halved) for groupings, eigen in zip(layers, solved, strict=True)
        ]
    wholes = [
        _whole(groupings, eigen, draw(), epsilon) for groupings, eigen, draw in zip(layers, solved, draws, strict=True)
    ]
    if not halved:
        return [whole.spectra for whole in wholes]
    del solved  # it takes as much memory as the halves will
    return [_with_halves(groupings, whole, solve, epsilon) for groupings, whole in zip(layers, wholes, strict=True)]


def _without_tokens(grouped: Groups, epsilon: float) -> LayerSpectra:
    """Return the spectra of a layer of which no token enters."""
    statistics = _statistics(grouped, np.zeros(0), grouped.within(None), epsilon)
    directions = torch.zeros(TOP_K, grouped.hidden, dtype=torch.float64)
    return LayerSpectra(statistics, directions, torch.zeros(RANDOM_DRAWS, grouped.hidden))


def _eigenvalues(groupings: Sequence[Groups], eigen: Eigen, epsilon: float, halved: bool) -> LayerSpectra:
    """Return the spectra of all tokens and without each group, which have no directions."""
    grouped = groupings[0]
    spectrum = grouped.spectrum(None, eigen, min(grouped.count(None), grouped.hidden))
    statistics = _statistics(grouped, spectrum.eigenvalues.cpu().numpy(), grouped.within(None), epsilon)
    nothing = torch.zeros(0, grouped.hidden)
    spectra = LayerSpectra(statistics, nothing, nothing)
    if not halved:
        return spectra
    replicates = []
    for each in groupings:
        removed = each.removals(None, spectrum)
        without = _statistics_without(each, spectrum.eigenvalues, removed, _ritz(spectrum, removed.blocks), epsilon)
        replicates.append(Replicates(without, nothing[None], nothing[None]))
    units, *documents = replicates
    return replace(spectra, replicates=units, documents=documents[0] if documents else None)


def _whole(groupings: Sequence[Groups], eigen: Eigen, draws: Float32[Tensor, "draws rank"], epsilon: float) -> _Whole:
    """Return the spectra of all tokens, from the eigenpairs of their matrix."""
    grouped = groupings[0]
    spectrum = grouped.spectrum(None, eigen, min(grouped.count(None), grouped.hidden))
    removed = tuple(each.removals(None, spectrum) for each in groupings) if len(grouped.tokens) > 1 else ()
    eigenvalues = spectrum.eigenvalues.cpu().numpy()
    pairs = _Pairs.of(grouped, eigenvalues, removed[0]) if removed else None
    between = None if pairs is None else pairs.between(grouped)
    spectra = LayerSpectra(
        _statistics(grouped, eigenvalues, grouped.within(None), epsilon, between),
        _first(spectrum.directions, TOP_K).cpu(),
        _random_directions(spectrum, draws),
    )
    # A copy: a view would keep all directions in memory.
    leading = Spectrum(spectrum.eigenvalues, spectrum.directions[:LEADING].clone())
    without = []
    for each in removed:
        ritz = _ritz(leading, each.blocks)
        without.append((ritz, _directions_without(spectrum, ritz, _outside(spectrum, each, ritz))))
    return _Whole(spectra, leading, removed, tuple(without), pairs)


def _with_halves(groupings: Sequence[Groups], whole: _Whole, solve: Eigensolver, epsilon: float) -> LayerSpectra:
    """Return the spectra with the leading part of each half, and with replicates."""
    halves = [_half(groupings[0], side, whole.leading, solve) for side in (0, 1)]
    a, b = (
        _statistics(groupings[0], half.eigenvalues.cpu().numpy(), groupings[0].within(side), epsilon)
        for side, half in enumerate(halves)
    )
    of_a, of_b = (_first(half.directions, TOP_K).cpu() for half in halves)
    units, *documents = (
        _replicates(groupings[number], whole, number, halves, epsilon) for number in range(len(groupings))
    )
    return replace(
        whole.spectra,
        halves=(a, b),
        half_directions=(of_a, of_b),
        replicates=units,
        documents=documents[0] if documents else None,
    )


def _half(grouped: Groups, side: int, leading: Spectrum, solve: Eigensolver) -> Spectrum:
    """Return the spectrum of a half with LEADING directions: that of an eigenproblem where it is small or needed."""
    size = grouped.size(side)
    if size > SMALL * LEADING:
        spectrum = leading_spectrum(lambda columns: grouped.times(side, columns), leading.directions)
        if spectrum is not None:
            return spectrum
    (eigen,) = solve([grouped.matrix(side)], [size])
    return grouped.spectrum(side, eigen, LEADING)


def _replicates(grouped: Groups, whole: _Whole, number: int, halves: Sequence[Spectrum], epsilon: float) -> Replicates:
    """Return a layer without each group of a grouping; figures of pairs of groups are those of the first one, units."""
    everything, (ritz, directions) = grouped.within(None), whole.without[number]
    pairs = None if number else whole.pairs
    statistics = _statistics_without(
        grouped, whole.leading.eigenvalues, whole.removed[number], ritz, epsilon, pairs=pairs
    )
    of_half = torch.zeros(len(everything), TOP_K, grouped.hidden)
    for side, half in enumerate(halves):
        of_side = _ritz(half, grouped.removals(side, half).blocks)
        of_half[side::2] = _directions_without(half, of_side, _applied(grouped, side, half, of_side))
    return Replicates(statistics, directions, of_half)


def _statistics_without(
    grouped: Groups,
    eigenvalues: Float64[Tensor, " rank"],
    removed: Removals,
    ritz: Ritz,
    epsilon: float,
    *,
    pairs: _Pairs | None = None,
) -> tuple[LayerStatistics, ...]:
    """Return the statistics without each group, with sums over pairs of groups where `pairs` are given."""
    everything, remaining = grouped.within(None), _eigenvalues_without(eigenvalues, removed, ritz)
    out = []
    for g in everything:
        between = None if pairs is None else pairs.between(grouped, g)
        out.append(_statistics(grouped, remaining[g], [i for i in everything if i != g], epsilon, between))
    return tuple(out)


def _ritz(spectrum: Spectrum, blocks: Float64[Tensor, "groups m m"]) -> Ritz:
    """Return the eigenpairs of S - E_g in the span of the leading directions, for each group g, on the host.

    Small problems are solved on the host in one call: a GPU would spend its time on launching them.
    """
    diagonal = torch.diag(_first(spectrum.eigenvalues[:, None], blocks.shape[1]).flatten())
    values, vectors = torch.linalg.eigh((diagonal - blocks).cpu())
    return values.flip(1), vectors.flip(2)


def _eigenvalues_without(
    eigenvalues: Float64[Tensor, " rank"], removed: Removals, ritz: Ritz
) -> Float64[np.ndarray, "groups rank"]:
    """Return the eigenvalues of S - E_g for each group g, to second order in E_g.

    The leading ones are exact within the span of the leading directions of S; what the other directions do to them, and
    to each other, is taken to second order (`groups.mixing`).
    """
    remaining = eigenvalues - removed.energies[:, : len(eigenvalues)]
    if removed.borders is not None:
        values, vectors = (part.to(eigenvalues.device) for part in ritz)
        count = min(values.shape[1], len(eigenvalues))
        values, vectors, rest = values[:, :count], vectors.mT[:, :count].float(), remaining[:, count:]
        with_leading = torch.zeros_like(values), torch.zeros_like(rest)
        at_once = max(1, entries_at_once(eigenvalues.device) // max(1, count * rest.shape[1]))
        for groups in torch.split(torch.arange(len(values), device=values.device), at_once):
            moved = mixing(vectors[groups] @ removed.borders[groups], half_gaps(values[groups], rest[groups]))
            with_leading[0][groups] = moved.sum(dim=2, dtype=torch.float64)
            with_leading[1][groups] = moved.sum(dim=1, dtype=torch.float64)
        rest = rest - with_leading[1] + (0.0 if removed.shifts is None else removed.shifts)
        remaining = torch.cat([values + with_leading[0], rest], dim=1)
    out = remaining.cpu().numpy()
    out[out <= _rounding(float(eigenvalues[0]), len(eigenvalues))] = 0.0
    return np.asarray(out)


def _rounding(largest: float, size: int) -> float:
    """Return the energy at or below which rounding decides, where `largest` was the largest before the deletion."""
    return float(largest) * max(size, LEADING) * float(np.finfo(np.float64).eps)


def _outside(spectrum: Spectrum, removed: Removals, ritz: Ritz) -> Float64[Tensor, "groups hidden k"]:
    """Return S - E_g times its leading Ritz vectors, from what E_g does in all directions of S."""
    assert removed.borders is not None
    values, vectors = ritz[0][:, :TOP_K].to(spectrum.directions.device), ritz[1][:, :, :TOP_K]
    vectors = vectors.to(spectrum.directions.device)
    count = vectors.shape[1]
    rest = spectrum.directions[count : count + removed.borders.shape[2]]
    inside = spectrum.directions[:count].T @ (vectors * values[:, None, :])
    return inside - rest.T @ (removed.borders.mT @ vectors.float()).double()


def _applied(grouped: Groups, side: int, half: Spectrum, ritz: Ritz) -> Float64[Tensor, "groups hidden k"]:
    """Return S - E_g of a half times its leading Ritz vectors, for each group of the half."""
    groups, leading = grouped.within(side), half.directions[: ritz[0].shape[1]]
    inside = leading.T @ ritz[1][:, :, :TOP_K].to(leading.device)
    whole = grouped.times(side, inside.transpose(0, 1).flatten(1)).view(-1, len(groups), inside.shape[2])
    removals = [grouped.removed_times(g, side, inside[i]) for i, g in enumerate(groups)]
    return whole.transpose(0, 1) - torch.stack(removals)


def _directions_without(
    spectrum: Spectrum, ritz: Ritz, outside: Float64[Tensor, "groups hidden k"]
) -> Float32[Tensor, "groups top hidden"]:
    """Return the top-k directions of S - E_g for each group g, as unit rows.

    outside: S - E_g times the Ritz vectors. It brings in what lies outside their span, to first order in it. Rows are
    zero where the rank is below k, as it is where all tokens are in that group.
    """
    leading = spectrum.directions[: ritz[0].shape[1]]
    present = ritz[0][:, :TOP_K] > _rounding(float(spectrum.eigenvalues[0]), len(spectrum.eigenvalues))
    present = present.to(leading.device)
    norms = outside.norm(dim=1, keepdim=True)
    outside = outside / torch.where(norms > 0, norms, torch.ones_like(norms))
    rows = orthonormal(outside * present[:, None, :]).mT  # no more of them than dimensions
    # The sign of a direction is a convention; replicates take that of the whole, from which they then differ little.
    along = (rows * leading[: rows.shape[1]]).sum(dim=2, keepdim=True)
    rows = torch.where(along < 0, -rows, rows) * present[:, : rows.shape[1], None]
    out = torch.zeros(len(rows), TOP_K, leading.shape[1])
    out[:, : rows.shape[1]] = rows.float()
    return out


def _statistics(
    grouped: Groups,
    eigenvalues: Float64[np.ndarray, " rank"],
    groups: Sequence[int],
    epsilon: float,
    between: tuple[float, float] | None = None,
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
    return LayerStatistics(tokens, grouped.hidden, scaled, averages, in_mean, epsilon, between)


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
