"""The updates of one layer as moments, by group of units: for a stream in several shards, which none of them outlives.

Each group has a Gram matrix, so units are dealt into few groups (units.ADDED_GROUPS). Sums over tokens do not depend on
centring; `MomentsByGroup` forms them once for all variants that take the same rows, as `sink_free` and `centred` do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from delta_suite.reduction.eigen import Eigen
from delta_suite.reduction.gram import Spectrum, spectrum_of_gram
from delta_suite.reduction.groups import LEADING, Groups, GroupSums, Removals, half_gaps_of, mixed
from delta_suite.reduction.moments import Moments


class MomentsByGroup:
    """The moments of one layer for each group, and their totals over a side, each formed once."""

    def __init__(self, moments: Sequence[Moments | None]) -> None:
        """Take the moments of each group, None for a group without tokens; at least one group must have tokens."""
        filled = next(group for group in moments if group is not None)
        self.moments = [filled.zeros_like() if group is None else group for group in moments]
        self._totals: dict[int | None, Moments] = {}
        self.sums = GroupSums(
            [group.tokens for group in self.moments],
            torch.stack([group.sums for group in self.moments]),
            torch.stack([group.squares for group in self.moments]),
            torch.stack([group.total for group in self.moments]),
        )

    def total(self, side: int | None) -> Moments:
        """Return the moments of a side, of which a group must have been given. Do not overwrite them: they are kept."""
        if side not in self._totals:
            first, *others = self.moments if side is None else self.moments[side::2]
            for other in others:
                first = first + other
            self._totals[side] = first
        return self._totals[side]


class GroupedMoments(Groups):
    """Groups of a stream that is not kept. The eigenproblem is that of X^T X."""

    def __init__(self, moments: MomentsByGroup, centre: bool) -> None:
        """Take the moments of one layer, and whether the variant takes rows less their mean."""
        self._by_group = moments
        super().__init__(moments.sums, centre)

    def matrix(self, side: int | None) -> Float64[Tensor, "n n"]:
        """Return the Gram matrix X^T X of a side; n is the hidden size."""
        total = self._by_group.total(side)
        return total.centred_gram() if self.centre else total.gram.clone()

    def size(self, side: int | None) -> int:
        """Return the hidden size."""
        return self.hidden

    def spectrum(self, side: int | None, eigen: Eigen, k: int) -> Spectrum:
        """Return the spectrum of a side, with k directions, from the eigenpairs of X^T X."""
        return spectrum_of_gram(eigen, self.count(side), k)

    def _shift(self, group: int, side: int | None) -> Float64[Tensor, " hidden"]:
        """Return e, where centring the remaining tokens on their own mean takes e e^T more from the second moment."""
        shifted = self.totals[group] - self.mean(side) * self.tokens[group]
        scaled: Tensor = shifted / max(1, self.count(side) - self.tokens[group]) ** 0.5
        return scaled

    def _group_times(
        self, group: int, side: int | None, vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """Return the Gram matrix of a group, about the mean of a side where the variant is centred, times vectors."""
        out = self._by_group.moments[group].gram @ vectors
        if self.centre:
            mean, total = self.mean(side), self.totals[group]
            along = mean @ vectors
            out -= torch.outer(total - self.tokens[group] * mean, along) + torch.outer(mean, total @ vectors)
        return out

    def removed_times(
        self, group: int, side: int | None, vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """Return E_g times vectors, without forming E_g where the variant is centred."""
        out = self._group_times(group, side, vectors)
        if self.centre:
            shift = self._shift(group, side)
            out += torch.outer(shift, shift @ vectors)
        return out

    def removals(self, side: int | None, spectrum: Spectrum) -> Removals:
        """Return what each group takes, from the product of its Gram matrix with the spectrum's directions."""
        basis, values = spectrum.directions, spectrum.eigenvalues
        rank = len(values) if side is None else 0
        halves = half_gaps_of(values[LEADING:])
        energies, blocks, pairs, borders, shifts = [], [], [], [], []
        for g in self.within(side):
            product = self._group_times(g, side, basis.T)
            energy = (basis * product.T).sum(dim=1)
            crossed = basis @ product
            with_whole = energy[:rank] @ values if rank else energy.sum()
            pairs.append(torch.stack([energy.sum(), with_whole, product.square().sum()]))
            if self.centre:
                along = basis @ self._shift(g, side)
                energy = energy + along.square()
                crossed += torch.outer(along, along)
            energies.append(energy)
            blocks.append(crossed[:LEADING, :LEADING])
            borders.append(crossed[:LEADING, LEADING:rank].float())
            if rank:
                shifts.append(mixed(crossed[LEADING:rank, LEADING:rank].float(), halves))
        return Removals(
            torch.stack(energies),
            torch.stack(blocks),
            torch.stack(pairs),
            torch.stack(borders) if rank else None,
            torch.stack(shifts) if rank else None,
        )

    def through(self) -> Float64[Tensor, "groups 4"]:
        """Return what `disjoint.centred_pairs` takes of each group, from its Gram matrix times the groups' totals."""
        totals = self.centred_totals()
        out = torch.zeros(len(totals), 4, dtype=torch.float64, device=totals.device)
        for g in self.within(None):
            images = self._group_times(g, None, totals.T)
            products = (totals * images.T).sum(dim=1)
            out[g, 0] = products[g]
            out[g, 1] = products.sum()
            out[:, 2] += products
            out[:, 3] += totals @ images[:, g]
        return out

    def times(self, side: int | None, vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        """Return the second moment of a side times vectors."""
        total = self._by_group.total(side)
        product = total.gram @ vectors
        if self.centre:
            product -= torch.outer(total.total, total.total @ vectors) / max(1, total.tokens)
        return product
