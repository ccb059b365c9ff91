"""The content of the leaderboard: the records that count, grouped by what may be compared, and judged."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar
from urllib.parse import quote

from delta_suite.claims.judge import judge_all
from delta_suite.claims.schema import Hypothesis
from delta_suite.errors import OptionError, RecordError
from delta_suite.escaping import is_web_address
from delta_suite.models.spec import control_source, natural_key
from delta_suite.paths import shorten
from delta_suite.publish.entries import Entry
from delta_suite.publish.labels import labels_of
from delta_suite.publish.recomputed import SecondMeasurements
from delta_suite.publish.rows import Row
from delta_suite.publish.trajectory import PhaseFigures
from delta_suite.publish.verdict_tables import chance_text
from delta_suite.records.cache import Cache, cache_root
from delta_suite.records.record import CalibrationRecord, Identity, Record
from delta_suite.records.store import JudgedBy, load_once_verified, record_paths, stamps
from delta_suite.reduction.variants import WRITE_VARIANTS

_Words = ParamSpec("_Words")
_Formed = TypeVar("_Formed")

GROUPING_SETTINGS = ("max_tokens", "top_k", "drop_first_token")
"""Settings of a measurement that change what its numbers mean, beside the calibration and the metrics' versions."""


@dataclass(frozen=True)
class Run:
    """The checkpoints of one training run that may stand in one table, in the order of their steps; two at least."""

    name: str
    """The models' names, with * for the step."""
    dtype: str
    entries: Mapping[int, Entry]
    """By step."""

    @property
    def rows(self) -> list[Row]:
        """Return the rows of all checkpoints."""
        return [row for entry in self.entries.values() for row in entry.rows]

    @property
    def steps(self) -> dict[int, str]:
        """Return the model names by step."""
        return {step: entry.model for step, entry in self.entries.items()}

    def figures(self) -> dict[int, PhaseFigures]:
        """Return the figures of each checkpoint's phases by step, from one record after the other."""
        return {step: PhaseFigures(entry.view) for step, entry in self.entries.items()}


@dataclass(frozen=True)
class Group:
    """Entries whose numbers may stand in one table: one calibration, one set of metric versions, one schema."""

    calibration: CalibrationRecord
    metrics: str
    """Eight hex digits for the set of metrics and their versions, and the settings that count."""
    metric_versions: dict[str, int]
    settings: dict[str, Any]
    schema: int
    entries: tuple[Entry, ...]

    @property
    def id(self) -> str:
        """Return a short name that is unique among the groups."""
        return f"{self.calibration.sha256[:8]}-{self.metrics}-{self.schema}"

    @property
    def title(self) -> str:
        """Return the heading of the table."""
        return f"Calibration {self.calibration.name}, metric set {self.metrics}"

    @cached_property
    def described(self) -> str:
        """Return what all entries of the table share, and what they do not."""
        documents = self.calibration.documents
        versions = sorted(set(self.metric_versions.values()))
        suites = sorted({entry.head.provenance.suite for entry in self.entries})
        settings = ", ".join(f"{name} {value}" for name, value in self.settings.items())
        return (
            f"{documents} document{'s' if documents != 1 else ''}, SHA-256 {self.calibration.sha256[:12]}; "
            f"{len(self.metric_versions)} metrics of version {', '.join(map(str, versions))}; {settings}; "
            f"record schema {self.schema}; delta-suite {' and '.join(suites)}. "
            f"{chance_text([row for entry in self.entries for row in entry.rows])}"
        ).rstrip()

    @property
    def changed(self) -> tuple[str, ...]:
        """Return how hypothesis files have changed since they last judged the entries, one line a model and file."""
        return tuple(
            f"{self.label(entry)}: {name}, {how}" for entry in self.entries for name, how in entry.changed.items()
        )

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """Return the training runs among the entries. Where two models are one step, it is not known which is of it."""
        runs: dict[tuple[str, str], dict[int, list[Entry]]] = {}
        for entry in self.entries:
            if entry.head.model.series is not None:
                name, step = entry.head.model.series
                runs.setdefault((name, entry.dtype), {}).setdefault(step, []).append(entry)
        return tuple(
            Run(name, dtype, {step: entries[0] for step, entries in sorted(steps.items())})
            for (name, dtype), steps in sorted(runs.items())
            if len(steps) > 1 and all(len(entries) == 1 for entries in steps.values())
        )

    def label(self, entry: Entry) -> str:
        """Return the model's name, with the dtype where the table has it in several."""
        return f"{entry.model} ({entry.dtype})" if self._counts[entry.model] > 1 else entry.model

    @cached_property
    def _counts(self) -> Counter[str]:
        return Counter(entry.model for entry in self.entries)


@dataclass(frozen=True)
class Superseded:
    """A record that a newer one of the same model, calibration, dtype and versions replaces.

    Models are the same if source, revision and fingerprint are.
    """

    record: str
    model: str
    created: str
    by: str


@dataclass(frozen=True)
class Broken:
    """A file among the records that cannot be used, and why, in one line."""

    record: str
    why: str


def _once(form: Callable[Concatenate[Board, _Words], _Formed]) -> Callable[Concatenate[Board, _Words], _Formed]:
    """Form each link and place of a board once: it stands in many cells."""

    def formed(board: Board, /, *words: _Words.args, **named: _Words.kwargs) -> _Formed:
        known: dict[object, _Formed] = board.__dict__.setdefault(f"_{form.__name__}", {})
        if words not in known:
            known[words] = form(board, *words, **named)
        return known[words]

    return formed


@dataclass(frozen=True)
class Board:
    """Everything that is published, before it has a form."""

    results: Path
    repository: str | None
    hypotheses: tuple[Hypothesis, ...]
    groups: tuple[Group, ...]
    superseded: tuple[Superseded, ...]
    broken: tuple[Broken, ...]

    @cached_property
    def root(self) -> Path:
        """Return the folder that published paths are relative to: the one that holds the results folder."""
        return _absolute(self.results).parent

    @_once
    def claim_place(self, where: str) -> str:
        """Return a claim's place as `hypotheses/phase_c.toml:14`, whatever the folder that the command ran in."""
        file, _, line = where.rpartition(":")
        path = _absolute(Path(file))
        shown = path.relative_to(self.root) if path.is_relative_to(self.root) else Path(path.parent.name, path.name)
        return f"{shown.as_posix()}:{line}"

    @_once
    def claim_link(self, where: str, folder: str) -> str | None:
        """Return the link to a claim's file and line, from a page in this folder of the results.

        It is None for a file that lies outside the folder that holds the results: no link to it works elsewhere.
        """
        file, _, line = where.rpartition(":")
        path = _absolute(Path(file))
        if not path.is_relative_to(self.root):
            return None
        return f"{self._link(path, folder)}#L{line}"

    @_once
    def record_link(self, record: str, folder: str) -> str:
        """Return the link to the raw record, from a page in this folder of the results."""
        return self._link(_absolute(self.results) / record, folder)

    def _link(self, path: Path, folder: str) -> str:
        if self.repository is not None:
            return f"{self.repository.rstrip('/')}/{quote(path.relative_to(self.root).as_posix())}"
        return quote(Path(os.path.relpath(path, _absolute(self.results) / folder)).as_posix())

    @cached_property
    def runs(self) -> dict[str, list[tuple[Group, Run]]]:
        """Return all training runs, by name."""
        by_name: dict[str, list[tuple[Group, Run]]] = {}
        for group in self.groups:
            for run in group.runs:
                by_name.setdefault(run.name, []).append((group, run))
        return dict(sorted(by_name.items()))

    @cached_property
    def models(self) -> dict[str, list[tuple[Group, Entry]]]:
        """Return all entries, by model."""
        by_name: dict[str, list[tuple[Group, Entry]]] = {}
        for group in self.groups:
            for entry in group.entries:
                by_name.setdefault(entry.model, []).append((group, entry))
        return dict(sorted(by_name.items()))


def build(
    results: Path,
    hypotheses: Sequence[Hypothesis],
    repository: str | None = None,
    records: Sequence[Path] | None = None,
) -> Board:
    """Read and judge every record under `results/runs/`, or else these, each under the phases it was recorded with.

    The newest record of a model, calibration, dtype and set of metric versions counts. Nothing but the records and the
    hypotheses is read: no model, no clock, and of the cache only which records were found right before.

    Raises:
        OptionError: the repository is no http(s) address.
        RecordError: there is no folder of records.
    """
    if repository is not None and not is_web_address(repository):
        raise OptionError(
            f"--repository {shorten(repository)} is no address that links can begin with: give one such as "
            "https://github.com/me/it/blob/main, without a user, a password, spaces or brackets."
        )
    view_of = partial(load_once_verified, cache=_cache())
    read: list[_Stored] = []  # without figures, or thousands of records would not fit into memory
    broken: list[Broken] = []
    root = _absolute(results)
    for path in record_paths(results) if records is None else records:
        place = _absolute(path)
        record = place.relative_to(root).as_posix() if place.is_relative_to(root) else path.name
        try:
            read.append(_Stored(path, record, _head(view_of(path).record)))
        except RecordError as error:
            broken.append(Broken(record, " ".join(str(error).replace(str(path), record).split())))
    labels = labels_of(stored.head.model for stored in read)
    newest, superseded = _newest(read, labels)
    by_source: dict[tuple[object, ...], list[_Stored]] = {}
    for stored in sorted(newest.values(), key=lambda stored: stored.created, reverse=True):
        by_source.setdefault((*_comparable(stored.head), stored.head.model.source), []).append(stored)
    second = SecondMeasurements(((stored.path, stored.head) for stored in sorted(read, key=_age)), view_of)
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for stored in newest.values():
        model = stored.head.model
        candidates = by_source.get((*_comparable(stored.head), control_source(model.source)), ())
        control = next((other for other in candidates if other.head.model.is_control_of(model)), None)
        judged = judge_all(hypotheses, [(view_of(stored.path), None if control is None else view_of(control.path))])
        label = labels[model.name, model.identity]
        rows = tuple(replace(Row.of(each, stored.record), model=label) for each in judged)
        entry = Entry(
            stored.head,
            stored.record,
            rows,
            partial(view_of, stored.path),
            _stamps(stored.path),
            label,
            second.recomputed_by(stored.path, stored.head),
        )
        groups.setdefault(_group_key(stored.head), []).append(entry)
    return Board(
        results,
        repository,
        tuple(hypotheses),
        tuple(_group(entries) for _, entries in sorted(groups.items())),
        tuple(sorted(superseded, key=lambda item: item.record)),
        tuple(broken),
    )


def _cache() -> Cache:
    """Return the cache; one that remembers nothing where there can be none."""
    try:
        return Cache(cache_root())
    except RecordError:
        return Cache(Path(os.devnull))


class _Stored(NamedTuple):
    """One record that was read."""

    path: Path
    record: str
    """Path relative to the results folder."""
    head: Record

    @property
    def created(self) -> str:
        return self.head.provenance.created


def _age(stored: _Stored) -> tuple[str, bool, str]:
    """Return what records are put in order by, the oldest first; a submitted copy comes after its measurement."""
    return stored.created, stored.head.submitter is not None, stored.record


_Key = tuple[tuple[str, ...], str, str, Identity]
"""A table's key, the model's name, the dtype and the model's identity. Of records of one key, the newest counts."""


def _comparable(record: Record) -> tuple[object, ...]:
    """Return what a model and its control must have in common."""
    return _group_key(record), record.provenance.dtype


def _newest(
    read: Iterable[_Stored], labels: Mapping[tuple[str, Identity], str]
) -> tuple[dict[_Key, _Stored], list[Superseded]]:
    """Return the records that count, and those that they replace."""
    by_key: dict[_Key, list[_Stored]] = {}
    for stored in read:
        model, dtype = stored.head.model, stored.head.provenance.dtype
        by_key.setdefault((_group_key(stored.head), model.name, dtype, model.identity), []).append(stored)
    newest: dict[_Key, _Stored] = {}
    superseded: list[Superseded] = []
    for key, candidates in sorted(by_key.items()):
        # A folder's name can hold another stamp than the record, so the record's time decides, and then its name.
        *older, newest[key] = sorted(candidates, key=_age)
        replaced_by = newest[key].record
        label = labels[key[1], key[3]]
        superseded += [Superseded(old.record, label, old.created, replaced_by) for old in older]
    return newest, superseded


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path))  # noqa: PTH100  (a link stays the path that was given)


def _stamps(path: Path) -> Mapping[str, JudgedBy]:
    """Return what last judged a record; nothing where that file is damaged, as it is written anew."""
    try:
        return stamps(path)
    except RecordError:
        return {}


def _head(record: Record) -> Record:
    """Return a record without its figures."""
    return record.model_copy(update={"layers": (), "scopes": {}, "boundaries": {}})


def _reading(record: Record) -> tuple[str, dict[str, Any]]:
    """Return a short hash of what makes figures comparable beside the calibration, and the settings in it."""
    provenance = record.provenance
    settings = {name: provenance.settings.get(name) for name in GROUPING_SETTINGS}
    calibration = record.calibration
    if calibration.begins_with is not None:  # absent in older records
        settings["begins_with_special_token"] = bool(calibration.begins_with)
        settings["chat_template"] = bool(calibration.chat_template)
    variants = {name: version for name, version in record.variants.items() if name not in WRITE_VARIANTS}
    text = json.dumps([provenance.metric_versions, variants, settings], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8], settings


def _group_key(record: Record) -> tuple[str, ...]:
    calibration = record.calibration
    return (calibration.name, calibration.sha256, _reading(record)[0], str(record.schema_version))


def _group(entries: Iterable[Entry]) -> Group:
    ordered = tuple(sorted(entries, key=lambda entry: (natural_key(entry.model), entry.dtype)))
    record = ordered[0].head
    metrics, settings = _reading(record)
    versions = record.provenance.metric_versions
    return Group(record.calibration, metrics, versions, settings, record.schema_version, ordered)
