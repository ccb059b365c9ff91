"""The content of the leaderboard: the records that count, grouped by what may be compared, and judged."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Concatenate, ParamSpec, TypeVar
from urllib.parse import quote

from delta_suite.claims.schema import Hypothesis
from delta_suite.errors import OptionError, RecordError
from delta_suite.escaping import is_web_address
from delta_suite.models.spec import RANDOM_WEIGHTS, control_source
from delta_suite.paths import shorten
from delta_suite.pool import HERE, Pool
from delta_suite.publish.comparable import Alike, Group, Run
from delta_suite.publish.entries import Entry
from delta_suite.publish.labels import labels_of
from delta_suite.publish.pages import RECORDS, SITE, hypothesis_link
from delta_suite.publish.prepared import (
    Case,
    Place,
    Stored,
    cache,
    digest_of,
    drawn,
    judged_rows,
    phase_figures,
    read_view,
    stored_or_why,
)
from delta_suite.publish.recomputed import SecondMeasurements
from delta_suite.records.record import Identity
from delta_suite.records.store import JudgedBy, record_paths, stamps

_Words = ParamSpec("_Words")
_Formed = TypeVar("_Formed")


@dataclass(frozen=True)
class Superseded:
    """A record that a newer one of the same model and table replaces.

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
    """Form each link and place of a board once: many cells have it."""

    def formed(board: Board, /, *words: _Words.args, **named: _Words.kwargs) -> _Formed:
        known: dict[object, _Formed] = board.__dict__.setdefault(f"_{form.__name__}", {})
        if words not in known:
            known[words] = form(board, *words, **named)
        return known[words]

    return formed


@dataclass(frozen=True)
class Board:
    """Everything that is published, before it is rendered."""

    results: Path
    repository: str | None
    hypotheses: tuple[Hypothesis, ...]
    groups: tuple[Group, ...]
    superseded: tuple[Superseded, ...]
    broken: tuple[Broken, ...]
    with_records: bool = False
    """True where the records are published in the site's folder, too."""
    url: str | None = None
    """The address that the site will have, for the pictures that others show of a link to it."""

    @cached_property
    def root(self) -> Path:
        """The folder that published paths are relative to: the one that holds the results folder."""
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

        The site has a page of each file. Elsewhere the link leads to the file itself; it is None for one that lies
        outside the folder that holds the results: no link to it works elsewhere.
        """
        file, _, line = where.rpartition(":")
        if _in_site(folder) and file in self._pages:
            return f"{_up(folder)}{hypothesis_link(self._pages[file])}#L{line}"
        path = _absolute(Path(file))
        if not path.is_relative_to(self.root):
            return None
        return f"{self._link(path, folder)}#L{line}"

    @cached_property
    def _pages(self) -> dict[str, str]:
        return {str(hypothesis.path): hypothesis.id for hypothesis in self.hypotheses}

    def file_link(self, path: Path) -> str | None:
        """Return the link to a file of the repository from a page of the site; None where no repository is named."""
        where = _absolute(path)
        return self._link(where, SITE) if self.repository is not None and where.is_relative_to(self.root) else None

    @_once
    def record_link(self, record: str, folder: str) -> str | None:
        """Return the link to the raw record, from a page in this folder of the results.

        A page of the site has one only where the records are in the site, too, or a repository is named: the site's
        folder alone would not have the file.
        """
        if _in_site(folder) and self.with_records:
            return f"{_up(folder)}{RECORDS}/{quote(record.removeprefix('runs/'))}"
        if _in_site(folder) and self.repository is None:
            return None
        return self._link(_absolute(self.results) / record, folder)

    def _link(self, path: Path, folder: str) -> str:
        if self.repository is not None:
            return f"{self.repository.rstrip('/')}/{quote(path.relative_to(self.root).as_posix())}"
        return quote(Path(os.path.relpath(path, _absolute(self.results) / folder)).as_posix())

    @property
    def largest_first(self) -> list[Group]:
        """The tables in the order of the pages: those of most models and training runs first."""
        return sorted(self.groups, key=lambda group: group.row_count, reverse=True)

    @cached_property
    def runs(self) -> dict[str, list[tuple[Group, Run]]]:
        """All training runs, by name."""
        by_name: dict[str, list[tuple[Group, Run]]] = {}
        for group in self.groups:
            for run in group.runs:
                by_name.setdefault(run.name, []).append((group, run))
        return dict(sorted(by_name.items()))

    @cached_property
    def models(self) -> dict[str, list[tuple[Group, Entry]]]:
        """All entries, by model."""
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
    *,
    with_records: bool = False,
    url: str | None = None,
    pool: Pool = HERE,
) -> Board:
    """Read and judge every record under `results/runs/`, or else these, each under the phases it was recorded with.

    The newest record of a model counts in each table. Nothing but the records and the hypotheses is read: no model, no
    clock, and of the cache only which records were found right before, and what was formed of the same ones.

    Raises:
        OptionError: the repository is no http(s) address.
        RecordError: there is no folder of records.
    """
    for option, address in (("--repository", repository), ("--url", url)):
        if address is not None and not is_web_address(address):
            raise OptionError(
                f"{option} {shorten(address)} is no address that links can begin with: give one such as "
                "https://github.com/me/it/blob/main, without a user, a password, spaces or brackets."
            )
    root = _absolute(results)
    places = _places(record_paths(results) if records is None else records, root)
    cache().sweep_formed()
    digest = digest_of(hypotheses)
    outcomes = list(pool.map(partial(stored_or_why, hypotheses=hypotheses, digest=digest), places))
    read = [each for each in outcomes if isinstance(each, Stored)]
    broken = [Broken(place.record, why) for place, why in zip(places, outcomes, strict=True) if isinstance(why, str)]
    labels = labels_of(stored.head.model for stored in read)
    alike = Alike(hypotheses)
    tables = {stored.path: alike.key(stored.head) for stored in read}
    newest, superseded = _newest(read, labels, tables)
    by_source: dict[tuple[object, ...], list[Stored]] = {}
    for stored in sorted(newest.values(), key=lambda stored: stored.created, reverse=True):
        by_source.setdefault((*tables[stored.path], stored.head.model.source), []).append(stored)
    cases = []
    for stored in newest.values():
        model = stored.head.model
        candidates = by_source.get((*tables[stored.path], control_source(model.source)), ())
        control = next((other for other in candidates if other.head.model.is_control_of(model)), None)
        cases.append(Case(stored, control, labels[model.name, model.identity]))
    judge = partial(judged_rows, hypotheses=hypotheses, digest=digest)
    second = SecondMeasurements(((stored.path, stored.head) for stored in sorted(read, key=_age)), read_view)
    groups: dict[tuple[str, ...], list[Entry]] = {}
    for (stored, _, label), rows in zip(cases, pool.map(judge, cases), strict=True):
        entry = Entry(
            stored.head,
            stored.record,
            rows,
            partial(read_view, stored.path),
            _stamps(stored.path),
            label,
            stored.profile,
            second.recomputed_by(stored.path, stored.head),
            partial(drawn, stored),
            partial(phase_figures, stored),
        )
        groups.setdefault(tables[stored.path], []).append(entry)
    return Board(
        results,
        repository,
        tuple(hypotheses),
        tuple(alike.group(entries) for _, entries in sorted(groups.items())),
        tuple(sorted(superseded, key=lambda item: item.record)),
        tuple(broken),
        with_records,
        url,
    )


def _places(paths: Sequence[Path], root: Path) -> list[Place]:
    """Return the places of records, and which of them are likely to be judged without a control."""
    newest = {path.parent: path for path in sorted(paths)}  # names begin with the time of the measurement

    def alone(path: Path) -> bool:
        control = path.parent.with_name(f"{path.parent.name}@{RANDOM_WEIGHTS}")
        return newest[path.parent] == path and control not in newest

    return [Place(path, _relative(path, root), alone(path)) for path in paths]


def _in_site(folder: str) -> bool:
    return folder.split("/", maxsplit=1)[0] == SITE


def _up(folder: str) -> str:
    """Return the way from a page in this folder of the results to the site's folder."""
    return "../" * folder.count("/")


def _relative(path: Path, root: Path) -> str:
    """Return the path of a record relative to the results folder, or its name where it lies elsewhere."""
    place = _absolute(path)
    return place.relative_to(root).as_posix() if place.is_relative_to(root) else path.name


def _age(stored: Stored) -> tuple[str, bool, str]:
    """Return what records are put in order by, the oldest first; a submitted copy comes after its measurement."""
    return stored.created, stored.head.submitter is not None, stored.record


_Key = tuple[tuple[str, ...], str, Identity]
"""A table's key, the model's name and its identity. Of records of one key, the newest counts."""


def _newest(
    read: Iterable[Stored], labels: Mapping[tuple[str, Identity], str], tables: Mapping[Path, tuple[str, ...]]
) -> tuple[dict[_Key, Stored], list[Superseded]]:
    """Return the records that count, and those that they replace."""
    by_key: dict[_Key, list[Stored]] = {}
    for stored in read:
        model = stored.head.model
        by_key.setdefault((tables[stored.path], model.name, model.identity), []).append(stored)
    newest: dict[_Key, Stored] = {}
    superseded: list[Superseded] = []
    for key, candidates in sorted(by_key.items()):
        # A folder's name can hold another stamp than the record, so the record's time decides, and then its name.
        *older, newest[key] = sorted(candidates, key=_age)
        replaced_by = newest[key].record
        label = labels[key[1], key[2]]
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
