"""The parts `causal` and `damage` of a record: from losses to figures, back from its arrays, and their check.

Their metrics have no variants and do not follow from spectra, so they stand apart: causes by phase, damage by layer.
Beside the record lie, for P in `causal`, `damage`, the sums that everything follows from:

    P.nats, P.tokens                        (conditions, groups), (groups,)   by group of units
    P.nats_documents, P.tokens_documents    the same by group of documents, where the unit is the domain
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import numpy as np

from delta_suite.metrics.causal import cause_estimates, damage_estimates
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.registry import METRICS
from delta_suite.records.arrays import Arrays
from delta_suite.records.assemble import Assembled, parts_with
from delta_suite.records.problem import WRITTEN, Problem, quoted
from delta_suite.records.record import CausesRecord, DamageRecord, Record
from delta_suite.reduction.losses import CAUSAL_PHASES, CONDITIONS, UNDISTURBED, Causes, Damage, Losses

CAUSAL, DAMAGE = "causal", "damage"

_KINDS = ("nats", "tokens", "nats_documents", "tokens_documents")


def with_causes(entry: Assembled, causes: Causes) -> Assembled:
    """Return the entry with the causes of the loss."""
    conditions = () if causes.losses is None else causes.losses.conditions
    part = CausesRecord(
        phases=causes.phases,
        conditions=conditions,
        documents=causes.documents,
        passes=causes.passes,
        matched=dict(causes.matched),
        no_law=dict(causes.no_law),
        reason=causes.reason,
        metrics={phase: cause_estimates(causes, phase) for phase in causes.phases},
    )
    return entry.plus(_packed(CAUSAL, causes.losses), causes=part, parts=parts_with(entry.record, CAUSAL))


def with_damage(entry: Assembled, damage: Damage) -> Assembled:
    """Return the entry with the damage from each block's absence."""
    part = DamageRecord(
        documents=damage.documents,
        passes=damage.passes,
        failed=dict(damage.failed),
        reason=damage.reason,
        layers=tuple(damage_estimates(damage, entry.record.model.layers)),
    )
    return entry.plus(_packed(DAMAGE, damage.losses), damage=part, parts=parts_with(entry.record, DAMAGE))


def stored_causes(record: Record, arrays: Arrays) -> Causes | None:
    """Return the causes that a record was made from; None where its arrays lack them."""
    part = record.causes
    if part is None:
        return None
    losses = _unpacked(CAUSAL, part.conditions, arrays)
    if losses is None and part.reason is None:
        return None
    return Causes(part.phases, losses, part.documents, part.passes, part.matched, part.no_law, part.reason)


def stored_damage(record: Record, arrays: Arrays) -> Damage | None:
    """Return the damage that a record was made from; None where its arrays lack it."""
    part = record.damage
    if part is None:
        return None
    losses = _unpacked(DAMAGE, _damage_conditions(record.model.layers), arrays)
    if losses is None and part.reason is None:
        return None
    return Damage(losses, part.documents, part.passes, part.failed, part.reason)


def _damage_conditions(layers: int) -> tuple[str, ...]:
    skips, swaps = (f"skip.{layer}" for layer in range(layers)), (f"swap.{layer}" for layer in range(layers - 1))
    return (UNDISTURBED, *skips, *swaps)


def _packed(part: str, losses: Losses | None) -> dict[str, np.ndarray]:
    if losses is None:
        return {}
    arrays = {f"{part}.nats": losses.nats, f"{part}.tokens": losses.tokens}
    if losses.documents is not None:
        arrays |= {f"{part}.nats_documents": losses.documents.nats, f"{part}.tokens_documents": losses.documents.tokens}
    return arrays


def _unpacked(part: str, conditions: tuple[str, ...], arrays: Arrays) -> Losses | None:
    nats, tokens, of_documents, tokens_documents = (arrays.get(f"{part}.{kind}") for kind in _KINDS)
    if nats is None or tokens is None:
        return None
    narrower = None
    if of_documents is not None and tokens_documents is not None:
        narrower = Losses(conditions, of_documents, tokens_documents)
    return Losses(conditions, nats, tokens, narrower)


# --- the check -------------------------------------------------------------------------------------------------


def losses_problems(record: Record, arrays: Arrays | None, *, merged: bool = False) -> Iterator[Problem]:
    """Yield where causes and damage are incomplete, cannot be, or do not follow from their sums of losses.

    merged: true for a baseline that was added to, of which figures may come from two measurements.
    """
    for part, there in ((CAUSAL, record.causes), (DAMAGE, record.damage)):
        if (part in record.parts) != (there is not None):
            yield Problem(part, "it is a part of the record and not there, or there and no part of it")
            return
    problems = [*_fact_problems(record), *(() if arrays is None else _sum_problems(record, arrays))]
    yield from problems
    if problems or merged:
        return
    for where, stated, formed in _figures(record, arrays):
        yield from _figure_problems(record, where, stated, formed)


def _fact_problems(record: Record) -> Iterator[Problem]:
    if (causes := record.causes) is not None:
        for name, (first, last) in causes.phases.items():
            if name not in CAUSAL_PHASES or not 0 <= first <= last < record.model.layers:
                yield Problem(CAUSAL, f"phase {quoted(name)} is {first} to {last}, of {record.model.layers} layers")
        if set(causes.metrics) != set(causes.phases):
            yield Problem(CAUSAL, f"its figures are of {sorted(causes.metrics)}, its phases {sorted(causes.phases)}")
        known = {UNDISTURBED, *(f"{phase}.{condition}" for phase in causes.phases for condition in CONDITIONS)}
        expected = known - {f"{phase}.law" for phase in causes.no_law}
        if causes.reason is None and sorted(causes.conditions) != sorted(expected):
            yield Problem(CAUSAL, f"its conditions are {quoted(list(causes.conditions))}, not {sorted(expected)}")
        energies = [causes.matched.get(name, -1.0) for name in causes.phases]
        if causes.reason is None and not all(0.0 <= energy <= 1 + WRITTEN for energy in energies):
            yield Problem(CAUSAL, f"its control has {quoted(causes.matched)} of the energy of the v_L")
    if (damage := record.damage) is not None and len(damage.layers) != record.model.layers:
        yield Problem(DAMAGE, f"it has {len(damage.layers)} layers, and the model {record.model.layers}")
    for part, measured in ((CAUSAL, record.causes), (DAMAGE, record.damage)):
        if measured is not None and not 0 <= measured.documents <= record.calibration.documents:
            yield Problem(part, f"it ran {measured.documents} documents, of {record.calibration.documents}")
        if measured is not None and not 0 <= measured.passes < math.inf:
            yield Problem(part, f"it took {quoted(measured.passes)} passes")


def _sum_problems(record: Record, arrays: Arrays) -> Iterator[Problem]:
    rows = {
        CAUSAL: None if record.causes is None or record.causes.reason else len(record.causes.conditions),
        DAMAGE: None if record.damage is None or record.damage.reason else len(_damage_conditions(record.model.layers)),
    }
    groups = {"": record.resampling.groups, "_documents": record.resampling.document_groups or 0}
    for part, conditions in rows.items():
        if conditions is None:
            continue
        for end, count in groups.items():
            nats, tokens = arrays.get(f"{part}.nats{end}"), arrays.get(f"{part}.tokens{end}")
            if nats is None or tokens is None:
                if count and (part == CAUSAL or not end):
                    yield Problem(f"{part}.nats{end}", "the array is missing")
                continue
            if nats.shape != (conditions, count) or tokens.shape != (count,):
                expected = (conditions, count)
                yield Problem(f"{part}.nats{end}", f"its shape is {nats.shape}, and follows to be {expected}")
            elif not (np.isfinite(tokens).all() and (tokens >= 0).all() and not np.isinf(nats).any()):
                yield Problem(f"{part}.tokens{end}", "it holds a number of tokens, or a loss, that cannot be")
            elif (nats < 0).any():
                yield Problem(f"{part}.nats{end}", "a loss is negative, and -log p is not")


def _figures(
    record: Record, arrays: Arrays | None
) -> Iterator[tuple[str, Mapping[str, Estimate], Mapping[str, Estimate] | None]]:
    """Yield the place of the figures of each phase and layer, these figures, and what the sums make them."""
    if record.causes is not None:
        causes = None if arrays is None else stored_causes(record, arrays)
        for phase, figures in record.causes.metrics.items():
            yield f"causes, phase {phase}", figures, None if causes is None else cause_estimates(causes, phase)
    if record.damage is not None:
        damage = None if arrays is None else stored_damage(record, arrays)
        formed = None if damage is None else damage_estimates(damage, record.model.layers)
        for layer, figures in enumerate(record.damage.layers):
            yield f"damage, layer {layer}", figures, None if formed is None else formed[layer]


def _figure_problems(
    record: Record, where: str, stated: Mapping[str, Estimate], formed: Mapping[str, Estimate] | None
) -> Iterator[Problem]:
    """Yield which figures are missing, or are not what their sums make them, to the digits that are written."""
    versions = record.provenance.metric_versions
    source = "causes" if where.startswith("causes") else "damage"
    wanted = {name for name, metric in METRICS.items() if metric.takes == source and name in versions}
    for name in sorted(wanted - stated.keys()):
        yield Problem(where, f"{name} is missing")
    for name in sorted(wanted & stated.keys()):
        figure, place = stated[name], f"{where}, {name}"
        if figure.interval is not None and not figure.interval[0] <= (figure.corrected or 0.0) <= figure.interval[1]:
            yield Problem(place, "its corrected value is outside its interval")
        if formed is None or versions[name] != METRICS[name].version:
            continue
        words = ("value", "corrected value", "lower end", "upper end")
        for what, one, other in zip(words, _numbers(figure), _numbers(formed[name]), strict=True):
            if (one is None) != (other is None) or (
                one is not None and other is not None and abs(one - other) > 10 * WRITTEN * (1 + abs(other))
            ):
                yield Problem(place, f"its {what} is {quoted(one)}, and follows to be {quoted(other)}")


def _numbers(figure: Estimate) -> tuple[float | None, ...]:
    return figure.value, figure.corrected, *(figure.interval or (None, None))
