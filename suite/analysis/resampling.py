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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from suite.analysis.metrics import TOP_K, LayerStatistics
from suite.analysis.moments import TOKEN_QUANTITIES, Moments
from suite.analysis.spectra import Spectrum, algebra_device, spectrum_of_gram, spectrum_of_rows

GROUPS = 10
"""Groups of documents; fewer documents make fewer groups."""

LEADING = 64
"""Directions of S in whose span the directions of S - E_g are first sought."""

RANDOM_DRAWS = 100
"""Random directions per layer, drawn with the covariance of its updates."""


def group_count(documents: int) -> int:
    """How many groups: GROUPS, or as many as there are documents, made even; 1 where there are no two."""
    return min(GROUPS, documents // 2 * 2) if documents > 1 else 1


class Groups(ABC):
    """The updates of one layer in one variant, by group of documents."""

    tokens: list[int]
    """Of each group."""
    sums: Float64[Tensor, "groups quantities"]
    squares: Float64[Tensor, "groups quantities"]
    totals: Float64[Tensor, "groups hidden"]
    """Sum of each group's updates."""

    @abstractmethod
    def spectrum(self, groups: Sequence[int], k: int) -> Spectrum:
        """Of these groups together, centred on their own mean where the variant is."""

    @abstractmethod
    def removal(
        self, group: int, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, " r"], Float64[Tensor, "m m"]]:
        """v_i^T E_g v_i for all r rows of the basis, and V E_g V^T for the first LEADING of them.

        E_g is what deleting the group takes from the second moment of `groups`.
        """

    @abstractmethod
    def without(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """(S - E_g) times vectors."""


class GroupedRows(Groups):
    """Kept as rows: fewer tokens than hidden dimensions, all of them at hand."""

    def __init__(
        self,
        rows: Float32[Tensor, "tokens hidden"],
        quantities: Float64[Tensor, "tokens quantities"],
        group: Int64[Tensor, " tokens"],
        groups: int,
        centre: bool,
    ) -> None:
        index = [(group == g).nonzero().flatten() for g in range(groups)]
        self._rows = [rows[own.to(rows.device)].to(algebra_device(rows.device)).double() for own in index]
        self._centre = centre
        own = [quantities[i.to(quantities.device)] for i in index]
        self.tokens = [len(i) for i in index]
        self.sums = torch.stack([x.sum(dim=0) for x in own])
        self.squares = torch.stack([x.square().sum(dim=0) for x in own])
        self.totals = torch.stack([x.sum(dim=0) for x in self._rows])

    def _mean(self, groups: Sequence[int]) -> Float64[Tensor, " hidden"]:
        return self.totals[list(groups)].sum(dim=0) / max(1, sum(self.tokens[g] for g in groups))

    def _of(self, groups: Sequence[int]) -> Float64[Tensor, "tokens hidden"]:
        rows = torch.cat([self._rows[g] for g in groups])
        return rows - self._mean(groups) if self._centre else rows

    def spectrum(self, groups: Sequence[int], k: int) -> Spectrum:
        return spectrum_of_rows(self._of(groups), k)

    def _removed(self, group: int, groups: Sequence[int]) -> Float64[Tensor, "removed hidden"]:
        """Rows R with E_g = R^T R. Where the rows are centred, those that stay are centred anew, on their own mean."""
        if not self._centre:
            return self._rows[group]
        rows = self._rows[group] - self._mean(groups)
        left = sum(self.tokens[g] for g in groups) - self.tokens[group]
        return torch.cat([rows, rows.sum(dim=0, keepdim=True) / max(1, left) ** 0.5])

    def removal(
        self, group: int, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, " r"], Float64[Tensor, "m m"]]:
        along = self._removed(group, groups) @ basis.T
        leading = along[:, :LEADING]
        return along.square().sum(dim=0), leading.T @ leading

    def without(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        rows, removed = self._of(groups), self._removed(group, groups)
        return torch.sub(rows.T @ (rows @ vectors), removed.T @ (removed @ vectors))


class GroupedMoments(Groups):
    """Kept as moments of each group: more tokens than hidden dimensions, or several shards."""

    def __init__(self, moments: Sequence[Moments | None], centre: bool) -> None:
        """One of each group, None for a group without tokens; one group at least has some."""
        empty = next(own for own in moments if own is not None).none()
        self._moments = [own or empty for own in moments]
        self._centre = centre
        self._total: dict[tuple[int, ...], Moments] = {}
        self.tokens = [own.tokens for own in self._moments]
        self.sums = torch.stack([own.sums for own in self._moments])
        self.squares = torch.stack([own.squares for own in self._moments])
        self.totals = torch.stack([own.total for own in self._moments])

    def _of(self, groups: Sequence[int]) -> Moments:
        key = tuple(groups)
        if key not in self._total:
            first, *others = (self._moments[g] for g in groups)
            for own in others:
                first = first + own
            self._total[key] = first
        return self._total[key]

    def spectrum(self, groups: Sequence[int], k: int) -> Spectrum:
        total = self._of(groups)
        return spectrum_of_gram(total.centred().gram if self._centre else total.gram, total.tokens, k)

    def _extra(self, group: int, groups: Sequence[int]) -> Float64[Tensor, " hidden"]:
        """e, where centring those that stay anew, on their own mean, takes e e^T more from the second moment."""
        total, own = self._of(groups), self._moments[group]
        shifted = own.total - total.total * (own.tokens / max(1, total.tokens))
        left = float(max(1, total.tokens - own.tokens))
        scaled: Tensor = shifted / left**0.5
        return scaled

    def _times(self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]) -> Tensor:
        """E_g times vectors."""
        own = self._moments[group]
        out = own.gram @ vectors
        if not self._centre:
            return out
        total = self._of(groups)
        mean = total.total / max(1, total.tokens)
        # sum over the group of (x - m)(x - m)^T, and the shift of the mean of those that stay.
        along_mean, along_own, extra = mean @ vectors, own.total @ vectors, self._extra(group, groups)
        out = out - torch.outer(own.total, along_mean) - torch.outer(mean, along_own)
        return out + own.tokens * torch.outer(mean, along_mean) + torch.outer(extra, extra @ vectors)

    def removal(
        self, group: int, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, " r"], Float64[Tensor, "m m"]]:
        product = self._times(group, groups, basis.T)
        return (basis * product.T).sum(dim=1), basis[:LEADING] @ product[:, :LEADING]

    def without(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        total = self._of(groups)
        whole = total.gram @ vectors
        if self._centre:
            whole = whole - torch.outer(total.total, total.total @ vectors) / max(1, total.tokens)
        return torch.sub(whole, self._times(group, groups, vectors))


@dataclass(frozen=True)
class LayerSpectra:
    """One layer in one variant, of all tokens, of each half of the documents, and without each group of them.

    Statistics of halves and replicates are scaled to the token count of the whole, so that all are comparable.
    Directions are unit rows, on the host; those of replicates in float32.
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


def resample(own: Groups, *, layer: int, centre: bool, epsilon: float, intervals: bool = True) -> LayerSpectra:
    """Everything that is kept of one layer in one variant.

    `intervals`: whether replicates are formed; halves are, wherever there are two. `epsilon`: of the stream's dtype.
    """
    groups = range(len(own.tokens))
    everything = list(groups)
    hidden = own.totals.shape[1]
    tokens = sum(own.tokens)
    if tokens == 0:
        nothing = Spectrum(own.totals.new_zeros(0), own.totals.new_zeros(TOP_K, hidden))
        empty = _statistics(own, nothing.eigenvalues, everything, tokens, centre, epsilon)
        return LayerSpectra(empty, _kept(nothing.directions), _kept(own.totals.new_zeros(RANDOM_DRAWS, hidden)))
    whole = own.spectrum(everything, min(tokens, hidden))
    statistics = _statistics(own, whole.eigenvalues, everything, tokens, centre, epsilon)
    directions = _kept(_first(whole.directions, TOP_K))
    random = _random(whole, layer)
    sides = [[g for g in groups if g % 2 == side] for side in (0, 1)]
    if any(sum(own.tokens[g] for g in side) == 0 for side in sides):
        return LayerSpectra(statistics, directions, random)
    halves = [own.spectrum(side, LEADING) for side in sides]
    a, b = (
        _statistics(own, half.eigenvalues, side, tokens, centre, epsilon)
        for half, side in zip(halves, sides, strict=True)
    )
    of_a, of_b = (_kept(_first(half.directions, TOP_K)) for half in halves)
    kept = LayerSpectra(statistics, directions, random, (a, b), (of_a, of_b))
    if not intervals:
        return kept
    replicates, removed, removed_of_half = [], [], []
    for group in groups:
        energies, leading = own.removal(group, everything, whole.directions)
        left = (whole.eigenvalues - energies[: len(whole.eigenvalues)]).clamp_min(0.0)
        others = [g for g in groups if g != group]
        replicates.append(_statistics(own, left, others, tokens, centre, epsilon))
        removed.append(leading)
        removed_of_half.append(own.removal(group, sides[group % 2], halves[group % 2].directions)[1])
    of_half = torch.zeros(len(groups), TOP_K, hidden)
    for side, half in zip(sides, halves, strict=True):
        of_half[side] = _directions_without(own, side, side, half, [removed_of_half[g] for g in side])
    return replace(
        kept,
        replicates=tuple(replicates),
        replicate_directions=_directions_without(own, everything, everything, whole, removed),
        replicate_half_directions=of_half,
    )


def _directions_without(
    own: Groups,
    left_out: Sequence[int],
    groups: Sequence[int],
    spectrum: Spectrum,
    removed: Sequence[Float64[Tensor, "m m"]],
) -> Float32[Tensor, "left_out k hidden"]:
    """The top-k directions of S - E_g for each g that is left out, unit rows; zero rows where the rank is below k."""
    leading = spectrum.directions[: len(removed[0])]
    diagonal = torch.diag(_first(spectrum.eigenvalues[:, None], len(leading)).flatten())
    # Small problems are solved on the host, all in one go: a GPU spends its time on being asked.
    values, vectors = torch.linalg.eigh((diagonal - torch.stack(list(removed))).cpu())
    values, vectors = values.flip(1)[:, :TOP_K], vectors.flip(2)[:, :, :TOP_K].to(leading.device)
    present = values > values[:, :1].clamp_min(0.0) * len(leading) * torch.finfo(torch.float64).eps
    inside = leading.T @ vectors
    # One application of S - E_g brings in what lies outside the span, to first order in it.
    outside = torch.stack([own.without(g, groups, inside[i]) for i, g in enumerate(left_out)])
    norms = outside.norm(dim=1, keepdim=True)
    outside = outside / torch.where(norms > 0, norms, torch.ones_like(norms))
    outside = outside * present.to(leading.device)[:, None, :]
    # Orthonormal, in order; no more of them than dimensions.
    rows = torch.linalg.qr(outside.cpu()).Q.mT
    rows = rows * present[:, : rows.shape[1], None]
    out = torch.zeros(len(left_out), TOP_K, leading.shape[1])
    out[:, : rows.shape[1]] = rows.float()
    return out


def _statistics(
    own: Groups, eigenvalues: Tensor, groups: Sequence[int], tokens: int, centre: bool, epsilon: float
) -> LayerStatistics:
    """Of some groups, scaled to `tokens` tokens."""
    count = max(1, sum(own.tokens[g] for g in groups))
    index = list(groups)
    mean = own.sums[index].sum(dim=0) / count
    sd = (own.squares[index].sum(dim=0) / count - mean.square()).clamp_min(0.0).sqrt()
    averages = {
        name: (float(m), float(s)) for name, m, s in zip(TOKEN_QUANTITIES, mean.tolist(), sd.tolist(), strict=True)
    }
    energy = float(eigenvalues.sum())
    total = float(own.totals[index].sum(dim=0).square().sum()) / count
    in_mean = 0.0 if centre or energy == 0 else total / energy
    scaled = eigenvalues.cpu().numpy() * (tokens / count)
    return LayerStatistics(tokens, int(own.totals.shape[1]), scaled, averages, in_mean, epsilon)


def _random(spectrum: Spectrum, layer: int) -> Float[Tensor, "draws hidden"]:
    """Unit rows drawn from N(0, S), the same ones in each run; independent between layers."""
    generator = torch.Generator().manual_seed(layer)
    rank = min(len(spectrum.eigenvalues), len(spectrum.directions))
    draws = torch.randn(RANDOM_DRAWS, rank, generator=generator, dtype=torch.float64).to(spectrum.directions.device)
    rows = (draws * spectrum.eigenvalues[:rank].sqrt()) @ spectrum.directions[:rank]
    norms = rows.norm(dim=1, keepdim=True)
    return _kept(rows / torch.where(norms > 0, norms, torch.ones_like(norms)))


def _first(rows: Tensor, k: int) -> Tensor:
    """The first k rows; zero rows where there are fewer."""
    out = rows.new_zeros(k, rows.shape[1])
    out[: min(k, len(rows))] = rows[:k]
    return out


def _kept(rows: Tensor) -> Float[Tensor, "k hidden"]:
    return rows.cpu()
