"""Residual stream -> per-layer spectra, directions and token averages, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from suite.analysis.metrics import TOP_K, LayerStatistics
from suite.analysis.moments import TOKEN_QUANTITIES, Moments, token_quantities
from suite.analysis.spectra import Spectrum, spectrum_of_gram, spectrum_of_rows
from suite.capture.stream import ResidualStream


@dataclass(frozen=True)
class LayerSpectra:
    """One layer, reduced: statistics for the metrics, directions of all tokens and of the two document halves."""

    statistics: LayerStatistics
    directions: Float64[Tensor, "k hidden"]
    halves: tuple[Float64[Tensor, "k hidden"], Float64[Tensor, "k hidden"]] | None


ROWS_AT_ONCE = 8192
"""Tokens reduced at a time, so that float64 copies of them stay small beside the stream."""


def reduce_stream(
    shards: Iterable[ResidualStream],
    *,
    layers: int,
    tokens: int,
    devices: Sequence[torch.device] = (),
    advance: Callable[[int], object] = lambda tokens: None,
) -> list[LayerSpectra]:
    """Every layer of a stream that comes in one or more shards, `tokens` kept rows in all.

    One shard of at most `hidden` tokens is reduced on the token side. Otherwise the moments of each document half are
    added over the shards, and a layer's moments are dropped as soon as the last shard has been added.
    Documents with an even index form half a, the others half b; one document has no halves.

    Layer L is reduced on device L modulo their number, all devices at once; without devices, where its state lies.
    `advance` is told the tokens of each layer that has been reduced, `tokens` times `layers` in the end.
    """
    moments: list[dict[bool, Moments]] = [{} for _ in range(layers)]
    reduced: dict[int, LayerSpectra] = {}
    seen = 0
    lanes = max(1, len(devices))
    with ThreadPoolExecutor(lanes) as pool:
        for stream in shards:
            seen += int(stream.kept.sum())
            whole = seen == int(stream.kept.sum()) == tokens <= stream.hidden
            last = seen == tokens

            def reduce_lane(lane: int, stream: ResidualStream = stream, whole: bool = whole, last: bool = last) -> None:
                for layer in range(lane, layers, lanes):
                    device = devices[lane] if devices else stream.states[layer].device
                    if whole:
                        reduced[layer] = _reduce_rows(stream, layer, device)
                    else:
                        _accumulate(moments[layer], stream, layer, device)
                        if last:
                            reduced[layer] = _reduce_moments(moments[layer], _epsilon(stream))
                            moments[layer] = {}
                    advance(int(stream.kept.sum()))

            list(pool.map(reduce_lane, range(lanes)))
    return [reduced[layer] for layer in range(layers)]


def _accumulate(moments: dict[bool, Moments], stream: ResidualStream, layer: int, device: torch.device) -> None:
    """Add the kept rows of a layer to the moments of their document halves, some rows at a time."""
    in_half_a = stream.document % 2 == 0
    for start in range(0, len(stream.kept), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        before, update = stream.step(layer, rows, device)
        for half in (True, False):
            chosen = stream.kept[rows] & (in_half_a[rows] == half)
            if not bool(chosen.any()):
                continue
            own = Moments.of(*_rows(chosen, before, update))
            moments[half] = moments[half] + own if half in moments else own


def _rows(chosen: Bool[Tensor, " tokens"], *matrices: Tensor) -> tuple[Tensor, ...]:
    if bool(chosen.all()):
        return matrices
    index = chosen.nonzero().flatten()
    return tuple(matrix.index_select(0, index.to(matrix.device)) for matrix in matrices)


def _reduce_rows(stream: ResidualStream, layer: int, device: torch.device) -> LayerSpectra:
    before, update = _rows(stream.kept, *stream.step(layer, device=device))
    in_half_a = (stream.document % 2 == 0)[stream.kept]
    quantities = token_quantities(before, update)
    whole = spectrum_of_rows(update, TOP_K)
    halves = None
    if bool(in_half_a.any()) and not bool(in_half_a.all()):
        a, b = (spectrum_of_rows(_rows(half, update)[0], TOP_K).directions for half in (in_half_a, ~in_half_a))
        halves = (a, b)
    sums, squares = quantities.sum(dim=0), quantities.square().sum(dim=0)
    return LayerSpectra(_statistics(whole, len(update), sums, squares, _epsilon(stream)), whole.directions, halves)


def _epsilon(stream: ResidualStream) -> float:
    return torch.finfo(stream.states[0].dtype).eps


def _reduce_moments(moments: dict[bool, Moments], epsilon: float) -> LayerSpectra:
    parts = list(moments.values())
    total = parts[0] + parts[1] if len(parts) == 2 else parts[0]
    whole = spectrum_of_gram(total.gram, total.tokens, TOP_K)
    halves = None
    if len(parts) == 2:
        a, b = (spectrum_of_gram(moments[half].gram, moments[half].tokens, TOP_K) for half in (True, False))
        halves = (a.directions, b.directions)
    return LayerSpectra(_statistics(whole, total.tokens, total.sums, total.squares, epsilon), whole.directions, halves)


def _statistics(spectrum: Spectrum, tokens: int, sums: Tensor, squares: Tensor, epsilon: float) -> LayerStatistics:
    mean = sums / tokens
    sd = (squares / tokens - mean.square()).clamp_min(0.0).sqrt()
    averages = {
        name: (float(m), float(s)) for name, m, s in zip(TOKEN_QUANTITIES, mean.tolist(), sd.tolist(), strict=True)
    }
    hidden = spectrum.directions.shape[1]
    return LayerStatistics(tokens, hidden, spectrum.eigenvalues.cpu().numpy(), averages, epsilon)
