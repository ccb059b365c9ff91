"""Records from what a stream was reduced to: spectra, then boundaries, law, writes and states, under a phase map."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from delta_suite.capture.tolerances import WRITES
from delta_suite.capture.units import Units
from delta_suite.metrics import nulls
from delta_suite.metrics.boundaries import boundaries_under, boundary_metrics
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.directions import NEEDS_PRODUCTS
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import (
    direction_metrics,
    layer_metrics,
    layer_value,
    phase_metrics,
    state_metrics,
)
from delta_suite.metrics.law import law_estimates
from delta_suite.metrics.registry import METRICS
from delta_suite.metrics.segmentation import Boundaries
from delta_suite.models.phases import PhaseMap, phase_of
from delta_suite.records.arrays import STATES, Arrays, direction_arrays, full_gram, gram_arrays
from delta_suite.records.record import (
    SCHEMA,
    BoundaryRecord,
    BoundarySearch,
    CalibrationRecord,
    CertificateRecord,
    IdentityRecord,
    LawRecord,
    LayerRecord,
    ModelRecord,
    Provenance,
    Record,
    ResamplingRecord,
    ScopeRecord,
    SinkRecord,
)
from delta_suite.reduction.variants import VARIANTS, WRITE_VARIANTS, has_averages

if TYPE_CHECKING:
    from delta_suite.reduction.law_scores import Law
    from delta_suite.reduction.replicates import LayerSpectra
    from delta_suite.reduction.state_statistics import StateLayer

LAW_VARIANT = "sink_free"
"""The variant whose rows the law is fitted on, under which its metrics stand."""

LAW_METRICS = tuple(name for name, metric in METRICS.items() if metric.takes == "law")

GramOf = Callable[[str], DirectionGram]
"""Returns the gram of a variant."""


@dataclass(frozen=True)
class Assembled:
    """A record, the arrays beside it, and the arrays of directions that the cache keeps."""

    record: Record
    arrays: Arrays
    directions: Arrays

    def plus(self, arrays: Arrays, **fields: Any) -> Assembled:
        """Return the same with other fields of the record, and more arrays beside it."""
        return replace(self, record=self.record.model_copy(update=fields), arrays={**self.arrays, **arrays})


def assemble(
    spectra: Mapping[str, Sequence[LayerSpectra]],
    phases: PhaseMap,
    *,
    model: ModelRecord,
    calibration: CalibrationRecord,
    sinks: SinkRecord,
    certificate: CertificateRecord,
    provenance: Provenance,
    units: Units | None = None,
) -> Assembled:
    """Return the record of the spectra by variant, layer by layer, under a phase map.

    units: over which the spectra were reduced, by default the calibration's documents.
    """
    units = units or Units.of(calibration.documents)
    figures = _Figures.of(spectra)
    replicates = [len(gram.replicates) for gram in figures.grams.values()]
    documents = max(len(gram.documents) for gram in figures.grams.values())
    record = Record(
        schema_version=SCHEMA,
        model=model,
        calibration=calibration,
        resampling=ResamplingRecord(
            unit=units.unit,
            units=units.count,
            groups=max(1, *replicates),
            document_groups=documents or None,
            assignment=units.sha256,
        ),
        parts=("spectra",),
        variants={variant: VARIANTS[variant].version for variant in spectra},
        sinks=sinks,
        certificate=certificate,
        provenance=provenance,
        phases={},
        scopes={},
        layers=tuple(
            LayerRecord(layer=index, phase="", metrics=figures.of_layer(index)) for index in range(model.layers)
        ),
    )
    record, scope_arrays = under(record, figures.grams.__getitem__, phases)
    return Assembled(record, figures.arrays | scope_arrays, figures.directions)


@dataclass(frozen=True)
class _Figures:
    """The figures of layers in some variants, and the arrays that they follow from."""

    metrics: Mapping[str, Sequence[dict[str, Estimate]]]
    """The metrics of each layer, by variant."""
    arrays: dict[str, np.ndarray]
    directions: dict[str, np.ndarray]
    grams: Mapping[str, DirectionGram]

    @classmethod
    def of(cls, spectra: Mapping[str, Sequence[LayerSpectra]]) -> _Figures:
        """Return the figures of the spectra by variant, layer by layer."""
        directions: dict[str, np.ndarray] = {}
        arrays: dict[str, np.ndarray] = {}
        metrics: dict[str, list[dict[str, Estimate]]] = {}
        grams: dict[str, DirectionGram] = {}
        for variant, layers in spectra.items():
            directions |= direction_arrays(variant, layers)
            gram = grams[variant] = full_gram(directions, variant)
            averages = has_averages(VARIANTS[variant])
            metrics[variant] = [
                layer_metrics(layer.statistics, *layer.resamples, averages=averages) | direction_metrics(gram, index)
                for index, layer in enumerate(layers)
            ]
            arrays[f"{variant}.eigenvalues"] = _padded([layer.statistics.eigenvalues for layer in layers])
            arrays |= _layer_arrays(variant, layers, metrics[variant]) | gram_arrays(variant, gram)
        return cls(metrics, arrays, directions, grams)

    def of_layer(self, layer: int) -> dict[str, dict[str, Estimate]]:
        """Return the metrics of one layer, by variant."""
        return {variant: layers[layer] for variant, layers in self.metrics.items()}


def _padded(eigenvalues: Sequence[np.ndarray]) -> np.ndarray:
    """Return the eigenvalues of every layer, zeros where one layer has fewer."""
    out = np.zeros((len(eigenvalues), max(map(len, eigenvalues))), dtype=np.float32)
    for row, values in zip(out, eigenvalues, strict=True):
        row[: len(values)] = values
    return out


def _layer_arrays(
    variant: str, layers: Sequence[LayerSpectra], metrics: Sequence[Mapping[str, Estimate]]
) -> dict[str, np.ndarray]:
    """Return the replicates and the halves' values of every layer metric."""
    arrays = _replicate_arrays(variant, metrics)
    for name in metrics[0]:
        metric = METRICS[name]
        if metric.takes in {"spectrum", "tokens"} and metric.bias == "halves":
            halves = [[layer_value(half, metric).value for half in layer.halves or ()] for layer in layers]
            if all(halves):
                arrays[f"{variant}.halves.{name}"] = np.array(halves, dtype=np.float64).T
    return arrays


def _replicate_arrays(variant: str, metrics: Sequence[Mapping[str, Estimate]]) -> dict[str, np.ndarray]:
    """Return the replicates of the metrics of every layer."""
    return {
        f"{variant}.{kind}.{name}": columns(replicates).astype(np.float32)
        for name in metrics[0]
        for kind, replicates in replicates_of([layer[name] for layer in metrics]).items()
    }


def replicates_of(estimates: Sequence[Estimate]) -> dict[str, list[tuple[float, ...] | None]]:
    """Return the replicates of estimates by kind (arrays.KINDS), of the kinds that any of them has."""
    kinds = {
        "units": [estimate.replicates for estimate in estimates],
        "documents": [estimate.replicates_documents for estimate in estimates],
    }
    return {kind: rows for kind, rows in kinds.items() if any(row is not None for row in rows)}


def columns(replicates: Sequence[Sequence[float] | None]) -> np.ndarray:
    """Return a matrix with one column for each list of replicates, NaN where there is none."""
    length = max(len(values) for values in replicates if values is not None)
    out = np.full((length, len(replicates)), np.nan)
    for index, values in enumerate(replicates):
        if values is not None:
            out[:, index] = values
    return out


# --- a phase map -----------------------------------------------------------------------------------------------


def under(record: Record, gram_of: GramOf, phases: PhaseMap) -> tuple[Record, dict[str, np.ndarray]]:
    """Return the record under a phase map, and the arrays that depend on it.

    The law's metrics stay with phases of the same layers; boundaries are compared anew where they were measured.
    """
    phases = {name: (first, last) for name, (first, last) in phases.items()}
    scopes = {}
    for name, (first, last) in phases.items():
        span = range(first, last + 1)
        metrics = {variant: phase_metrics(gram_of(variant), span) for variant in record.variants}
        if LAW_VARIANT in metrics:
            metrics[LAW_VARIANT] |= _law_metrics(record, (first, last))
        scopes[name] = ScopeRecord(layers=(first, last), metrics=metrics)
    layers = tuple(layer.model_copy(update={"phase": phase_of(layer.layer, phases)}) for layer in record.layers)
    placed = record.model_copy(update={"phases": phases, "scopes": scopes, "layers": layers})
    if "boundaries" in record.parts:
        placed = with_boundaries(placed, gram_of)
    return placed, _scope_arrays(placed, gram_of, placed.variants)


def _law_metrics(record: Record, layers: tuple[int, int]) -> dict[str, Estimate]:
    """Return the law's metrics of the scope over these layers, if the record has one."""
    for scope in record.scopes.values():
        if scope.layers == layers:
            metrics = scope.metrics.get(LAW_VARIANT, {})
            return {name: metrics[name] for name in LAW_METRICS if name in metrics}
    return {}


def _scope_arrays(record: Record, gram_of: GramOf, variants: Collection[str]) -> dict[str, np.ndarray]:
    """Return what the figures of the record's phases need beyond the arrays of its layers, in these variants."""
    arrays = {}
    for variant in variants:
        gram = gram_of(variant)
        scopes = [
            (range(scope.layers[0], scope.layers[1] + 1), scope.metrics[variant]) for scope in record.scopes.values()
        ]
        for name in NEEDS_PRODUCTS:
            for kind, replicates in replicates_of([metrics[name] for _, metrics in scopes]).items():
                arrays[f"{variant}.scope_{kind}.{name}"] = columns(replicates).T.astype(np.float32)
        if gram.random is None:
            continue
        for name in nulls.FROM_TOP_DIRECTIONS:
            draws = [nulls.random_directions(gram, name, layers) for layers, _ in scopes]
            values = [None if isinstance(drawn, str) else sorted(drawn) for drawn in draws]
            if any(drawn is not None for drawn in values):
                arrays[f"{variant}.random.{name}"] = columns(values).T.astype(np.float32)
    return arrays


# --- boundaries, law, writes and states ------------------------------------------------------------------------


def measured_later(entry: Assembled, provenance: Provenance) -> Assembled:
    """Return an entry as of a later run that completes it; the seconds are those of both runs together."""
    before, spent = entry.record.provenance.seconds, provenance.seconds
    seconds = before | {step: round(before.get(step, 0.0) + spent[step], 3) for step in spent}
    return entry.plus({}, provenance=provenance.model_copy(update={"seconds": seconds}))


def with_rest(entry: Assembled, before: Assembled | None, elapsed: float) -> Assembled:
    """Return a measured entry whose clocks add up to the seconds it took: `other` is what is in none of them.

    That is hashing, imports, forming figures, and boundaries. before: the entry that it completes, if there was one.
    """
    seconds = entry.record.provenance.seconds
    known = sum(seconds.values()) - (0.0 if before is None else sum(before.record.provenance.seconds.values()))
    seconds = seconds | {"other": round(seconds.get("other", 0.0) + max(0.0, elapsed - known), 3)}
    return entry.plus({}, provenance=entry.record.provenance.model_copy(update={"seconds": seconds}))


def with_boundaries(record: Record, gram_of: GramOf) -> Record:
    """Return the record with its boundaries measured in every variant of whole blocks."""
    boundaries = {
        variant: boundary_record(boundaries_under(gram_of(variant), record.phases))
        for variant in record.variants
        if variant not in WRITE_VARIANTS
    }
    return record.model_copy(update={"boundaries": boundaries, "parts": parts_with(record, "boundaries")})


def boundary_record(boundaries: Boundaries | str) -> BoundaryRecord:
    """Return what a record holds of the boundaries of one variant, or of the reason why there are none."""
    metrics = boundary_metrics(boundaries)
    if isinstance(boundaries, str):
        return BoundaryRecord(metrics=metrics)
    return BoundaryRecord(
        detected=boundaries.detected,
        declared=boundaries.declared,
        recurrence=boundaries.recurrence,
        metrics=metrics,
        search=BoundarySearch(**{name: getattr(boundaries, name) for name in BoundarySearch.model_fields}),
        replicates={name: each.replicates for name, each in metrics.items() if each.replicates is not None} or None,
    )


def with_law(entry: Assembled, law: Law) -> Assembled:
    """Return the entry with the update law over its phases."""
    record = entry.record
    estimates = {name: law_estimates(law, name) for name in record.phases}
    scopes = {}
    for name, scope in record.scopes.items():
        metrics = dict(scope.metrics)
        metrics[LAW_VARIANT] = {**metrics[LAW_VARIANT], **estimates[name]}
        scopes[name] = scope.model_copy(update={"metrics": metrics})
    arrays = {}
    for name in LAW_METRICS:
        replicates = [estimates[phase][name].replicates for phase in record.phases]
        if any(values is not None for values in replicates):
            arrays[f"law.units.{name}"] = columns(replicates).T
    if law.reason is None:
        arrays["law.transfer"] = law.transfer[0].astype(np.float32)
    return entry.plus(arrays, law=LawRecord(phases=record.phases), scopes=scopes, parts=parts_with(record, "law"))


def with_writes(
    entry: Assembled, spectra: Mapping[str, Sequence[LayerSpectra]] | str, identity: IdentityRecord | None = None
) -> Assembled:
    """Return the entry with what attention and MLP write, layer by layer and over its phases.

    spectra: by variant; or the reason why the model has none, which is kept so that it is not tried again. identity:
    that of the certificate, that they are told apart.
    """
    record = entry.record
    parts = parts_with(record, "writes")
    if isinstance(spectra, str):
        return entry.plus({}, parts=parts, not_apart=spectra)
    assert identity is not None
    figures = _Figures.of(spectra)
    identities = {**record.certificate.identities, WRITES: identity}
    scopes = {}
    for name, scope in record.scopes.items():
        span = range(scope.layers[0], scope.layers[1] + 1)
        metrics = {variant: phase_metrics(gram, span) for variant, gram in figures.grams.items()}
        scopes[name] = scope.model_copy(update={"metrics": {**scope.metrics, **metrics}})
    complete = entry.plus(
        figures.arrays,
        parts=parts,
        certificate=record.certificate.model_copy(update={"identities": identities}),
        variants=record.variants | {variant: VARIANTS[variant].version for variant in spectra},
        scopes=scopes,
        layers=tuple(
            layer.model_copy(update={"metrics": {**layer.metrics, **figures.of_layer(layer.layer)}})
            for layer in record.layers
        ),
    )
    scope_arrays = _scope_arrays(complete.record, figures.grams.__getitem__, spectra)
    return replace(complete.plus(scope_arrays), directions={**entry.directions, **figures.directions})


def with_states(entry: Assembled, states: Mapping[str, Sequence[StateLayer]]) -> Assembled:
    """Return the entry with the figures of its states, by variant, layer by layer."""
    arrays: dict[str, np.ndarray] = {}
    by_layer: list[dict[str, dict[str, Estimate]]] = [dict(layer.metrics) for layer in entry.record.layers]
    for variant, layers in states.items():
        figures = [state_metrics(layer, variant) for layer in layers]
        for metrics, more in zip(by_layer, figures, strict=True):
            metrics[variant] = metrics[variant] | more
        arrays[f"{variant}.{STATES}"] = _padded([layer.whole.eigenvalues for layer in layers])
        arrays |= _replicate_arrays(variant, figures)
    layers_with = tuple(
        layer.model_copy(update={"metrics": metrics})
        for layer, metrics in zip(entry.record.layers, by_layer, strict=True)
    )
    return entry.plus(arrays, layers=layers_with, parts=parts_with(entry.record, "stream"))


def parts_with(record: Record, part: str) -> tuple[str, ...]:
    """Return the parts of a record and one more, in the order in which they were measured."""
    return tuple(dict.fromkeys([*record.parts, part]))
