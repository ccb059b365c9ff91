"""The parts of a leaderboard that follow from one record, each formed once: its head, plots, tables and verdicts.

They are kept in the cache, by the SHA-256 of the record and its arrays, of its control's and of the hypothesis files,
for this very code. Nothing in the results folder is believed for it: the record and the arrays are read and hashed each
time. Where there is no cache they are formed again. The functions run in any process.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pydantic import TypeAdapter

from delta_suite.claims.judge import judge_all
from delta_suite.claims.schema import Hypothesis
from delta_suite.errors import RecordError
from delta_suite.metrics.estimators import one_thread
from delta_suite.paths import cache_root
from delta_suite.publish.depth_profile import Profile
from delta_suite.publish.drawn import Drawn
from delta_suite.publish.rows import Row
from delta_suite.publish.trajectory import PhaseFigures
from delta_suite.records.cache import Cache
from delta_suite.records.record import Record
from delta_suite.records.store import Content, load_content
from delta_suite.records.view import RecordView

_PROFILE = TypeAdapter(Profile)


class Place(NamedTuple):
    """The path of a record, and what it is called: the path relative to the results folder."""

    path: Path
    record: str
    alone: bool = False
    """True where nothing beside it looks like its control or a newer record of it. Then it is judged as soon as it is
    read, and read once; if it turns out to have one, it is judged again."""


@dataclass(frozen=True)
class Stored:
    """One record that was read and found right, without its figures: thousands of them fit into memory."""

    place: Place
    sha256: str
    """SHA-256 of its place, content and arrays; empty where the arrays are gone, and nothing is kept."""
    head: Record
    profile: Profile

    @property
    def path(self) -> Path:
        """The path of the file."""
        return self.place.path

    @property
    def record(self) -> str:
        """The path relative to the results folder."""
        return self.place.record

    @property
    def created(self) -> str:
        """When it was measured."""
        return self.head.provenance.created


def stored_or_why(place: Place, hypotheses: Sequence[Hypothesis], digest: str) -> Stored | str:
    """Return a record without its figures, or in one line why it cannot be used. digest: as for `judged_rows`."""
    try:
        with one_thread():
            return _stored(place, hypotheses, digest)
    except RecordError as error:
        return " ".join(str(error).replace(str(place.path), place.record).split())


def _stored(place: Place, hypotheses: Sequence[Hypothesis], digest: str) -> Stored:
    content = Content.read(place.path)
    if (known := _kept_as(content.sha256, "head", _head_and_profile)) is not None:
        return Stored(place, content.sha256, *known)
    view = load_content(content, cache())
    head, profile = head_of(view.record), Profile.of(view)
    if not content.holds_all_of(view):
        return Stored(place, "", head, profile)
    stored = Stored(place, content.sha256, head, profile)
    formed: dict[str, Any] = {
        f"{stored.sha256}-head": {
            "head": head.model_dump(mode="json", by_alias=True),
            "profile": _PROFILE.dump_python(profile),
        },
        f"{stored.sha256}-drawn": Drawn.of(view).as_json(),
    }
    if head.model.series is not None:
        formed[f"{stored.sha256}-phases"] = PhaseFigures(view).as_json()
    if place.alone:
        rows = _judged(hypotheses, view, None, stored)
        formed[f"{_rows_key(stored, None, digest)}-rows"] = [row.as_json() for row in rows]
    cache().keep(formed)
    return stored


def _head_and_profile(kept: Any) -> tuple[Record, Profile]:
    return Record.model_validate(kept["head"]), _PROFILE.validate_python(kept["profile"])


def head_of(record: Record) -> Record:
    """Return a record without its figures."""
    return record.model_copy(update={"layers": (), "scopes": {}, "boundaries": {}})


def drawn(stored: Stored) -> Drawn:
    """Return the plots and tables of a record. Raises RecordError where it cannot be read any more."""
    return _kept_as(stored.sha256, "drawn", Drawn.from_json) or Drawn.of(read_view(stored.path))


def phase_figures(stored: Stored) -> PhaseFigures:
    """Return the figures of a checkpoint's phases. Raises RecordError where it cannot be read any more."""
    return _kept_as(stored.sha256, "phases", PhaseFigures.from_json) or PhaseFigures(read_view(stored.path))


class Case(NamedTuple):
    """A record to be judged, with its control, and what its model is called."""

    stored: Stored
    control: Stored | None
    label: str


def judged_rows(case: Case, hypotheses: Sequence[Hypothesis], digest: str) -> tuple[Row, ...]:
    """Return the verdicts on every claim. Raises RecordError where a record cannot be read any more.

    digest: that of the hypotheses, from `digest_of`.
    """
    stored, control, label = case
    key = _rows_key(stored, control, digest)
    if (known := _kept_as(key, "rows", lambda rows: [Row.from_json(row) for row in rows])) is not None:
        return tuple(replace(row, model=label, record=stored.record) for row in known)
    rows = _judged(hypotheses, read_view(stored.path), None if control is None else read_view(control.path), stored)
    if key:
        cache().keep({f"{key}-rows": [row.as_json() for row in rows]})
    return tuple(replace(row, model=label) for row in rows)


def _judged(
    hypotheses: Sequence[Hypothesis], view: RecordView, control: RecordView | None, stored: Stored
) -> list[Row]:
    with one_thread():
        return [Row.of(each, stored.record) for each in judge_all(hypotheses, [(view, control)])]


def _rows_key(stored: Stored, control: Stored | None, digest: str) -> str:
    """Return what the verdicts on a record are kept under; empty where they are not kept."""
    if not all(each.sha256 for each in (stored, control) if each is not None):
        return ""
    return hashlib.sha256(f"{stored.sha256} {control and control.sha256} {digest}".encode()).hexdigest()


def digest_of(hypotheses: Sequence[Hypothesis]) -> str:
    """Return the SHA-256 of what hypotheses say, and of where their files are."""
    parts = [(str(each.path), each.sha256, each.model_dump_json()) for each in hypotheses]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def read_view(path: Path) -> RecordView:
    """Return a view of a record that is examined only where it has not been. Raises RecordError as `store.load`."""
    return load_content(Content.read(path), cache())


def cache() -> Cache:
    """Return the cache; one that remembers nothing where there can be none."""
    try:
        return _cache(cache_root())
    except RecordError:
        return _cache(Path(os.devnull))


@lru_cache(maxsize=1)
def _cache(root: Path) -> Cache:
    """Return the cache at a place: the list of records that were examined before is read once."""
    return Cache(root)


_Formed = TypeVar("_Formed")


def _kept_as(sha256: str, what: str, form: Callable[[Any], _Formed]) -> _Formed | None:
    """Return what is kept of a record, formed from plain values; None where nothing is, or it is damaged."""
    kept = cache().kept(f"{sha256}-{what}") if sha256 else None
    try:
        return None if kept is None else form(kept)
    except (KeyError, TypeError, ValueError):
        return None
