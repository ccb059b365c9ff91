"""The check of a record: its figures, arrays and place against each other. Every reader runs it before it uses any.

It proves that the numbers follow from each other, not where they come from: whoever forms them anew, arrays included,
can make another record that is consistent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from delta_suite.errors import RecordError
from delta_suite.metrics.registry import METRICS
from delta_suite.records.arrays import KINDS, Arrays
from delta_suite.records.assemble import LAW_METRICS, LAW_VARIANT
from delta_suite.records.losses_part import losses_problems
from delta_suite.records.problem import (
    Figures,
    Problem,
    Resampled,
    Resamples,
    figures_by_metric,
    most_of,
    quoted,
    range_problems,
    resampling_problems,
)
from delta_suite.records.record import SCHEMA, Record
from delta_suite.records.verify_arrays import array_problems
from delta_suite.records.verify_boundaries import boundary_problems
from delta_suite.records.verify_facts import fact_problems, missing_problems, version_problems
from delta_suite.records.verify_layers import LayerFigures, layer_problems, relation_problems, tokens_of
from delta_suite.records.verify_parts import fit_problems, law_problems, part_problems
from delta_suite.records.verify_phases import Followed, followed_figures, phase_problems
from delta_suite.reduction.variants import VARIANTS

T_OF_SCHEMA_2 = 0.0005 / 2.262
"""Relative error of the quantile of t in records of schema 2, which delta-suite 0.1 took to three decimals."""

CURE = "Take it again from where it was made, or measure again with --fresh."
"""The way out for someone whose record is refused."""

SHOWN = 3
"""Number of contradictions that a refusal names; `delta-suite verify` lists all."""


def problems(record: Record, arrays: Arrays | None, *, merged: bool = False) -> list[Problem]:
    """Return every contradiction of a record; none where it is whole and consistent.

    Args:
        record: a record as `format.from_json` reads it, whose layers, variants and phases fit together.
        arrays: what lies beside it; None where that is gone, and the figures are compared with each other alone.
        merged: true for the record of a baseline that was added to: its figures may come from two measurements, and are
            not formed anew from its arrays.
    """
    contradictions = [*version_problems(record)]
    if not contradictions:
        contradictions += fact_problems(record, merged=merged)
    if not contradictions and not merged:
        contradictions += missing_problems(record)
    if not contradictions and arrays is not None:
        contradictions += array_problems(record, arrays)
    if contradictions:  # figures are only held against what fits together
        return contradictions
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        return [*figure_problems(record, arrays, merged=merged)]


def require_consistent(path: Path, contradictions: Sequence[Problem]) -> None:
    """Raise RecordError, which names the file and the first contradictions, where there are any."""
    if not contradictions:
        return
    more = f"; and {len(contradictions) - SHOWN} more" if len(contradictions) > SHOWN else ""
    raise RecordError(
        f"{path} contradicts itself: {'; '.join(map(str, contradictions[:SHOWN]))}{more}. {CURE} "
        f"`delta-suite verify` lists all contradictions."
    )


def unchecked(record: Record, arrays: Arrays | None) -> list[str]:
    """Return what could not be held against anything, and why."""
    notes = []
    if record.schema_version != SCHEMA:
        notes.append(f"its schema is {record.schema_version}: no spectra and cosines lie beside it")
    elif arrays is None:
        file = quoted(record.arrays.file) if record.arrays else "its file of arrays"
        notes.append(f"{file} is not beside it: figures are held against each other alone")
    return notes + not_formed_anew(record)


def not_formed_anew(record: Record) -> list[str]:
    """Return what nothing of a record can be held against, whatever lies beside it, as it is of other versions."""
    notes = []
    versions = record.provenance.metric_versions
    older = sorted(name for name, metric in METRICS.items() if versions.get(name, metric.version) != metric.version)
    if older:
        notes.append(f"figures of older versions are not formed anew: {', '.join(older)}")
    unknown = len([name for name in versions if name not in METRICS])
    unknown += len([name for name in record.variants if name not in VARIANTS])
    if unknown:
        notes.append(f"{unknown} metrics or variants are not known to this version; nothing reads them")
    return notes


# --- figures ---------------------------------------------------------------------------------------------------


def figure_problems(record: Record, arrays: Arrays | None, *, merged: bool = False) -> Iterator[Problem]:
    """Yield what of the figures cannot be, or does not follow from the others or from the arrays."""
    # Which tokens entered an older version is not known, and its figures are shown nowhere.
    current = [
        name
        for name, version in record.variants.items()
        if name in VARIANTS and (record.schema_version != SCHEMA or VARIANTS[name].version == version)
    ]
    followed = None
    if arrays is not None and record.schema_version == SCHEMA and not merged:
        groups = (record.resampling.groups, record.resampling.document_groups)
        kinds = [kind for kind, count in zip(KINDS, groups, strict=True) if count is not None]
        followed = {kind: followed_figures(record, arrays, current, kind) for kind in kinds}
    resampled = Resampled()
    for variant in record.variants:
        if variant in VARIANTS:
            known = arrays if variant in current else None
            yield from _variant_problems(record, known, variant, followed, resampled, merged=merged)
    yield from resampled.problems()
    if not merged:
        yield from fit_problems(record)
    yield from losses_problems(record, arrays, merged=merged)
    for variant, boundary in record.boundaries.items():
        if variant not in VARIANTS:
            continue
        figures, _ = figures_by_metric([boundary.metrics], [f"boundaries, {variant}"])
        yield from range_problems(figures, np.array([metric.high for metric in figures.metrics]))
        if not merged:
            today = record.schema_version == SCHEMA and VARIANTS[variant].version == record.variants[variant]
            checked = arrays if today else None
            yield from boundary_problems(record, checked, variant, boundary)


def _variant_problems(
    record: Record,
    arrays: Arrays | None,
    variant: str,
    followed: Mapping[str, Mapping[str, Followed]] | None,
    resampled: Resampled,
    *,
    merged: bool,
) -> Iterator[Problem]:
    tokens = tokens_of(record, variant)
    rank = min(tokens, record.model.hidden)
    places = [f"layer {layer.layer}, {variant}" for layer in record.layers]
    layers = LayerFigures(*figures_by_metric([layer.metrics[variant] for layer in record.layers], places))
    yield from range_problems(layers.figures, np.array([most_of(metric, rank, 1) for metric in layers.figures.metrics]))
    yield from relation_problems(layers, rank, tokens)
    counts = {f"phase {name}, {variant}": last - first + 1 for name, (first, last) in record.phases.items()}
    rows = [scope.metrics[variant] for scope in record.scopes.values()]
    phases, spans = figures_by_metric(rows, list(counts))
    most = [most_of(metric, rank, counts[place]) for metric, place in zip(phases.metrics, phases.places, strict=True)]
    yield from range_problems(phases, np.array(most))
    for name, scope in record.scopes.items():
        yield from part_problems(record, variant, scope, name)
    if arrays is None:
        return
    if record.schema_version != SCHEMA:
        yield from _inline_problems(record, arrays, f"{variant}.units", layers.figures, layers.spans)
        yield from _inline_problems(record, arrays, f"{variant}.scope_units", phases, spans)
        return
    versions = record.provenance.metric_versions
    today = {name for name, metric in METRICS.items() if versions.get(name) == metric.version}
    chosen = {name: span for name, span in layers.spans.items() if name in today}
    yield from layer_problems(record, arrays, variant, LayerFigures(layers.figures, chosen), resampled, merged=merged)
    chosen = {name: span for name, span in spans.items() if name in today and name not in LAW_METRICS}
    yield from phase_problems(record, arrays, variant, phases, chosen, followed, resampled)
    if variant == LAW_VARIANT and record.law is not None:
        yield from law_problems(record, arrays, today, resampled, merged=merged)


def _inline_problems(
    record: Record, arrays: Arrays, prefix: str, figures: Figures, spans: Mapping[str, slice]
) -> Iterator[Problem]:
    """Yield where the intervals of a record of schema 2 do not follow from the replicates in it."""
    for name, span in spans.items():
        units = arrays.get(f"{prefix}.{name}")
        chosen = figures.take(span)
        if units is None:
            continue
        replicates = units if prefix.endswith(".units") else units.T
        if replicates.shape[1:] == (len(chosen),):
            resamples = Resamples.join([(replicates, None, 0.0)], len(chosen), record.resampling.groups)
            yield from resampling_problems(chosen, resamples, centred=False, quantile=T_OF_SCHEMA_2)
