"""Records of planted streams: what the pipeline makes of updates whose truth is known, without a model.

The default is the self-test's population `phased`: 24 layers of 32 dimensions, 80 documents. Layers 6-10, phase C,
share a direction with |cos| about 0.8; layers 14-21, phase E, have one each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from delta_suite.capture.stream import ResidualStream
from delta_suite.models.phases import PhaseMap
from delta_suite.records.assemble import with_boundaries
from delta_suite.records.format import from_json, to_json
from delta_suite.records.record import ArrayReference
from delta_suite.records.view import RecordView
from delta_suite.selftest.documents import Population
from delta_suite.selftest.planted import SHARED, SPECIAL, phased
from delta_suite.selftest.proof import measured
from delta_suite.selftest.worlds import World

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
    return view


def without_arrays(view: RecordView) -> RecordView:
    """Return the view of the record as its JSON alone gives it, with the file of its arrays gone."""
    reference = ArrayReference(file="gone.safetensors", sha256="0" * 64)
    record, _ = from_json(to_json(view.record.model_copy(update={"arrays": reference})), "planted")
    return RecordView(record)
