"""The updates of one layer as rows, by group of units: any number of groups, of one or two ways to group them.

The eigenproblem is the smaller one, of X X^T (n = tokens) or of X^T X (n = hidden). What a group takes from the second
moment comes from its rows alone, so that memory does not grow with the number of groups. Sums over tokens and Gram
matrices do not depend on centring; `RowsByGroup` forms them once for all variants that take the same rows, as
`sink_free` and `centred` do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from delta_suite.reduction.eigen import Eigen
from delta_suite.reduction.gram import (
    Spectrum,
    add_gram,
    algebra_device,
    mirror,
    spectrum_of_gram,
    spectrum_of_tokens_gram,
    tokens_gram,
)
from delta_suite.reduction.groups import LEADING, Groups, GroupSums, Removals, gaps_of, members, mixing
from delta_suite.reduction.lanes import NARROW_ENTRIES_AT_ONCE, rows_at_once
from delta_suite.reduction.moments import widened


class RowsByGroup:
    """The updates of one layer as rows, and the groups of each way to group them."""

    def __init__(
        self,
        rows: Float32[Tensor, "tokens hidden"],
        quantities: Float64[Tensor, "tokens quantities"],
        groupings: Sequence[tuple[Int64[Tensor, " tokens"], int]],
    ) -> None:
        """Take rows, quantities, and the group of each token and the number of groups in each grouping.

        A token is in the same half in every grouping.
        """
        # Stored as float32; cast to float64 only where needed.
        self.rows = rows.to(algebra_device(rows.device))
        self.members = [[index.to(self.rows.device) for index in members(group, groups)] for group, groups in groupings]
        self.halves = [index.to(self.rows.device) for index in members(groupings[0][0] % 2, 2)]
        self.sums = [self._sums(quantities, index) for index in self.members]
        self._grams: dict[int | None, Tensor] = {}

    def _sums(self, quantities: Float64[Tensor, "tokens quantities"], index: Sequence[Tensor]) -> GroupSums:
        by_group = [quantities.index_select(0, each.to(quantities.device)) for each in index]
        totals = [self.rows.index_select(0, each).sum(dim=0, dtype=torch.float64) for each in index]
        return GroupSums(
            [len(each) for each in index],
            torch.stack([x.sum(dim=0) for x in by_group]),
            torch.stack([x.square().sum(dim=0) for x in by_group]),
            torch.stack(totals),
        )

    def index(self, side: int | None) -> Int64[Tensor, " _"] | None:
        """Return the rows of a side, None for all."""
        return None if side is None else self.halves[side]

    def gram(self, side: int | None) -> Float64[Tensor, "hidden hidden"]:
        """Return X^T X of a side. It is kept, so do not overwrite it."""
        if side not in self._grams:
            if side is None:
                self._grams[side] = self.gram(0) + self.gram(1)
            else:
                hidden = self.rows.shape[1]
                out = torch.zeros(hidden, hidden, dtype=torch.float64, device=self.rows.device)
                for block in torch.split(self.halves[side], rows_at_once(hidden)):
                    add_gram(out, widened(self.rows.index_select(0, block)))
                mirror(out)
                self._grams[side] = out
        return self._grams[side]


class GroupedRows(Groups):
    """Groups of a stream that is kept."""

    def __init__(self, rows: RowsByGroup, centre: bool, grouping: int = 0) -> None:
        """Take the rows of one layer, whether the variant takes them less their mean, and the way to group them."""
        self._by_group, self._members, self._of_units = rows, rows.members[grouping], grouping == 0
        super().__init__(rows.sums[grouping], centre)
        self._on_tokens = len(rows.rows) <= self.hidden
        """True if the eigenproblem is that of X X^T."""

    def _blocks(self, index: Int64[Tensor, " _"], side: int | None) -> Iterator[Float64[Tensor, "rows hidden"]]:
        """Yield rows in float64, as the variant takes them for a side, in blocks."""
        rows = self._by_group.rows
        for block in torch.split(index, rows_at_once(self.hidden)):
            wide = rows.index_select(0, block).double()
            yield wide.sub_(self.mean(side)) if self.centre else wide

    def _rows_of(self, side: int | None) -> Float[Tensor, "tokens hidden"]:
        """Return the rows of a side as the variant takes them; used where there are at most `hidden` of them."""
        index = self._by_group.index(side)
        rows = self._by_group.rows if index is None else self._by_group.rows.index_select(0, index)
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
        values, leading = spectrum.eigenvalues, spectrum.directions[:LEADING]
        rest = spectrum.directions[LEADING:].float() if side is None else leading[:0].float()
        full = self._of_units and side is None
        gaps = gaps_of(values[LEADING:]) if full else None
        taken, blocks, pairs, borders, shifts = [], [], [], [], []
        for together in self._together(side, max(self.hidden, len(rest) ** 2 if full else 0)):
            count = len(together)
            block, trace = values.new_zeros(count, len(leading), len(leading)), values.new_zeros(count)
            border = rest.new_zeros(count, len(leading), len(rest))
            product = rest.new_zeros(count, *(len(rest) if full else 0,) * 2)
            energy = values.new_zeros(count, len(rest))
            totals = [values.new_zeros(count, len(leading)), values.new_zeros(count, len(rest))]
            for rows in self._padded(together, side):
                along, single = rows @ leading.T, rows.float() @ rest.T
                trace += rows.square().sum(dim=(1, 2))
                block += along.mT @ along
                border += along.mT.float() @ single
                energy += single.square().sum(dim=1)
                if full:
                    product.baddbmm_(single.mT, single)
                totals = [total + part.sum(dim=1) for total, part in zip(totals, (along, single), strict=True)]
            square = self._squares(together, rows) if full else None
            energies = torch.cat([block.diagonal(dim1=1, dim2=2), energy], dim=1)
            whole = trace if square is None else energies @ values
            pairs.append(torch.stack([trace, whole, trace if square is None else square], dim=1))
            if self.centre:
                remaining = [max(1, self.count(side) - self.tokens[g]) for g in together]
                scale = values.new_tensor(remaining).sqrt()[:, None]
                at_leading, at_rest = (total / scale for total in totals)
                energies = energies + torch.cat([at_leading, at_rest], dim=1).square()
                block += at_leading[:, :, None] * at_leading[:, None, :]
                border += (at_leading[:, :, None] * at_rest[:, None, :]).float()
                product += (at_rest[:, :, None] * at_rest[:, None, :]).float() if full else 0.0
            taken.append(energies)
            blocks.append(block)
            borders.append(border)
            if gaps is not None:
                shifts.append(mixing(product, gaps).sum(dim=2))
        return Removals(
            torch.cat(taken),
            torch.cat(blocks),
            torch.cat(pairs),
            torch.cat(borders) if side is None else None,
            torch.cat(shifts) if full else None,
        )

    def _together(self, side: int | None, entries: int) -> Iterator[list[int]]:
        """Yield groups of a side that are worked on together: many small ones, or one whose rows take a block."""
        groups = self.within(side)
        longest = max(self.tokens[g] for g in groups)
        most = max(1, NARROW_ENTRIES_AT_ONCE // max(1, longest * self.hidden, entries))
        for start in range(0, len(groups), most):
            yield groups[start : start + most]

    def _padded(self, together: Sequence[int], side: int | None) -> Iterator[Float64[Tensor, "groups rows hidden"]]:
        """Yield the rows of groups as the variant takes them, in blocks; zeros follow those of shorter ones."""
        rows, members = self._by_group.rows, [self._members[g] for g in together]
        index = torch.nn.utils.rnn.pad_sequence(members, batch_first=True)
        lengths = torch.tensor([len(each) for each in members], device=index.device)
        padding = torch.arange(index.shape[1], device=index.device) >= lengths[:, None]
        for block, absent in zip(
            torch.split(index, rows_at_once(self.hidden), dim=1),
            torch.split(padding, rows_at_once(self.hidden), dim=1),
            strict=True,
        ):
            wide = rows.index_select(0, block.flatten()).double()
            wide = wide.sub_(self.mean(side)) if self.centre else wide
            yield wide.view(*block.shape, -1).masked_fill_(absent[:, :, None].to(wide.device), 0.0)

    def _squares(
        self, together: Sequence[int], rows: Float64[Tensor, "groups rows hidden"]
    ) -> Float64[Tensor, " groups"]:
        """Return ||G_g||_F^2 of groups, whose rows these are unless they come in several blocks."""
        if rows.shape[1] < max(self.tokens[g] for g in together):
            return torch.stack([self._square(g) for g in together])
        # ||X X^T|| = ||X^T X||, and the smaller one is formed.
        smaller = rows @ rows.mT if rows.shape[1] <= self.hidden else rows.mT @ rows
        return smaller.square().sum(dim=(1, 2))

    def _square(self, group: int) -> Float64[Tensor, ""]:
        """Return ||G_g||_F^2, of the Gram matrix of a group, about the mean of all where the variant is centred."""
        rows = self._by_group.rows.index_select(0, self._members[group])
        rows = rows.double().sub_(self.mean(None)) if self.centre else rows
        if len(rows) <= self.hidden:  # ||X X^T|| = ||X^T X||
            return tokens_gram(rows).square().sum()
        out = torch.zeros(self.hidden, self.hidden, dtype=torch.float64, device=rows.device)
        add_gram(out, widened(rows))
        mirror(out)
        return out.square().sum()

    def through(self) -> Float64[Tensor, "groups 4"]:
        """Return what `disjoint.centred_pairs` takes of each group, from its rows along the groups' totals."""
        totals = self.centred_totals()
        counts = len(totals)
        out = torch.zeros(counts, 4, dtype=torch.float64, device=totals.device)
        for g in self.within(None):
            for rows in self._blocks(self._members[g], None):
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
        for rows in self._blocks(self._members[group], side):
            out += rows.T @ (rows @ vectors)
            total += rows.sum(dim=0)
        if self.centre:
            remaining = max(1, self.count(side) - self.tokens[group])
            out += torch.outer(total, (total @ vectors) / remaining)
        return out
