"""The law's sums over units of work: each adds up x x^T and delta x^T in all dimensions, which `law_fit` fits from.

Together with the moments of a layer (packed.py), which hold delta delta^T and the sum of delta over the same tokens,
they are what `law_sums.sum_groups` forms from rows. Rows are not shifted here, as no mean is known before all units are
there: where tokens differ from their mean by a share s of its length, 1e-16 / s^2 of a sum is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from delta_suite.capture.stream import Memory, ResidualStream, gib
from delta_suite.errors import DeviceError
from delta_suite.reduction.eigen import eigh
from delta_suite.reduction.gram import algebra_device
from delta_suite.reduction.lanes import rows_at_once
from delta_suite.reduction.law_memory import Plan
from delta_suite.reduction.law_sums import FOLDS, ORDER, Basis, Home, Sums, close_folds, empty_sums
from delta_suite.reduction.moments import NORM_FLOOR, Moments, rms
from delta_suite.reduction.packed import Packed, above, from_triangle, unpacked

PRODUCTS_SHARE = 0.25
"""Share of what is free that the products of all layers may take; the stream and its moments come beside them."""


@dataclass
class LawProducts:
    """Sums of one layer over the tokens that enter the law, x = h / rms(h)."""

    xx: Float64[Tensor, "hidden hidden"]
    """Sum of x x^T."""
    yx: Float64[Tensor, "hidden hidden"]
    """Sum of delta x^T."""
    x: Float64[Tensor, " hidden"]
    """Sum of x."""

    @classmethod
    def zeros(cls, hidden: int, device: torch.device) -> LawProducts:
        """Return sums of no tokens."""
        square = torch.zeros(hidden, hidden, dtype=torch.float64, device=device)
        return cls(square, square.clone(), square[0].clone())

    def add(self, stream: ResidualStream, layer: int, entering: Bool[Tensor, " tokens"], device: torch.device) -> None:
        """Add the entering rows of a layer, which are multiplied on a device: the same bits wherever the sums lie."""
        size = rows_at_once(stream.hidden)
        for start in range(0, len(entering), size):
            rows = slice(start, start + size)
            before, update = stream.step(layer, rows, algebra_device(device))
            index = entering[rows].nonzero().flatten().to(before.device)
            x, y = before.index_select(0, index).double(), update.index_select(0, index).double()
            x /= rms(x)
            home = self.x.device
            self.xx += (x.T @ x).to(home)
            self.yx += (y.T @ x).to(home)
            self.x += x.sum(dim=0).to(home)

    def __add__(self, other: LawProducts) -> LawProducts:
        return LawProducts(self.xx + other.xx, self.yx + other.yx, self.x + other.x)

    def packed(self, group: int) -> dict[str, np.ndarray]:
        """Return the sums as a vector, by the group of units that they are over."""
        return {f"{group}": torch.cat([self.xx[above(self.xx)], self.yx.flatten(), self.x]).cpu().numpy()}

    @classmethod
    def unpacked(cls, vector: Float64[np.ndarray, " entries"], hidden: int, device: torch.device) -> LawProducts:
        """Return the sums that were packed, on a device."""
        sizes = [len(vector) - hidden**2 - hidden, hidden**2, hidden]
        triangle, yx, x = torch.split(torch.tensor(vector).to(device), sizes)
        return cls(from_triangle(triangle, hidden), yx.view(hidden, hidden), x)


def place_of_products(device: torch.device, layers: int, hidden: int) -> torch.device:
    """Return where the products of all layers lie: on the device, or on the host. Raises DeviceError without room."""
    needed, memory = 2 * 8 * layers * hidden**2, Memory.free(device, PRODUCTS_SHARE)
    if needed > max(memory.device, memory.host):
        raise DeviceError(
            f"the law's sums of {layers} layers, over one unit of work, take {gib(needed)}. May be taken: {memory}. "
            f"Let fewer workers run on a machine, use one with more memory, or leave out the law (--parts)."
        )
    return algebra_device(device) if needed <= memory.device else torch.device("cpu")


class LawUnit:
    """The products of every layer over one unit of work, to which the shards of its stream are added."""

    def __init__(self, layers: int, hidden: int, devices: Sequence[torch.device]) -> None:
        """Make room for the products. Raises DeviceError where there is none."""
        home = place_of_products(devices[0], layers, hidden)
        self.products = [LawProducts.zeros(hidden, home) for _ in range(layers)]
        self.devices, self.tokens = devices, 0
        self.documents: set[int] = set()
        """The documents of which a token enters."""

    def add(self, stream: ResidualStream, sinks: Bool[Tensor, " tokens"]) -> None:
        """Add the rows of a shard that are no sinks."""
        entering = (stream.kept & ~sinks).cpu()
        self.tokens += int(entering.sum())
        self.documents |= set(stream.document.cpu()[entering].tolist())
        for layer, products in enumerate(self.products):
            products.add(stream, layer, entering, self.devices[layer % len(self.devices)])


LayerSums = Mapping[int, tuple[LawProducts, Moments]]
"""The sums of one layer by group of units, over the tokens that enter the law."""


def layer_sums(
    moments: Packed, products: Packed, group_of: Mapping[int, int], hidden: int, device: torch.device
) -> LayerSums:
    """Return the sums of a layer by group of the law, from those over all units of work.

    group_of: the group of the law, of at most GROUPS, that each group of the units of work belongs to.
    """
    parts = unpacked(moments, hidden, device)
    out: dict[int, tuple[LawProducts, Moments]] = {}
    for name, vector in sorted(products.items(), key=lambda item: int(item[0])):
        group = group_of[int(name)]
        pair = (
            LawProducts.unpacked(vector, hidden, device),
            parts.get((int(name), False), Moments.zeros(hidden, device)),
        )
        earlier = out.get(group)
        out[group] = pair if earlier is None else (earlier[0] + pair[0], earlier[1] + pair[1])
    return out


@dataclass(frozen=True)
class SummedUnits:
    """The sums of all units of work, from which the law is fitted; a `law_fit.SumSource`."""

    read: Callable[[int], LayerSums]
    """Returns the sums of a layer over each group of units, of which there are at most GROUPS."""
    layers: int
    hidden: int

    def bases(self, k: int, plan: Plan, device: torch.device) -> list[Basis]:
        """Return the span of the first k principal components of x and of delta in each fold."""
        if k == self.hidden:
            return [Basis(None, None) for _ in FOLDS]
        pooled = torch.zeros(len(FOLDS), 2, self.hidden, self.hidden, dtype=torch.float64, device=device)
        for layer in range(self.layers):
            groups = self.read(layer)
            for fold, pool in zip(FOLDS, pooled, strict=True):
                members = [groups[group] for group in ORDER[fold]]
                rows = float(sum(moments.tokens for _, moments in members))
                squares = [(products.xx, moments.gram) for products, moments in members]
                totals = [(products.x, moments.total) for products, moments in members]
                for side in (0, 1):
                    square, total = (_total(pair[side] for pair in pairs) for pairs in (squares, totals))
                    centred = square - torch.outer(total, total) / rows
                    energy = centred.diagonal().sum() if side else centred.new_tensor(rows)
                    pool[side] += centred / energy.clamp_min(NORM_FLOOR)
        return [Basis(*(eigh(total)[1][:, -k:].contiguous() for total in sides)) for sides in pooled]

    def sums(self, layers: Sequence[int], bases: Sequence[Basis], home: Home) -> list[Sums]:
        """Return for each basis the sums of these layers, over every group of documents and every fold."""
        out = [
            empty_sums(len(layers), self.hidden if basis.x is None else int(basis.x.shape[1]), self.hidden, home)
            for basis in bases
        ]
        for place, layer in enumerate(layers):
            groups = self.read(layer)
            for position, group in enumerate(ORDER):
                products, moments = groups[group]
                for basis, sums in zip(bases, out, strict=True):
                    for name, value in _of_group(products, moments, basis).items():
                        getattr(sums, name)[position, place] = value.to(getattr(sums, name).device)
            for sums in out:
                close_folds(sums, place)
        return out


def _total(tensors: Iterable[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape, of which two are held at a time."""
    return reduce(torch.add, tensors)


def _of_group(products: LawProducts, moments: Moments, basis: Basis) -> dict[str, Tensor]:
    """Return the sums over one group by the names of the fields of `Sums`, with coordinates in a basis."""
    x, y, device = products.x, moments.total, products.x.device
    whole = {
        "n": x.new_tensor(float(moments.tokens)),
        "whole_x": x,
        "whole_y": y,
        "xx": products.xx.diagonal().sum(),
        "xy": products.yx.diagonal().sum(),
        "yy": moments.gram.diagonal().sum(),
        "update": y,
        "energy": moments.gram.diagonal().sum(),
    }
    if basis.x is None or basis.y is None:
        return whole | {"A": products.xx, "B": products.yx, "D": moments.gram, "x": x, "y": y}
    to_x, to_y = basis.x.to(device), basis.y.to(device)
    return whole | {
        "A": to_x.T @ products.xx @ to_x,
        "B": to_y.T @ products.yx @ to_x,
        "D": to_y.T @ moments.gram @ to_y,
        "x": x @ to_x,
        "y": y @ to_y,
    }
