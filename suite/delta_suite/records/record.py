"""The record: everything that was measured of one model, and where it came from. Read it without a model or torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError

from delta_suite.errors import RecordError
from delta_suite.metrics import nulls
from delta_suite.metrics.boundaries import Boundaries
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.estimators import (
    LAW_NOT_MEASURED,
    boundaries_under,
    boundary_metrics,
    direction_metrics,
    layer_metrics,
    phase_metrics,
)
from delta_suite.metrics.registry import METRICS, DirectionGram
from delta_suite.models.phases import phase_of
from delta_suite.models.registry import series_of
from delta_suite.records.sections import Shares, Triangle, plot_sections
from delta_suite.reduction.statistics import LayerStatistics

if TYPE_CHECKING:
    from delta_suite.reduction.resampling import LayerSpectra

SCHEMA = 2
"""Version of the record's shape; readers refuse others."""

PhaseMap = Mapping[str, tuple[int, int]]
Metrics = dict[str, dict[str, Estimate]]
"""variant -> metric -> estimate"""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)


class ModelRecord(_Part):
    """Which model."""

    name: str
    source: str
    """Where the weights came from: `hub:...`, `package:...`, `directory:...`; `random-weights, ...` of a control."""
    revision: str | None
    """The hub commit, where there is one."""
    fingerprint: str
    """SHA-256 over weights, config and tokenizer files; of a control over config, tokenizer and seed."""
    architecture: str
    layers: int
    hidden: int

    @property
    def series(self) -> tuple[str, int] | None:
        """The training run and the step that this is a checkpoint of; None of others: see `ModelSpec.series`."""
        kind, _, where = self.source.partition(":")
        if kind == "hub":
            return series_of(self.name, self.name.partition("@")[2])
        path = Path(where)
        return series_of(self.name, path.parent.name if path.suffix == ".gguf" else path.name)


class CalibrationRecord(_Part):
    """Which texts."""

    name: str
    sha256: str
    documents: int
    first: int | None = None
    """The number of documents asked for (`--documents`), the source's first ones; null: all of them."""
    tokens_per_document: int | None = None
    """Only so many tokens of each document ran; null: whole documents."""
    tokens: int
    """Tokens that enter the metrics."""
    dropped: int
    """Tokens that ran through the model and were left out."""


class IdentityRecord(_Part):
    """One identity of the capture certificate, its largest error and what was allowed."""

    says: str
    error: float
    tolerance: float


class SinkRecord(_Part):
    """What the variant `sink_free` leaves out, and why."""

    position_zero: int
    """Tokens at position 0 of their sequence."""
    large_norm: int
    """Other tokens whose state exceeds `ratio` times the median norm in some layer."""
    ratio: float
    largest: tuple[tuple[int, int, int, float], ...]
    """(document, position, layer, norm over median) of the largest."""


class CertificateRecord(_Part):
    """The capture certificate. A record exists only where every identity held."""

    holds: Literal[True]
    blocks: int
    forward_passes: int
    final_norm: tuple[str, ...]
    identities: dict[str, IdentityRecord]


class StreamRecord(_Part):
    """Where the residual stream was kept while it was analysed. The figures do not depend on it."""

    storage: Literal["device", "host", "disk"]
    """In the memory of the device; in pinned host memory beside a GPU; in a memory-mapped file."""
    shards: int
    """Those of several come one after the other, and are kept one at a time."""
    largest_bytes: int
    """Of the largest shard."""

    @property
    def usual(self) -> bool:
        """All of it at once, on the device."""
        return self.storage == "device" and self.shards == 1


class Provenance(_Part):
    """How, when and with what."""

    created: str
    """UTC, ISO 8601."""
    suite: str
    git: dict[str, Any] | None
    """Commit and dirty flag of the suite's own checkout, where it runs from one."""
    dtype: str
    attention: str
    device: str
    """`cpu`, `cuda`, `mps`."""
    hardware: str
    versions: dict[str, str]
    settings: dict[str, Any]
    metric_versions: dict[str, int]
    seconds: dict[str, float]
    """Wall time of load, capture, analysis."""
    peak_memory_bytes: dict[str, int]
    """Of the process, and of each GPU used."""
    stream: StreamRecord | None = None
    """Null of what no model was run for, and in records older than this field."""
    cache_key: str


class LayerRecord(_Part):
    """One layer; pair metrics stand at the first of their two layers."""

    layer: int
    phase: str
    metrics: Metrics


class ScopeRecord(_Part):
    """One phase; `layers` are the first and the last, both included."""

    layers: tuple[int, int]
    metrics: Metrics


class LawRecord(_Part):
    """The update law, fitted over the phases that the model was measured under, on the rows of `sink_free`."""

    phases: dict[str, tuple[int, int]]
    metrics: dict[str, dict[str, Estimate]]
    """phase -> metric -> estimate"""
    transfer: tuple[tuple[float | None, ...], ...]
    """R^2 on layer L (row) of the map of layer M (column), held out; null on a layer whose update does not vary; empty
    where the law was not measured."""


class BoundarySearch(_Part):
    """How the boundaries were found and ranked: fields of `analysis.boundaries.Boundaries`."""

    chosen: tuple[int, ...] | None
    declared_cost: float
    found_cost: float
    total_cost: float
    orders: int
    others: int
    cost_rank_any_lengths: float
    chance_agreement: float
    draws: int


class BoundaryRecord(_Part):
    """The boundaries found in the layers' similarity, beside the declared ones: first layers of segments."""

    found: tuple[int, ...] = ()
    declared: tuple[int, ...] = ()
    returns: tuple[float, ...] | None = None
    """For each found boundary, the share of the replicates that find it again within one layer."""
    metrics: dict[str, Estimate]
    search: BoundarySearch | None = None
    """Null where nothing could be searched for, and in records older than this field."""


class JudgedBy(_Part):
    """The hypothesis file that a record was last judged by. Its verdicts are kept apart: they follow from the two."""

    version: int
    """The file's own, raised when its meaning changes."""
    sha256: str
    """Of the file's bytes, so that any change of it shows."""

    @property
    def text(self) -> str:
        return f"version {self.version}, SHA-256 {self.sha256[:12]}"


class NullRecord(_Part):
    """What a metric over the phases is held against, so that a record alone can be judged."""

    windows: dict[str, Estimate]
    """By "first-last", over every run of as many layers as some phase has."""
    lag: dict[str, Estimate]
    """By phase: over pairs outside, at the distances of those inside."""
    random: dict[str, tuple[float, ...]]
    """By phase: with each v_L drawn at random, once per draw, ascending."""


class Measurement(_Part):
    """One measured model under one calibration, with the phase map it is shown under."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, populate_by_name=True)

    schema_version: Literal[2] = Field(alias="schema")
    model: ModelRecord
    calibration: CalibrationRecord
    sinks: SinkRecord
    certificate: CertificateRecord
    provenance: Provenance
    phases: dict[str, tuple[int, int]]
    judged_by: dict[str, JudgedBy] = Field(default_factory=dict)
    """By hypothesis, of the runs that judged this record; the only part that is written after measuring."""
    layers: tuple[LayerRecord, ...]
    scopes: dict[str, ScopeRecord]
    law: LawRecord | None = None
    boundaries: dict[str, BoundaryRecord] = Field(default_factory=dict)
    """By variant."""
    nulls: dict[str, dict[str, NullRecord]] = Field(default_factory=dict)
    """variant -> metric -> null, for the metrics of RECORDED_NULLS."""
    cosines: dict[str, Triangle] | None = None
    """variant -> |v_L . v_M| above the diagonal; absent from records older than this field."""
    spectra: dict[str, Shares] | None = None
    """variant -> the first energy shares of each layer; absent from records older than this field."""

    _arrays: Path | None = PrivateAttr(default=None)
    _grams: dict[str, DirectionGram] = PrivateAttr(default_factory=dict)

    def with_arrays(self, path: Path) -> Measurement:
        """The same record, able to answer for any set of layers from the arrays in this file."""
        self._arrays = path
        return self

    def with_directions(self, grams: Mapping[str, DirectionGram]) -> Measurement:
        """The same record, with the inner products of its directions at hand."""
        self._grams.update(grams)
        return self

    def under(self, phases: PhaseMap, **model: str | None) -> Measurement:
        """The same measurement shown under another phase map, and other `model` fields (name, source, revision).

        Raises RecordError where a phase's metrics cannot be formed because the arrays are gone.
        """
        phases = {name: (first, last) for name, (first, last) in phases.items()}
        scopes = (
            self.scopes
            if phases == self.phases
            else {
                name: ScopeRecord(
                    layers=(first, last),
                    metrics={
                        variant: phase_metrics(self.gram(variant), range(first, last + 1)) | self._law_over(first, last)
                        for variant in self.layers[0].metrics
                    },
                )
                for name, (first, last) in phases.items()
            }
        )
        of_nulls, boundaries = self.nulls, self.boundaries
        if phases != self.phases:
            of_nulls = {variant: self._nulls(variant, phases) for variant in self.layers[0].metrics}
            boundaries = {
                variant: _boundary_record(boundaries_under(self.gram(variant), phases))
                for variant in self.layers[0].metrics
            }
        layers = tuple(layer.model_copy(update={"phase": phase_of(layer.layer, phases)}) for layer in self.layers)
        update = {
            "phases": phases,
            "scopes": scopes,
            "nulls": of_nulls,
            "boundaries": boundaries,
            "layers": layers,
            "model": self.model.model_copy(update=model),
        }
        return self.model_copy(update=update)

    def _nulls(self, variant: str, phases: PhaseMap) -> dict[str, NullRecord]:
        gram = self.gram(variant)
        several = {name: range(first, last + 1) for name, (first, last) in phases.items() if last > first}
        runs = {run for own in several.values() for run in nulls.windows(self.model.layers, len(own))}
        out = {}
        for metric in RECORDED_NULLS:
            random = {name: nulls.random_directions(gram, metric, own) for name, own in several.items()}
            out[metric] = NullRecord(
                windows={
                    f"{run[0]}-{run[-1]}": phase_metrics(gram, run, only=metric)[metric].model_copy(
                        update={"per_layer": None}
                    )
                    for run in sorted(runs, key=lambda run: (len(run), run[0]))
                },
                lag={name: nulls.lag_matched(gram, metric, own) for name, own in several.items()},
                random={name: tuple(sorted(own)) for name, own in random.items() if not isinstance(own, str)},
            )
        return out

    def lag_matched(self, layers: range, metric: str, variant: str) -> Estimate:
        """The metric over pairs outside these layers, at their distances: see `nulls.lag_matched`."""
        recorded = self.nulls.get(variant, {}).get(metric)
        name = self._phase_of(layers)
        if recorded is not None and name in recorded.lag:
            return recorded.lag[name]
        try:
            return nulls.lag_matched(self.gram(variant), metric, layers)
        except RecordError as error:
            return absent(str(error))

    def random_directions(self, layers: range, metric: str, variant: str) -> Sequence[float] | str:
        """The metric with v_L drawn at random, or why there is none: see `nulls.random_directions`."""
        recorded = self.nulls.get(variant, {}).get(metric)
        name = self._phase_of(layers)
        if recorded is not None and name in recorded.random:
            return recorded.random[name]
        try:
            return nulls.random_directions(self.gram(variant), metric, layers)
        except RecordError as error:
            return str(error)

    def _phase_of(self, layers: range) -> str:
        return next((name for name, own in self.phases.items() if own == (layers[0], layers[-1])), "")

    def _law_over(self, first: int, last: int) -> dict[str, Estimate]:
        """What the law says of these layers, where they are a phase that it was fitted over."""
        if self.law is None:
            return {}
        return next((self.law.metrics[name] for name, own in self.law.phases.items() if own == (first, last)), {})

    def over(self, layers: Sequence[int], metric: str, variant: str) -> Estimate:
        """A pair or phase metric over a contiguous set of layers, from the record or else from its arrays."""
        if METRICS[metric].from_law:
            return self._law_over(layers[0], layers[-1]).get(metric, absent(LAW_NOT_MEASURED))
        for scope in self.scopes.values():
            if scope.layers == (layers[0], layers[-1]) and metric in scope.metrics.get(variant, {}):
                return scope.metrics[variant][metric]
        if variant not in self.layers[0].metrics:
            return absent(f"variant {variant} was not measured")
        if METRICS[metric].scope == "model":
            return self.boundaries_of(variant).metrics[metric]
        recorded = self.nulls.get(variant, {}).get(metric)
        if recorded is not None and (run := f"{layers[0]}-{layers[-1]}") in recorded.windows:
            return recorded.windows[run]
        try:
            return phase_metrics(self.gram(variant), layers, only=metric)[metric]
        except RecordError as error:
            return absent(str(error))

    def boundaries_of(self, variant: str) -> BoundaryRecord:
        """As recorded; where a record has none they are found from the arrays, once, or the metrics say why not."""
        if variant not in self.boundaries:
            try:
                found = boundaries_under(self.gram(variant), self.phases)
            except RecordError as error:
                return _boundary_record(absent(str(error)))
            self.boundaries[variant] = _boundary_record(found)
        return self.boundaries[variant]

    def gram(self, variant: str) -> DirectionGram:
        """Inner products of all directions. Raises RecordError where the arrays are gone."""
        if variant not in self._grams:
            if self._arrays is None or not self._arrays.exists():
                raise RecordError(
                    f"the directions of {self.model.name} are not at hand (cache entry "
                    f"{self.provenance.cache_key[:12]}), so only the phases in its record can be judged. "
                    f"Measure it again: delta-suite measure {self.model.name}"
                )
            self._grams[variant] = direction_gram(read_arrays(self._arrays), variant)
        return self._grams[variant]

    def to_json(self) -> str:
        """Indented, but an array of numbers stays on one line. A text never holds a raw newline, so none is touched."""
        text = self.model_dump_json(by_alias=True, indent=1)
        return re.sub(r"\[\n\s+[^\[\]{}\"]*\]", lambda numbers: " ".join(numbers[0].split()), text) + "\n"

    @classmethod
    def from_json(cls, text: str, where: object) -> Measurement:
        """Raises RecordError for anything that is not a whole record of this schema."""
        try:
            found = cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            at = ".".join(str(part) for part in first["loc"]) or "the whole file"
            raise RecordError(
                f"{where} is not a measurement record of schema {SCHEMA}: at {at}: {first['msg']}"
                f"{f' (and {error.error_count() - 1} more)' if error.error_count() > 1 else ''}. "
                f"Records are written by `delta-suite measure`."
            ) from None
        if problem := found._lacks():
            raise RecordError(f"{where} is not a whole record: {problem}. Measure again: delta-suite measure --fresh.")
        return found

    def _lacks(self) -> str | None:
        """How its parts do not fit together, so that it could not be judged; None where they do."""
        layers, variants = self.model.layers, [set(layer.metrics) for layer in self.layers]
        if not layers or [layer.layer for layer in self.layers] != list(range(layers)):
            return f"it says {layers} layers and holds {len(self.layers)}"
        if any(own != variants[0] or "raw" not in own for own in variants):
            return "its layers were not all measured in the same variants"
        if any(not 0 <= first <= last < layers for first, last in self.phases.values()):
            return f"a phase reaches past its {layers} layers"
        return None


RECORDED_NULLS = ("intra_cosine", "intra_cosine_cross_fitted", "block_effective_rank_fraction")
"""Metrics whose nulls are kept in a record; those of others are formed from the arrays, while the cache has them."""


def _boundary_record(found: Boundaries | Estimate) -> BoundaryRecord:
    metrics = boundary_metrics(found)
    if isinstance(found, Estimate):
        return BoundaryRecord(metrics=metrics)
    search = BoundarySearch(**{name: getattr(found, name) for name in BoundarySearch.model_fields})
    return BoundaryRecord(
        found=found.found, declared=found.declared, returns=found.returned, metrics=metrics, search=search
    )


LayerParts = tuple[LayerStatistics, Sequence[LayerStatistics], Sequence[LayerStatistics]]
"""Statistics of a layer: of all documents, of each half, and without each group."""


def measured_layers(
    statistics: Mapping[str, Sequence[LayerParts]], grams: Mapping[str, DirectionGram]
) -> list[LayerRecord]:
    """The layers' part of a record, by variant, before any phase map."""
    layers = len(next(iter(statistics.values())))
    return [
        LayerRecord(
            layer=layer,
            phase="",
            metrics={
                variant: layer_metrics(*own[layer]) | direction_metrics(grams[variant], layer)
                for variant, own in statistics.items()
            },
        )
        for layer in range(layers)
    ]


def assemble(
    spectra: Mapping[str, Sequence[LayerSpectra]], *, phases: PhaseMap | None = None, **parts: _Part
) -> tuple[Measurement, dict[str, np.ndarray]]:
    """The record of what a stream was reduced to, its directions at hand, and the arrays that are stored beside it.

    parts: the record's `model`, `calibration`, `sinks`, `certificate`, `provenance` and `law`. Nothing is computed for
    the phases here: `under` does that.
    """
    arrays: dict[str, np.ndarray] = {}
    for variant, layers in spectra.items():
        arrays |= direction_arrays(variant, layers)
        arrays[f"{variant}.eigenvalues"] = np.stack([own.statistics.eigenvalues for own in layers])
    statistics = {
        variant: [(own.statistics, own.halves or (), own.replicates) for own in layers]
        for variant, layers in spectra.items()
    }
    grams = {variant: direction_gram(arrays, variant) for variant in spectra}
    fields: dict[str, Any] = {
        "schema_version": SCHEMA,
        "phases": dict(phases or {}),
        "layers": tuple(measured_layers(statistics, grams)),
        "scopes": {},
        **plot_sections(grams, {variant: [own.statistics for own in layers] for variant, layers in spectra.items()}),
    }
    return Measurement(**fields, **parts).with_directions(grams), arrays


_PRODUCTS = ("whole", "aa", "ab", "bb")


def direction_gram(arrays: Mapping[str, np.ndarray], variant: str) -> DirectionGram:
    """From stored arrays: `<variant>.directions`; where there are halves `.directions_a` and `_b`; where there are
    groups of documents the inner products without each, `.replicates_whole` and `_aa`, `_ab`, `_bb`; and `.random`.
    """
    a, b = arrays.get(f"{variant}.directions_a"), arrays.get(f"{variant}.directions_b")
    whole = DirectionGram.of(arrays[f"{variant}.directions"], None if a is None or b is None else (a, b))
    products = [arrays.get(f"{variant}.replicates_{name}") for name in _PRODUCTS]
    replicates = (
        tuple(
            DirectionGram(whole.hidden, *(own.astype(np.float64) for own in rest))
            for rest in zip(*(product for product in products if product is not None), strict=True)
        )
        if all(product is not None for product in products)
        else ()
    )
    return replace(whole, replicates=replicates, random=arrays.get(f"{variant}.random"))


def direction_arrays(variant: str, layers: Sequence[LayerSpectra]) -> dict[str, np.ndarray]:
    """What is stored of the directions of all layers, in float32: the arrays that `direction_gram` reads.

    Kept and compared in float32, so that the cache gives back exactly what was measured.
    """
    # In numpy: torch's threads, still spinning from the reduction, took as long as the work on a machine of many cores.
    random = np.stack([own.random.numpy() for own in layers], axis=1)
    out = {
        "directions": np.stack([own.directions.numpy() for own in layers]),
        "random": random @ random.transpose(0, 2, 1),
    }
    halves = [own.half_directions for own in layers if own.half_directions is not None]
    if len(halves) == len(layers):
        out["directions_a"], out["directions_b"] = (
            np.stack([own.numpy() for own in half]) for half in zip(*halves, strict=True)
        )
    without = [own.replicate_directions for own in layers if own.replicate_directions is not None]
    half_without = [own.replicate_half_directions for own in layers if own.replicate_half_directions is not None]
    if len(without) == len(half_without) == len(halves) == len(layers):
        replicates = []
        for group in range(len(without[0])):
            sides = [out["directions_a"], out["directions_b"]]
            sides[group % 2] = np.stack([own[group].numpy() for own in half_without])
            whole = np.stack([own[group].numpy() for own in without])
            replicates.append(DirectionGram.of(whole, (sides[0], sides[1])))
        for name in _PRODUCTS:
            out[f"replicates_{name}"] = np.stack([getattr(own, name) for own in replicates])
    return {f"{variant}.{name}": array.astype(np.float32) for name, array in out.items()}


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Raises RecordError where the file is damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RecordError(f"{path} is not a readable safetensors file: {error}. Measure again with --fresh.") from None


def arrays_bytes(arrays: Mapping[str, np.ndarray]) -> bytes:
    """As a safetensors file holds them. Written from here, a full disk is an OSError as for any other file."""
    from safetensors.numpy import save

    content: bytes = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
    return content


def metric_versions() -> dict[str, int]:
    """What a cache entry or a baseline must agree on to be comparable."""
    return {name: metric.version for name, metric in METRICS.items()}


def write_atomically(path: Path, text: str) -> None:
    """The whole file or nothing, also when two processes write it at once.

    Raises RecordError where the folder cannot be written.
    """
    write_together({path: text.encode()})


def write_together(content: Mapping[Path, bytes]) -> None:
    """Files that belong together: each is whole or as it was, and a full disk leaves all as they were.

    Raises RecordError that names the file that cannot be written.
    """
    import tempfile

    temporary: dict[Path, Path] = {}
    path = Path()
    try:
        for path, own in content.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary[path] = Path(file.name)
                file.write(own)
            temporary[path].chmod(0o644)
        for path, whole in temporary.items():  # all have had room: only now is one put in its place
            os.replace(whole, path)  # noqa: PTH105  (atomic on one file system)
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror}. Choose another folder or free space.") from None
    finally:
        for left in temporary.values():
            left.unlink(missing_ok=True)
