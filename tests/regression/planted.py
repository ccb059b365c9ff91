"""Records of planted directions, as a measurement would write them: figures, arrays, and directions of the cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from delta_suite.capture.tolerances import tolerances
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import direction_metrics
from delta_suite.metrics.intervals import with_interval
from delta_suite.metrics.registry import METRICS, metric_versions
from delta_suite.models.phases import PhaseMap
from delta_suite.records import assemble
from delta_suite.records.arrays import ArrayFile, as_kept, gram_arrays
from delta_suite.records.record import Record
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import VARIANTS

LAYERS, HIDDEN, GROUPS, TOP_K = 4, 32, 10, 8
PHASES: PhaseMap = {"A": (0, 1), "C": (2, 3)}
_VERSIONS = {
    name: version
    for name, version in metric_versions().items()
    if name in {"stream_norm", "sharing_index"} or METRICS[name].takes in {"directions", "boundaries"}
}
"""Versions of the metrics that the records hold: no spectra are planted, and one metric of the law."""

NOISE = 0.02
"""Standard deviation of what a group of documents adds to each entry of a direction."""


def planted(*, phases: PhaseMap = PHASES, **options: Any) -> RecordView:
    """Return a view of a record of planted truth; the same one for the same arguments, as no view is ever changed.

    shift: added to every stream norm, all else equal. turn: degrees that each v_L is turned towards a direction outside
    its top 8. spread: standard deviation of the replicates of the stream norm. seed: of the noise of the documents.
    """
    return _planted(tuple(phases.items()), **options)


@cache
def _planted(
    phases: tuple[tuple[str, tuple[int, int]], ...],
    *,
    shift: float = 0.0,
    turn: float = 0.0,
    spread: float = 0.1,
    fingerprint: str = "f" * 64,
    calibration: str = "a" * 64,
    layers: int = LAYERS,
    seed: int = 0,
    with_directions: bool = True,
) -> RecordView:
    truth, draw = np.random.default_rng(100), np.random.default_rng(seed)
    bases = np.stack([np.linalg.qr(truth.standard_normal((HIDDEN, HIDDEN)))[0].T for _ in range(layers)])
    angle = np.radians(turn)
    bases[:, 0] = np.cos(angle) * bases[:, 0] + np.sin(angle) * bases[:, TOP_K]
    norms = truth.standard_normal(GROUPS)
    record = Record.model_validate(
        {
            "schema": 3,
            "model": {"name": "m", "source": "directory:m", "fingerprint": fingerprint, "architecture": "Llama"}
            | {"layers": layers, "hidden": HIDDEN},
            "calibration": {"name": "docs", "sha256": calibration, "documents": 40, "tokens": 400, "dropped": 0},
            "resampling": {"units": 40, "groups": GROUPS},
            "parts": ["spectra"],
            "variants": {name: VARIANTS[name].version for name in ("raw", "sink_free")},
            "sinks": {"position_zero": 0, "large_norm": 0, "ratio": 6.0, "largest": []},
            "certificate": {"holds": True, "blocks": layers, "forward_passes": 1, "final_norm": []}
            | {"identities": {name: {"says": name, "error": 0.0, "tolerance": 0.0} for name in tolerances(1, 1.0)}},
            "provenance": {
                **{"created": "2026-11-24T00:00:00Z", "suite": "0", "dtype": "float32", "attention": ""},
                **{"device": "cpu", "hardware": "a CPU", "versions": {}, "seconds": {}, "peak_memory_bytes": {}},
                **{"cache_key": "b" * 64, "settings": {"max_tokens": 2048}, "metric_versions": _VERSIONS},
            },
            "phases": {},
            "scopes": {},
            "layers": [{"layer": layer, "phase": "", "metrics": {}} for layer in range(layers)],
        }
    )
    arrays: dict[str, np.ndarray] = {}
    directions: dict[str, np.ndarray] = {}
    metrics: list[dict[str, dict[str, Estimate]]] = [{} for _ in range(layers)]
    grams = {}
    for variant in record.variants:
        a, b = _fitted(bases, draw), _fitted(bases, draw)
        gram = grams[variant] = as_kept(_with_replicates(bases, (a, b), draw))
        directions |= {f"{variant}.directions": bases[:, :TOP_K].astype(np.float32)}
        directions |= {f"{variant}.directions_a": a.astype(np.float32), f"{variant}.directions_b": b.astype(np.float32)}
        arrays |= gram_arrays(variant, gram)
        for layer in range(layers):
            value = Estimate(value=10.0 + layer + shift, sd=1.0)
            replicates = [Estimate(value=10.0 + layer + shift + spread * norm) for norm in norms]
            stream_norm = with_interval(value, (value, value), replicates)
            metrics[layer][variant] = {"stream_norm": stream_norm} | direction_metrics(gram, layer)
        values = [row[variant]["stream_norm"].value for row in metrics]
        arrays[f"{variant}.halves.stream_norm"] = np.array([values, values])
        arrays[f"{variant}.eigenvalues"] = np.ones((layers, HIDDEN), dtype=np.float32)
        for name in metrics[0][variant]:
            rows = [row[variant][name].replicates for row in metrics]
            if any(replicates is not None for replicates in rows):
                arrays[f"{variant}.units.{name}"] = assemble.columns(rows)
    measured = tuple(row.model_copy(update={"metrics": metrics[row.layer]}) for row in record.layers)
    record = record.model_copy(update={"layers": measured})
    record, scope_arrays = assemble.under(record, grams.__getitem__, dict(phases))
    kept_directions = ArrayFile(Path("cache"), content=directions) if with_directions else None
    return RecordView(record, ArrayFile(Path("memory"), content=arrays | scope_arrays), kept_directions)


def _fitted(bases: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Return the top directions of each layer as a sample of documents gives them."""
    noisy = bases[:, :TOP_K] + NOISE * draw.standard_normal((len(bases), TOP_K, bases.shape[2]))
    return np.stack([np.linalg.qr(rows.T)[0].T for rows in noisy])


def _with_replicates(
    bases: np.ndarray, halves: tuple[np.ndarray, np.ndarray], draw: np.random.Generator
) -> DirectionGram:
    replicates = tuple(
        DirectionGram.of(_fitted(bases, draw), (_fitted(bases, draw), _fitted(bases, draw))) for _ in range(GROUPS)
    )
    return replace(DirectionGram.of(bases[:, :TOP_K], halves), replicates=replicates)
