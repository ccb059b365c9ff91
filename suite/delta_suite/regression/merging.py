"""Adding to a baseline: the figures, phases and parts of a later record that the baseline's record lacks.

The later record is of the same calibration, and may be of another checkpoint. A figure and its replicates are always
taken from the same record, so that the noise of a difference is that of the figure it is shown with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.registry import METRICS
from delta_suite.records.assemble import LAW_METRICS, LAW_VARIANT, columns, replicates_of
from delta_suite.records.record import BoundaryRecord, LawRecord, Metrics, Record, ScopeRecord
from delta_suite.records.view import RecordView
from delta_suite.regression.comparison import MODEL, Place, estimate_at, figures

ABSENT = absent("neither record has it")


def missing_figures(old: RecordView, new: RecordView) -> list[Place]:
    """Return the places where the new record has a figure, and the old one has none or one without a value.

    A phase of the same name over other layers is not missing: it is not comparable.
    """
    present = set(figures(old))
    missing = []
    for place in figures(new):
        _, scope, metric = place
        if scope in old.phases and old.phases[scope] != new.phases[scope]:
            continue
        if scope == MODEL and METRICS[metric].takes != "boundaries":
            continue  # formed from the old record's cosines whenever it is asked for
        if place in present and (estimate_at(old, place).value is not None or estimate_at(new, place).value is None):
            continue
        missing.append(place)
    return missing


def merged(old: RecordView, new: RecordView, missing: Sequence[Place]) -> tuple[Record, dict[str, np.ndarray]]:
    """Return the old record with the new one's figures at these places, and its arrays.

    missing: as `missing_figures` returns them. Draws of random directions, which are not compared, are left out.
    """
    record = old.record
    estimates = {place: estimate_at(new, place) for place in missing}
    phases = dict(record.phases) | {scope: new.phases[scope] for _, scope, _ in missing if scope in new.phases}
    scopes = {}
    for name, layers in phases.items():
        metrics = record.scopes[name].metrics if name in record.scopes else {}
        scopes[name] = ScopeRecord(layers=layers, metrics=_with(metrics, estimates, name))
    fitted = {name: scope.layers for name, scope in scopes.items() if _has_law(scope)}
    parts = dict.fromkeys([*record.parts, *(METRICS[metric].part for _, _, metric in missing)])
    layer_records = tuple(
        layer.model_copy(update={"metrics": _with(layer.metrics, estimates, f"layer:{layer.layer}")})
        for layer in record.layers
    )
    versions = new.record.provenance.metric_versions | record.provenance.metric_versions
    record = record.model_copy(
        update={
            "phases": phases,
            "parts": tuple(parts),
            "variants": {name: new.record.variants.get(name, 0) for name in layer_records[0].metrics} | record.variants,
            "layers": layer_records,
            "scopes": scopes,
            "law": LawRecord(phases=fitted) if fitted else None,
            "boundaries": _boundaries(record, new.record) if "boundaries" in parts else {},
            "provenance": record.provenance.model_copy(update={"metric_versions": versions}),
        }
    )
    arrays = {name: array for name, array in {**new.content(), **old.content()}.items() if ".random." not in name}
    return record, arrays | _replicate_arrays(record, old, estimates)


def _has_law(scope: ScopeRecord) -> bool:
    return not set(LAW_METRICS).isdisjoint(scope.metrics.get(LAW_VARIANT, {}))


def _boundaries(old: Record, new: Record) -> dict[str, BoundaryRecord]:
    """Return the boundaries of the old record, with the variants and metrics that only the new one has."""
    boundaries = new.boundaries | old.boundaries
    for variant in new.boundaries.keys() & old.boundaries.keys():
        metrics = new.boundaries[variant].metrics | old.boundaries[variant].metrics
        boundaries[variant] = old.boundaries[variant].model_copy(update={"metrics": metrics})
    return boundaries


def _with(metrics: Metrics, estimates: Mapping[Place, Estimate], scope: str) -> Metrics:
    """Return the metrics of a layer or phase with the estimates of its scope."""
    result = {variant: dict(row) for variant, row in metrics.items()}
    for (variant, where, metric), estimate in estimates.items():
        if where == scope:
            result.setdefault(variant, {})[metric] = estimate
    return result


def _replicate_arrays(record: Record, old: RecordView, added: Mapping[Place, Estimate]) -> dict[str, np.ndarray]:
    """Return the arrays of replicates of every metric that was added to, one row or column for each layer or phase."""
    present = set(figures(old))

    def estimate(place: Place) -> Estimate:
        return added.get(place) or (estimate_at(old, place) if place in present else ABSENT)

    arrays: dict[str, np.ndarray] = {}
    layers = [f"layer:{layer}" for layer in range(record.model.layers)]
    for variant, scope, metric in added:
        if scope == MODEL:
            continue
        if scope in layers:
            prefix, scopes = f"{variant}.", layers
        elif METRICS[metric].takes == "law":
            prefix, scopes = "law.", list(record.law.phases if record.law is not None else ())
        else:
            prefix, scopes = f"{variant}.scope_", list(record.scopes)
        if f"{prefix}units.{metric}" in arrays:
            continue
        for kind, rows in replicates_of([estimate((variant, each, metric)) for each in scopes]).items():
            array = columns(rows) if scopes is layers else columns(rows).T
            arrays[f"{prefix}{kind}.{metric}"] = array.astype(np.float64 if prefix == "law." else np.float32)
    return arrays
