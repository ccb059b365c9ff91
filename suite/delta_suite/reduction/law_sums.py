"""Sums from which the law is fitted: x x^T, delta x^T and delta delta^T, by layer and group of documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.reduction.eigen import eigh, slow_float64
from delta_suite.reduction.gram import algebra_device, gram
from delta_suite.reduction.moments import NORM_FLOOR

Form = Literal["normalised", "raw"]
"""Rows x on which a map acts: `normalised` is h / rms(h), as the first norm of a block returns it; `raw` is h."""

GROUPS = 10
"""Number of groups: document i is in group i % 10. Even documents are one fold and odd ones the other, so each group
lies in one fold."""

ORDER = (*range(0, GROUPS, 2), *range(1, GROUPS, 2))
"""Order in which groups are stored: those of the even fold, then those of the odd one."""

FOLDS = (slice(0, GROUPS // 2), slice(GROUPS // 2, GROUPS))
"""Slice of ORDER that holds the groups of each fold."""


@dataclass(frozen=True)
class Rows:
    """The rows of one layer that enter, sorted by group of documents, in float64, less their mean over all documents.

    The shift changes no result, because each fit subtracts its training mean, and it avoids cancellation there.
    """

    x: Float64[Tensor, "rows hidden"]
    """The rows on which a map acts, as `Form` says."""
    y: Float64[Tensor, "rows hidden"]
    """The updates delta."""


Walk = Callable[[], Iterator[tuple[int, Rows]]]
"""Function that yields each layer and its rows, as often as it is called."""


def walk_rows(
    stream: ResidualStream, order: Int64[Tensor, " rows"], form: Form, devices: Sequence[torch.device]
) -> Walk:
    """Return a walk over the layers: layer L on device L modulo their number, or where its state lies without devices.

    `order` holds the numbers of the rows that enter, sorted by group of documents.
    """

    def walk() -> Iterator[tuple[int, Rows]]:
        for layer in range(stream.layers):
            device = devices[layer % len(devices)] if devices else stream.states[layer].device
            before, update = stream.step(layer, device=algebra_device(device))
            index = order.to(before.device)
            x, y = before.index_select(0, index).double(), update.index_select(0, index).double()
            if form == "normalised":
                x /= x.square().mean(dim=1, keepdim=True).sqrt_().clamp_min_(NORM_FLOOR)
            x -= x.mean(dim=0)
            y -= y.mean(dim=0)
            yield layer, Rows(x, y)

    return walk


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


def fold_bases(walk: Walk, folds: Sequence[slice], hidden: int, k: int, device: torch.device) -> list[Basis]:
    """Return for each fold, a slice of rows, the span of the first k principal components of x and of delta.

    They are taken over all layers together: x is pooled as in the normal equations of the shared map, delta with every
    layer at unit energy.
    """
    if k == hidden:
        return [Basis(None, None) for _ in folds]
    pooled = [[torch.zeros(hidden, hidden, dtype=torch.float64, device=device) for _ in ("x", "y")] for _ in folds]
    for _, rows in walk():
        for totals, fold in zip(pooled, folds, strict=True):
            for side, matrix in enumerate((rows.x, rows.y)):
                part = matrix[fold] - matrix[fold].mean(dim=0)
                energy = part.square().sum() if side else part.new_tensor(float(len(part)))
                product = gram(part.float() if slow_float64(part.device) else part)
                totals[side] += (product / energy.clamp_min(NORM_FLOOR)).to(device)
    return [Basis(*(eigh(total)[1][:, -k:].contiguous() for total in totals)) for totals in pooled]


@dataclass(frozen=True)
class Sums:
    """Sums over the tokens of `sets` of documents, for all layers.

    Those with k dimensions are of coordinates in a basis, those with `hidden` of x and delta themselves.
    """

    n: Float64[Tensor, "sets 1"]
    """Number of tokens."""
    A: Float64[Tensor, "sets layers k k"]
    """Sum of x x^T."""
    B: Float64[Tensor, "sets layers k k"]
    """Sum of delta x^T."""
    D: Float64[Tensor, "sets layers k k"]
    """Sum of delta delta^T, multiplied in float32, as only its top eigenvector and energies along it are read."""
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

    def sets(self, chosen: slice, device: torch.device) -> Sums:
        """Return a slice of the sets, on a device."""
        return Sums(**{field.name: getattr(self, field.name)[chosen].to(device) for field in fields(self)})

    def total(self, chosen: slice, device: torch.device) -> Sums:
        """Return one set, of all documents of a slice of the sets, on a device."""
        totals = {field.name: getattr(self, field.name)[chosen].sum(dim=0, keepdim=True) for field in fields(self)}
        return Sums(**{name: total.to(device) for name, total in totals.items()})

    def __sub__(self, other: Sums) -> Sums:
        return Sums(**{field.name: getattr(self, field.name) - getattr(other, field.name) for field in fields(self)})

    def layers(self, chosen: Sequence[int]) -> Sums:
        """Return the sums of the chosen layers."""
        chosen_layers = {f.name: getattr(self, f.name)[:, list(chosen)] for f in fields(self) if f.name != "n"}
        return replace(self, **chosen_layers)

    def about(self, other: Sums) -> Sums:
        """Return the sums of x and delta less their means in `other`, the one set on which a map is fitted."""
        n, size = self.n[..., None], other.n[..., None]
        mean_x, mean_y = other.x / size, other.y / size
        rest_x, rest_y = self.x - n * mean_x, self.y - n * mean_y
        whole_x, whole_y = other.whole_x / size, other.whole_y / size
        rest_whole_x, rest_whole_y = self.whole_x - n * whole_x, self.whole_y - n * whole_y

        def shifted(total: Tensor, sums: Tensor, mean: Tensor, means: Tensor, rest: Tensor) -> Tensor:
            """Return sum (a - m)(b - l)^T = sum a b^T - (sum a) l^T - m (sum b - n l)^T, in one pass over memory."""
            mean, means = mean.expand_as(sums), means.expand_as(rest)
            columns, rows = torch.stack([sums, mean], dim=-1), torch.stack([means, rest], dim=-2)
            flat = torch.baddbmm(total.flatten(0, 1), columns.flatten(0, 1), rows.flatten(0, 1), alpha=-1.0)
            return flat.view_as(total)

        return Sums(
            self.n,
            shifted(self.A, self.x, mean_x, mean_x, rest_x),
            shifted(self.B, self.y, mean_y, mean_x, rest_x),
            shifted(self.D, self.y, mean_y, mean_y, rest_y),
            rest_x,
            rest_y,
            rest_whole_x,
            rest_whole_y,
            self.xx - (self.whole_x * whole_x + whole_x * rest_whole_x).sum(dim=-1),
            self.xy - (self.whole_y * whole_x + whole_y * rest_whole_x).sum(dim=-1),
            self.yy - (self.whole_y * whole_y + whole_y * rest_whole_y).sum(dim=-1),
        )


def sum_groups(
    walk: Walk, slices: Sequence[slice], layers: int, hidden: int, bases: Sequence[Basis], home: torch.device
) -> list[Sums]:
    """Return for each basis the sums of every group of documents (a slice of rows) and layer, stored on `home`.

    Where all dimensions enter, the bases share one object.
    """
    shared = bases[0].x is None
    k = hidden if bases[0].x is None else int(bases[0].x.shape[1])
    out = [_empty(len(slices), layers, k, hidden, home) for _ in bases[: 1 if shared else len(bases)]]
    for layer, rows in walk():
        for basis, sums in zip(bases, out, strict=False):
            x, y = basis.coordinates(rows)
            coarse = y.float()
            for group, part in enumerate(slices):
                gx, gy, gd = x[part], y[part], coarse[part]
                sums.A[group, layer] = gx.T @ gx
                sums.B[group, layer] = gy.T @ gx
                sums.D[group, layer] = gd.T @ gd
                sums.x[group, layer], sums.y[group, layer] = gx.sum(dim=0), gy.sum(dim=0)
                wx, wy = rows.x[part], rows.y[part]
                sums.whole_x[group, layer], sums.whole_y[group, layer] = wx.sum(dim=0), wy.sum(dim=0)
                sums.xx[group, layer], sums.yy[group, layer] = wx.square().sum(), wy.square().sum()
                sums.xy[group, layer] = (wx * wy).sum()
                sums.n[group] = len(wx)
    return out * len(bases) if shared else out


def _empty(groups: int, layers: int, k: int, hidden: int, device: torch.device) -> Sums:
    """Return sums of zero, ready to be filled in."""
    shapes = {"n": (1,), "A": (layers, k, k), "B": (layers, k, k), "D": (layers, k, k)}
    shapes |= {"x": (layers, k), "y": (layers, k), "whole_x": (layers, hidden), "whole_y": (layers, hidden)}
    shapes |= dict.fromkeys(("xx", "xy", "yy"), (layers,))
    return Sums(**{name: torch.zeros(groups, *s, dtype=torch.float64, device=device) for name, s in shapes.items()})


def law_bytes(layers: int, k: int, bases: int) -> tuple[int, int]:
    """Return the bytes of the sums of all groups, and of the algebra of one fit beside them."""
    matrix = layers * k * k * 8
    return 3 * GROUPS * bases * matrix, 45 * matrix


def place_for(layers: int, k: int, bases: int, device: torch.device) -> tuple[torch.device, str | None]:
    """Return where the sums of all groups are stored, and None, or the reason if they do not fit anywhere.

    It is the device if they fit there beside the algebra of one fit, else the host.
    """
    sums, algebra = law_bytes(layers, k, bases)
    memory = Memory.free(device)
    if sums + algebra <= memory.device:
        return device, None
    if algebra <= memory.device and sums <= memory.host:
        return torch.device("cpu"), None
    free = f"{memory.device / 2**30:.1f} GiB may be taken on {device} and {memory.host / 2**30:.1f} GiB on the host"
    return device, (
        f"the sums over {GROUPS} groups of documents in {layers} layers and {k} dimensions take "
        f"{sums / 2**30:.1f} GiB, their algebra {algebra / 2**30:.1f} GiB; {free}"
    )
