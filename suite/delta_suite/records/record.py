"""The record: everything that was measured of one model under one calibration, and where it came from. Data alone.

`format` reads and writes it, `view` computes from it, `arrays` lie beside it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from delta_suite.capture.units import Unit
from delta_suite.metrics.estimate import Estimate
from delta_suite.models.phases import PhaseMap
from delta_suite.models.spec import MEMORY, control_source, series_of

SCHEMA = 3
"""Version of the record's shape. Records of schema 2 are read, too."""

Metrics = dict[str, dict[str, Estimate]]
"""variant -> metric -> estimate"""

Identity = tuple[str, str, str]
"""Source, revision ("" without one) and fingerprint of a model."""


class RecordPart(BaseModel):
    """A part of a record: frozen, and open to keys that a later version adds."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False, populate_by_name=True)

    @model_serializer(mode="wrap")
    def _without_absent(self, handler: Any) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if value is not None}


class ModelRecord(RecordPart):
    """Which model was measured."""

    name: str
    source: str
    """The origin of the weights: `hub:...`, `package:...`, `directory:...`; `random-weights, ...` for a control."""
    revision: str | None = None
    """The hub commit, where there is one."""
    fingerprint: str
    """SHA-256 over weights, config and tokenizer files; for a control over config, tokenizer and seed."""
    architecture: str
    layers: int
    hidden: int

    @property
    def identity(self) -> Identity:
        """Source, revision and fingerprint, which are equal for equal models; the name is a label."""
        return self.source, self.revision or "", self.fingerprint

    def is_control_of(self, model: ModelRecord) -> bool:
        """Return True for the same architecture, from the same place, with random weights."""
        shapes = [(each.architecture, each.layers, each.hidden) for each in (self, model)]
        return self.source == control_source(model.source) and shapes[0] == shapes[1]

    @property
    def series(self) -> tuple[str, int] | None:
        """The training run and the step that this is a checkpoint of, or None: see `ModelSpec.series`."""
        kind, _, where = self.source.partition(":")
        if kind in {"hub", MEMORY}:
            return series_of(self.name, self.name.partition("@")[2])
        path = Path(where)
        return series_of(self.name, path.parent.name if path.suffix == ".gguf" else path.name)


class CalibrationRecord(RecordPart):
    """Which texts ran."""

    name: str
    sha256: str
    documents: int
    first: int | None = None
    """The number of documents asked for (`--documents`), the source's first ones; absent for all of them."""
    bytes_per_document: int | None = None
    """Documents were cut at so many bytes of UTF-8, as those of `core` are; absent for whole documents."""
    tokens_per_document: int | None = None
    """Only so many tokens of each document ran, as of an earlier `core`; no newer record has it."""
    tokens: int
    """Tokens that enter the metrics."""
    dropped: int
    """Tokens that ran through the model and were left out."""
    unknown_tokens: float | None = None
    """Share of `tokens` that stand for text that the tokenizer does not know, where it was counted; where that is more,
    the share of letters and digits that it deletes, or has no token for."""
    duplicates: int | None = None
    """Documents that were dropped because they repeat another, where they were counted."""
    begins_with: tuple[tuple[str, int], ...] | None = None
    """Special tokens, each with its id, that every document begins with, such as BOS; absent in older records."""
    ends_with: tuple[tuple[str, int], ...] | None = None
    """Special tokens that every document ends with; none where documents were cut."""
    domains: int | None = None
    """The number of domains that the calibration declares; absent where it declares none."""
    languages: dict[str, int] | None = None
    """The number of documents in each language, where they are declared."""
    chat_template: bool | None = None
    """True if each document was one message of a user in the model's own chat template."""


class ResamplingRecord(RecordPart):
    """The units that intervals are formed over."""

    unit: Unit = "document"
    units: int
    """The number of documents or domains."""
    groups: int
    """Groups of units that are left out in turn; the length of every array of replicates. 1 where there are none."""
    document_groups: int | None = None
    """Groups of documents that are left out in turn for the narrower question, where the unit is the domain."""
    assignment: str | None = None
    """SHA-256 of the group of each document. Replicates are paired only where it is the same; absent in older records,
    where document i is in group i modulo their number."""


class IdentityRecord(RecordPart):
    """One identity of the capture certificate, its largest error and what was allowed."""

    says: str
    error: float
    tolerance: float


class CertificateRecord(RecordPart):
    """The capture certificate. A record exists only where every identity held."""

    holds: Literal[True]
    blocks: int
    forward_passes: int
    final_norm: tuple[str, ...]
    identities: dict[str, IdentityRecord]


class SinkRecord(RecordPart):
    """The tokens that the variant `sink_free` leaves out."""

    position_zero: int
    """Tokens at position 0 of their sequence."""
    large_norm: int
    """Other tokens whose state exceeds `ratio` times the median norm in some layer."""
    ratio: float
    largest: tuple[tuple[int, int, int, float], ...]
    """(document, position, layer, norm over median) of the largest."""


class StreamRecord(RecordPart):
    """The memory that held the residual stream while it was analysed.

    The figures do not depend on it, and intervals over domains only by the number of their groups.
    """

    storage: Literal["device", "host", "disk"]
    """In the memory of the device; in pinned host memory beside a GPU; in a memory-mapped file."""
    shards: int
    """Several come one after the other, and are kept one at a time."""
    largest_bytes: int
    """Size of the largest shard."""
    planned_batch_tokens: int | None = None
    """Largest number of padded tokens of a batch, as planned from the model's shape and the kind of device."""
    batch_tokens: int | None = None
    """Largest number of them as run: less where memory ran out, and then figures may differ in the seventh digit."""

    @property
    def usual(self) -> bool:
        """True where all of it was on the device at once."""
        return self.storage == "device" and self.shards == 1


class Provenance(RecordPart):
    """How, when and with what the model was measured."""

    created: str
    """UTC, ISO 8601."""
    suite: str
    """Version of delta-suite."""
    git: dict[str, Any] | None = None
    """Commit and dirty flag of the suite's checkout, where it runs from one."""
    dtype: str
    attention: str
    device: str
    """`cpu`, `cuda`, `mps`."""
    hardware: str
    versions: dict[str, str]
    settings: dict[str, Any]
    metric_versions: dict[str, int]
    seconds: dict[str, float]
    """Wall time of each step."""
    peak_memory_bytes: dict[str, int]
    """Peak of the process, and of each GPU used."""
    stream: StreamRecord | None = None
    """Absent where no model was run, and in records older than this field."""
    zero_weights: tuple[str, ...] | None = None
    """Names of weight matrices that are zero, in whole or in many rows; absent where there are none."""
    cache_key: str


class LayerRecord(RecordPart):
    """One layer; pair metrics stand at the first of their two layers."""

    layer: int
    phase: str
    metrics: Metrics


class ScopeRecord(RecordPart):
    """One phase; `layers` are the first and the last, both included."""

    layers: tuple[int, int]
    metrics: Metrics


class LawRecord(RecordPart):
    """The phases that the update law was fitted over. Its metrics stand in `scopes`, under `sink_free`."""

    phases: PhaseMap


class CausesRecord(RecordPart):
    """The causes of the loss: how it changes when the updates of all layers of a phase are changed."""

    phases: PhaseMap
    """The phases that they were measured in."""
    conditions: tuple[str, ...] = ()
    """The conditions of the rows of `causal.nats`: `undisturbed`, `C.zero` and so on."""
    documents: int = 0
    """The number of documents whose loss was measured."""
    passes: float = 0.0
    """Passes through all blocks over these documents; one that leaves out the first half of them counts as a half."""
    matched: dict[str, float] = Field(default_factory=dict)
    """By phase, the least energy that the control of equal energy took away in a layer, over that of the v_L."""
    no_law: dict[str, str] = Field(default_factory=dict)
    """By phase, why the law was not put in place of the updates."""
    reason: str | None = None
    """Why nothing was measured although `causal` is a part, such as that the model has no head."""
    metrics: dict[str, dict[str, Estimate]]
    """By phase."""


class DamageRecord(RecordPart):
    """How the loss changes when a block is left out, or exchanged with a neighbour."""

    documents: int = 0
    """The number of documents whose loss was measured."""
    passes: float = 0.0
    """Passes through all blocks over these documents."""
    failed: dict[str, str] = Field(default_factory=dict)
    """By condition, such as `skip.3`, why the model does not run with it."""
    reason: str | None = None
    """Why nothing was measured although `damage` is a part."""
    layers: tuple[dict[str, Estimate], ...]
    """The metrics of each layer."""


class BoundarySearch(RecordPart):
    """How the boundaries were detected and ranked: fields of `metrics.segmentation.Boundaries`."""

    chosen: tuple[int, ...] | None = None
    declared_cost: float
    detected_cost: float
    total_cost: float
    orders: int
    others: int
    cost_rank_any_lengths: float
    chance_agreement: float
    draws: int


class BoundaryRecord(RecordPart):
    """The boundaries detected in the layers' similarity, beside the declared ones: first layers of segments."""

    detected: tuple[int, ...] = ()
    declared: tuple[int, ...] = ()
    recurrence: tuple[float, ...] | None = None
    """For each detected boundary, the share of the replicates that detect it again within one layer."""
    metrics: dict[str, Estimate]
    search: BoundarySearch | None = None
    """Absent where nothing could be searched for, and in records older than this field."""
    replicates: dict[str, tuple[float, ...]] | None = None
    """Each metric without each group of units, as many as the record has groups; absent without intervals."""


class ArrayReference(RecordPart):
    """The file of arrays beside a record."""

    file: str
    """Its name, in the record's folder."""
    sha256: str


class SubmitterRecord(RecordPart):
    """Who contributed a record, in their own words. Nothing proves it."""

    handle: str
    """Their name where the record was contributed, such as on GitHub."""
    hardware: str | None = None
    """The hardware, where they say more than `provenance.hardware`."""
    note: str | None = None
    """A line about the measurement."""


class Record(RecordPart):
    """One measured model under one calibration, with the phase map that it is shown under."""

    schema_version: Literal[2, 3] = Field(alias="schema")
    model: ModelRecord
    calibration: CalibrationRecord
    resampling: ResamplingRecord
    parts: tuple[str, ...]
    """The parts that were measured: spectra, boundaries, law, writes, stream, causal, damage."""
    variants: dict[str, int]
    """The version of each variant that was measured."""
    sinks: SinkRecord
    certificate: CertificateRecord
    provenance: Provenance
    phases: PhaseMap
    arrays: ArrayReference | None = None
    """Absent while a record has not been written."""
    submitter: SubmitterRecord | None = None
    """Who contributed the record, where somebody did: `submit` writes it into a copy of its own."""
    not_apart: str | None = None
    """Why attention and MLP are not measured apart although `writes` is a part: the model's blocks have not both."""
    law: LawRecord | None = None
    causes: CausesRecord | None = None
    damage: DamageRecord | None = None
    boundaries: dict[str, BoundaryRecord] = Field(default_factory=dict)
    """By variant."""
    scopes: dict[str, ScopeRecord]
    layers: tuple[LayerRecord, ...]
