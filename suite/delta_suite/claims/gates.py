"""What must be true of a measurement before a verdict may be drawn from it. A gate that stays shut: inconclusive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.registry import METRICS
from delta_suite.records.record import Measurement

if TYPE_CHECKING:
    from delta_suite.claims.judge import Observation
    from delta_suite.claims.loader import Expectation

MIN_DOCUMENTS = 50
"""Documents are the unit of resampling; intervals of spectra want 50-100 of them (SCIENCE)."""

RELIABLE = 0.9
"""Split-half |cos| below which a layer has no direction to speak of (SCIENCE)."""

MOSTLY = 0.8
"""Share of a scope's layers that must have a direction (SCIENCE)."""

SINK_ENERGY = 0.5
"""Share of a layer's energy in sinks from which the raw spectrum is theirs, and not the text's."""

ROUNDING_ENERGY = 0.5
"""Share of a layer's energy that is rounding, from which its spectrum is that of the dtype."""

MIN_TOKENS_PER_DIMENSION: Mapping[str, float] = {
    "effective_rank": 2.0,
    "participation_ratio": 2.0,
    "stable_rank": 1.0,
    "effective_rank_roy": 10.0,
}
"""n / d below which the halves do not tell the bias of a rank: in simulated streams at n/d = 1.9 the entropy rank was
still covered (0.93) and Roy's was not (0.41), which was at n/d = 10 (0.97)."""

_ABOUT_GATES = ("reliability", "spectral_gap", "intra_cosine_disattenuated")
"""Metrics that tell how far directions can be trusted are not held to it."""


@dataclass(frozen=True)
class Gate:
    """One that stays shut, and why."""

    name: str
    says: str


def failed_gates(
    expectation: Expectation, observed: Observation, reference: Observation | None, measurement: Measurement
) -> tuple[Gate, ...]:
    """The gates that keep this measurement from deciding this claim.

    The capture certificate is not among them: a record exists only where it holds.
    """
    sides = [side for side in (observed, reference) if side is not None and side.model == observed.model]
    gates = list(_documents(observed, measurement))
    for metric, layers in dict.fromkeys((side.metric, side.layers) for side in sides):
        if layers is not None:
            scope = range(layers[0], layers[1] + 1)
            gates += _of_scope(metric, scope, expectation.variant, measurement)
    return tuple(dict.fromkeys(gates))


def _documents(observed: Observation, measurement: Measurement) -> Iterator[Gate]:
    documents = measurement.calibration.documents
    if documents < MIN_DOCUMENTS:
        which = "one document" if documents == 1 else f"{documents} documents"
        yield Gate("documents", f"{which}; an interval needs {MIN_DOCUMENTS} (try --calibration core)")
    elif METRICS[observed.metric].scope == "model":
        return  # a rank or a p needs no interval
    elif observed.interval is None and not any(own.interval for own in observed.each.values()):
        yield Gate("interval", "this figure has no interval, as it has no value without some group of documents")


def _of_scope(metric: str, layers: Sequence[int], variant: str, measurement: Measurement) -> Iterator[Gate]:
    definition = METRICS[metric]
    calibration, hidden = measurement.calibration, measurement.model.hidden
    needed = MIN_TOKENS_PER_DIMENSION.get(metric, 0.0)
    if calibration.tokens < needed * hidden:
        yield Gate("n/d", f"{calibration.tokens} tokens for {hidden} dimensions; {metric} needs {needed:g} for each")

    def figures(name: str, of: str = variant) -> list[Estimate]:
        return [measurement.layers[layer].metrics[of][name] for layer in layers]

    if definition.scope == "model" or definition.from_law:
        return
    if (definition.scope != "layer" or definition.from_directions) and metric not in _ABOUT_GATES:
        if len(layers) == 1 and definition.scope == "phase":
            yield Gate("layers", "the scope is one layer, and the metric is taken over several")
            return
        reliable = [own.value is not None and own.value >= RELIABLE for own in figures("reliability")]
        if sum(reliable) < MOSTLY * len(reliable):
            yield Gate(
                "reliability",
                f"{sum(reliable)} of {len(reliable)} layers point the same way (|cos| >= {RELIABLE:g}) in both halves "
                f"of the documents; {MOSTLY:.0%} required",
            )
        resolved = [own.interval is not None and own.interval[0] > 1.0 for own in figures("spectral_gap")]
        if sum(resolved) < MOSTLY * len(resolved):
            yield Gate(
                "gap",
                f"in {sum(resolved)} of {len(resolved)} layers sigma_1 is told from sigma_2 (95% interval of the "
                f"spectral gap above 1); {MOSTLY:.0%} required",
            )
    # Each update is divided by its norm there, so the variant has no share of its own.
    rounding = [
        own.value or 0.0 for own in figures("rounding_share", "raw" if variant == "token_normalised" else variant)
    ]
    rounded = sum(share >= ROUNDING_ENERGY for share in rounding)
    if rounded > (1 - MOSTLY) * len(layers):
        dtype = measurement.provenance.dtype
        cure = "" if dtype == "float32" else "; --dtype float32 may show what is under it"
        says = f"in {rounded} of {len(layers)} layers half of the update's energy or more is rounding of {dtype}{cure}"
        yield Gate("rounding", says)
    if variant == "raw" and "sink_free" in measurement.layers[0].metrics and definition.scope != "layer":
        shares = []
        for raw, free in zip(figures("frobenius"), figures("frobenius", "sink_free"), strict=True):
            if raw.value and free.value is not None:
                shares.append(1.0 - (free.value / raw.value) ** 2)
        dominated = sum(share >= SINK_ENERGY for share in shares)
        if dominated > (1 - MOSTLY) * len(layers):
            yield Gate(
                "sinks",
                f"in {dominated} of {len(layers)} layers sinks hold half of the energy or more; the variant sink_free "
                f"leaves them out",
            )
