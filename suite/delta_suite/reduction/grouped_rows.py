"""The updates of one layer as rows, by group of units: any number of groups, of one or two ways to group them.

The eigenproblem is the smaller one, of X X^T (n = tokens) or of X^T X (n = hidden). What a group takes from the second
moment comes from its rows alone, so that memory does not grow with the number of groups. Sums over tokens and Gram
matrices do not depend on centring; `RowsByGroup` forms them once for all variants that take the same rows, as
`sink_free` and `centred` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from delta_suite.reduction.eigen import Eigen
from delta_suite.reduction.gram import (
    Spectrum,
    add_gram,
    algebra_device,
    in_blocks,
    mirror,
    spectrum_of_gram,
    spectrum_of_tokens_gram,
    tokens_gram,
)
from delta_suite.reduction.groups import LEADING, Groups, GroupSums, Removals, half_gaps_of, mixed, upper_blocks
from delta_suite.reduction.lanes import entries_at_once, rows_at_once
from delta_suite.reduction.moments import widened


class RowsByGroup:
    """The updates of one layer as rows, and the groups of each way to group them."""

    def __init__(
        self,
        rows: Float[Tensor, "tokens hidden"],
        quantities: Float64[Tensor, "tokens quantities"],
        groupings: Sequence[tuple[Int64[Tensor, " tokens"], int]],
    ) -> None:
        """Take rows, quantities, and the group of each token and the number of groups in each grouping.

        Rows come in the order of `in_groups` of the first grouping. A token is in the same half in every grouping.
        """
        # Stored in the dtype of the updates; cast to float64 only where needed.
        self.rows = rows.to(algebra_device(rows.device))
        self.groupings = [
            Grouping.of(group, count, None if number == 0 else in_groups(group).to(self.rows.device))
            for number, (group, count) in enumerate(groupings)
        ]
        self.sums = [self._sums(quantities, grouping) for grouping in self.groupings]
        self._grams: dict[int | None, Tensor] = {}

    def taken(self, grouping: Grouping, rows: slice) -> Float[Tensor, "_ hidden"]:
        """Return rows in the order of a grouping."""
        return self.rows[rows] if grouping.order is None else self.rows.index_select(0, grouping.order[rows])

    def side(self, side: int | None) -> Float[Tensor, "_ hidden"]:
        """Return the rows of a side."""
        return self.rows[self.groupings[0].within(side)]

    def _sums(self, quantities: Float64[Tensor, "tokens quantities"], grouping: Grouping) -> GroupSums:
        order, groups = grouping.order, grouping.rows
        ordered = quantities if order is None else quantities.index_select(0, order.to(quantities.device))
        return GroupSums(
            [each.stop - each.start for each in groups],
            torch.stack([ordered[each].sum(dim=0) for each in groups]),
            torch.stack([ordered[each].square().sum(dim=0) for each in groups]),
            torch.stack([self.taken(grouping, each).sum(dim=0, dtype=torch.float64) for each in groups]),
        )

    def gram(self, side: int | None) -> Float64[Tensor, "hidden hidden"]:
        """Return X^T X of a side. It is kept, so do not overwrite it."""
        if side not in self._grams:
            if side is None:
                self._grams[side] = self.gram(0) + self.gram(1)
            else:
                hidden = self.rows.shape[1]
                zeros = torch.zeros(hidden, hidden, dtype=torch.float64, device=self.rows.device)
                self._grams[side] = _added(zeros, self.side(side))
        return self._grams[side]

    def take_grams(self, fewer: RowsByGroup, more: Bool[Tensor, " tokens"]) -> None:
        """Take over the Gram matrices of the same rows without those in `more`, and add these."""
        for side, gram in fewer._grams.items():
            if side is not None:
                place = self.groupings[0].within(side)
                rows = self.rows[place][more[place].to(self.rows.device)]
                self._grams[side] = _added(gram, rows)
        fewer._grams.clear()


@dataclass(frozen=True)
class Grouping:
    """One way to group rows: the rows of each group follow each other, those of half a before those of half b."""

    order: Int64[Tensor, " tokens"] | None
    """The row at each place; None where rows are stored in this order."""
    rows: Sequence[slice]
    """The places of the rows of each group."""

    @classmethod
    def of(cls, group: Int64[Tensor, " tokens"], groups: int, order: Int64[Tensor, " tokens"] | None) -> Grouping:
        """Return the grouping of rows whose groups these are."""
        counts = torch.bincount(group, minlength=groups).tolist()
        rows, start = [slice(0, 0)] * groups, 0
        for g in (*range(0, groups, 2), *range(1, groups, 2)):
            rows[g] = slice(start, start + counts[g])
            start += counts[g]
        return cls(order, rows)

    def within(self, side: int | None) -> slice:
        """Return the places of the rows of a side."""
        last = len(self.rows) - 1
        border = self.rows[last - last % 2].stop
        return slice(border if side == 1 else 0, border if side == 0 else None)


def in_groups(group: Int64[Tensor, " tokens"]) -> Int64[Tensor, " tokens"]:
    """Return the order in which rows of the same group follow each other, those of half a before those of half b.

    Example:
        >>> in_groups(torch.tensor([1, 0, 2, 0])).tolist()
        [1, 3, 2, 0]
    """
    return torch.argsort(group + (group % 2 << 32), stable=True)


class GroupedRows(Groups):
    """Groups of a stream that is kept."""

    def __init__(self, rows: RowsByGroup, centre: bool, grouping: int = 0) -> None:
        """Take the rows of one layer, whether the variant takes them less their mean, and the way to group them."""
        self._by_group, self._grouping, self._of_units = rows, rows.groupings[grouping], grouping == 0
        super().__init__(rows.sums[grouping], centre)
        self._on_tokens = len(rows.rows) <= self.hidden
        """True if the eigenproblem is that of X X^T."""

    def _blocks(self, rows: slice, side: int | None) -> Iterator[Float64[Tensor, "rows hidden"]]:
        """Yield rows in float64, as the variant takes them for a side, in blocks."""
        at_once = rows_at_once(self.hidden)
        for start in range(rows.start, rows.stop, at_once):
            taken = self._by_group.taken(self._grouping, slice(start, min(start + at_once, rows.stop)))
            yield taken.double().sub_(self.mean(side)) if self.centre else taken.double()

    def _rows_of(self, side: int | None) -> Float[Tensor, "tokens hidden"]:
        """Return the rows of a side as the variant takes them; used where there are at most `hidden` of them."""
        rows = self._by_group.side(side)
        return rows.double().sub_(self.mean(side)) if self.centre else rows

    def matrix(self, side: int | None) -> Float64[Tensor, "n n"]:
        """Return X X^T or X^T X, X the rows of a side as the variant takes them."""
        if self._on_tokens:
            return tokens_gram(self._rows_of(side))
        gram = self._by_group.gram(side)
        if not self.centre:
            return gram.clone()
        return gram - torch.outer(self.mean(side), self.mean(side) * self.count(side))

    def size(self, side: int | None) -> int:
        """Return the number of tokens of a side, or the hidden size."""
        return self.count(side) if self._on_tokens else self.hidden

    def spectrum(self, side: int | None, eigen: Eigen, k: int) -> Spectrum:
        """Return the spectrum of a side, with k directions, from the eigenpairs of its matrix."""
        if self._on_tokens:
            return spectrum_of_tokens_gram(eigen, self._rows_of(side), k)
        return spectrum_of_gram(eigen, self.count(side), k)

    def removals(self, side: int | None, spectrum: Spectrum) -> Removals:
        """Return what each group takes, from the coordinates of its rows in the spectrum's directions.

        Those in the leading directions are of float64. The others are of float32, as only small parts of intervals come
        of them.
        """
        values, leading, groups = spectrum.eigenvalues, spectrum.directions[:LEADING], self.within(side)
        rest = spectrum.directions[LEADING:].float() if side is None else leading[:0].float()
        full = self._of_units and side is None
        m, r = len(leading), len(rest)
        energies, blocks = values.new_zeros(len(groups), m + r), values.new_zeros(len(groups), m, m)
        borders, shifts = rest.new_zeros(len(groups), m, r), rest.new_zeros(len(groups), r)
        pairs = values.new_zeros(len(groups), 3)
        along_shift = self._shifts(side) @ spectrum.directions[: m + r].T if self.centre else None
        halves = half_gaps_of(values[LEADING:]) if full else None
        # A GPU, which the host's calls keep waiting, multiplies both halves in one call.
        apart = rest.device.type == "cpu" and in_blocks(r, rest.device)
        upper = (upper_blocks(r) if apart else [(0, r)]) if full else []
        for places in self._together(side, r**2 if full else 0):
            products = rest.new_zeros(len(places) if full else 0, r, r)
            for rows, parts in self._parts([groups[place] for place in places], side):
                along, single = rows @ leading.T, rows.float() @ rest.T if r else rest.new_empty(len(rows), 0)
                for number, part in enumerate(parts):
                    one, other = along[part], single[part]
                    blocks[places[number]].addmm_(one.T, one)
                    borders[places[number]].addmm_(one.T.float(), other)
                    energies[places[number], m:] += other.square().sum(dim=0)
                    for start, stop in upper:
                        products[number, start:stop, start:].addmm_(other[:, start:stop].T, other[:, start:])
            energies[places, :m] = blocks[places].diagonal(dim1=1, dim2=2)
            if halves is not None:  # the directions span all rows, so ||G_g|| is that of its coordinates
                parts_of_square = [(blocks[places], 1.0), (borders[places], 2.0)]
                parts_of_square += [(products[:, start:stop, start:stop], 1.0) for start, stop in upper]
                parts_of_square += [(products[:, start:stop, stop:], 2.0) for start, stop in upper[:-1]]
                pairs[places, 2] = sum(scale * _squared_norms(part) for part, scale in parts_of_square)
                if along_shift is not None:
                    shift = along_shift[places, m:].float()
                    products.baddbmm_(shift[:, :, None], shift[:, None, :])
                shifts[places] = mixed(products, halves)
        if full:
            pairs[:, 0], pairs[:, 1] = energies.sum(dim=1), energies @ values
        if along_shift is not None:
            energies += along_shift.square()
            at_leading, at_rest = along_shift[:, :m], along_shift[:, m:].float()
            blocks.baddbmm_(at_leading[:, :, None], at_leading[:, None, :])
            borders.baddbmm_(at_leading[:, :, None].float(), at_rest[:, None, :])
        if side is not None:
            return Removals(energies, blocks, pairs)
        return Removals(energies, blocks, pairs, borders, shifts if full else None)

    def _shifts(self, side: int | None) -> Float64[Tensor, "groups hidden"]:
        """Return e for each group, where centring the remaining tokens on their own mean takes e e^T more."""
        groups = self.within(side)
        tokens = self.totals.new_tensor([self.tokens[g] for g in groups])[:, None]
        remaining = (self.count(side) - tokens).clamp_min(1.0)
        return (self.totals[groups] - tokens * self.mean(side)) / remaining.sqrt()

    def _together(self, side: int | None, entries: int) -> Iterator[list[int]]:
        """Yield the places of groups of a side that are worked on together: their rows follow each other.

        entries: those of the matrix that each needs. There is one group where its rows take a block.
        """
        groups, at_once = self.within(side), entries_at_once(self.totals.device)
        places: list[int] = []
        rows = 0
        for place in sorted(range(len(groups)), key=lambda place: groups[place] % 2):
            rows += self.tokens[groups[place]]
            if places and max(rows * self.hidden, (len(places) + 1) * entries) > at_once:
                yield places
                places, rows = [], self.tokens[groups[place]]
            places.append(place)
        yield places

    def _parts(
        self, together: Sequence[int], side: int | None
    ) -> Iterator[tuple[Float64[Tensor, "rows hidden"], list[slice]]]:
        """Yield the rows of groups as the variant takes them, in blocks, and the slice of each group in a block."""
        start, bounds = 0, [self._grouping.rows[g] for g in together]
        first = bounds[0].start
        for rows in self._blocks(slice(first, bounds[-1].stop), side):
            before = first + start
            yield (
                rows,
                [slice(*(min(max(place - before, 0), len(rows)) for place in (b.start, b.stop))) for b in bounds],
            )
            start += len(rows)

    def through(self) -> Float64[Tensor, "groups 4"]:
        """Return what `disjoint.centred_pairs` takes of each group, from its rows along the groups' totals."""
        totals = self.centred_totals()
        counts = len(totals)
        out = torch.zeros(counts, 4, dtype=torch.float64, device=totals.device)
        for g in self.within(None):
            for rows in self._blocks(self._grouping.rows[g], None):
                along = rows @ totals.T
                squares = along.square()
                out[g, 0] += squares[:, g].sum()
                out[g, 1] += squares.sum()
                out[:, 2] += squares.sum(dim=0)
                out[:, 3] += along.T @ along[:, g]
        return out

    def times(self, side: int | None, vectors: Float64[Tensor, "hidden k"]) -> Float64[Tensor, "hidden k"]:
        """Return the second moment of a side times vectors."""
        if self._on_tokens:
            rows = self._rows_of(side).double()
            return rows.T @ (rows @ vectors)
        product = self._by_group.gram(side) @ vectors
        if self.centre:
            mean = self.mean(side)
            product -= torch.outer(mean, (mean @ vectors) * self.count(side))
        return product

    def removed_times(
        self, group: int, side: int | None, vectors: Float64[Tensor, "hidden k"]
    ) -> Float64[Tensor, "hidden k"]:
        """Return E_g times vectors, from the rows of the group."""
        out, total = torch.zeros_like(vectors), vectors.new_zeros(len(vectors))
        for rows in self._blocks(self._grouping.rows[group], side):
            out += rows.T @ (rows @ vectors)
            total += rows.sum(dim=0)
        if self.centre:
            remaining = max(1, self.count(side) - self.tokens[group])
            out += torch.outer(total, (total @ vectors) / remaining)
        return out


def _added(
    gram: Float64[Tensor, "hidden hidden"], rows: Float[Tensor, "tokens hidden"]
) -> Float64[Tensor, "hidden hidden"]:
    """Add X^T X of more rows to a Gram matrix, in place, and return it."""
    for block in torch.split(rows, rows_at_once(rows.shape[1])):
        add_gram(gram, widened(block))
    mirror(gram)
    return gram


def _squared_norms(matrices: Float[Tensor, "groups _ _"]) -> Float64[Tensor, " groups"]:
    """Return ||M||_F^2 of each matrix: each row's in the dtype of the matrix, their sum in float64."""
    norms: Tensor = torch.linalg.vector_norm(matrices, dim=2)
    return norms.double().square().sum(dim=1)
