"""Records of random streams at the edges: zero layers, rank one, empty halves, extreme sizes, every dtype."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from delta_suite.models.phases import PhaseMap, phase_map
from delta_suite.pipeline import metric_versions
from delta_suite.records.arrays import ArrayFile, Arrays
from delta_suite.records.assemble import assemble, with_boundaries, with_law
from delta_suite.records.format import from_json, to_json
from delta_suite.records.record import (
    CalibrationRecord,
    CertificateRecord,
    ModelRecord,
    Provenance,
    Record,
    SinkRecord,
)
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import BLOCK_VARIANTS

from tests.planted_records import with_facts

KINDS = ("normal", "normal", "zero", "rank one", "one half", "tiny", "shared", "one token")


def random_record(seed: int) -> tuple[Record, Arrays]:
    """Return the record of a random stream at the edges, as it is read from its file, and its arrays."""
    draw = np.random.default_rng(seed)
    layers, hidden = int(draw.integers(1, 8)), int(draw.choice([2, 3, 8, 12]))
    documents, length = int(draw.choice([1, 2, 3, 10, 13])), int(draw.integers(2, 8))
    scale = float(draw.choice([1e-12, 1.0, 1.0, 1e4]))
    dtype = str(draw.choice(["float32", "bfloat16", "float16"])) if scale == 1.0 else "float32"
    kinds = [str(draw.choice(KINDS)) for _ in range(layers)]
    phases = phase_map(layers, None if draw.random() < 0.6 else {"P": (0, layers - 1)})
    return _record(draw, kinds, (documents, length, hidden), phases, scale=scale, dtype=dtype, spikes=True)


def ordinary_record() -> tuple[Record, Arrays]:
    """Return the record of six layers over twenty documents, with every part and every figure."""
    kinds = ["normal", "shared", "shared", "normal", "normal", "shared"]
    return _record(np.random.default_rng(0), kinds, (20, 24, 12), phase_map(6))


def _record(
    draw: np.random.Generator,
    kinds: Sequence[str],
    sizes: tuple[int, int, int],
    phases: PhaseMap,
    *,
    scale: float = 1.0,
    dtype: str = "float32",
    spikes: bool = False,
) -> tuple[Record, Arrays]:
    """Return the record of a stream with layers of these kinds; sizes: documents, tokens of each, width."""
    import torch
    from delta_suite.capture.sinks import find_sinks
    from delta_suite.capture.stream import ResidualStream
    from delta_suite.capture.units import Units
    from delta_suite.reduction.law_fit import measure_law
    from delta_suite.reduction.reduce import reduce_stream

    documents, length, hidden = sizes
    layers = len(kinds)
    token = np.arange(documents * length)
    states = [scale * draw.standard_normal((len(token), hidden))]
    for kind in kinds:
        update = _update(kind, draw.standard_normal((len(token), hidden)), token // length)
        if spikes and draw.random() < 0.2:
            update[draw.integers(len(token))] *= 1e3
        states.append(states[-1] + scale * update)
    stream = ResidualStream(
        [torch.from_numpy(state.astype(np.float32)).to(getattr(torch, dtype)) for state in states],
        torch.from_numpy(token // length),
        torch.from_numpy(token % length),
        torch.ones(len(token), dtype=torch.bool),
        "device",
    )
    found: list[Any] = []
    with torch.no_grad():
        spectra = reduce_stream(
            [stream],
            layers=layers,
            tokens=len(token),
            units=Units.of(documents),
            variants=list(BLOCK_VARIANTS.values()),
            sinks=lambda shard: found.append(find_sinks(shard)) or found[-1],
        )
        law = measure_law(stream, phases, sinks=found[-1])
    entry = assemble(
        spectra,
        phases,
        model=ModelRecord(name="r", source="r", fingerprint="", architecture="r", layers=layers, hidden=hidden),
        calibration=CalibrationRecord(name="r", sha256="", documents=documents, tokens=len(token), dropped=0),
        sinks=SinkRecord(position_zero=found[0].first, large_norm=found[0].large, ratio=6.0, largest=found[0].largest),
        certificate=CertificateRecord(holds=True, blocks=layers, forward_passes=1, final_norm=(), identities={}),
        provenance=Provenance(
            **dict.fromkeys(("created", "suite", "attention", "device", "hardware", "cache_key"), ""),
            **{name: {} for name in ("versions", "settings", "seconds", "peak_memory_bytes")},
            dtype=dtype,
            metric_versions=metric_versions(),
        ),
    )
    entry = with_law(entry, law)
    view = RecordView(entry.record, ArrayFile(Path("memory"), content=entry.arrays))
    record = with_facts(with_boundaries(entry.record, view.gram))
    return from_json(to_json(record), "random")[0], entry.arrays


def _update(kind: str, update: np.ndarray, document: np.ndarray) -> np.ndarray:
    """Return the updates of one layer, of this kind."""
    match kind:
        case "zero":
            return update * 0
        case "rank one":
            return np.outer(update[:, 0], update[0])
        case "one half":
            return np.where(document[:, None] % 2 == 0, 0.0, update)
        case "tiny":
            return update * 1e-5
        case "shared":
            return np.outer(update[:, 0], np.ones(update.shape[1])) + 0.1 * update
        case "one token":
            return np.where(np.arange(len(update))[:, None] == 0, update, 0.0)
    return update
