"""results/: the records of measured models, and which hypothesis files judged each of them last.

results/runs/<model>/<utc>-<hash8>.json          a record, and its arrays beside it as .safetensors
results/judged/<model>/<utc>-<hash8>.json        the hypothesis files that judged it last
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from delta_suite.command_line import DEFAULT_RESULTS
from delta_suite.errors import RecordError
from delta_suite.models.spec import RANDOM_WEIGHTS
from delta_suite.paths import is_directory, path_error, shorten
from delta_suite.reading import ARRAYS_LIMIT, UnreadableFileError, read_bytes, read_text
from delta_suite.records.arrays import ArrayFile, pack
from delta_suite.records.cache import Cache
from delta_suite.records.format import from_json, to_json
from delta_suite.records.problem import Problem, quoted
from delta_suite.records.record import SCHEMA, ArrayReference, Record
from delta_suite.records.verify import CURE, problems, require_consistent, unchecked
from delta_suite.records.view import RecordView
from delta_suite.writing import folder_lock, sweep, write_atomically, write_together

RESULTS = Path(DEFAULT_RESULTS)
"""The default results folder, relative to where the command runs."""

RUNS, JUDGED = "runs", "judged"
"""Folders of the results: records, and what judged them."""


class JudgedBy(BaseModel):
    """The hypothesis file that a record was last judged by. Its verdicts follow from the two, and are not kept."""

    model_config = ConfigDict(frozen=True)

    version: int
    """The file's version number, raised when its meaning changes."""
    sha256: str
    """SHA-256 of the file's bytes, so that any change of it shows."""

    @property
    def text(self) -> str:
        """The version and the beginning of the SHA-256."""
        return f"version {self.version}, SHA-256 {self.sha256[:12]}"


_STAMPS = TypeAdapter(dict[str, JudgedBy])


def record_path(results: Path, record: Record) -> Path:
    """Return `results/runs/<model>/<utc>-<hash8>.json`; the hash tells settings, parts and phase maps apart.

    That of a submitted record is another one, so that it never takes the place of the measurement that it holds.
    """
    shown = f"{record.provenance.cache_key} {record.model.name} {record.phases} {record.parts}"
    if record.submitter is not None:
        shown += " " + json.dumps(record.submitter.model_dump(mode="json"), sort_keys=True)
    stamp = record.provenance.created.replace("-", "").replace(":", "")
    name = f"{stamp}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}.json"
    return results / RUNS / folder_name(record.model.name) / name


def folder_name(model: str) -> str:
    """Return a model's name as one folder: letters stay, separators become `--`.

    Example:
        >>> folder_name("org/name")
        'org--name'
    """
    return model.strip("./").replace("/", "--").replace("\\", "--") or "model"


def save(results: Path, view: RecordView, cache: Cache) -> tuple[Path, RecordView]:
    """Write the record and its arrays, unless this very record is there, and return its path and a view of it.

    Raises RecordError where they cannot be written.
    """
    path = record_path(results, view.record)
    beside = path.with_suffix(".safetensors")
    packed = pack(view.content())
    record = view.record.model_copy(
        update={"arrays": ArrayReference(file=beside.name, sha256=hashlib.sha256(packed).hexdigest())}
    )
    text = to_json(record)
    with exclusive(path, cache):
        if not (path.exists() and beside.exists()):
            write_together([(beside, packed), (path, text.encode())])
    record, _ = from_json(text, path)  # the figures as they are written, so that the cache gives back the same
    return path, RecordView(record, ArrayFile(beside, content=view.content()), view.directions)


@dataclass(frozen=True)
class Examined:
    """A stored record, and what checking it found."""

    view: RecordView
    problems: list[Problem]
    """The contradictions; empty where the record can be believed."""
    unchecked: list[str]
    """The reasons why some of it could not be checked."""


def examine(path: Path, cache: Cache | None = None) -> Examined:
    """Read a stored record with the arrays beside it, and check them against each other and against their place.

    Raises RecordError where there is no record, or it or its arrays are damaged or of a schema that is not read.
    """
    view = _read(path, cache)
    arrays = None if view.arrays is None else view.arrays.content
    contradictions = [*problems(view.record, arrays), *place_problems(path, view.record)]
    return Examined(view, contradictions, unchecked(view.record, arrays))


@dataclass(frozen=True)
class Verified:
    """The outcome of checking a stored record, as `delta-suite verify` tells it."""

    path: Path
    problems: tuple[str, ...] = ()
    """How it contradicts itself, its arrays or its place."""
    unchecked: tuple[str, ...] = ()
    """The reasons why some of it could not be checked."""
    unreadable: str | None = None
    """Why it cannot be read, where it cannot."""

    @property
    def consistent(self) -> bool:
        """True where it was read, and nothing contradicts anything else."""
        return self.unreadable is None and not self.problems

    def lines(self) -> Iterator[str]:
        """Yield what was found, as lines of text."""
        if self.unreadable is not None:
            names_it = str(self.path) in self.unreadable
            yield self.unreadable if names_it else f"{self.path}: cannot be read: {self.unreadable}"
            return
        count = len(self.problems)
        yield f"{self.path}: {'ok' if not count else f'{count} contradiction' + 's' * (count > 1)}"
        yield from (f"  {problem}" for problem in self.problems)
        yield from (f"  not checked: {note}" for note in self.unchecked)


def verify(places: Iterable[Path]) -> Iterator[Verified]:
    """Check records, and all records of results folders.

    Raises RecordError where there is none.
    """
    for path in named_records(places):
        try:
            examined = examine(path)
        except RecordError as error:
            yield Verified(path, unreadable=str(error))
        else:
            yield Verified(path, tuple(map(str, examined.problems)), tuple(examined.unchecked))


def named_records(places: Iterable[Path]) -> list[Path]:
    """Return records as they are named, and all records of results folders. Raises RecordError where there is none."""
    paths = [path for place in places for path in (record_paths(place) if is_directory(place) else [place])]
    if not paths:
        raise RecordError("there are no records: `delta-suite measure NAME` writes one into results/runs/<model>/.")
    return paths


def verified_total(records: Sequence[Verified]) -> str:
    """Return one line about how many records are consistent."""
    consistent = sum(record.consistent for record in records)
    return f"records: {len(records)}, consistent: {consistent}, not: {len(records) - consistent}"


def load(path: Path, cache: Cache | None = None, *, verified: bool = False) -> RecordView:
    """Return a view of a stored record, with the arrays beside it, and its directions where the cache has them.

    verified: true for a file whose bytes have been examined before (`Cache.verified`). Raises RecordError where there
    is no record, it is damaged or of a schema that is not read, or it contradicts itself, its arrays or its place.
    """
    if verified:
        return _read(path, cache)
    examined = examine(path, cache)
    require_consistent(path, examined.problems)
    return examined.view


def _read(path: Path, cache: Cache | None) -> RecordView:
    """Return a view of a stored record, of which nothing has been checked but its shape and its arrays' SHA-256."""
    try:
        text = read_text(path)
    except UnreadableFileError as error:
        raise RecordError(
            f"record {error} Records lie in results/runs/<model>/; `delta-suite measure NAME` writes one."
        ) from None
    record, inline = from_json(text, path)
    arrays = None
    if inline is not None:
        arrays = ArrayFile(path, content=inline)
    elif record.arrays is not None and Path(record.arrays.file).name == record.arrays.file:
        beside = path.parent / record.arrays.file
        if path_error(beside) is None:
            arrays = ArrayFile(beside, record.arrays.sha256)
    try:
        _ = None if arrays is None else arrays.content
    except RecordError as error:
        raise RecordError(f"{path} cannot be believed: {error} {CURE}") from None
    directions = None if cache is None else cache.directions(record.provenance.cache_key)
    return RecordView(record, arrays, directions)


@dataclass(frozen=True)
class Content:
    """The files of a record as they are now."""

    path: Path
    record: str
    """SHA-256 of the record and its place; empty where it cannot be read."""
    sha256: str
    """SHA-256 of the record, its place and the file of arrays of the same name, where there is one."""

    @classmethod
    def read(cls, path: Path) -> Content:
        """Read and hash the files of a record."""
        beside = path.with_suffix(".safetensors")
        try:
            place = f"{path.parent.name}/{path.name}\0".encode("utf-8", "surrogateescape")
            known = hashlib.sha256(place + read_bytes(path)).hexdigest()
        except UnreadableFileError:
            return cls(path, "", "")
        try:
            arrays = hashlib.sha256(read_bytes(beside, ARRAYS_LIMIT)).hexdigest()
        except UnreadableFileError:
            arrays = "none"
        return cls(path, known, hashlib.sha256(f"{known} {arrays}".encode()).hexdigest())

    def holds_all_of(self, view: RecordView) -> bool:
        """Return True if what follows from the record follows from these files, so that it is known by `sha256`."""
        reference, inside = view.record.arrays, view.arrays is not None and view.arrays.path == self.path
        return inside or (
            view.arrays is not None
            and reference is not None
            and view.arrays.path == self.path.with_suffix(".safetensors")
        )


def load_content(content: Content, cache: Cache) -> RecordView:
    """Return a view as `load` does; what the cache knows to be right in this place is not examined again."""
    view = load(content.path, verified=cache.verified(content.record))
    if view.arrays is not None and content.record:  # without them, some of it could not be examined
        cache.remember(content.record)
    return view


def place_problems(path: Path, record: Record) -> list[Problem]:
    """Return how the place of a record in a results folder contradicts its content; elsewhere it may lie anywhere."""
    folder = path.parent.resolve()
    if folder.parent.name != RUNS:
        return []
    contradictions = []
    model, expected = record.model.name, record_path(folder.parent.parent, record)
    if folder.name != expected.parent.name:
        contradictions.append(
            Problem("its place", f"it lies in the folder {quoted(folder.name)}, and is of the model {quoted(model)}")
        )
    if record.schema_version == SCHEMA and path.name != expected.name:
        contradictions.append(
            Problem("its place", f"it is called {quoted(path.name)}, and its content makes it {quoted(expected.name)}")
        )
    return contradictions


def record_paths(results: Path) -> list[Path]:
    """Return the records of a results folder, by model, the oldest first. Raises RecordError if it holds no `runs`."""
    runs = results / RUNS
    if not is_directory(runs):
        if results.parent.name == RUNS:
            raise RecordError(f"{shorten(results)} is no results folder. Name its records, {shorten(results)}/*.json.")
        raise RecordError(
            f"{shorten(runs)} is not a folder. Records lie in results/runs/<model>/: `delta-suite measure NAME` writes "
            f"one. Or name another results folder."
        )
    return sorted(runs.glob("*/*.json"))


def newest_control(results: Path, model: RecordView) -> RecordView | None:
    """Return the newest readable record of a model's control under the same calibration, or None.

    A record of that name that is not of this model's control does not count.
    """
    folder = results / RUNS / folder_name(f"{model.model.name}@{RANDOM_WEIGHTS}")
    for path in sorted(folder.glob("*.json"), reverse=True):
        try:
            view = load(path)
        except RecordError:
            continue  # of another schema, say; an older one may do
        there, here = view.record.calibration, model.record.calibration
        same = there.sha256 == here.sha256 and bool(there.chat_template) == bool(here.chat_template)
        if same and view.model.is_control_of(model.model):
            return view
    return None


def control_beside(path: Path, model: RecordView) -> RecordView | None:
    """Return the newest record of the model's control in the results folder that a record lies in, or None."""
    runs = path.resolve().parent.parent
    return newest_control(runs.parent, model) if runs.name == RUNS else None


# --- what judged a record --------------------------------------------------------------------------------------


def stamps_path(path: Path) -> Path | None:
    """Return where it is kept what judged a record of a results folder; None for a record that lies elsewhere."""
    runs = path.resolve().parent.parent
    return runs.parent / JUDGED / path.resolve().parent.name / path.name if runs.name == RUNS else None


def stamps(path: Path) -> dict[str, JudgedBy]:
    """Return the hypothesis files that judged a record last, by hypothesis. Raises RecordError for a damaged file."""
    where = stamps_path(path)
    if where is None or not os.path.lexists(where):
        return {}
    try:
        return _STAMPS.validate_json(read_bytes(where))
    except (UnreadableFileError, ValidationError) as error:
        why = error.why if isinstance(error, UnreadableFileError) else error
        raise RecordError(f"{where} cannot be read: {why}. Remove it: it is written anew.") from None


def stamp(path: Path, judged_by: Mapping[str, JudgedBy], cache: Cache) -> None:
    """Keep which hypothesis files judged a record last, by hypothesis; other hypotheses keep theirs.

    The record does not change, and the file does not where these were the last to judge it already; nothing is kept of
    a record outside a results folder. Raises RecordError where the file cannot be read or written.
    """
    where = stamps_path(path)
    if where is None:
        return
    with exclusive(path, cache):
        sweep(where.parent)
        before = stamps(path)
        after = dict(sorted({**before, **judged_by}.items()))
        if after != before:
            content = {name: stamp.model_dump() for name, stamp in after.items()}
            write_atomically(where, json.dumps(content, indent=1) + "\n")


@contextmanager
def exclusive(path: Path, cache: Cache) -> Iterator[None]:
    """Serialise the writers of a file: read, change and write under one lock.

    The cache's lock reaches a user's processes on every machine that shares the cache, and the folder's lock every
    user's on this one, whatever cache they have.
    """
    name = f"record-{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
    with cache.lock(name), folder_lock(path.parent):
        sweep(path.parent)
        yield
