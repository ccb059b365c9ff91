"""Sums from which the law is fitted: x x^T, delta x^T and delta delta^T, by layer and group of units.

A `Walk` brings the rows of the layers, in one or more parts each: shards of the stream, and blocks of rows that keep
copies in float64 small. What is added up does not depend on the parts, but for rounding in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from delta_suite.capture.stream import ResidualStream, Storage, mapped
from delta_suite.reduction.eigen import eigh, slow_float64
from delta_suite.reduction.gram import add_gram, algebra_device, gram, mirror
from delta_suite.reduction.lanes import HOST_ROWS, rows_at_once
from delta_suite.reduction.moments import NORM_FLOOR, rms

GROUPS = 10
"""Number of groups that units are dealt into. The even ones, of half a, are one fold, the odd ones the other."""

ORDER = (*range(0, GROUPS, 2), *range(1, GROUPS, 2))
"""Order in which groups are stored: those of the even fold, then those of the odd one."""

FOLDS = (slice(0, GROUPS // 2), slice(GROUPS // 2, GROUPS))
"""Slice of ORDER that holds the groups of each fold."""

Streams = Callable[[Sequence[int]], Iterable[ResidualStream]]
"""Function that returns the stream again, in shards, with the states around these layers at least."""


@dataclass(frozen=True)
class Rows:
    """Rows of one layer that enter, sorted by group of units, in float64, about a point near their mean.

    The shift changes no result, because each fit subtracts its training mean, and it avoids cancellation there.
    """

    layer: int
    x: Float64[Tensor, "rows hidden"]
    """The rows on which a map acts: h / rms(h), as the first norm of a block returns it."""
    y: Float64[Tensor, "rows hidden"]
    """The updates delta."""
    slices: Sequence[slice]
    """The rows of each group, in ORDER."""
    update: Float64[Tensor, "groups hidden"]
    """Sum of delta over each of these, about zero: where it is zero, so is the sum, without rounding."""
    energy: Float64[Tensor, " groups"]
    """Sum of ||delta||^2 over each of these, about zero."""
    last: bool
    """True for the last part of the layer."""

    def fold(self, number: int) -> slice:
        """Return the rows of a fold."""
        slices = self.slices[FOLDS[number]]
        return slice(slices[0].start, slices[-1].stop)


Walk = Callable[[Sequence[int]], Iterator[Rows]]
"""Function that yields the rows of these layers, as often as it is called."""


def walk_rows(
    streams: Streams,
    entering: Bool[Tensor, " tokens"],
    groups: Int64[Tensor, " documents"],
    devices: Sequence[torch.device],
    at_once: int | None = None,
) -> Walk:
    """Return a walk over layers: layer L on device L modulo their number, or where its state lies without devices.

    `entering` tells which of all tokens enter, in the order of the stream, and `groups` the group of each document; the
    rows come in blocks of `at_once`.
    """

    def walk(layers: Sequence[int]) -> Iterator[Rows]:
        centres: dict[int, tuple[Tensor, Tensor]] = {}
        start = 0
        for stream in streams(layers):
            on_host = stream.states[0].device.type == "cpu" and all(device.type == "cpu" for device in devices)
            rows_of = _ordered_rows if on_host else _row_blocks
            blocks = list(rows_of(stream, entering[start : start + len(stream.document)], groups, at_once))
            start += len(stream.document)
            for layer in layers:
                device = algebra_device(devices[layer % len(devices)] if devices else stream.states[layer].device)
                for number, (rows, order, slices) in enumerate(blocks):
                    before, update = stream.step(layer, rows, device)
                    if order is not None:
                        index = order.to(before.device)
                        before, update = before.index_select(0, index), update.index_select(0, index)
                    x, y = before.double(), update.double()
                    del before, update
                    x /= rms(x)
                    if layer not in centres and len(x):
                        centres[layer] = x.mean(dim=0), y.mean(dim=0)
                    update = torch.stack([y[part].sum(dim=0) for part in slices])
                    energy = torch.stack([y[part].flatten() @ y[part].flatten() for part in slices])
                    if layer in centres:
                        x -= centres[layer][0]
                        y -= centres[layer][1]
                    last = start == len(entering) and number == len(blocks) - 1
                    yield Rows(layer, x, y, slices, update, energy, last)
            del stream  # a shard is large, and the next one is filled now

    return walk


_Block = tuple[slice | Int64[Tensor, " rows"], Int64[Tensor, " rows"] | None, list[slice]]
"""Rows of a stream, the order in which they are taken of these (None: as they are), and the slice of each group."""


def _row_blocks(
    stream: ResidualStream, entering: Bool[Tensor, " tokens"], groups: Int64[Tensor, " documents"], at_once: int | None
) -> Iterator[_Block]:
    """Yield blocks of rows, the entering ones of each in the order of their groups."""
    group = _places(stream, groups)
    size = at_once or rows_at_once(stream.hidden)
    for start in range(0, len(group), size):
        rows = slice(start, start + size)
        index = entering[rows].nonzero().flatten()
        order = index[torch.argsort(group[rows][index], stable=True)]
        yield rows, order, _slices(group[rows][index])


def _ordered_rows(
    stream: ResidualStream, entering: Bool[Tensor, " tokens"], groups: Int64[Tensor, " documents"], at_once: int | None
) -> Iterator[_Block]:
    """Yield the entering rows in the order of their groups, in small blocks.

    A CPU works on these in its cache, and takes their memory from what the last one left: in blocks of all rows two
    thirds of the time went into new pages of memory.
    """
    group = _places(stream, groups)
    index = entering.nonzero().flatten()
    order = index[torch.argsort(group[index], stable=True)]
    for rows in torch.split(order, min(at_once or HOST_ROWS, HOST_ROWS)):
        yield rows, None, _slices(group[rows])


def _places(stream: ResidualStream, groups: Int64[Tensor, " documents"]) -> Int64[Tensor, " tokens"]:
    """Return the place in ORDER of each token's group."""
    place = torch.empty(GROUPS, dtype=torch.int64)
    place[list(ORDER)] = torch.arange(GROUPS)
    return place[groups[stream.document.cpu()]]


def _slices(group: Int64[Tensor, " rows"]) -> list[slice]:
    """Return the slice of each group, of rows that are sorted by group."""
    ends = [0, *torch.bincount(group, minlength=GROUPS).cumsum(0).tolist()]
    return [slice(a, b) for a, b in pairwise(ends)]


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns onto which x and delta of one fold are projected; None where all dimensions enter."""

    x: Float64[Tensor, "hidden k"] | None
    y: Float64[Tensor, "hidden k"] | None

    def coordinates(self, rows: Rows) -> tuple[Tensor, Tensor]:
        """Return x and delta in coordinates of the basis, (rows, k) each."""
        if self.x is None or self.y is None:
            return rows.x, rows.y
        return rows.x @ self.x.to(rows.x.device), rows.y @ self.y.to(rows.y.device)

    def lifted(self, directions: Float64[Tensor, "layers k"]) -> Float64[Tensor, "layers hidden"]:
        """Return directions of delta, given in the basis, in hidden space."""
        return directions if self.y is None else directions @ self.y.to(directions.device).T


def fold_bases(
    walk: Walk, layers: int, hidden: int, k: int, device: torch.device, at_once: int | None = None
) -> list[Basis]:
    """Return for each fold the span of the first k principal components of x and of delta.

    They are taken over all layers together: x is pooled as in the normal equations of the shared map, delta with every
    layer at unit energy. Two products of each fold are held for each of the `at_once` layers of a walk (all by default)
    that come in parts, and two of the pool.
    """
    if k == hidden:
        return [Basis(None, None) for _ in FOLDS]
    pooled = [[torch.zeros(hidden, hidden, dtype=torch.float64, device=device) for _ in ("x", "y")] for _ in FOLDS]
    for start in range(0, layers, at_once or layers):
        held: dict[int, list[list[_Product]]] = {}
        for rows in walk(range(start, min(layers, start + (at_once or layers)))):
            products = held.setdefault(rows.layer, [[_Product(), _Product()] for _ in FOLDS])
            for fold, sides in enumerate(products):
                for product, matrix in zip(sides, (rows.x, rows.y), strict=True):
                    product.add(matrix[rows.fold(fold)])
            if rows.last:
                for totals, sides in zip(pooled, held.pop(rows.layer), strict=True):
                    for side, product in enumerate(sides):
                        centred = product.about_mean()
                        energy = centred.diagonal().sum() if side else centred.new_tensor(float(product.rows))
                        totals[side] += (centred / energy.clamp_min(NORM_FLOOR)).to(device)
    return [Basis(*(eigh(total)[1][:, -k:].contiguous() for total in totals)) for totals in pooled]


class _Product:
    """Sum of r r^T over rows r, taken about the mean of the first of them."""

    def __init__(self) -> None:
        self.rows = 0
        self._centre: Tensor | None = None
        self._gram: Tensor
        self._total: Tensor

    def add(self, rows: Float64[Tensor, "rows hidden"]) -> None:
        if not len(rows):
            return
        if self._centre is None:
            self._centre = rows.mean(dim=0)
        part = rows - self._centre
        product, total = gram(part.float() if slow_float64(part.device) else part), part.sum(dim=0)
        self._gram, self._total = (self._gram + product, self._total + total) if self.rows else (product, total)
        self.rows += len(rows)

    def about_mean(self) -> Float64[Tensor, "hidden hidden"]:
        """Return the sum about the mean of all rows."""
        return self._gram.addr_(self._total, self._total, alpha=-1.0 / self.rows)


STILL = 1e-12
"""Share of the sum of ||delta||^2 at or below which what is left about a mean is rounding, and is set to zero.

Each update then differs from the mean by a millionth of its length, about what float32 keeps of it.
"""

SETS = GROUPS + len(FOLDS)
"""Number of sets of documents whose sums are stored: the groups in ORDER, then the folds."""


@dataclass(frozen=True)
class Means:
    """Means of x and delta over one set of documents."""

    x: Float64[Tensor, "1 layers k"]
    y: Float64[Tensor, "1 layers k"]
    whole_x: Float64[Tensor, "1 layers hidden"]
    whole_y: Float64[Tensor, "1 layers hidden"]


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of `sets` of documents, for some layers.

    Those with k dimensions are of coordinates in a basis, those with `hidden` of x and delta themselves.
    """

    n: Float64[Tensor, "sets layers"]
    """Number of tokens; the same for every layer."""
    A: Float64[Tensor, "sets layers k k"]
    """Sum of x x^T."""
    B: Float64[Tensor, "sets layers k k"]
    """Sum of delta x^T."""
    D: Float64[Tensor, "sets layers k k"]
    """Sum of delta delta^T."""
    x: Float64[Tensor, "sets layers k"]
    """Sum of x."""
    y: Float64[Tensor, "sets layers k"]
    """Sum of delta."""
    whole_x: Float64[Tensor, "sets layers hidden"]
    """Sum of x in all dimensions."""
    whole_y: Float64[Tensor, "sets layers hidden"]
    """Sum of delta in all dimensions."""
    xx: Float64[Tensor, "sets layers"]
    """Sum of ||x||^2 in all dimensions."""
    xy: Float64[Tensor, "sets layers"]
    """Sum of <x, delta> in all dimensions."""
    yy: Float64[Tensor, "sets layers"]
    """Sum of ||delta||^2 in all dimensions."""
    update: Float64[Tensor, "sets layers hidden"]
    """Sum of delta about zero, where the sums above are about a point near its mean."""
    energy: Float64[Tensor, "sets layers"]
    """Sum of ||delta||^2 about zero."""

    def part(self, chosen: int, layers: slice, device: torch.device) -> Sums:
        """Return one of the sets, for a slice of the layers, on a device."""
        sets = slice(chosen, chosen + 1)
        return Sums(**{field.name: getattr(self, field.name)[sets, layers].to(device) for field in fields(self)})

    def total(self, chosen: slice, layers: Sequence[int], device: torch.device) -> Sums:
        """Return one set, of all documents of a slice of the sets, for some layers, on a device."""
        index = list(layers)
        totals = {f.name: getattr(self, f.name)[chosen][:, index].sum(dim=0, keepdim=True) for f in fields(self)}
        return Sums(**{name: total.to(device) for name, total in totals.items()})

    def means(self) -> Means:
        """Return the means of x and delta."""
        size = self.n[..., None]
        return Means(self.x / size, self.y / size, self.whole_x / size, self.whole_y / size)

    def __sub__(self, other: Sums) -> Sums:
        return Sums(**{field.name: getattr(self, field.name) - getattr(other, field.name) for field in fields(self)})

    def about(self, means: Means, *, overwrite: bool = False) -> Sums:
        """Return the sums of x and delta less their means in the one set on which a map is fitted.

        overwrite: these sums are not needed any more, and their memory may be taken.
        Updates that do not differ from the mean have sums of exactly zero: maps of what rounding leaves of them would
        enter the shared maps of other layers like any.
        """
        n = self.n[..., None]
        mean_x, mean_y, whole_x, whole_y = means.x, means.y, means.whole_x, means.whole_y
        rest_x, rest_y = self.x - n * mean_x, self.y - n * mean_y
        rest_whole_x, rest_whole_y = self.whole_x - n * whole_x, self.whole_y - n * whole_y

        def shifted(total: Tensor, sums: Tensor, mean: Tensor, means: Tensor, rest: Tensor) -> Tensor:
            """Return sum (a - m)(b - l)^T = sum a b^T - (sum a) l^T - m (sum b - n l)^T, in one pass over memory."""
            mean, means = mean.expand_as(sums), means.expand_as(rest)
            columns, rows = torch.stack([sums, mean], dim=-1), torch.stack([means, rest], dim=-2)
            terms, flat = (columns.flatten(0, 1), rows.flatten(0, 1)), total.flatten(0, 1)
            flat = flat.baddbmm_(*terms, alpha=-1.0) if overwrite else torch.baddbmm(flat, *terms, alpha=-1.0)
            return flat.view_as(total)

        B, D = shifted(self.B, self.y, mean_y, mean_x, rest_x), shifted(self.D, self.y, mean_y, mean_y, rest_y)
        yy = self.yy - (self.whole_y * whole_y + whole_y * rest_whole_y).sum(dim=-1)
        varies = (yy > STILL * self.yy).to(yy.dtype)
        each = None if bool(varies.all()) else varies[..., None, None]
        return Sums(
            self.n,
            shifted(self.A, self.x, mean_x, mean_x, rest_x),
            B if each is None else B.mul_(each),
            D if each is None else D.mul_(each),
            rest_x,
            rest_y,
            rest_whole_x,
            rest_whole_y,
            self.xx - (self.whole_x * whole_x + whole_x * rest_whole_x).sum(dim=-1),
            varies * (self.xy - (self.whole_y * whole_x + whole_y * rest_whole_x).sum(dim=-1)),
            varies * yy,
            self.update,
            self.energy,
        )


def sum_groups(walk: Walk, layers: Sequence[int], hidden: int, bases: Sequence[Basis], home: Home) -> list[Sums]:
    """Return for each basis the sums of these layers, over every group of documents and every fold."""
    out = [
        empty_sums(len(layers), hidden if basis.x is None else int(basis.x.shape[1]), hidden, home) for basis in bases
    ]
    place = {layer: index for index, layer in enumerate(layers)}
    for rows in walk(layers):
        layer = place[rows.layer]
        for number, (basis, sums) in enumerate(zip(bases, out, strict=True)):
            x, y = basis.coordinates(rows)
            for group, part in enumerate(rows.slices):
                if part.start == part.stop:
                    continue
                gx, gy = x[part], y[part]
                _add_gram(sums.A[group, layer], gx)
                _add_product(sums.B[group, layer], gy, gx)
                if slow_float64(gy.device):  # only its top eigenvector and energies along it are read
                    sums.D[group, layer] += gram(gy.float()).to(sums.D.device)
                else:
                    _add_gram(sums.D[group, layer], gy)
                sums.x[group, layer] += gx.sum(dim=0).to(sums.x.device)
                sums.y[group, layer] += gy.sum(dim=0).to(sums.y.device)
                if number:
                    continue
                wx, wy = rows.x[part], rows.y[part]
                vectors = {"whole_x": wx.sum(dim=0), "whole_y": wy.sum(dim=0)}
                vectors |= {"xx": wx.flatten() @ wx.flatten(), "xy": wx.flatten() @ wy.flatten()}
                vectors["yy"] = wy.flatten() @ wy.flatten()
                vectors |= {"update": rows.update[group], "energy": rows.energy[group]}
                for each in out:  # the sums in all dimensions are the same for every basis
                    each.n[group, layer] += len(wx)
                    for name, value in vectors.items():
                        getattr(each, name)[group, layer] += value.to(each.n.device)
        if rows.last:
            for sums in out:
                for group in range(GROUPS):
                    mirror(sums.A[group, layer])
                    mirror(sums.D[group, layer])
                close_folds(sums, layer)
    return out


def close_folds(sums: Sums, layer: int) -> None:
    """Add up the groups of each fold, once those of a layer are complete."""
    for field in fields(Sums):
        values = getattr(sums, field.name)
        for fold, groups in enumerate(FOLDS):
            values[GROUPS + fold, layer] = values[groups, layer].sum(dim=0)


def _add_gram(out: Float64[Tensor, "k k"], rows: Float64[Tensor, "rows k"]) -> None:
    """Add rows^T rows to the blocks of a matrix on and above the diagonal, in place."""
    if out.device == rows.device:
        add_gram(out, rows)
    else:
        out += gram(rows).to(out.device)


def _add_product(out: Float64[Tensor, "k k"], one: Float64[Tensor, "rows k"], other: Float64[Tensor, "rows k"]) -> None:
    """Add one^T other to a matrix, in place."""
    if out.device == one.device:
        out.addmm_(one.T, other)
    else:
        out += (one.T @ other).to(out.device)


@dataclass(frozen=True)
class Home:
    """Place where large tensors are kept between uses."""

    device: torch.device
    storage: Storage

    def zeros(self, *shape: int) -> Float64[Tensor, ...]:
        """Return zeros of this shape."""
        if self.storage == "disk":
            return mapped(shape, torch.float64)
        return torch.zeros(*shape, dtype=torch.float64, device=self.device)


class Maps:
    """Maps of one fit, kept where the sums are; one after the other, so that each fit overwrites those of the last."""

    KINDS = ("own_map", "square", "factor", "shared", "shared_square", "residual")

    def __init__(self, home: Home, layers: int, k: int) -> None:
        """Make room for the matrices of these layers, where the device is not their place."""
        self._matrices = None if home.storage == "device" else home.zeros(len(self.KINDS), layers, k, k)

    def keep(self, kind: str, layers: slice, matrices: Float64[Tensor, "_ k k"]) -> Float64[Tensor, "_ k k"]:
        """Keep the matrices of some layers and return them: the same ones where they are in their place already."""
        if self._matrices is None:
            return matrices
        place: Tensor = self._matrices[self.KINDS.index(kind), layers]
        return place.copy_(matrices)


def empty_sums(layers: int, k: int, hidden: int, home: Home) -> Sums:
    """Return sums of zero, ready to be filled in."""
    matrices = {name: home.zeros(SETS, layers, k, k) for name in ("A", "B", "D")}
    shapes: dict[str, tuple[int, ...]] = {"x": (k,), "y": (k,)}
    shapes |= dict.fromkeys(("whole_x", "whole_y", "update"), (hidden,))
    shapes |= dict.fromkeys(("n", "xx", "xy", "yy", "energy"), ())
    vectors = {
        name: torch.zeros(SETS, layers, *shape, dtype=torch.float64, device=home.device)
        for name, shape in shapes.items()
    }
    return Sums(**matrices, **vectors)
