"""The parts of a measurement that a record has: which it lacks, and how they are added."""

from __future__ import annotations

from typing import TYPE_CHECKING

from delta_suite.errors import DeviceError
from delta_suite.models.phases import PhaseMap, phase_map
from delta_suite.records.assemble import Assembled, with_law, with_states, with_writes
from delta_suite.records.captured import identity_record
from delta_suite.records.losses_part import with_causes, with_damage
from delta_suite.records.record import Record
from delta_suite.reduction.losses import causal_phases
from delta_suite.reduction.variants import VARIANTS

if TYPE_CHECKING:
    from delta_suite.reduction.passes import Captured


def missing_parts(declared: PhaseMap | None, record: Record | None, parts: frozenset[str]) -> frozenset[str]:
    """Return those of the parts that a record in the cache lacks; all where there is none.

    declared: the phases that are declared for the model.
    """
    if record is None:
        return parts
    phases = phase_map(record.model.layers, declared)
    law_fits = record.law is not None and dict(record.law.phases) == phases
    causes_fit = record.causes is not None and dict(record.causes.phases) == causal_phases(phases)
    writes_fit = all(version == VARIANTS[name].version for name, version in record.variants.items() if name in VARIANTS)
    fitting = {"law": law_fits, "causal": causes_fit, "writes": writes_fit}
    return parts - {part for part in record.parts if fitting.get(part, True)}


def with_parts(entry: Assembled, captured: Captured) -> Assembled:
    """Return the entry with the parts beside its spectra that were captured; one that memory ran out for is absent."""
    from delta_suite.reduction.losses import Causes, Damage

    if captured.law is not None and not isinstance(captured.law, DeviceError):
        entry = with_law(entry, captured.law)
    if captured.writes is not None and not isinstance(captured.writes, DeviceError):
        identity = None if captured.apart is None else identity_record(captured.apart)
        entry = with_writes(entry, captured.writes, identity)
    if captured.states is not None and not isinstance(captured.states, DeviceError):
        entry = with_states(entry, captured.states)
    if isinstance(captured.causes, Causes):
        entry = with_causes(entry, captured.causes)
    if isinstance(captured.damage, Damage):
        entry = with_damage(entry, captured.damage)
    return entry
