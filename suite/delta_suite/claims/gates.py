"""Gates: conditions on a measurement under which a verdict may be drawn from it. A closed gate: inconclusive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from delta_suite.claims.observe import Observation
from delta_suite.metrics.definition import Metric
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import PERCENT
from delta_suite.metrics.registry import METRICS, WITHOUT_VARIANTS
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import VARIANTS

MIN_DOCUMENTS = 50
"""Intervals of spectra over documents need 50-100 of them."""

MIN_DOMAINS = 12
"""Domains below which no verdict is drawn where a calibration declares them: the spread of fewer is hardly known, and
each decides too much of it."""

RELIABLE = 0.9
"""Split-half |cos| below which a layer's direction is noise."""

MOSTLY = 0.8
"""Share of a scope's layers that must have a direction."""

SINK_ENERGY = 0.5
"""Share of a layer's energy in sinks from which a spectrum that keeps them describes the sinks, and not the text."""

ROUNDING_ENERGY = 0.5
"""Share of a layer's energy in rounding from which the spectrum describes the dtype, and not the model."""

MOST_UNKNOWN = 0.05
"""Share of unknown tokens above which figures may be those of one token and not of the text."""

MIN_TOKENS_PER_DIMENSION: Mapping[str, float] = {
    "effective_rank": 2.0,
    "participation_ratio": 2.0,
    "stable_rank": 1.0,
    "effective_rank_roy": 10.0,
    "stream_effective_rank": 2.0,
}
"""Tokens per dimension, n/d, below which the halves do not show the bias of a rank. In simulated streams the interval
of the entropy rank covered 0.93 at n/d = 1.9; that of Roy's rank covered 0.41 there, and 0.97 at n/d = 10."""

_ABOUT_GATES = ("reliability", "spectral_gap", "intra_cosine_disattenuated")
"""Metrics that tell how far directions can be trusted, and are not held to the gates on directions."""


@dataclass(frozen=True)
class Gate:
    """A gate that stays closed, with the reason."""

    name: str
    says: str


def failed_gates(observed: Observation, reference: Observation | None, view: RecordView) -> tuple[Gate, ...]:
    """Return the gates that keep this measurement from deciding a claim about these figures.

    The capture certificate is not among them: a record exists only where it holds.
    """
    sides = [side for side in (observed, reference) if side is not None and side.model == observed.model]
    gates = [*_documents(observed, view), *_unknown(view)]
    for metric, variant, layers in dict.fromkeys((side.metric, side.variant, side.layers) for side in sides):
        if layers is not None:
            scope = range(layers[0], layers[1] + 1)
            gates += _scope_gates(METRICS[metric], scope, variant, view)
    return tuple(dict.fromkeys(gates))


def _documents(observed: Observation, view: RecordView) -> Iterator[Gate]:
    documents = view.record.calibration.documents
    if documents < MIN_DOCUMENTS:
        which = "one document" if documents == 1 else f"{documents} documents"
        yield Gate("documents", f"{which}; an interval needs {MIN_DOCUMENTS} (try --calibration core)")
    elif (domains := view.record.calibration.domains) is not None and domains < MIN_DOMAINS:
        which = "one domain" if domains == 1 else f"{domains} domains"
        says = f"{which}; a claim about other text needs {MIN_DOMAINS} (try --calibration core)"
        yield Gate("domains", says)
    elif observed.interval is None and not any(estimate.interval for estimate in observed.each.values()):
        yield Gate("interval", "this figure has no interval, as it has no value without some group of its units")


def _unknown(view: RecordView) -> Iterator[Gate]:
    share = view.record.calibration.unknown_tokens or 0.0
    if share > MOST_UNKNOWN:
        says = f"{share:.1%} of the text is unknown to the model's tokenizer; at most {MOST_UNKNOWN:.0%} may be"
        yield Gate("unknown", says)


def _scope_gates(metric: Metric, layers: Sequence[int], variant: str, view: RecordView) -> Iterator[Gate]:
    calibration, hidden = view.record.calibration, view.model.hidden
    needed = MIN_TOKENS_PER_DIMENSION.get(metric.name, 0.0)
    if calibration.tokens < needed * hidden:
        says = f"{calibration.tokens} tokens for {hidden} dimensions; {metric.name} needs {needed:g} for each"
        yield Gate("n/d", says)
    if metric.takes in {"boundaries", "stream", *WITHOUT_VARIANTS}:
        return
    if metric.takes == "directions" and metric.name not in _ABOUT_GATES:
        if len(layers) == 1 and metric.scope == "phase":
            yield Gate("layers", "the scope is one layer, and the metric is taken over several")
            return
        yield from _direction_gates(layers, variant, view)
    yield from _rounding_gate(layers, variant, view)
    if VARIANTS[variant].keeps_sinks and "sink_free" in view.variants and metric.scope != "layer":
        yield from _sink_gate(layers, variant, view)


def _figures(view: RecordView, layers: Sequence[int], metric: str, variant: str) -> list[Estimate]:
    return [view.layer(layer, metric, variant, replicates=False) for layer in layers]


def _direction_gates(layers: Sequence[int], variant: str, view: RecordView) -> Iterator[Gate]:
    """Yield the gates on layers whose leading direction is not told from noise or from the second one."""
    reliable = [
        estimate.value is not None and estimate.value >= RELIABLE
        for estimate in _figures(view, layers, "reliability", variant)
    ]
    if sum(reliable) < MOSTLY * len(reliable):
        yield Gate(
            "reliability",
            f"{sum(reliable)} of {len(reliable)} layers point the same way (|cos| >= {RELIABLE:g}) in both halves "
            f"of the {view.record.resampling.unit}s; {MOSTLY:.0%} required",
        )
    resolved = [
        estimate.interval is not None and estimate.interval[0] > 1.0
        for estimate in _figures(view, layers, "spectral_gap", variant)
    ]
    if sum(resolved) < MOSTLY * len(resolved):
        yield Gate(
            "gap",
            f"in {sum(resolved)} of {len(resolved)} layers sigma_1 is told from sigma_2 ({PERCENT} interval of the "
            f"spectral gap above 1); {MOSTLY:.0%} required",
        )


def _rounding_gate(layers: Sequence[int], variant: str, view: RecordView) -> Iterator[Gate]:
    """Yield the gate on layers whose update is mostly rounding of the dtype."""
    shares = [estimate.value or 0.0 for estimate in _figures(view, layers, "rounding_share", variant)]
    rounded = sum(share >= ROUNDING_ENERGY for share in shares)
    if rounded > (1 - MOSTLY) * len(layers):
        dtype = view.record.provenance.dtype
        cure = "" if dtype == "float32" else "; --dtype float32 may show what is under it"
        says = f"in {rounded} of {len(layers)} layers half of the update's energy or more is rounding of {dtype}{cure}"
        yield Gate("rounding", says)


def _sink_gate(layers: Sequence[int], variant: str, view: RecordView) -> Iterator[Gate]:
    """Yield the gate on layers whose energy is mostly that of sinks, in a variant that keeps them."""
    both = (_figures(view, layers, "frobenius", name) for name in (variant, "sink_free"))
    shares = [
        1.0 - (sink_free.value / kept.value) ** 2
        for kept, sink_free in zip(*both, strict=True)
        if kept.value and sink_free.value is not None
    ]
    dominated = sum(share >= SINK_ENERGY for share in shares)
    if dominated > (1 - MOSTLY) * len(layers):
        yield Gate(
            "sinks",
            f"in {dominated} of {len(layers)} layers sinks hold half of the energy or more; the variant sink_free "
            f"leaves them out",
        )
