"""The states h_L themselves: their spectra, sinks and curvature, and how well each token's own state gives its update.

Spectra are those of `reduce_stream`, of the states in the place of the updates. Everything else comes from two walks
over the rows. The first forms the sums from which maps from a state to the update (state_maps.py) are fitted, one on
each half of the units; the second scores each map on the other half, token by token. Without a group of units the maps
are as they were fitted, and the group is not scored: intervals are over the text that is scored, for these maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import reduce
from operator import add
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from delta_suite.capture.stream import ResidualStream, wide
from delta_suite.capture.units import Units
from delta_suite.reduction import state_maps
from delta_suite.reduction.gram import algebra_device
from delta_suite.reduction.lanes import HOST_ROWS, rows_at_once
from delta_suite.reduction.law_sums import Streams
from delta_suite.reduction.replicates import LayerSpectra
from delta_suite.reduction.state_maps import MapFit, MapSums, features, squared_norms
from delta_suite.reduction.state_statistics import LINEAR, TOKENWISE, StateLayer, StateStatistics
from delta_suite.reduction.variants import BLOCK_VARIANTS

FITS = ((LINEAR, "raw"), (LINEAR, "sink_free"), (TOKENWISE, "sink_free"))
"""The maps, and the rows on which each is fitted and scored."""

UPDATE = "update"
"""The name of the updates beside those of the maps."""

KEPT_BYTES = 1 << 29
"""Most bytes of rows that are kept between the two walks; more are formed again. SmolLM2-135M under `core`: 0.37 GB."""

Sums = dict[tuple[str, str], Float64[np.ndarray, "groups columns"]]


class Part(NamedTuple):
    """The tokens of a quarter of the units, sinks apart: sums over parts make those of every map."""

    half: int
    quarter: int
    """Which quarter of the half: the first one fits, the second one chooses the ridge."""
    sink: bool


@dataclass(frozen=True)
class StateStream(ResidualStream):
    """A stream whose `step` returns each state twice, so that states are reduced in the place of updates."""

    @classmethod
    def of(cls, stream: ResidualStream) -> StateStream:
        """Return the same stream, whose states are reduced."""
        return cls(**{each.name: getattr(stream, each.name) for each in fields(stream)})

    def step(
        self, layer: int, rows: slice | Int64[Tensor, " rows"] = slice(None), device: torch.device | None = None
    ) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows hidden"]]:
        """Return h_L in the dtype of the stream, and in that of its updates."""
        before = self.states[layer][rows]
        before = before.to(before.device if device is None else device)
        return before, wide(before)


def state_streams(streams: Iterable[ResidualStream]) -> Iterator[ResidualStream]:
    """Yield streams whose states are reduced, and hold none of them while the next one is filled."""
    for stream in streams:
        yield StateStream.of(stream)
        del stream


@dataclass(frozen=True)
class _Tokens:
    """Everything about the tokens of a shard that is the same for all layers."""

    stream: ResidualStream
    entering: Mapping[str, Bool[Tensor, " tokens"]]
    """The tokens that enter, for raw and for sink_free."""
    group: Int64[Tensor, " tokens"]
    documents: Int64[Tensor, " tokens"] | None
    """The group of documents of each token, where the unit is the domain."""
    parts: Mapping[Part, Bool[Tensor, " tokens"]]
    """The tokens of each part: those that enter raw, apart by whether they are sinks."""
    whole: bool
    """True where the shard holds all tokens."""

    @classmethod
    def of(cls, stream: ResidualStream, sinks: Bool[Tensor, " tokens"], units: Units, *, whole: bool) -> _Tokens:
        document, kept, sinks = stream.document.cpu(), stream.kept.cpu(), sinks.cpu()
        group = torch.tensor(units.groups)[document]
        documents = None if units.documents is None else torch.tensor(units.documents)[document]
        parts = {
            Part(quarter % 2, quarter // 2, sink): kept & (group % 4 == quarter) & (sinks == sink)
            for sink in (False, True)
            for quarter in range(4)
        }
        return cls(stream, {"raw": kept, "sink_free": kept & ~sinks}, group, documents, parts, whole)

    def triples(self, variant: str) -> Bool[Tensor, " tokens"]:
        """Return True for each token that enters with the two after it, all of one sequence."""
        enters, position = self.entering[variant], self.stream.position.cpu()
        document = self.stream.document.cpu()
        out = torch.zeros_like(enters)
        if len(enters) > 2:
            follows = (position[1:] == position[:-1] + 1) & (document[1:] == document[:-1]) & enters[1:] & enters[:-1]
            out[:-2] = follows[:-1] & follows[1:]
        return out

    def rows(
        self, layer: int, device: torch.device | None
    ) -> Iterator[tuple[Part, Int64[Tensor, " rows"], Float64[Tensor, "rows hidden"], Float64[Tensor, "rows hidden"]]]:
        """Yield the rows of a layer, some of one part at a time: their numbers, states and updates, in float64."""
        stream = self.stream
        home = algebra_device(device or stream.states[layer].device)
        at_once = rows_at_once(stream.hidden + state_maps.FEATURES)
        together = HOST_ROWS if home.type == "cpu" else at_once
        for start in range(0, len(stream.document), at_once):
            rows = slice(start, start + at_once)
            before, update = stream.step(layer, rows, home)
            for part, tokens in self.parts.items():
                for numbers in torch.split(tokens[rows].nonzero().flatten(), together):
                    index = numbers.to(home)
                    states, updates = (taken.index_select(0, index).double() for taken in (before, update))
                    if len(numbers):
                        yield part, numbers + start, states, updates


class _Rows(NamedTuple):
    """Rows of one part, for one of the maps: both sides are about the centres of the layer."""

    part: Part
    numbers: Int64[Tensor, " rows"]
    kind: str
    x: Float64[Tensor, "rows columns"]
    y: Float64[Tensor, "rows hidden"]


class _Layer:
    """The accumulating figures of one layer."""

    def __init__(self, units: Units, room: int) -> None:
        """Take the units, and the bytes of rows that may be kept from the first walk for the second one."""
        self.counts = (units.group_count, units.document_group_count)
        self.centres: dict[str, Tensor] = {}
        """A point near the mean of what each map acts on, and of the updates, so that nothing cancels about it."""
        self.parts: dict[tuple[str, Part], MapSums] = {}
        self.fits: dict[tuple[str, str, int], MapFit] = {}
        self._kept: list[_Rows] = []
        self._room = room
        self.sums: tuple[Sums, Sums] = ({}, {})
        self.norms: list[Float[np.ndarray, " tokens"]] = []
        self.tokens: list[tuple[np.ndarray, ...]] = []
        """Whether each token is kept, its position, and its group in each grouping."""

    def first(self, layer: int, tokens: _Tokens, device: torch.device | None) -> None:
        """Add the rows of a shard to the sums of the maps, and take its norms and angles."""
        kept, position = tokens.entering["raw"], tokens.stream.position.cpu()
        groupings = [group for group in (tokens.group, tokens.documents) if group is not None]
        self.tokens.append(tuple(part.numpy() for part in (kept, position, *groupings)))
        self.norms.append(tokens.stream.row_norms(layer).numpy())
        for rows in self._formed(layer, tokens, device):
            if (rows.kind, rows.part) not in self.parts:
                self.parts[rows.kind, rows.part] = MapSums.zeros(rows.x, rows.x.shape[1], rows.y.shape[1])
            self.parts[rows.kind, rows.part].add(rows.x, rows.y)
            self._room -= rows.x.nbytes + rows.y.nbytes
            if tokens.whole and self._room >= 0:
                self._kept.append(rows)
        if self._room < 0:
            self._kept.clear()
        angle = _angles(tokens.stream.states[layer], device)
        columns = torch.stack([torch.ones_like(angle), angle, angle.square()], dim=1)
        for variant in tokens.entering:
            index = (tokens.triples(variant) & ~angle.isnan()).nonzero().flatten()
            self._count(("angle", variant), tokens, index, columns[index])

    def _formed(self, layer: int, tokens: _Tokens, device: torch.device | None) -> Iterator[_Rows]:
        """Yield the rows of a shard for each map that they enter."""
        for part, numbers, states, update in tokens.rows(layer, device):
            kinds = (LINEAR,) if part.sink else (TOKENWISE, LINEAR)
            matrices = {kind: features(kind, states) for kind in kinds} | {UPDATE: update}
            for name, matrix in matrices.items():
                if name not in self.centres:
                    self.centres[name] = matrix.mean(dim=0)
                matrix.sub_(self.centres[name])
            for kind in kinds:
                yield _Rows(part, numbers, kind, matrices[kind], update)

    def solve(self) -> str | None:
        """Fit the maps, or return why they cannot be fitted."""
        for kind, chosen in FITS:
            for half in (0, 1):
                self.fits[kind, chosen, half] = MapFit([self._quarter(kind, chosen, half, each) for each in (0, 1)])
        self.parts.clear()
        for fit in self.fits.values():
            if problem := fit.problem:
                return problem
        for fit in self.fits.values():
            fit.solve()
        return None

    def _quarter(self, kind: str, chosen: str, half: int, quarter: int) -> MapSums | None:
        """Return the sums over a quarter of the units, with sinks where they enter; None where it has no rows."""
        sinks = (False, True) if chosen == "raw" else (False,)
        parts = [self.parts.get((kind, Part(half, quarter, sink))) for sink in sinks]
        present = [part for part in parts if part is not None]
        return reduce(add, present) if present else None

    def second(self, layer: int, tokens: _Tokens, device: torch.device | None) -> None:
        """Score the rows of a shard by the maps of the other half."""
        for part, numbers, kind, x, y in self._kept or self._formed(layer, tokens, device):
            by_rows = {chosen: self.fits[each, chosen, 1 - part.half] for each, chosen in FITS if each == kind}
            if part.sink:
                del by_rows["sink_free"]
            scored = {chosen: [fit.errors(x, y)] for chosen, fit in by_rows.items()}
            if kind == LINEAR:  # x is h itself, and the update about its mean is scored once for both maps
                for chosen, fit in by_rows.items():
                    scored[chosen].append(squared_norms(y - fit.mean_y))
                after = x.add_(y)
                for chosen, fit in by_rows.items():
                    scored[chosen].append(squared_norms(after - (fit.mean_x + fit.mean_y)))
            for chosen, columns in scored.items():
                self._count((kind, chosen), tokens, numbers, torch.stack(columns, dim=1).cpu())

    def _count(
        self,
        key: tuple[str, str],
        tokens: _Tokens,
        index: Int64[Tensor, " rows"],
        columns: Float64[Tensor, "rows columns"],
    ) -> None:
        """Add the columns of these tokens to the sums of their groups, in each grouping."""
        for sums, groups, count in zip(self.sums, (tokens.group, tokens.documents), self.counts, strict=True):
            if groups is not None:
                total = sums.setdefault(key, np.zeros((count, columns.shape[1])))
                np.add.at(total, groups[index].numpy(), columns.numpy())


def _angles(states: Float[Tensor, "tokens hidden"], device: torch.device | None) -> Float64[Tensor, " tokens"]:
    """Return the angle between the step to the next token and the step after that; NaN where a step has no length.

    Angles are taken by halves, 2 atan2(|a - b|, |a + b|) of unit vectors, which loses nothing where steps are parallel.
    """
    home = algebra_device(device or states.device)
    at_once = HOST_ROWS if home.type == "cpu" else rows_at_once(states.shape[1])
    out = torch.full((len(states),), torch.nan, dtype=torch.float64)
    for start in range(0, max(0, len(states) - 2), at_once):
        block = states[start : start + at_once + 2].to(home).double()
        steps = block[1:] - block[:-1]
        norms = steps.norm(dim=1, keepdim=True)
        unit = steps / torch.where(norms > 0, norms, torch.full_like(norms, torch.nan))
        first, second = unit[:-1], unit[1:]
        angles = 2 * torch.atan2((first - second).norm(dim=1), (first + second).norm(dim=1))
        out[start : start + len(angles)] = angles.cpu()
    return out


def state_layers(
    streams: Streams,
    sinks: Bool[Tensor, " tokens"],
    spectra: Mapping[str, Sequence[LayerSpectra]],
    *,
    units: Units,
    chosen: Sequence[int],
    at_once: int,
    devices: Sequence[torch.device] = (),
) -> dict[str, list[StateLayer]]:
    """Return the figures of the chosen states, by variant.

    streams: the stream again, in shards. sinks: True for each sink, in the order of the stream. spectra: those of the
    states (`state_streams`) of these layers, by variant. at_once: layers of one walk over the stream.
    """
    out: dict[str, list[StateLayer]] = {variant: [] for variant in BLOCK_VARIANTS}
    for start in range(0, len(chosen), at_once):
        portion = chosen[start : start + at_once]
        layers = {layer: _Layer(units, KEPT_BYTES // at_once) for layer in portion}

        def walk(step: str, layers: Mapping[int, _Layer] = layers, portion: Sequence[int] = portion) -> None:
            first = 0
            for stream in streams(portion):
                count = len(stream.document)
                tokens = _Tokens.of(stream, sinks[first : first + count], units, whole=count == len(sinks))
                first += count
                for layer in portion:
                    device = devices[layer % len(devices)] if devices else None
                    getattr(layers[layer], step)(layer, tokens, device)
                del stream, tokens

        walk("first")
        problems = [layers[layer].solve() for layer in portion]
        if not any(problems):
            walk("second")
        for number, layer in enumerate(portion):
            for variant, figures in out.items():
                of_layer = spectra[variant][start + number]
                figures.append(_figures(layers[layer], variant, of_layer, problems[number]))
    return out


def _figures(layer: _Layer, variant: str, spectra: LayerSpectra, problem: str | None) -> StateLayer:
    """Return the figures of one state in one variant, of all units and without each group."""
    norms = np.concatenate(layer.norms)
    kept, position, *groupings = (np.concatenate(parts) for parts in zip(*layer.tokens, strict=True))

    def case(eigenvalues: np.ndarray, grouping: int, without: int | None) -> StateStatistics:
        stays = kept if without is None else kept & (groupings[grouping] != without)
        sums = layer.sums[grouping]

        def total(key: tuple[str, str]) -> np.ndarray | None:
            rows = sums.get(key)
            if rows is None:
                return None
            return np.asarray(rows.sum(axis=0) - (0.0 if without is None else rows[without]))

        first, others = norms[stays & (position == 0)], norms[stays & (position > 0)]
        angle = total(("angle", variant))
        fitted = {kind: total((kind, variant)) for kind, rows in FITS if rows == variant and problem is None}
        known = {kind: columns for kind, columns in fitted.items() if columns is not None}
        linear = known.get(LINEAR)
        return StateStatistics(
            eigenvalues,
            (float(first.mean(dtype=np.float64)), float(np.median(others))) if len(first) and len(others) else None,
            None if angle is None or angle[0] == 0 else _mean_sd(angle),
            {kind: float(columns[0]) for kind, columns in known.items()},
            (0.0, 0.0) if linear is None else (float(linear[1]), float(linear[2])),
            problem,
        )

    replicates = tuple(
        tuple(
            case(each.eigenvalues, grouping, group)
            for group, each in enumerate(() if removed is None else removed.statistics)
        )
        for grouping, removed in enumerate((spectra.replicates, spectra.documents))
    )
    return StateLayer(case(spectra.statistics.eigenvalues, 0, None), *replicates)


def _mean_sd(sums: Float64[np.ndarray, " 3"]) -> tuple[float, float]:
    """Return mean and standard deviation from a count, a sum and a sum of squares."""
    mean = sums[1] / sums[0]
    return float(mean), float(np.sqrt(max(0.0, sums[2] / sums[0] - mean**2)))
