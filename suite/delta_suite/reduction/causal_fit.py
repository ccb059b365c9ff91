"""Replacements of the updates of a phase, fitted on one half of the units and applied to the other.

Over the rows of `sink_free` of one half, v_L is the leading right singular vector of the updates delta_L of layer L,
mu_L their mean, e_i the energies of the further singular vectors v_i. In documents of the other half, at the tokens of
`sink_free`, the update of every block of the phase becomes

    zero      delta - (v^T delta) v                 with each layer's own v = v_L
    kept      delta - (v^T delta - v^T mu) v        the same, and its mean stays
    shared    delta - (u^T delta) u                 with the direction that the phase shares: the leading right
                                                    singular vector of the stacked v_L
    matched   delta - sum_i a_i (v_i^T delta) v_i   with the directions that follow v_L, in order, until the energy of
                                                    the change, sum_i a_i^2 e_i, is that of v_L: each a_i is 1, but for
                                                    the last
    random    delta - (r^T delta) r                 with a random direction r
    mean      mu                                    the mean update in place of each
    law       mu + (c T^(-L) + v w^T)(x - mean x)   what reduction/law_fit.py fits on that half: the map that the
                                                    phase's other layers share, and one direction; x = h / rms(h) of the
                                                    state as the changed blocks before it leave it

`matched` is the control for how much is taken away: it leaves v_L and takes as much energy from lower in the spectrum.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from delta_suite.capture.intervene import Intervention, Update
from delta_suite.models.phases import PhaseMap
from delta_suite.reduction.eigen import eigh, slow_float64
from delta_suite.reduction.gram import algebra_device, gram
from delta_suite.reduction.lanes import rows_at_once
from delta_suite.reduction.law_sums import Streams
from delta_suite.reduction.losses import CONDITIONS
from delta_suite.reduction.moments import rms

LawMap = tuple[Float[Tensor, "hidden k"], Float[Tensor, "hidden k"] | None]
"""Factors A and B of c T^(-L) + v w^T = A B^T; B is None where k is the width."""

LawMaps = Mapping[tuple[int, int], LawMap]
"""By layer and half."""


@dataclass(frozen=True)
class LayerFit:
    """Directions and means of one layer, fitted on one half."""

    direction: Float64[Tensor, " hidden"]
    """v_L."""
    mean: Float64[Tensor, " hidden"]
    """mu_L."""
    mean_input: Float64[Tensor, " hidden"]
    """The mean of x."""
    lower: Float32[Tensor, "count hidden"]
    """The directions below v_L that the control takes away, in float32."""
    parts: Float64[Tensor, " count"]
    """The part of each that it takes away, a_i."""
    matched: float
    """The energy of its change over that of v_L."""


def fit_layers(
    streams: Streams,
    entering: Bool[Tensor, " tokens"],
    half: Int64[Tensor, " tokens"],
    layers: Sequence[int],
    devices: Sequence[torch.device],
) -> dict[tuple[int, int], LayerFit]:
    """Return the fit of each of these layers on each half, 0 and 1.

    entering, half: which of all tokens enter, and the half of each, in the order of the stream. A layer without energy
    in a half has directions of zero: taking them away changes nothing.
    """
    fits: dict[tuple[int, int], LayerFit] = {}
    sums: dict[tuple[int, int], _Sums] = {}
    start = 0
    for stream in streams(layers):
        tokens = len(stream.document)
        within, side = entering[start : start + tokens], half[start : start + tokens]
        start += tokens
        for number, layer in enumerate(layers):
            device = algebra_device(devices[number % len(devices)])
            for first in range(0, tokens, rows_at_once(stream.hidden)):
                rows = slice(first, first + rows_at_once(stream.hidden))
                before, update = stream.step(layer, rows, device)
                for fold in (0, 1):
                    index = (within[rows] & (side[rows] == fold)).nonzero().flatten().to(before.device)
                    total = sums.setdefault((layer, fold), _Sums.zeros(stream.hidden, device))
                    total.add(before.index_select(0, index).double(), update.index_select(0, index).double())
            if start == len(entering):  # one layer after the other: the sums of a layer are squares
                for fold in (0, 1):
                    fits[layer, fold] = sums.pop((layer, fold)).fit()
    return fits


@dataclass
class _Sums:
    """Sums over the rows of one layer in one half."""

    rows: int
    x: Float64[Tensor, " hidden"]
    y: Float64[Tensor, " hidden"]
    square: Float64[Tensor, "hidden hidden"]

    @classmethod
    def zeros(cls, hidden: int, device: torch.device) -> _Sums:
        vector = torch.zeros(hidden, dtype=torch.float64, device=device)
        return cls(0, vector, vector.clone(), vector.new_zeros(hidden, hidden))

    def add(self, h: Float64[Tensor, "rows hidden"], delta: Float64[Tensor, "rows hidden"]) -> None:
        self.rows += len(h)
        self.x += (h / rms(h)).sum(dim=0)
        self.y += delta.sum(dim=0)
        self.square += gram(delta.float() if slow_float64(delta.device) else delta)

    def fit(self) -> LayerFit:
        values, vectors = eigh(self.square)
        energies, directions = values.flip(0).clamp_min(0.0), vectors.T.flip(0)
        directions = directions * (energies > 0).to(directions)[:, None]
        below, target = energies[1:], energies[0]
        before = torch.cat([below.new_zeros(1), below.cumsum(0)[:-1]])
        parts = ((target - before).clamp_min(0.0) / below.clamp_min(1e-300)).clamp_max(1.0).sqrt()
        parts = parts * (below > 0)
        used = int((parts > 0).sum())
        taken = float((parts.square() * below).sum() / target) if float(target) > 0 else 1.0
        rows = max(1, self.rows)
        return LayerFit(
            directions[0].cpu(),
            (self.y / rows).cpu(),
            (self.x / rows).cpu(),
            directions[1 : 1 + used].float().cpu(),  # of many layers: up to a square each
            parts[:used].cpu(),
            taken,
        )


def interventions(fits: Mapping[tuple[int, int], LayerFit], laws: LawMaps, phases: PhaseMap) -> Iterator[Intervention]:
    """Yield the interventions of each phase, in the order of CONDITIONS; `law` where the phase has maps.

    They are named `C.zero` and so on. What was fitted on one half is used in documents of the other.
    """
    for phase, (first, last) in phases.items():
        layers = range(first, last + 1)
        shared = [_leading([fits[layer, half].direction for layer in layers]) for half in (0, 1)]
        for condition in CONDITIONS:
            if condition == "law" and not all((layer, half) in laws for layer in layers for half in (0, 1)):
                continue

            def update(layer: int, half: int, condition: str = condition, shared: list[Tensor] = shared) -> Update:
                fit = fits[layer, half]
                if condition in {"zero", "kept"}:
                    constant = fit.direction @ fit.mean if condition == "kept" else None
                    return _Removed(fit.direction[None], constant=constant)
                if condition == "shared":
                    return _Removed(shared[half][None])
                if condition == "matched":
                    return _Removed(fit.lower, fit.parts)
                if condition == "random":
                    return _Removed(_random(layer, half, len(fit.direction))[None])
                return _Replaced(fit.mean, fit.mean_input, laws[layer, half] if condition == "law" else None)

            updates = {layer: (update(layer, 1), update(layer, 0)) for layer in layers}
            yield Intervention(f"{phase}.{condition}", updates)


def _leading(directions: Sequence[Tensor]) -> Tensor:
    """Return the leading right singular vector of stacked directions."""
    return cast(Tensor, torch.linalg.svd(torch.stack(list(directions)), full_matrices=False)[2][0])


def _random(layer: int, half: int, hidden: int) -> Tensor:
    """Return a direction drawn at random, the same one in every run."""
    generator = torch.Generator().manual_seed(2 * layer + half)
    drawn = torch.randn(hidden, generator=generator, dtype=torch.float64)
    return cast(Tensor, drawn / drawn.norm())


class _Removed:
    """Update without its components along some directions, or a part of each."""

    def __init__(self, directions: Tensor, parts: Tensor | None = None, constant: Tensor | None = None) -> None:
        """Take directions as rows, the part of each that is taken away, and what stays along the only one."""
        self._directions, self._parts, self._constant = directions, parts, constant

    def __call__(self, h: Tensor, delta: Tensor) -> Tensor:
        directions = self._directions.to(delta)  # not kept there: those of all phases would fill a GPU
        along = delta @ directions.T
        if self._parts is not None:
            along = along * self._parts.to(delta)
        if self._constant is not None:
            along = along - self._constant.to(delta)
        return delta - along @ directions


class _Replaced:
    """Mean update, and what the law adds to it, where it is given."""

    def __init__(self, mean: Tensor, mean_input: Tensor, law: LawMap | None) -> None:
        self._mean, self._mean_input, self._law = mean, mean_input, law

    def __call__(self, h: Tensor, delta: Tensor) -> Tensor:
        mean = self._mean.to(delta)
        if self._law is None:
            return mean.expand_as(delta)
        onto, basis = self._law
        x = h / rms(h) - self._mean_input.to(delta)
        return mean + (x if basis is None else x @ basis.to(delta)) @ onto.to(delta).T
