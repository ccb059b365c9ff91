"""Residual stream -> per-layer spectra, directions and token averages, one layer at a time, in every variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float32, Float64
from torch import Tensor

from suite.analysis.metrics import TOP_K, LayerStatistics
from suite.analysis.moments import TOKEN_QUANTITIES, Moments, token_quantities
from suite.analysis.spectra import Spectrum, spectrum_of_gram, spectrum_of_rows
from suite.analysis.variants import Sinks, find_sinks, normalised
from suite.capture.stream import ResidualStream

LANES = 4
"""Layers reduced at once on one GPU, each on a CUDA stream of its own: an eigenproblem alone leaves much of it idle."""

ROWS_AT_ONCE = 8192
"""Tokens reduced at a time, so that float64 copies of them stay small beside the stream."""


@dataclass(frozen=True)
class LayerSpectra:
    """One layer in one variant: statistics for the metrics, directions of all tokens and of the two document halves."""

    statistics: LayerStatistics
    directions: Float64[Tensor, "k hidden"]
    halves: tuple[Float64[Tensor, "k hidden"], Float64[Tensor, "k hidden"]] | None


@dataclass(frozen=True)
class _Shard:
    """A stream and what was chosen of its tokens once, for all layers."""

    stream: ResidualStream
    in_half_a: Bool[Tensor, " tokens"]
    sinks: Sinks | None
    """None where no variant asks."""

    @property
    def sink(self) -> Bool[Tensor, " tokens"]:
        return torch.zeros_like(self.stream.kept) if self.sinks is None else self.sinks.dropped


@dataclass(frozen=True)
class _Lane:
    """Where some of the layers are reduced, one after the other. On a GPU a lane has a CUDA stream of its own.

    A layer stays in its lane over all shards, so its moments are added in order.
    """

    device: torch.device | None
    """None: where each layer's state lies."""
    stream: torch.cuda.Stream | None
    _entered: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def over(cls, devices: Sequence[torch.device], per_gpu: int) -> list[_Lane]:
        lanes = []
        for device in devices:
            if device.type == "cuda":
                # torch loads its CUDA linear algebra at the first call, and fails where two threads make that at once.
                torch.linalg.eigh(torch.eye(2, device=device, dtype=torch.float64))
                lanes += [cls(device, torch.cuda.Stream(device)) for _ in range(per_gpu)]  # type: ignore[no-untyped-call]
            else:
                lanes.append(cls(device, None))
        return lanes or [cls(None, None)]

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.default_stream(self.stream.device))
            self._entered.enter_context(torch.cuda.stream(self.stream))

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.synchronize()  # before the shard that it reads goes away
        self._entered.close()


Part = tuple[str, bool, bool]
"""What moments are kept apart by: (as they are or normalised, in half a, a sink). Sums of parts make the variants."""


def reduce_stream(
    shards: Iterable[ResidualStream],
    *,
    layers: int,
    tokens: int,
    variants: Sequence[str] = ("raw",),
    devices: Sequence[torch.device] = (),
    advance: Callable[[int], object] = lambda tokens: None,
    found_sinks: Callable[[Sinks], object] = lambda sinks: None,
) -> dict[str, list[LayerSpectra]]:
    """Every layer, by variant, of a stream that comes in one or more shards, `tokens` kept rows in all.

    One shard of at most `hidden` tokens is reduced on the token side. Otherwise the moments of each document half are
    added over the shards, and a layer's moments are dropped as soon as the last shard has been added.
    Documents with an even index form half a, the others half b; one document has no halves.

    Layer L is reduced on device L modulo their number, all devices at once; without devices, where its state lies.
    `advance` is told the tokens of each layer that has been reduced, `tokens` times `layers` in the end; `found_sinks`
    the tokens that `sink_free` leaves out, once for each shard.
    """
    moments: list[dict[Part, Moments]] = [{} for _ in range(layers)]
    reduced: dict[int, dict[str, LayerSpectra]] = {}
    lanes: list[_Lane] = []
    seen = 0
    with ThreadPoolExecutor(max(1, len(devices)) * LANES) as pool:
        for stream in shards:
            sinks = find_sinks(stream) if "sink_free" in variants else None
            if sinks is not None:
                found_sinks(sinks)
            shard = _Shard(stream, stream.document % 2 == 0, sinks)
            seen += int(stream.kept.sum())
            whole = seen == int(stream.kept.sum()) == tokens <= stream.hidden
            last = seen == tokens
            lanes = lanes or _Lane.over(devices, LANES if tokens <= stream.hidden else 1)

            def reduce_lane(
                lane: int,
                lanes: Sequence[_Lane] = lanes,
                shard: _Shard = shard,
                whole: bool = whole,
                last: bool = last,
            ) -> None:
                with lanes[lane]:
                    for layer in range(lane, layers, len(lanes)):
                        device = lanes[lane].device or shard.stream.states[layer].device
                        if whole:
                            reduced[layer] = _reduce_rows(shard, layer, device, variants)
                        else:
                            _accumulate(moments[layer], shard, layer, device, variants)
                            if last:
                                epsilon = _epsilon(shard.stream)
                                reduced[layer] = {v: _reduce_moments(moments[layer], v, epsilon) for v in variants}
                                moments[layer] = {}
                        advance(int(shard.stream.kept.sum()))

            list(pool.map(reduce_lane, range(len(lanes))))
            # The shard is the largest thing in memory: nothing here may hold it while the next one is filled.
            del stream, shard, reduce_lane
    return {variant: [reduced[layer][variant] for layer in range(layers)] for variant in variants}


def _accumulate(
    moments: dict[Part, Moments], shard: _Shard, layer: int, device: torch.device, variants: Sequence[str]
) -> None:
    """Add the kept rows of a layer to the moments of their parts, some rows at a time."""
    stream = shard.stream
    ways = ["as they are", *(["normalised"] if "token_normalised" in variants else [])]
    for start in range(0, len(stream.kept), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        before, update = stream.step(layer, rows, device)
        for half in (True, False):
            for sink in (True, False):
                chosen = stream.kept[rows] & (shard.in_half_a[rows] == half) & (shard.sink[rows] == sink)
                if not bool(chosen.any()):
                    continue
                own_before, own_update = _rows(chosen, before, update)
                quantities = token_quantities(own_before, own_update)
                for way in ways:
                    own = Moments.of(own_update if way == "as they are" else normalised(own_update), quantities)
                    part = (way, half, sink)
                    moments[part] = moments[part] + own if part in moments else own


def _rows(chosen: Bool[Tensor, " tokens"], *matrices: Tensor) -> tuple[Tensor, ...]:
    if bool(chosen.all()):
        return matrices
    index = chosen.nonzero().flatten()
    return tuple(matrix.index_select(0, index.to(matrix.device)) for matrix in matrices)


def _reduce_rows(shard: _Shard, layer: int, device: torch.device, variants: Sequence[str]) -> dict[str, LayerSpectra]:
    stream = shard.stream
    before, update = _rows(stream.kept, *stream.step(layer, device=device))
    quantities = token_quantities(before, update)
    in_half_a, sink = shard.in_half_a[stream.kept], shard.sink[stream.kept]
    out = {}
    for variant in variants:
        half, rows, own = in_half_a, update, quantities
        if variant == "sink_free":
            rows, own = _rows(~sink, update, quantities)
            (half,) = _rows(~sink, in_half_a)
        elif variant == "token_normalised":
            rows = normalised(update)
        out[variant] = _spectra_of_rows(rows, own, half, variant == "centred", _epsilon(stream))
    return out


def _spectra_of_rows(
    rows: Float32[Tensor, "tokens hidden"],
    quantities: Float64[Tensor, "tokens quantities"],
    in_half_a: Bool[Tensor, " tokens"],
    centre: bool,
    epsilon: float,
) -> LayerSpectra:
    def spectrum(own: Tensor) -> Spectrum:
        return spectrum_of_rows(own - own.mean(dim=0) if centre else own, TOP_K)

    whole = spectrum(rows)
    halves = None
    if bool(in_half_a.any()) and not bool(in_half_a.all()):
        a, b = (spectrum(_rows(half, rows)[0]).directions for half in (in_half_a, ~in_half_a))
        halves = (a, b)
    energy = float(rows.double().square().sum())
    mean = 0.0 if centre or energy == 0 else float(rows.double().sum(dim=0).square().sum()) / len(rows) / energy
    sums, squares = quantities.sum(dim=0), quantities.square().sum(dim=0)
    return LayerSpectra(_statistics(whole, len(rows), sums, squares, mean, epsilon), whole.directions, halves)


def _epsilon(stream: ResidualStream) -> float:
    return torch.finfo(stream.states[0].dtype).eps


def _reduce_moments(moments: Mapping[Part, Moments], variant: str, epsilon: float) -> LayerSpectra:
    way = "normalised" if variant == "token_normalised" else "as they are"
    halves: dict[bool, Moments] = {}
    for (own_way, half, sink), own in moments.items():
        if own_way == way and not (variant == "sink_free" and sink):
            halves[half] = halves[half] + own if half in halves else own
    if not halves:  # every token is a sink
        nothing = next(iter(moments.values())).gram.new_zeros(0, len(next(iter(moments.values())).gram)).float()
        return _spectra_of_rows(
            nothing, nothing.new_zeros(0, len(TOKEN_QUANTITIES)).double(), torch.zeros(0) > 0, False, epsilon
        )
    parts = list(halves.values())
    total = parts[0] + parts[1] if len(parts) == 2 else parts[0]
    whole = _spectrum(total, variant)
    directions = None
    if len(parts) == 2:
        directions = (_spectrum(halves[True], variant).directions, _spectrum(halves[False], variant).directions)
    mean = 0.0 if variant == "centred" else total.mean_energy
    statistics = _statistics(whole, total.tokens, total.sums, total.squares, mean, epsilon)
    return LayerSpectra(statistics, whole.directions, directions)


def _spectrum(moments: Moments, variant: str) -> Spectrum:
    return spectrum_of_gram((moments.centred() if variant == "centred" else moments).gram, moments.tokens, TOP_K)


def _statistics(
    spectrum: Spectrum, tokens: int, sums: Tensor, squares: Tensor, mean_energy: float, epsilon: float
) -> LayerStatistics:
    mean = sums / max(tokens, 1)
    sd = (squares / max(tokens, 1) - mean.square()).clamp_min(0.0).sqrt()
    averages = {
        name: (float(m), float(s)) for name, m, s in zip(TOKEN_QUANTITIES, mean.tolist(), sd.tolist(), strict=True)
    }
    hidden = spectrum.directions.shape[1]
    return LayerStatistics(tokens, hidden, spectrum.eigenvalues.cpu().numpy(), averages, mean_energy, epsilon)
