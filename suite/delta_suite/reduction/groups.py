"""The updates of one layer by group of documents: what an eigenproblem needs, and what deleting a group changes.

Documents are the unit of resampling: tokens of one document are no independent draws. Document i belongs to group
i modulo the number of groups; that number is even, so that each group lies within one of the halves a (even documents)
and b (odd).

Write S for the second moment of the updates, the sum of delta delta^T over tokens, and E_g for what deleting group g
takes from it: without that group the second moment is S - E_g. Where the variant is centred, S is taken about the mean
of its tokens, and E_g holds one rank-one term more, because the tokens that stay are centred on their own mean.

`GroupedRows` keeps the updates themselves and solves the problem on the token side (n = tokens); `GroupedMoments` keeps
their moments and solves it on the hidden side (n = hidden). Both have the same interface, `Groups`. Their sums over
tokens do not depend on centring, so `RowsByGroup` and `MomentsByGroup` form them once for all variants that take the
same rows, as `sink_free` and `centred` do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from delta_suite.reduction.disjoint import centred_pairs
from delta_suite.reduction.eigen import Eigen
from delta_suite.reduction.gram import (
    Spectrum,
    algebra_device,
    spectrum_of_gram,
    spectrum_of_tokens_gram,
    times_transposed,
    tokens_gram,
)
from delta_suite.reduction.moments import Moments

GROUPS = 10
"""Number of groups of documents; fewer documents make fewer groups."""

LEADING = 64
"""Number of leading directions of S in whose span the directions of S - E_g are sought first."""


def group_count(documents: int) -> int:
    """Return the number of groups for this many documents: at most GROUPS, and even, so that halves are whole groups.

    One document cannot be split and makes one group.

    Example:
        >>> [group_count(documents) for documents in (1, 2, 3, 9, 136)]
        [1, 2, 2, 8, 10]
    """
    return min(GROUPS, documents // 2 * 2) if documents > 1 else 1


def half_by_half(groups: int) -> list[int]:
    """Return all group numbers, those of half a first.

    Example:
        >>> half_by_half(4)
        [0, 2, 1, 3]
    """
    return [*range(0, groups, 2), *range(1, groups, 2)]


def rows_by_group(group: Int64[Tensor, " tokens"], groups: int) -> Int64[Tensor, " tokens"]:
    """Return the order of tokens in which each group is contiguous, and each half too, as `RowsByGroup` expects."""
    place = torch.empty(groups, dtype=torch.int64)
    place[half_by_half(groups)] = torch.arange(groups)
    return torch.argsort(place[group], stable=True)


@dataclass(frozen=True)
class GroupSums:
    """Sums over the tokens of each group of documents."""

    tokens: list[int]
    """Number of tokens of each group."""
    sums: Float64[Tensor, "groups quantities"]
    """Sums of the token quantities (`moments.TOKEN_QUANTITIES`)."""
    squares: Float64[Tensor, "groups quantities"]
    """Sums of their squares."""
    totals: Float64[Tensor, "groups hidden"]
    """Summed updates."""


class RowsByGroup:
    """The updates of one layer as rows, each group of documents in one contiguous slice."""

    def __init__(
        self,
        rows: Float32[Tensor, "tokens hidden"],
        quantities: Float64[Tensor, "tokens quantities"],
        tokens: Sequence[int],
    ) -> None:
        """Take rows and quantities in the order of `rows_by_group`, and the number of tokens of each group."""
        order = half_by_half(len(tokens))
        ends = np.cumsum([tokens[g] for g in order]).tolist()
        self.slices = {g: slice(end - tokens[g], end) for g, end in zip(order, ends, strict=True)}
        # Stored as float32; cast to float64 only where needed.
        self.rows = rows.to(algebra_device(rows.device))
        by_group = [quantities[self.slices[g]] for g in range(len(tokens))]
        self.sums = GroupSums(
            list(tokens),
            torch.stack([x.sum(dim=0) for x in by_group]),
            torch.stack([x.square().sum(dim=0) for x in by_group]),
            torch.stack([self.rows[self.slices[g]].sum(dim=0, dtype=torch.float64) for g in range(len(tokens))]),
        )


class MomentsByGroup:
    """The moments of one layer for each group of documents, and their totals over groups, each formed once."""

    def __init__(self, moments: Sequence[Moments | None]) -> None:
        """Take the moments of each group, None for a group without tokens; at least one group must have tokens."""
        filled = next(group for group in moments if group is not None)
        self.moments = [filled.zeros_like() if group is None else group for group in moments]
        self._totals: dict[tuple[int, ...], Moments] = {}
        self.sums = GroupSums(
            [group.tokens for group in self.moments],
            torch.stack([group.sums for group in self.moments]),
            torch.stack([group.squares for group in self.moments]),
            torch.stack([group.total for group in self.moments]),
        )

    def total(self, groups: Sequence[int]) -> Moments:
        """Return the moments of several groups together. They are kept, so do not overwrite them."""
        key = tuple(groups)
        if key not in self._totals:
            first, *others = (self.moments[g] for g in groups)
            for other in others:
                first = first + other
            self._totals[key] = first
        return self._totals[key]

    @cached_property
    def traces(self) -> Float64[Tensor, " groups"]:
        """The traces tr G_a of the groups' Gram matrices."""
        return torch.stack([group.gram.diagonal().sum() for group in self.moments])

    @cached_property
    def overlaps(self) -> Float64[Tensor, "groups groups"]:
        """The inner products tr G_a G_b of the groups' Gram matrices."""
        flat = [group.gram.flatten() for group in self.moments]
        overlaps = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat[0].device)
        for a, one in enumerate(flat):
            for b, other in enumerate(flat[: a + 1]):
                overlaps[a, b] = overlaps[b, a] = one @ other
        return overlaps


class Groups(ABC):
    """The updates of one layer in one variant, by group of documents."""

    def __init__(self, sums: GroupSums, centre: bool) -> None:
        """Take the sums of each group, and whether the variant takes rows less their mean."""
        self.tokens, self.totals, self.centre = sums.tokens, sums.totals, centre
        # Everything that statistics need goes to the host in one copy: asked one by one, a GPU would stop for each.
        grams = self._grams() if len(self.tokens) > 1 else ()
        through = [self._through()] if grams and centre else []
        parts = [sums.sums, sums.squares, self.totals @ self.totals.T, *grams, *through]
        packed = torch.cat([part.to(self.totals.device) for part in parts], dim=1).cpu().numpy()
        ends = np.cumsum([part.shape[1] for part in parts])
        self.sums, self.squares, self.products, *of_grams = np.split(packed, ends[:-1], axis=1)
        """`products`: inner products of the groups' summed updates, (groups, groups)."""
        self.traces: Float64[np.ndarray, "groups 1"]
        self.overlaps: Float64[np.ndarray, "groups groups"]
        self.traces, self.overlaps, *of_mean = of_grams or [np.zeros((1, 1))] * 2
        """tr G_a and tr G_a G_b of the groups' Gram matrices; zero where there is a single group."""
        self.through: Float64[np.ndarray, "groups 4"] | None = of_mean[0] if of_mean else None
        """What `disjoint.centred_pairs` takes; None where the variant is not centred, and of a single group."""

    def pairs(self, groups: Sequence[int]) -> tuple[float, float] | None:
        """Return the sums whose ratio is the unbiased participation ratio of these groups; None where they are too few.

        Where the variant is centred, these must be all groups or all but one, and are None of others.
        """
        if not self.centre:
            if sum(self.tokens[g] > 0 for g in groups) < 2:
                return None
            traces, overlaps = self.traces[groups], self.overlaps[np.ix_(groups, groups)]
            return float(traces.sum() ** 2 - (traces**2).sum()), float(overlaps.sum() - overlaps.trace())
        left_out = sorted(set(range(len(self.tokens))) - set(groups))
        if self.through is None or len(left_out) > 1:
            return None
        n = np.asarray(self.tokens, dtype=np.float64)
        along = self.products.sum(axis=1) / max(1.0, n.sum())  # t_a . m, from which those of t_a - n_a m follow
        square = along.sum() / max(1.0, n.sum())
        products = self.products - np.outer(along, n) - np.outer(n, along) + square * np.outer(n, n)
        without = left_out[0] if left_out else None
        return centred_pairs(self.tokens, self.traces[:, 0], self.overlaps, products, self.through, without)

    def _centred_totals(self) -> Float64[Tensor, "groups hidden"]:
        """Return the summed updates of each group about the mean of all."""
        n = torch.tensor(self.tokens, dtype=torch.float64, device=self.totals.device)
        return self.totals - torch.outer(n, self.totals.sum(dim=0) / n.sum().clamp_min(1))

    @abstractmethod
    def _grams(self) -> tuple[Float64[Tensor, "groups 1"], Float64[Tensor, "groups groups"]]:
        """Return tr G_a and tr G_a G_b, about the mean of all groups where the variant is centred."""

    @abstractmethod
    def _through(self) -> Float64[Tensor, "groups 4"]:
        """Return what `disjoint.centred_pairs` takes of each group, about the mean of all groups."""

    @abstractmethod
    def matrix(self, groups: Sequence[int]) -> Float64[Tensor, "n n"]:
        """Return the matrix whose eigenpairs give the spectrum of these groups together.

        Where the variant is centred it is taken about the mean of these groups. The caller may overwrite it.
        """

    @abstractmethod
    def size(self, groups: Sequence[int]) -> int:
        """Return n, the size of the matrix of these groups."""

    @abstractmethod
    def spectrum(self, groups: Sequence[int], eigen: Eigen, k: int) -> Spectrum:
        """Return the spectrum of these groups, with k directions, from the eigenpairs of their matrix."""

    @abstractmethod
    def removals(
        self, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, "groups r"], Float64[Tensor, "groups m m"]]:
        """Return v_i^T E_g v_i for all r rows of the basis, and V E_g V^T for the first LEADING of them, for each g.

        E_g is what deleting group g takes from the second moment of `groups`.
        """

    @abstractmethod
    def times(self, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        """Return S, the second moment of `groups`, times vectors."""

    @abstractmethod
    def removed_times(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """Return E_g, what deleting `group` takes from the second moment of `groups`, times vectors."""


class GroupedRows(Groups):
    """Groups kept as rows, for fewer tokens than hidden dimensions.

    `groups` is always all groups or those of one half: these are contiguous, so one slice of the rows holds them.
    """

    def __init__(self, rows: RowsByGroup, centre: bool) -> None:
        """Take the rows of one layer, and whether the variant takes them less their mean."""
        self._rows, self._slices = rows.rows, rows.slices
        super().__init__(rows.sums, centre)

    def _grams(self) -> tuple[Float64[Tensor, "groups 1"], Float64[Tensor, "groups groups"]]:
        rows = self._rows_of(range(len(self.tokens)))
        member = torch.zeros(len(rows), len(self.tokens), dtype=torch.float64, device=rows.device)
        for group, part in enumerate(self._slices_within(range(len(self.tokens)))):
            member[part, group] = 1.0
        products = tokens_gram(rows)
        # tr G_a G_b = ||X_a X_b^T||_F^2, and X X^T is the smaller of the two products here.
        return member.T @ products.diagonal()[:, None], member.T @ products.square_() @ member

    def _through(self) -> Float64[Tensor, "groups 4"]:
        rows = self._rows_of(range(len(self.tokens))).double()
        along = rows @ self._centred_totals().T.to(rows.device)  # x_i . t_a
        member = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for group, part in enumerate(self._slices_within(range(len(self.tokens)))):
            member[part] = group
        with_own = along.gather(1, member[:, None])
        sums = torch.zeros(len(self.tokens), 2, dtype=torch.float64, device=rows.device)
        sums.index_add_(0, member, torch.cat([with_own.square(), along.square().sum(dim=1, keepdim=True)], dim=1))
        return torch.cat([sums, along.square().sum(dim=0)[:, None], along.T @ with_own], dim=1)

    def _mean(self, groups: Sequence[int]) -> Float64[Tensor, " hidden"]:
        return self.totals[list(groups)].sum(dim=0) / max(1, self.size(groups))

    def _slices_within(self, groups: Sequence[int]) -> list[slice]:
        """Return the slice of each group within `_rows_of(groups)`."""
        slices = [self._slices[g] for g in groups]
        first = min(part.start for part in slices)
        return [slice(part.start - first, part.stop - first) for part in slices]

    def _rows_of(self, groups: Sequence[int]) -> Float[Tensor, "tokens hidden"]:
        """Return the rows of these groups as the variant takes them."""
        first = min(self._slices[g].start for g in groups)
        rows = self._rows[first : first + self.size(groups)]
        return rows.double().sub_(self._mean(groups)) if self.centre else rows

    def matrix(self, groups: Sequence[int]) -> Float64[Tensor, "n n"]:
        """Return X X^T, X the rows of these groups as the variant takes them; n is their number of tokens."""
        return tokens_gram(self._rows_of(groups))

    def size(self, groups: Sequence[int]) -> int:
        """Return the number of tokens of these groups."""
        return sum(self.tokens[g] for g in groups)

    def spectrum(self, groups: Sequence[int], eigen: Eigen, k: int) -> Spectrum:
        """Return the spectrum of these groups, with k directions, from the eigenpairs of X X^T."""
        return spectrum_of_tokens_gram(eigen, self._rows_of(groups), k)

    def _removed(self, group: int, groups: Sequence[int]) -> Float64[Tensor, "removed hidden"]:
        """Return rows R with E_g = R^T R."""
        rows = self._rows[self._slices[group]].double()
        return self._with_shift(rows.sub_(self._mean(groups)) if self.centre else rows, group, groups)

    def _with_shift(
        self, rows: Float64[Tensor, "group_rows m"], group: int, groups: Sequence[int]
    ) -> Float64[Tensor, "removed m"]:
        """Return a group's rows, or their coordinates in a basis, and where the variant is centred one row more.

        It accounts for the mean of the tokens that stay, on which these are centred once the group is deleted.
        """
        if not self.centre:
            return rows
        remaining = self.size(groups) - self.tokens[group]
        return torch.cat([rows, rows.sum(dim=0, keepdim=True) / max(1, remaining) ** 0.5])

    def removals(
        self, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, "groups r"], Float64[Tensor, "groups m m"]]:
        """Return v_i^T E_g v_i and V E_g V^T for each group g, from the coordinates of its rows in the basis."""
        along = times_transposed(self._rows_of(groups), basis)
        slices = self._slices_within(groups)
        parts = [self._with_shift(along[part], g, groups) for g, part in zip(groups, slices, strict=True)]
        energies = torch.stack([part.square().sum(dim=0) for part in parts])
        return energies, torch.stack([part[:, :LEADING].T @ part[:, :LEADING] for part in parts])

    def times(self, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        """Return X^T X, the second moment of `groups`, times vectors."""
        rows = self._rows_of(groups).double()
        return rows.T @ (rows @ vectors)

    def removed_times(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """Return E_g = R^T R times vectors."""
        removed = self._removed(group, groups)
        return removed.T @ (removed @ vectors)


class GroupedMoments(Groups):
    """Groups kept as moments, for more tokens than hidden dimensions, or several shards."""

    def __init__(self, moments: MomentsByGroup, centre: bool) -> None:
        """Take the moments of one layer, and whether the variant takes rows less their mean."""
        self._by_group = moments
        super().__init__(moments.sums, centre)

    def _grams(self) -> tuple[Float64[Tensor, "groups 1"], Float64[Tensor, "groups groups"]]:
        traces, overlaps = self._by_group.traces, self._by_group.overlaps
        if not self.centre:
            return traces[:, None], overlaps
        # The same of G_a - t_a m^T - m t_a^T + n_a m m^T without forming it: t_a are the group's summed updates, m the
        # mean of all groups.
        n = torch.tensor(self.tokens, dtype=torch.float64, device=traces.device)
        totals = self.totals
        mean = totals.sum(dim=0) / n.sum().clamp_min(1)
        images = torch.stack([group.gram @ mean for group in self._by_group.moments])  # G_a m
        along, square, inside = totals @ mean, mean @ mean, images @ mean
        crossed = torch.outer(n, inside) - 2 * (totals @ images.T)  # [b, a]: G_a with what is taken from G_b
        shifts = 2 * (totals @ totals.T * square + torch.outer(along, along))
        shifts = shifts - 2 * square * (torch.outer(n, along) + torch.outer(along, n)) + square**2 * torch.outer(n, n)
        return (traces - 2 * along + n * square)[:, None], overlaps + crossed + crossed.T + shifts

    def _through(self) -> Float64[Tensor, "groups 4"]:
        totals = self._centred_totals()
        n = torch.tensor(self.tokens, dtype=torch.float64, device=totals.device)
        mean = self.totals.sum(dim=0) / n.sum().clamp_min(1)
        along_mean = totals @ mean
        images = torch.zeros(len(totals), *totals.shape, dtype=torch.float64, device=totals.device)
        for a, group in enumerate(self._by_group.moments):  # t_b^T G_a for every b, G_a about the mean of all groups
            images[a] = totals @ group.gram - torch.outer(along_mean, self.totals[a])
            images[a] += torch.outer(n[a] * along_mean - totals @ self.totals[a], mean)
        products = torch.einsum("abh,bh->ab", images, totals)  # t_b^T G_a t_b
        u = images.diagonal(dim1=0, dim2=1).sum(dim=1)
        columns = (products.diagonal(), products.sum(dim=1), products.sum(dim=0), totals @ u)
        return torch.stack(columns, dim=1)

    def matrix(self, groups: Sequence[int]) -> Float64[Tensor, "n n"]:
        """Return the Gram matrix X^T X of these groups; n is the hidden size."""
        total = self._by_group.total(groups)
        return total.centred_gram() if self.centre else total.gram.clone()

    def size(self, groups: Sequence[int]) -> int:
        """Return the hidden size."""
        return int(self.totals.shape[1])

    def spectrum(self, groups: Sequence[int], eigen: Eigen, k: int) -> Spectrum:
        """Return the spectrum of these groups, with k directions, from the eigenpairs of X^T X."""
        return spectrum_of_gram(eigen, sum(self.tokens[g] for g in groups), k)

    def _shift(self, group: int, groups: Sequence[int]) -> Float64[Tensor, " hidden"]:
        """Return e, where centring the remaining tokens on their own mean takes e e^T more from the second moment."""
        total, deleted = self._by_group.total(groups), self._by_group.moments[group]
        shifted = deleted.total - total.total * (deleted.tokens / max(1, total.tokens))
        remaining = float(max(1, total.tokens - deleted.tokens))
        scaled: Tensor = shifted / remaining**0.5
        return scaled

    def removed_times(
        self, group: int, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """Return E_g times vectors, without forming E_g where the variant is centred."""
        deleted = self._by_group.moments[group]
        out = deleted.gram @ vectors
        if not self.centre:
            return out
        total = self._by_group.total(groups)
        mean = total.total / max(1, total.tokens)
        # The sum over the group of (x - m)(x - m)^T, and the shift of the mean of the tokens that stay.
        along_mean, along_total, shift = mean @ vectors, deleted.total @ vectors, self._shift(group, groups)
        out = out - torch.outer(deleted.total, along_mean) - torch.outer(mean, along_total)
        return out + deleted.tokens * torch.outer(mean, along_mean) + torch.outer(shift, shift @ vectors)

    def removals(
        self, groups: Sequence[int], basis: Float64[Tensor, "r hidden"]
    ) -> tuple[Float64[Tensor, "groups r"], Float64[Tensor, "groups m m"]]:
        """Return v_i^T E_g v_i and V E_g V^T for each group g, from the product of E_g with the basis."""
        products = [self.removed_times(group, groups, basis.T) for group in groups]
        energies = torch.stack([(basis * product.T).sum(dim=1) for product in products])
        return energies, torch.stack([basis[:LEADING] @ product[:, :LEADING] for product in products])

    def times(self, groups: Sequence[int], vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        """Return X^T X, the second moment of `groups`, times vectors."""
        total = self._by_group.total(groups)
        product = total.gram @ vectors
        if self.centre:
            product = product - torch.outer(total.total, total.total @ vectors) / max(1, total.tokens)
        return product
