"""Records of planted streams: what the pipeline makes of updates whose truth is known, without a model.

The default is the self-test's population `phased`: 24 layers of 32 dimensions, 80 documents. Layers 6-10, phase C,
share a direction with |cos| about 0.8; layers 14-21, phase E, have one each.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from delta_suite.capture.stream import ResidualStream
from delta_suite.capture.tolerances import SINGLE_EPSILON, tolerances
from delta_suite.models.phases import PhaseMap
from delta_suite.records.arrays import pack
from delta_suite.records.assemble import with_boundaries
from delta_suite.records.format import from_json, to_json
from delta_suite.records.record import ArrayReference, IdentityRecord, Record
from delta_suite.records.store import record_path
from delta_suite.records.view import RecordView
from delta_suite.selftest.documents import Population
from delta_suite.selftest.planted import SHARED, SPECIAL, phased
from delta_suite.selftest.proof import measured
from delta_suite.selftest.world import World

PHASES: PhaseMap = {"C": SHARED, "E": SPECIAL}


def planted_view(
    plant: Callable[[np.random.Generator], Population] = phased,
    *,
    phases: PhaseMap = PHASES,
    variants: Sequence[str] = ("raw",),
    parts: Sequence[str] = ("spectra",),
    name: str = "planted",
    seed: int = 0,
) -> RecordView:
    """Return a view, with arrays and directions, of the record of documents drawn from a planted population.

    parts: "boundaries" and "law" may be added; the law needs the variant sink_free.
    """
    draw = np.random.default_rng(seed)
    return view_of_stream(plant(draw).stream(draw), phases=phases, variants=variants, parts=parts, name=name)


def view_of_stream(
    stream: ResidualStream,
    *,
    phases: PhaseMap = PHASES,
    variants: Sequence[str] = ("raw",),
    parts: Sequence[str] = ("spectra",),
    name: str = "planted",
) -> RecordView:
    """Return a view, with arrays and directions, of the record of a stream of 80 documents."""
    if "law" in parts:
        covered = dict.fromkeys(phases, ("sharing_index",))
        world = World(phased, "planted", variants=variants, phases=phases, covered=covered)
    else:  # `measured` forms figures of phases with the law alone; `under` forms them here
        world = World(phased, "planted", variants=variants, phases={"replaced below": (0, 0)})
    view = measured(stream, world).under(phases, name=name)
    if "boundaries" in parts:
        view = RecordView(with_boundaries(view.record, view.full_gram), view.arrays, view.directions)
    return RecordView(with_facts(view.record), view.arrays, view.directions)


def with_facts(record: Record) -> Record:
    """Return a planted record with what only a model and a run give one: hashes, a date, and a certificate."""
    digits = hashlib.sha256(record.model.name.encode()).hexdigest()
    identities = {
        name: IdentityRecord(says=name, error=0.0, tolerance=tolerance)
        for name, tolerance in tolerances(record.model.layers, SINGLE_EPSILON).items()
    }
    certificate = {"forward_passes": 1, "identities": identities}
    provenance = {"created": "2026-11-24T00:00:00Z", "cache_key": digits}
    return record.model_copy(
        update={
            "model": record.model.model_copy(update={"fingerprint": digits}),
            "calibration": record.calibration.model_copy(update={"sha256": "c" * 64}),
            "certificate": record.certificate.model_copy(update=certificate),
            "provenance": record.provenance.model_copy(update=provenance),
        }
    )


def without_arrays(view: RecordView) -> RecordView:
    """Return the view of the record as its JSON alone gives it, with the file of its arrays gone."""
    reference = ArrayReference(file="gone.safetensors", sha256="0" * 64)
    record, _ = from_json(to_json(view.record.model_copy(update={"arrays": reference})), "planted")
    return RecordView(record)


def write_copies(results: Path, view: RecordView, count: int) -> None:
    """Write records of so many models, which differ in name and fingerprint alone."""
    packed = pack(view.content())
    for number in range(count):
        name = f"copy-{number}-of-{view.model.name}"
        fingerprint = hashlib.sha256(name.encode()).hexdigest()
        model = view.model.model_copy(update={"name": name, "fingerprint": fingerprint})
        record = view.record.model_copy(update={"model": model})
        path = record_path(results, record)
        path.parent.mkdir(parents=True)
        beside = path.with_suffix(".safetensors")
        beside.write_bytes(packed)
        reference = ArrayReference(file=beside.name, sha256=hashlib.sha256(packed).hexdigest())
        path.write_text(to_json(record.model_copy(update={"arrays": reference})))
