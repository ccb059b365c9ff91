"""What deleting a group of documents changes: the material of every interval, from one eigenproblem of all tokens.

Documents are the unit of resampling: tokens of one document are no independent draws. Document i belongs to group
i modulo the number of groups; that number is even, so that each group lies within one of the halves a (even documents)
and b (odd).

Without group g the second moment of the updates is S - E_g. Its spectrum is taken to first order in E_g,
lambda_i - v_i^T E_g v_i, the infinitesimal jackknife: it gives every function of the spectrum its standard error, while
its bias is read off the halves, which have eigenproblems of their own (uncertainty.py). Its leading directions are the
Ritz vectors of S - E_g in the span of LEADING directions of S, corrected to first order for what lies outside.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from delta_suite.reduction.eigen import Eigen, Eigensolver
from delta_suite.reduction.gram import (
    Spectrum,
    algebra_device,
    spectrum_of_gram,
    spectrum_of_tokens_gram,
    times_transposed,
    tokens_gram,
)
from delta_suite.reduction.moments import TOKEN_QUANTITIES, Moments
from delta_suite.reduction.statistics import TOP_K, LayerStatistics

GROUPS = 10
"""Groups of documents; fewer documents make fewer groups."""

LEADING = 64
"""Directions of S in whose span the directions of S - E_g are first sought."""

RANDOM_DRAWS = 100
"""Random directions per layer, drawn with the covariance of its updates."""


def group_count(documents: int) -> int:
    """How many groups: GROUPS, or as many as there are documents, made even; 1 where there are no two."""
    return min(GROUPS, documents // 2 * 2) if documents > 1 else 1


def half_by_half(groups: int) -> list[int]:
    """All groups, those of half a first."""
    return [*range(0, groups, 2), *range(1, groups, 2)]


def rows_by_group(group: Int64[Tensor, " tokens"], groups: int) -> Int64[Tensor, " tokens"]:
    """The order of tokens in which each group lies together, and each half: as GroupedRows takes them."""
    place = torch.empty(groups, dtype=torch.int64)
    place[half_by_half(groups)] = torch.arange(groups)
    return torch.argsort(place[group], stable=True)


class Groups(ABC):
    """The updates of one layer in one variant, by group of documents."""

    def __init__(
        self,
        tokens: list[int],
        sums: Float64[Tensor, "groups quantities"],
        squares: Float64[Tensor, "groups quantities"],
        totals: Float64[Tensor, "groups hidden"],
        centre: bool,
    ) -> None:
        """tokens, sums and squares of the token quantities, and summed updates, each of every group."""
        self.tokens, self.totals, self.centre = tokens, totals, centre
        # All that statistics are made of goes to the host at once: asked one by one, a GPU would stop for each.
        parts = [sums, squares, totals @ totals.T, *(self._grams() if len(tokens) > 1 else ())]
        small = torch.cat([own.to(totals.device) for own in parts], dim=1).cpu().numpy()
        ends = np.cumsum([own.shape[1] for own in parts])
        self.sums, self.squares, self.products, *of_grams = np.split(small, ends[:-1], axis=1)
        """`products`: inner products of the groups' summed updates."""
        self.traces: Float64[np.ndarray, "groups 1"]
        self.overlaps: Float64[np.ndarray, "groups groups"]
        self.traces, self.overlaps = of_grams or [np.zeros((1, 1))] * 2
        """tr G_a (one column) and tr G_a G_b of the groups' Gram matrices; nothing of a single group."""

    @abstractmethod
    def _grams(self) -> tuple[Float64[Tensor, "groups 1"], Float64[Tensor, "groups groups"]]:
        """tr G_a and tr G_a G_b, centred on the mean of all groups where the variant is."""

    @abstractmethod
    def matrix(self, groups: Sequence[int]) -> Float64[Tensor, "n n"]:
        """Whose eigenpairs give the spectrum of these groups together, centred on their own mean where the variant is.

        It may be overwritten.
        """

    @abstractmethod
    def size(self, groups: Sequence[int]) -> int:
        """n of their matrix."""

    @abstractmethod
    def spectrum(self, groups: Sequence[int], eigen: Eigen, k: int) -> Spectrum:
        """From the eigenpairs of their matrix."""

    @abstractmethod
    def removals(
        self, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, "groups r"], Float64[Tensor, "groups m m"]]:
        """v_i^T E_g v_i for all r rows of the basis, and V E_g V^T for the first LEADING of them, for each group g.

        E_g is what deleting it takes from the second moment of `groups`.
        """

    @abstractmethod
    def times(self, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        """S, the second moment of `groups`, times vectors."""

    @abstractmethod
    def removed_times(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """E_g times vectors."""


class GroupedRows(Groups):
    """Kept as rows: fewer tokens than hidden dimensions, all of them at hand."""

    def __init__(
        self,
        rows: Float32[Tensor, "tokens hidden"],
        quantities: Float64[Tensor, "tokens quantities"],
        tokens: Sequence[int],
        centre: bool,
    ) -> None:
        """rows and quantities lie as rows_by_group has them; tokens: of each group."""
        order = half_by_half(len(tokens))
        ends = np.cumsum([tokens[g] for g in order]).tolist()
        self._slice = {g: slice(end - tokens[g], end) for g, end in zip(order, ends, strict=True)}
        # In float32, as updates are: copies in float64 come and go with what needs them.
        self._rows = rows.to(algebra_device(rows.device))
        own = [quantities[self._slice[g]] for g in range(len(tokens))]
        super().__init__(
            list(tokens),
            torch.stack([x.sum(dim=0) for x in own]),
            torch.stack([x.square().sum(dim=0) for x in own]),
            torch.stack([self._rows[self._slice[g]].sum(dim=0, dtype=torch.float64) for g in range(len(tokens))]),
            centre,
        )

    def _grams(self) -> tuple[Float64[Tensor, "groups 1"], Float64[Tensor, "groups groups"]]:
        rows = self._of(range(len(self.tokens)))
        member = torch.zeros(len(rows), len(self.tokens), dtype=torch.float64, device=rows.device)
        for group, own in enumerate(self._slices(range(len(self.tokens)))):
            member[own, group] = 1.0
        products = tokens_gram(rows)
        # tr G_a G_b = ||X_a X_b^T||_F^2, and X X^T is of the smaller side here.
        return member.T @ products.diagonal()[:, None], member.T @ products.square_() @ member

    def _mean(self, groups: Sequence[int]) -> Float64[Tensor, " hidden"]:
        return self.totals[list(groups)].sum(dim=0) / max(1, self.size(groups))

    def _slices(self, groups: Sequence[int]) -> list[slice]:
        """Where each group is in `_of` them: all groups, or one half, as those lie together."""
        own = [self._slice[g] for g in groups]
        first = min(s.start for s in own)
        return [slice(s.start - first, s.stop - first) for s in own]

    def _of(self, groups: Sequence[int]) -> Float[Tensor, "tokens hidden"]:
        first = min(self._slice[g].start for g in groups)
        rows = self._rows[first : first + self.size(groups)]
        return rows.double().sub_(self._mean(groups)) if self.centre else rows

    def matrix(self, groups: Sequence[int]) -> Float64[Tensor, "n n"]:
        return tokens_gram(self._of(groups))

    def size(self, groups: Sequence[int]) -> int:
        return sum(self.tokens[g] for g in groups)

    def spectrum(self, groups: Sequence[int], eigen: Eigen, k: int) -> Spectrum:
        return spectrum_of_tokens_gram(eigen, self._of(groups), k)

    def _removed(self, group: int, groups: Sequence[int]) -> Float64[Tensor, "removed hidden"]:
        """Rows R with E_g = R^T R."""
        rows = self._rows[self._slice[group]].double()
        return self._anew(rows.sub_(self._mean(groups)) if self.centre else rows, group, groups)

    def _anew(self, rows: Float64[Tensor, "own m"], group: int, groups: Sequence[int]) -> Float64[Tensor, "removed m"]:
        """A group's rows, or their coordinates, and where the variant is centred one more: those that stay are centred
        anew, on their own mean."""
        if not self.centre:
            return rows
        left = self.size(groups) - self.tokens[group]
        return torch.cat([rows, rows.sum(dim=0, keepdim=True) / max(1, left) ** 0.5])

    def removals(
        self, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, "groups r"], Float64[Tensor, "groups m m"]]:
        along = times_transposed(self._of(groups), basis)
        parts = [self._anew(along[own], g, groups) for g, own in zip(groups, self._slices(groups), strict=True)]
        energies = torch.stack([part.square().sum(dim=0) for part in parts])
        return energies, torch.stack([part[:, :LEADING].T @ part[:, :LEADING] for part in parts])

    def times(self, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        rows = self._of(groups).double()
        return rows.T @ (rows @ vectors)

    def removed_times(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        removed = self._removed(group, groups)
        return removed.T @ (removed @ vectors)


class GroupedMoments(Groups):
    """Kept as moments of each group: more tokens than hidden dimensions, or several shards."""

    def __init__(self, moments: Sequence[Moments | None], centre: bool) -> None:
        """One of each group, None for a group without tokens; one group at least has some."""
        some = next(own for own in moments if own is not None)
        self._moments = [some.none() if own is None else own for own in moments]
        self._total: dict[tuple[int, ...], Moments] = {}
        super().__init__(
            [own.tokens for own in self._moments],
            torch.stack([own.sums for own in self._moments]),
            torch.stack([own.squares for own in self._moments]),
            torch.stack([own.total for own in self._moments]),
            centre,
        )

    def _grams(self) -> tuple[Float64[Tensor, "groups 1"], Float64[Tensor, "groups groups"]]:
        flat = [own.gram.flatten() for own in self._moments]
        traces = torch.stack([own.gram.diagonal().sum() for own in self._moments])
        overlaps = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=traces.device)
        for a, one in enumerate(flat):
            for b, other in enumerate(flat[: a + 1]):
                overlaps[a, b] = overlaps[b, a] = one @ other
        if not self.centre:
            return traces[:, None], overlaps
        # Of G_a - t_a m^T - m t_a^T + n_a m m^T, t_a the group's summed updates and m the mean, without forming it.
        n = torch.tensor(self.tokens, dtype=torch.float64, device=traces.device)
        totals = self.totals
        mean = totals.sum(dim=0) / n.sum().clamp_min(1)
        images = torch.stack([own.gram @ mean for own in self._moments])  # G_a m
        along, square, inside = totals @ mean, mean @ mean, images @ mean
        crossed = torch.outer(n, inside) - 2 * (totals @ images.T)  # [b, a]: of G_a with what is taken from G_b
        shifts = 2 * (totals @ totals.T * square + torch.outer(along, along))
        shifts = shifts - 2 * square * (torch.outer(n, along) + torch.outer(along, n)) + square**2 * torch.outer(n, n)
        return (traces - 2 * along + n * square)[:, None], overlaps + crossed + crossed.T + shifts

    def _of(self, groups: Sequence[int]) -> Moments:
        key = tuple(groups)
        if key not in self._total:
            first, *others = (self._moments[g] for g in groups)
            for own in others:
                first = first + own
            self._total[key] = first
        return self._total[key]

    def matrix(self, groups: Sequence[int]) -> Float64[Tensor, "n n"]:
        total = self._of(groups)
        return total.centred().gram if self.centre else total.gram.clone()

    def size(self, groups: Sequence[int]) -> int:
        return int(self.totals.shape[1])

    def spectrum(self, groups: Sequence[int], eigen: Eigen, k: int) -> Spectrum:
        return spectrum_of_gram(eigen, sum(self.tokens[g] for g in groups), k)

    def _extra(self, group: int, groups: Sequence[int]) -> Float64[Tensor, " hidden"]:
        """e, where centring those that stay anew, on their own mean, takes e e^T more from the second moment."""
        total, own = self._of(groups), self._moments[group]
        shifted = own.total - total.total * (own.tokens / max(1, total.tokens))
        left = float(max(1, total.tokens - own.tokens))
        scaled: Tensor = shifted / left**0.5
        return scaled

    def removed_times(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        own = self._moments[group]
        out = own.gram @ vectors
        if not self.centre:
            return out
        total = self._of(groups)
        mean = total.total / max(1, total.tokens)
        # sum over the group of (x - m)(x - m)^T, and the shift of the mean of those that stay.
        along_mean, along_own, extra = mean @ vectors, own.total @ vectors, self._extra(group, groups)
        out = out - torch.outer(own.total, along_mean) - torch.outer(mean, along_own)
        return out + own.tokens * torch.outer(mean, along_mean) + torch.outer(extra, extra @ vectors)

    def removals(
        self, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, "groups r"], Float64[Tensor, "groups m m"]]:
        products = [self.removed_times(group, groups, basis.T) for group in groups]
        energies = torch.stack([(basis * product.T).sum(dim=1) for product in products])
        return energies, torch.stack([basis[:LEADING] @ product[:, :LEADING] for product in products])

    def times(self, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        total = self._of(groups)
        whole = total.gram @ vectors
        if self.centre:
            whole = whole - torch.outer(total.total, total.total @ vectors) / max(1, total.tokens)
        return whole


@dataclass(frozen=True)
class LayerSpectra:
    """One layer in one variant, of all tokens, of each half of the documents, and without each group of them.

    Statistics of halves and replicates are scaled to the token count of the whole, so that all are comparable.
    Directions are unit rows, on the host; those of replicates and random ones in float32.
    """

    statistics: LayerStatistics
    directions: Float[Tensor, "k hidden"]
    random: Float[Tensor, "draws hidden"]
    """Directions drawn from a Gaussian with the covariance of the updates."""
    halves: tuple[LayerStatistics, LayerStatistics] | None = None
    half_directions: tuple[Float[Tensor, "k hidden"], Float[Tensor, "k hidden"]] | None = None
    replicates: tuple[LayerStatistics, ...] = ()
    replicate_directions: Float[Tensor, "groups k hidden"] | None = None
    """Without each group, all other documents."""
    replicate_half_directions: Float[Tensor, "groups k hidden"] | None = None
    """Without each group, the documents of its own half."""


def random_draws(layer: int, rank: int) -> Float32[Tensor, "draws rank"]:
    """Standard normal, the same in each run and on each device, and for all variants of a layer."""
    return torch.from_numpy(np.random.default_rng(layer).standard_normal((RANDOM_DRAWS, rank), dtype=np.float32))


@dataclass(frozen=True)
class _Whole:
    """A layer once the spectrum of all its documents is known, and what of that is needed later."""

    kept: LayerSpectra
    leading: Spectrum
    """With LEADING directions."""
    energies: Float64[np.ndarray, "groups rank"] | None = None
    """v_i^T E_g v_i of every direction, for replicates."""
    removed: Float64[Tensor, "groups m m"] | None = None
    """V E_g V^T of the leading ones."""


def resample(
    layers: Sequence[Groups],
    draws: Sequence[Callable[[], Float32[Tensor, "draws rank"]]],
    solve: Eigensolver,
    *,
    epsilon: float,
    intervals: bool = True,
) -> list[LayerSpectra]:
    """Everything that is kept of some layers in one variant, all of the same tokens.

    draws: each layer's random_draws. intervals: whether replicates are formed; halves are, wherever there are two.
    epsilon: machine epsilon of the stream's dtype.
    """
    first = layers[0]
    tokens, everything = first.tokens, range(len(first.tokens))
    if sum(tokens) == 0:
        return [_without_tokens(own, epsilon) for own in layers]
    sides = [list(everything[side::2]) for side in (0, 1)]
    halved = all(any(tokens[g] for g in side) for side in sides)
    solved = solve((own.matrix(everything) for own in layers), [first.size(everything)] * len(layers))
    wholes = [
        _whole(own, eigen, draw(), epsilon, intervals and halved)
        for own, eigen, draw in zip(layers, solved, draws, strict=True)
    ]
    if not halved:
        return [own.kept for own in wholes]
    del solved  # as much memory again as the halves take
    solved = solve((own.matrix(side) for own in layers for side in sides), [first.size(s) for s in sides] * len(layers))
    return [
        _with_halves(own, whole, sides, solved[2 * i : 2 * i + 2], epsilon)
        for i, (own, whole) in enumerate(zip(layers, wholes, strict=True))
    ]


def _without_tokens(own: Groups, epsilon: float) -> LayerSpectra:
    nothing = own.totals.new_zeros(TOP_K, own.totals.shape[1])
    statistics = _statistics(own, np.zeros(0), range(len(own.tokens)), epsilon)
    return LayerSpectra(
        statistics, _kept(nothing), _kept(own.totals.new_zeros(RANDOM_DRAWS, own.totals.shape[1]).float())
    )


def _whole(own: Groups, eigen: Eigen, draws: Float32[Tensor, "draws rank"], epsilon: float, intervals: bool) -> _Whole:
    groups = range(len(own.tokens))
    spectrum = own.spectrum(groups, eigen, min(sum(own.tokens), own.totals.shape[1]))
    eigenvalues = spectrum.eigenvalues.cpu().numpy()
    kept = LayerSpectra(
        _statistics(own, eigenvalues, groups, epsilon),
        _kept(_first(spectrum.directions, TOP_K)),
        _random(spectrum, draws),
    )
    # A copy: a view would hold all directions.
    leading = Spectrum(spectrum.eigenvalues, spectrum.directions[:LEADING].clone())
    if not intervals:
        return _Whole(kept, leading)
    energies, removed = own.removals(groups, spectrum.directions)
    return _Whole(kept, leading, energies.cpu().numpy()[:, : len(eigenvalues)], removed)


def _with_halves(
    own: Groups, whole: _Whole, sides: Sequence[list[int]], solved: Sequence[Eigen], epsilon: float
) -> LayerSpectra:
    groups = range(len(own.tokens))
    halves = [own.spectrum(side, eigen, LEADING) for side, eigen in zip(sides, solved, strict=True)]
    a, b = (
        _statistics(own, half.eigenvalues.cpu().numpy(), side, epsilon)
        for half, side in zip(halves, sides, strict=True)
    )
    of_a, of_b = (_kept(_first(half.directions, TOP_K)) for half in halves)
    kept = replace(whole.kept, halves=(a, b), half_directions=(of_a, of_b))
    if whole.energies is None or whole.removed is None:
        return kept
    left = _spectra_without(whole.leading.eigenvalues.cpu().numpy(), whole.energies)
    of_half = torch.zeros(len(groups), TOP_K, own.totals.shape[1])
    for side, half in zip(sides, halves, strict=True):
        of_half[side] = _directions_without(own, side, half, own.removals(side, half.directions)[1])
    return replace(
        kept,
        replicates=tuple(_statistics(own, left[g], [i for i in groups if i != g], epsilon) for g in groups),
        replicate_directions=_directions_without(own, groups, whole.leading, whole.removed),
        replicate_half_directions=of_half,
    )


def _spectra_without(
    eigenvalues: Float64[np.ndarray, " rank"], energies: Float64[np.ndarray, "groups rank"]
) -> Float64[np.ndarray, "groups rank"]:
    """lambda_i - v_i^T E_g v_i, in the order of the whole's directions v_i, so that a figure of the first follows it.

    Sorted anew, the spread of two that are nearly equal would be that of the larger of them: in noise, where gamma is
    covered in 0.90 of the cases so, it was then in 0.79.
    """
    left = eigenvalues - energies
    left[left <= _rounding(eigenvalues[0], len(eigenvalues))] = 0.0
    return np.asarray(left)


def _rounding(largest: float, size: int) -> float:
    """Of energies whose largest this was before a group was deleted: no more than it is no energy."""
    return float(largest) * max(size, LEADING) * float(np.finfo(np.float64).eps)


def _directions_without(
    own: Groups, groups: Sequence[int], spectrum: Spectrum, removed: Float64[Tensor, "groups m m"]
) -> Float32[Tensor, "groups k hidden"]:
    """The top-k directions of S - E_g for each group g, unit rows; zero rows where the rank is below k, as it is where
    all documents are in that group."""
    leading = spectrum.directions[: removed.shape[1]]
    diagonal = torch.diag(_first(spectrum.eigenvalues[:, None], len(leading)).flatten())
    # Small problems are solved on the host, all in one go: a GPU spends its time on being asked.
    values, vectors = torch.linalg.eigh((diagonal - removed).cpu())
    values, vectors = values.flip(1)[:, :TOP_K], vectors.flip(2)[:, :, :TOP_K].to(leading.device)
    present = values > _rounding(float(spectrum.eigenvalues[0]), len(spectrum.eigenvalues))
    inside = leading.T @ vectors
    # One application of S - E_g brings in what lies outside the span, to first order in it.
    whole = own.times(groups, inside.transpose(0, 1).flatten(1)).view(-1, len(groups), inside.shape[2])
    removals = [own.removed_times(g, groups, inside[i]) for i, g in enumerate(groups)]
    outside = whole.transpose(0, 1) - torch.stack(removals)
    norms = outside.norm(dim=1, keepdim=True)
    outside = outside / torch.where(norms > 0, norms, torch.ones_like(norms))
    outside = outside * present.to(leading.device)[:, None, :]
    # Orthonormal, in order; no more of them than dimensions.
    rows = torch.linalg.qr(outside.cpu()).Q.mT
    rows = rows * present[:, : rows.shape[1], None]
    out = torch.zeros(len(groups), TOP_K, leading.shape[1])
    out[:, : rows.shape[1]] = rows.float()
    return out


def _statistics(
    own: Groups, eigenvalues: Float64[np.ndarray, " rank"], groups: Sequence[int], epsilon: float
) -> LayerStatistics:
    """Of some groups, scaled to the token count of all."""
    tokens, count = sum(own.tokens), max(1, sum(own.tokens[g] for g in groups))
    index = list(groups)
    mean = own.sums[index].sum(axis=0) / count
    sd = np.sqrt(np.maximum(own.squares[index].sum(axis=0) / count - mean**2, 0.0))
    averages = {
        name: (float(m), float(s)) for name, m, s in zip(TOKEN_QUANTITIES, mean.tolist(), sd.tolist(), strict=True)
    }
    energy = float(eigenvalues.sum())
    total = float(own.products[np.ix_(index, index)].sum()) / count
    in_mean = 0.0 if own.centre or energy == 0 else total / energy
    scaled = eigenvalues * (tokens / count)
    between = None
    if sum(own.tokens[g] > 0 for g in groups) > 1:
        traces, overlaps = own.traces[index], own.overlaps[np.ix_(index, index)]
        between = (float(traces.sum() ** 2 - (traces**2).sum()), float(overlaps.sum() - overlaps.trace()))
    return LayerStatistics(tokens, int(own.totals.shape[1]), scaled, averages, in_mean, epsilon, between)


def _random(spectrum: Spectrum, draws: Float32[Tensor, "draws rank"]) -> Float32[Tensor, "draws hidden"]:
    """Unit rows with the distribution N(0, S) before they are normalised."""
    rank = min(len(spectrum.eigenvalues), len(spectrum.directions))
    scales = spectrum.eigenvalues[:rank].sqrt()
    rows = (draws[:, :rank].to(scales.device).double() * scales) @ spectrum.directions[:rank]
    norms = rows.norm(dim=1, keepdim=True)
    return _kept((rows / torch.where(norms > 0, norms, torch.ones_like(norms))).float())


def _first(rows: Tensor, k: int) -> Tensor:
    """The first k rows; zero rows where there are fewer."""
    out = rows.new_zeros(k, rows.shape[1])
    out[: min(k, len(rows))] = rows[:k]
    return out


def _kept(rows: Tensor) -> Float[Tensor, "k hidden"]:
    return rows.cpu()
