"""Decide what may stand in one table: groups of entries that were measured alike, and the training runs among them.

Figures are compared only where all of these are equal: the calibration and its texts, the versions of the metrics and
variants that the pages show, the settings that change a number's meaning, the dtype, the quantisation of the weights,
the special token in front of a document, and the chat template.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from delta_suite.claims.schema import Hypothesis
from delta_suite.metrics.registry import METRICS
from delta_suite.models.spec import natural_key
from delta_suite.publish.depth_profile import SHOWN
from delta_suite.publish.entries import Entry
from delta_suite.publish.model_tables import PHASE_COLUMNS
from delta_suite.publish.rows import Row
from delta_suite.publish.trajectory import PhaseFigures
from delta_suite.publish.verdict_tables import chance_text
from delta_suite.records.record import CalibrationRecord, ModelRecord, Record
from delta_suite.reduction.variants import BLOCK_VARIANTS

GROUPING_SETTINGS = ("max_tokens", "top_k", "drop_first_token")
"""Settings of a measurement that change what its numbers mean, beside the calibration and the metrics' versions."""

OF_GATES = ("reliability", "spectral_gap", "rounding_share")
"""Metrics that the gates of every claim read."""

_QUANTISATION = re.compile(r"[.-]((?:IQ|TQ|Q)\d\w*|MXFP4\w*)\.gguf$", re.IGNORECASE)
"""The quantisation in the name of a GGUF file, as llama.cpp's tools write it."""


@dataclass(frozen=True)
class Run:
    """The checkpoints of one training run that may stand in one table, in the order of their steps; two at least."""

    name: str
    """The models' names, with * for the step."""
    entries: Mapping[int, Entry]
    """By step."""

    @property
    def rows(self) -> list[Row]:
        """The rows of all checkpoints."""
        return [row for entry in self.entries.values() for row in entry.rows]

    @property
    def steps(self) -> dict[int, str]:
        """The model names by step."""
        return {step: entry.model for step, entry in self.entries.items()}

    @property
    def last(self) -> Entry:
        """The checkpoint of the last step."""
        return self.entries[max(self.entries)]

    def figures(self) -> dict[int, PhaseFigures]:
        """Return the figures of each checkpoint's phases by step, from one record after the other."""
        return {step: entry.phase_figures for step, entry in self.entries.items()}


@dataclass(frozen=True)
class Heading:
    """The words of a table that the page of one of its entries needs, without the other entries."""

    id: str
    title: str
    described: str
    runs: tuple[str, ...]
    """The training runs that the entry is a checkpoint of."""


@dataclass(frozen=True)
class Group:
    """Entries whose numbers may stand in one table, as they were measured alike."""

    calibration: CalibrationRecord
    metrics: str
    """Eight hex digits for the versions of the metrics and variants that are shown, and the settings that count."""
    metric_versions: dict[str, int]
    settings: dict[str, Any]
    schema: int
    precision: str
    """The dtype that the models were run in, and the quantisation of their weights where they have one."""
    entries: tuple[Entry, ...]

    @property
    def id(self) -> str:
        """A short name that is unique among the groups."""
        precision = re.sub(r"[^\w]+", "-", self.precision)
        return f"{self.calibration.sha256[:8]}-{self.metrics}-{self.schema}-{precision}"

    @property
    def title(self) -> str:
        """The heading of the table."""
        return f"Calibration {self.calibration.name}, {self.precision}, metric set {self.metrics}"

    @property
    def facts(self) -> dict[str, str]:
        """The settings that the figures of all entries share, by name. Groups differ in at least one of them."""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.metric_versions.items()))
        return {
            "calibration": f"{self.calibration.name}, {self._texts}",
            "precision": self.precision,
            "metrics": f"set {self.metrics}: {versions}",
            **{name.replace("_", " "): str(value) for name, value in self.settings.items()},
            "record schema": str(self.schema),
        }

    @cached_property
    def described(self) -> str:
        """A sentence on what all entries of the table share, and what they do not."""
        versions = sorted(set(self.metric_versions.values()))
        suites = sorted({entry.head.provenance.suite for entry in self.entries})
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{self._texts}; {self.precision}; {len(self.metric_versions)} metrics shown, of version "
            f"{', '.join(map(str, versions))}; {settings}; "
            f"record schema {self.schema}; delta-suite {' and '.join(suites)}. "
            f"{chance_text([row for entry in self.entries for row in entry.rows])}"
        ).rstrip()

    def heading(self, entry: Entry) -> Heading:
        """Return what the page of an entry says of this table."""
        return Heading(self.id, self.title, self.described, self._runs_of.get(entry.record, ()))

    @cached_property
    def _runs_of(self) -> dict[str, tuple[str, ...]]:
        names: dict[str, tuple[str, ...]] = {}
        for run in self.runs:
            for entry in run.entries.values():
                names[entry.record] = (*names.get(entry.record, ()), run.name)
        return names

    @property
    def _texts(self) -> str:
        documents = self.calibration.documents
        return f"{documents} document{'s' if documents != 1 else ''}, SHA-256 {self.calibration.sha256[:12]}"

    @property
    def changed(self) -> tuple[str, ...]:
        """How hypothesis files have changed since they last judged the entries, one line a model and file."""
        return tuple(f"{entry.model}: {name}, {how}" for entry in self.entries for name, how in entry.changed.items())

    @property
    def row_count(self) -> int:
        """The number of models and training runs."""
        return len(self.entries) - sum(len(run.entries) - 1 for run in self.runs)

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """The training runs among the entries. Where two models are one step, it is not known which is of it."""
        runs: dict[str, dict[int, list[Entry]]] = {}
        for entry in self.entries:
            if entry.head.model.series is not None:
                name, step = entry.head.model.series
                runs.setdefault(name, {}).setdefault(step, []).append(entry)
        return tuple(
            Run(name, {step: entries[0] for step, entries in sorted(steps.items())})
            for name, steps in sorted(runs.items())
            if len(steps) > 1 and all(len(entries) == 1 for entries in steps.values())
        )


def quantisation(model: ModelRecord) -> str | None:
    """Return the quantisation of a model's weights as the name of its GGUF file says it; None where it says none.

    A control has random weights in the same form, and is compared with the model that it is the control of.

    Example:
        >>> of = lambda source: ModelRecord(
        ...     name="m", source=source, fingerprint="", architecture="", layers=1, hidden=1
        ... )
        >>> quantisation(of("package:it/Model.Q4_1.gguf")), quantisation(of("hub:org/name"))
        ('Q4_1', None)
    """
    written = _QUANTISATION.search(model.source)
    return written[1].upper() if written else None


def precision(record: Record) -> str:
    """Return the dtype that a model was run in, and the quantisation of its weights where it has one."""
    written = quantisation(record.model)
    return record.provenance.dtype + (f" from {written}" if written else "")


class Alike:
    """Decides which records may stand in one table, by the hypotheses that judge them."""

    def __init__(self, hypotheses: Iterable[Hypothesis]) -> None:
        """Take the metrics that the claims name, those that gates read, and those of profiles and tables of phases."""
        named = (metric for each in hypotheses for claim in each.expect for metric in claim.metrics)
        self.metrics = tuple(sorted({*named, *OF_GATES, *SHOWN, *PHASE_COLUMNS}))

    def versions(self, record: Record) -> dict[str, int]:
        """Return the versions of the metrics that are shown.

        A metric that a record is too old for has no figure there, so that it cannot be compared wrongly, and counts as
        today's: a new metric splits no table.
        """
        known = record.provenance.metric_versions
        return {name: known.get(name, METRICS[name].version) for name in self.metrics}

    def reading(self, record: Record) -> tuple[str, dict[str, Any]]:
        """Return a short hash of what makes figures comparable beside calibration and dtype, and its settings."""
        settings = {name: record.provenance.settings.get(name) for name in GROUPING_SETTINGS}
        calibration = record.calibration
        if calibration.begins_with is not None:  # absent in older records
            settings["begins_with_special_token"] = bool(calibration.begins_with)
            settings["chat_template"] = bool(calibration.chat_template)
        variants = {name: record.variants.get(name, each.version) for name, each in BLOCK_VARIANTS.items()}
        text = json.dumps([self.versions(record), variants, settings], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:8], settings

    def key(self, record: Record) -> tuple[str, ...]:
        """Return what is equal for two records exactly where they may stand in one table."""
        calibration = record.calibration
        written = self.reading(record)[0]
        return (calibration.name, calibration.sha256, written, str(record.schema_version), precision(record))

    def group(self, entries: Iterable[Entry]) -> Group:
        """Return the table of entries of one key, in the order of their names."""
        ordered = tuple(sorted(entries, key=lambda entry: natural_key(entry.model)))
        record = ordered[0].head
        metrics, settings = self.reading(record)
        return Group(
            record.calibration,
            metrics,
            self.versions(record),
            settings,
            record.schema_version,
            precision(record),
            ordered,
        )
