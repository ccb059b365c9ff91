"""The states h_L themselves: their spectra, sinks and curvature, and how well each token's own state gives its update.

Spectra are those of `reduce_stream`, of the states in the place of the updates. Everything else comes from two walks
over the rows. The first forms the sums from which maps from a state to the update are fitted, one on each half of the
units; the second scores each map on the other half, token by token. Two maps are fitted:

- `linear`: ridge regression of delta on h. Its error is that of the map from h to h + delta, too.
- `tokenwise`: ridge regression of delta on x = h / rms(h) and FEATURES random features relu(W x + b): it may bend.

Each has the ridge that is best inside the half that it is fitted on: a quarter of the units fits, another one tests, as
tokens of a text are alike and least squares alone would learn them. Without a group of units the maps are as they were
fitted, and the group is not scored: intervals are over the text that is scored, for these maps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from delta_suite.capture.stream import ResidualStream, wide
from delta_suite.capture.units import Units
from delta_suite.reduction.eigen import eigh
from delta_suite.reduction.gram import algebra_device
from delta_suite.reduction.lanes import rows_at_once
from delta_suite.reduction.law_sums import Streams
from delta_suite.reduction.moments import NORM_FLOOR
from delta_suite.reduction.replicates import LayerSpectra
from delta_suite.reduction.state_statistics import LINEAR, TOKENWISE, StateLayer, StateStatistics
from delta_suite.reduction.variants import BLOCK_VARIANTS

FEATURES = 512
"""Random features of the map `tokenwise`. On SmolLM2-135M 1,024 of them gave no more than the linear map."""

FITS = ((LINEAR, "raw"), (LINEAR, "sink_free"), (TOKENWISE, "sink_free"))
"""The maps, and the rows on which each is fitted and scored."""

RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Ridges to choose from, in multiples of the mean variance of the features. The law's, and larger ones: random features
learn a text by heart that a linear map cannot."""

FEWEST = 160
"""Fewest tokens of a half: with fewer, a map says nothing about the stream."""

TINY = 1e-300
"""Smallest variance that a ridge is a multiple of."""

Sums = dict[tuple[str, str], Float64[np.ndarray, "groups columns"]]


@dataclass(frozen=True)
class StateStream(ResidualStream):
    """A stream whose `step` returns each state twice, so that states are reduced in the place of updates."""

    @classmethod
    def of(cls, stream: ResidualStream) -> StateStream:
        """Return the same stream, whose states are reduced."""
        return cls(**{each.name: getattr(stream, each.name) for each in fields(stream)})

    def step(
        self, layer: int, rows: slice = slice(None), device: torch.device | None = None
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


@lru_cache(maxsize=2)
def _weights(hidden: int, count: int) -> tuple[Float64[Tensor, "hidden features"], Float64[Tensor, " features"]]:
    """Return the weights of the random features: the same in each run, and for all layers."""
    draw = np.random.default_rng(0)
    weights = draw.standard_normal((hidden, count)) / hidden**0.5
    return torch.from_numpy(weights), torch.from_numpy(draw.standard_normal(count))


def features(kind: str, states: Float64[Tensor, "rows hidden"]) -> Float64[Tensor, "rows columns"]:
    """Return what a map acts on: the states, or the normalised states and their random features."""
    if kind == LINEAR:
        return states
    x = states / states.square().mean(dim=1, keepdim=True).sqrt().clamp_min(NORM_FLOOR)
    weights, bias = (part.to(x.device) for part in _weights(x.shape[1], FEATURES))
    return torch.cat([x, torch.relu(x @ weights + bias)], dim=1)


@dataclass
class _Sums:
    """Sums over rows about a point near their mean, from which least squares is fitted and scored."""

    count: int
    x: Float64[Tensor, " columns"]
    y: Float64[Tensor, " hidden"]
    xx: Float64[Tensor, "columns columns"]
    xy: Float64[Tensor, "columns hidden"]

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(self)))

    def about(self, mean_x: Tensor, mean_y: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means of x x^T and x y^T about a point."""
        x, y = self.x / self.count, self.y / self.count
        A = self.xx / self.count - torch.outer(x, x) + torch.outer(x - mean_x, x - mean_x)
        return A, self.xy / self.count - torch.outer(x, y) + torch.outer(x - mean_x, y - mean_y)

    @property
    def means(self) -> tuple[Tensor, Tensor]:
        """The means of x and y."""
        return self.x / self.count, self.y / self.count


class _Fit:
    """A map from features to the update, fitted on the rows of one half of the units."""

    def __init__(self) -> None:
        self._centre: tuple[Tensor, Tensor] | None = None
        self._quarters: list[_Sums | None] = [None, None]

    def add(self, x: Float64[Tensor, "rows columns"], y: Float64[Tensor, "rows hidden"], quarter: int) -> None:
        """Add rows of a quarter of the units, of the training half."""
        if not len(x):
            return
        if self._centre is None:  # near the mean, so that nothing cancels
            self._centre = x.mean(dim=0), y.mean(dim=0)
        x, y = x - self._centre[0], y - self._centre[1]
        sums = _Sums(len(x), x.sum(dim=0), y.sum(dim=0), x.T @ x, x.T @ y)
        before = self._quarters[quarter]
        self._quarters[quarter] = sums if before is None else before + sums

    @property
    def problem(self) -> str | None:
        """Why the map cannot be fitted; None where it can."""
        counts = [0 if quarter is None else quarter.count for quarter in self._quarters]
        if not min(counts):
            return "maps are fitted on one half of the units, a quarter of them choosing the ridge: needs four groups"
        return None if sum(counts) >= FEWEST else f"a map needs {FEWEST} tokens, and a half has {sum(counts)}"

    def solve(self) -> None:
        """Fit the map with the ridge that is best inside the half, and forget the sums."""
        first, second = self._quarters
        assert first is not None
        assert second is not None
        assert self._centre is not None
        inner = _Ridge(first)
        ridge = inner.best(second)
        whole = first + second
        self._map = _Ridge(whole).map(ridge)
        self.mean_x, self.mean_y = (centre + mean for centre, mean in zip(self._centre, whole.means, strict=True))
        self._quarters = [None, None]

    def errors(self, x: Float64[Tensor, "rows columns"], y: Float64[Tensor, "rows hidden"]) -> Float64[Tensor, " rows"]:
        """Return the squared error of each row."""
        return (y - self.mean_y - (x - self.mean_x) @ self._map).square().sum(dim=1)


class _Ridge:
    """Least squares with any ridge, from one eigenproblem."""

    def __init__(self, sums: _Sums) -> None:
        self.means = sums.means
        A, B = sums.about(*self.means)
        values, self._vectors = eigh(A)
        self._values, self._seen = values.clamp_min(0.0), self._vectors.T @ B

    def map(self, ridge: float) -> Float64[Tensor, "columns hidden"]:
        """Return (A + mu I)^-1 B, mu the ridge times the mean of the diagonal of A."""
        return self._vectors @ self._solved(ridge)

    def _solved(self, ridge: float) -> Float64[Tensor, "columns hidden"]:
        mu = ridge * self._values.mean().clamp_min(TINY)
        return self._seen / (self._values + mu)[:, None]

    def best(self, test: _Sums) -> float:
        """Return the ridge with the least squared error on other rows."""
        A, B = test.about(*self.means)
        rotated, seen = self._vectors.T @ A @ self._vectors, self._vectors.T @ B

        def error(ridge: float) -> float:  # less what is the same for every ridge
            solved = self._solved(ridge)
            return float((solved * (rotated @ solved - 2 * seen)).sum())

        return min(RIDGES, key=error)


@dataclass(frozen=True)
class _Tokens:
    """Everything about the tokens of a shard that is the same for all layers."""

    stream: ResidualStream
    entering: Mapping[str, Bool[Tensor, " tokens"]]
    """The tokens that enter, for raw and for sink_free."""
    group: Int64[Tensor, " tokens"]
    documents: Int64[Tensor, " tokens"] | None
    """The group of documents of each token, where the unit is the domain."""

    @classmethod
    def of(cls, stream: ResidualStream, sinks: Bool[Tensor, " tokens"], units: Units) -> _Tokens:
        document, kept = stream.document.cpu(), stream.kept.cpu()
        groups = torch.tensor(units.groups)[document]
        documents = None if units.documents is None else torch.tensor(units.documents)[document]
        return cls(stream, {"raw": kept, "sink_free": kept & ~sinks.cpu()}, groups, documents)

    def triples(self, variant: str) -> Bool[Tensor, " tokens"]:
        """Return True for each token that enters with the two after it, all of one sequence."""
        enters, position = self.entering[variant], self.stream.position.cpu()
        document = self.stream.document.cpu()
        out = torch.zeros_like(enters)
        if len(enters) > 2:
            follows = (position[1:] == position[:-1] + 1) & (document[1:] == document[:-1]) & enters[1:] & enters[:-1]
            out[:-2] = follows[:-1] & follows[1:]
        return out


class _Layer:
    """The accumulating figures of one layer."""

    def __init__(self, units: Units) -> None:
        self.counts = (units.group_count, units.document_group_count)
        self.fits = {(kind, rows, half): _Fit() for kind, rows in FITS for half in (0, 1)}
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
        for rows, states, update in _blocks(tokens.stream, layer, device):
            for kind, chosen in FITS:
                x = features(kind, states)
                for quarter in range(4):
                    used = tokens.entering[chosen][rows] & (tokens.group[rows] % 4 == quarter)
                    index = used.nonzero().flatten().to(x.device)
                    self.fits[kind, chosen, quarter % 2].add(x[index], update[index], quarter // 2)
        angle = _angles(tokens.stream.states[layer], device)
        for variant in tokens.entering:
            used = tokens.triples(variant) & ~angle.isnan()
            columns = torch.stack([torch.ones_like(angle), angle, angle.square()], dim=1)
            self._count(("angle", variant), tokens, used, columns)

    def solve(self) -> str | None:
        """Fit the maps, or return why they cannot be fitted."""
        for fit in self.fits.values():
            if problem := fit.problem:
                return problem
        for fit in self.fits.values():
            fit.solve()
        return None

    def second(self, layer: int, tokens: _Tokens, device: torch.device | None) -> None:
        """Score the rows of a shard by the maps of the other half."""
        for rows, states, update in _blocks(tokens.stream, layer, device):
            half = tokens.group[rows] % 2
            for kind, chosen in FITS:
                x, enters = features(kind, states), tokens.entering[chosen][rows]
                columns = torch.zeros(len(x), 3, dtype=torch.float64)
                for side in (0, 1):
                    fit, index = self.fits[kind, chosen, 1 - side], (enters & (half == side)).nonzero().flatten()
                    x_there, update_there = (part[index.to(x.device)] for part in (x, update))
                    scored = [fit.errors(x_there, update_there)]
                    if kind == LINEAR:  # x is h itself, and the update about its mean is scored once for both maps
                        about = update_there - fit.mean_y
                        scored += [part.square().sum(dim=1) for part in (about, x_there - fit.mean_x + about)]
                    columns[index, : len(scored)] = torch.stack(scored, dim=1).cpu()
                self._count((kind, chosen), tokens, enters, columns, rows)

    def _count(
        self,
        key: tuple[str, str],
        tokens: _Tokens,
        used: Bool[Tensor, " rows"],
        columns: Float64[Tensor, "rows columns"],
        rows: slice = slice(None),
    ) -> None:
        """Add the columns of the rows that are used to the sums of their groups, in each grouping."""
        for sums, groups, count in zip(self.sums, (tokens.group, tokens.documents), self.counts, strict=True):
            if groups is not None:
                total = sums.setdefault(key, np.zeros((count, columns.shape[1])))
                np.add.at(total, groups[rows][used].numpy(), columns[used].numpy())


def _blocks(
    stream: ResidualStream, layer: int, device: torch.device | None
) -> Iterator[tuple[slice, Float64[Tensor, "rows hidden"], Float64[Tensor, "rows hidden"]]]:
    """Yield the rows of a layer in blocks: states and updates in float64."""
    home = algebra_device(device or stream.states[layer].device)
    at_once = rows_at_once(stream.hidden + FEATURES)
    for start in range(0, len(stream.document), at_once):
        rows = slice(start, start + at_once)
        before, update = stream.step(layer, rows, home)
        yield rows, before.double(), update.double()


def _angles(states: Float[Tensor, "tokens hidden"], device: torch.device | None) -> Float64[Tensor, " tokens"]:
    """Return the angle between the step to the next token and the step after that; NaN where a step has no length.

    Angles are taken by halves, 2 atan2(|a - b|, |a + b|) of unit vectors, which loses nothing where steps are parallel.
    """
    home, at_once = algebra_device(device or states.device), rows_at_once(states.shape[1])
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
        layers = {layer: _Layer(units) for layer in portion}

        def walk(step: str, layers: Mapping[int, _Layer] = layers, portion: Sequence[int] = portion) -> None:
            first = 0
            for stream in streams(portion):
                tokens = _Tokens.of(stream, sinks[first : first + len(stream.document)], units)
                first += len(stream.document)
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
