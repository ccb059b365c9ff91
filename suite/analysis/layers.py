"""Residual stream -> per-layer spectra, directions and token averages, one layer at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from jaxtyping import Bool, Float, Float32, Float64
from torch import Tensor

from suite.analysis.metrics import TOP_K, LayerStatistics
from suite.analysis.moments import TOKEN_QUANTITIES, Moments, token_quantities
from suite.analysis.spectra import Spectrum, spectrum_of_gram, spectrum_of_rows
from suite.capture.residual import ResidualStream


@dataclass(frozen=True)
class LayerSpectra:
    """One layer, reduced: statistics for the metrics, directions of all tokens and of the two document halves."""

    statistics: LayerStatistics
    directions: Float64[Tensor, "k hidden"]
    halves: tuple[Float64[Tensor, "k hidden"], Float64[Tensor, "k hidden"]] | None


def reduce_stream(
    shards: Iterable[ResidualStream],
    *,
    layers: int,
    tokens: int,
    advance: Callable[[int], object] = lambda layer: None,
) -> list[LayerSpectra]:
    """Every layer of a stream that comes in one or more shards, `tokens` kept rows in all.

    One shard of at most `hidden` tokens is reduced on the token side. Otherwise the moments of each document half are
    added over the shards, and a layer's moments are dropped as soon as the last shard has been added.
    Documents with an even index form half a, the others half b; one document has no halves.
    """
    moments: list[dict[bool, Moments]] = [{} for _ in range(layers)]
    reduced: list[LayerSpectra] = []
    seen = 0
    for stream in shards:
        seen += int(stream.kept.sum())
        in_half_a = (stream.document % 2 == 0)[stream.kept]
        for layer in range(layers):
            rows = _kept(stream, layer)
            if seen == tokens <= stream.hidden and not moments[layer]:
                reduced.append(_reduce_rows(*rows, in_half_a))
            else:
                _accumulate(moments[layer], *rows, in_half_a)
                if seen == tokens:
                    reduced.append(_reduce_moments(moments[layer]))
                    moments[layer] = {}
            advance(layer)
    return reduced


def _kept(stream: ResidualStream, layer: int) -> tuple[Tensor, Tensor]:
    """h_L and delta_L of the kept tokens, moved to where the layer's state was captured from."""
    before, update = stream.states[layer], stream.delta(layer)
    if bool(stream.kept.all()):
        return before, update
    kept = stream.kept.to(before.device)
    return before[kept], update[kept]


def _accumulate(moments: dict[bool, Moments], before: Tensor, update: Tensor, in_half_a: Tensor) -> None:
    for half in (True, False):
        rows = (in_half_a == half).to(update.device)
        if bool(rows.any()):
            own = Moments.of(before[rows], update[rows])
            moments[half] = moments[half] + own if half in moments else own


def _reduce_rows(
    before: Float[Tensor, "tokens hidden"],
    update: Float32[Tensor, "tokens hidden"],
    in_half_a: Bool[Tensor, " tokens"],
) -> LayerSpectra:
    quantities = token_quantities(before, update)
    whole = spectrum_of_rows(update, TOP_K)
    halves = None
    if bool(in_half_a.any()) and not bool(in_half_a.all()):
        a = in_half_a.to(update.device)
        halves = (
            spectrum_of_rows(update[a], TOP_K).directions,
            spectrum_of_rows(update[~a], TOP_K).directions,
        )
    sums, squares = quantities.sum(dim=0), quantities.square().sum(dim=0)
    return LayerSpectra(_statistics(whole, len(update), sums, squares), whole.directions, halves)


def _reduce_moments(moments: dict[bool, Moments]) -> LayerSpectra:
    parts = list(moments.values())
    total = parts[0] + parts[1] if len(parts) == 2 else parts[0]
    whole = spectrum_of_gram(total.gram, total.tokens, TOP_K)
    halves = None
    if len(parts) == 2:
        a, b = (spectrum_of_gram(moments[half].gram, moments[half].tokens, TOP_K) for half in (True, False))
        halves = (a.directions, b.directions)
    return LayerSpectra(_statistics(whole, total.tokens, total.sums, total.squares), whole.directions, halves)


def _statistics(spectrum: Spectrum, tokens: int, sums: Tensor, squares: Tensor) -> LayerStatistics:
    mean = sums / tokens
    sd = (squares / tokens - mean.square()).clamp_min(0.0).sqrt()
    averages = {
        name: (float(m), float(s)) for name, m, s in zip(TOKEN_QUANTITIES, mean.tolist(), sd.tolist(), strict=True)
    }
    hidden = spectrum.directions.shape[1]
    return LayerStatistics(tokens, hidden, spectrum.eigenvalues.cpu().numpy(), averages)
