"""Measure on workers: what travels to one, and what is made here of what comes back.

A worker writes nothing but hashes of the weight files on its machine. This process has the cache and the results, and
writes each record as it arrives, so that what ends it costs only what was under way. What its cache holds is not
measured again, though only a worker can tell: the key of a measurement depends on its files and device.
"""

from __future__ import annotations

import os
import pickle
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from delta_suite.capture.calibration import Calibration, load_calibrations
from delta_suite.engine import dispatch
from delta_suite.errors import EngineError, RecordError, WorkerError, explain, is_foreseen
from delta_suite.paths import cache_root, expand_user
from delta_suite.pipeline import Measured, Outcome, Settings, labelled, measure_view, not_kept, stored, view_of, written
from delta_suite.pool import THREADS
from delta_suite.progress import Progress, no_progress
from delta_suite.provenance import shared_versions, version_problem
from delta_suite.records.cache import Cache
from delta_suite.records.parts import missing_parts

if TYPE_CHECKING:
    from delta_suite.engine.work import Item
    from delta_suite.models.spec import ModelSpec
    from delta_suite.records.assemble import Assembled


@dataclass(frozen=True)
class Terms:
    """Settings and texts that all tasks of a sweep share."""

    settings: Settings
    calibrations: Mapping[str, Calibration]
    """The texts by the name that an item has for them; a worker has no need of their files."""
    threads: int
    """Threads that a worker calculates with."""
    versions: Mapping[str, str]
    """Versions here, which a worker must have, too."""

    def adopt(self) -> None:
        """Calculate with their threads from now on, at a worker. Raises EngineError where its versions are others."""
        if problem := version_problem(self.versions, shared_versions()):
            raise EngineError(f"the worker at {platform.node()} has {problem}. Install the same versions everywhere.")
        fix_threads(self.threads)


@dataclass(frozen=True)
class Request:
    """One item to measure, as it travels to a worker."""

    spec: ModelSpec
    calibration: str
    held: frozenset[str] = frozenset()
    """Keys of the measurements that the sender's cache holds."""
    entry: tuple[str, Assembled] | None = None
    """A measurement that lacks some parts, with its key."""


@dataclass(frozen=True)
class Reply:
    """Answer of a worker: a measurement, or the error that hindered it."""

    key: str
    """Key of the measurement; empty where an error came before it."""
    entry: Assembled | None
    """The measurement; None where the sender's cache holds it, or an error hindered it."""
    revision: str | None = None
    notes: tuple[str, ...] = ()
    error: Exception | None = None
    """Error that hindered the measurement, or a part of it."""


# --- at the worker ---------------------------------------------------------------------------------------------


class _HeldError(Exception):
    """Signal that the sender's cache holds the measurement under this key."""


@dataclass(frozen=True)
class _ShippedCache(Cache):
    """The cache of a task: it holds what travelled with it, and keeps what is to travel back."""

    held: frozenset[str] = frozenset()
    entries: dict[str, Assembled] = field(default_factory=dict)

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        yield

    def get(self, key: str, newer_than: float | None = None) -> Assembled | None:
        if key in self.held:
            raise _HeldError(key)
        return self.entries.get(key)

    def put(self, key: str, entry: Assembled) -> None:
        self.entries[key] = entry


def measure_request(terms: bytes, request: bytes) -> bytes:
    """Measure one item at a worker, and return the reply. Both arguments and the reply are pickled."""
    return pickle.dumps(_measured_reply(pickle.loads(terms), pickle.loads(request)))


def _measured_reply(terms: Terms, request: Request) -> Reply:
    cache = _ShippedCache(cache_root(), request.held, {} if request.entry is None else dict([request.entry]))
    settings = replace(terms.settings, calibration=request.calibration, cache=cache, fresh_since=None)
    subject = stored(request.spec, settings)
    try:
        terms.adopt()
        measured = measure_view(subject, settings, calibration=terms.calibrations[request.calibration])
    except _HeldError as held:
        return Reply(str(held), None, subject.revision, subject.notes)
    except Exception as error:  # whatever hinders it is told by the sender
        key, entry = next(reversed(cache.entries.items()), ("", None))  # measured, but for a part that has no room
        return Reply(key, entry, error=portable(error, request.spec.name))
    key, entry = next(reversed(cache.entries.items()))
    return Reply(key, entry, subject.revision, measured.notes)


def fix_threads(count: int) -> None:
    """Have this process calculate with so many threads: they decide how sums are split, and so their last digits."""
    os.environ.update(dict.fromkeys(THREADS, str(count)))  # for libraries that are loaded later
    import torch
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(count)
    threadpool_limits(count)


def portable(error: Exception, name: str) -> Exception:
    """Return the error in a form that travels. What nobody foresaw is explained here, where its traceback is."""
    if is_foreseen(error):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:  # an error of a library, which takes other arguments than it has
            return WorkerError(str(error))
        return error
    return WorkerError(explain(error, f"measuring {name}"))


# --- at the sender ---------------------------------------------------------------------------------------------


def measure_on(
    workers: dispatch.Workers, work: Iterable[Item], settings: Settings, progress: Progress = no_progress
) -> Iterator[tuple[Item, Outcome | Exception]]:
    """Measure items on workers; yield each with its outcome, or the error that hindered it, as they come.

    Its record is written by then. Raises CalibrationError and EngineError before anything is measured.
    """
    items = list(work)
    calibrations = load_calibrations((item.calibration for item in items), settings.documents)
    terms = Terms(settings, calibrations, workers.threads, shared_versions())
    with workers, progress("measured", len(items), "model") as bar:
        sender = _Sender(settings, workers.share(pickle.dumps(terms)))
        for item, outcome in dispatch.run(items, workers, sender.task, sender.finish):
            bar.update(1)
            yield item, outcome


@dataclass(frozen=True)
class _Sender:
    """Makes the tasks of items, and writes what comes back."""

    settings: Settings
    terms: object
    """The terms, as the workers share them."""

    def task(self, item: Item) -> dispatch.Task:
        """Return the first task of an item."""
        return self._task(item, self.settings.cache.keys(self.settings.fresh_since))

    def _task(self, item: Item, held: frozenset[str], entry: tuple[str, Assembled] | None = None) -> dispatch.Task:
        request = Request(absolute(item.spec), item.calibration, held, entry)
        return measure_request, (self.terms, pickle.dumps(request))

    def finish(self, item: Item, content: bytes, losses: int) -> Outcome | dispatch.Again:
        """Keep what a worker measured, and write its record."""
        reply: Reply = pickle.loads(content)
        cache, notes, kept, cached = self.settings.cache, [*reply.notes], True, False
        entry = reply.entry
        if entry is not None:
            try:
                with cache.lock(reply.key):
                    cache.put(reply.key, entry)
            except RecordError as error:  # what was measured is not lost: its record is written
                kept = False
                notes.append(not_kept(error, item.spec.name))
        if reply.error is not None:
            raise reply.error
        if entry is None:
            cached = True
            try:
                with cache.lock(reply.key):
                    entry = cache.get(reply.key, self.settings.fresh_since)
            except RecordError:  # damaged, and removed
                entry = None
            if entry is None:
                return dispatch.Again(self._task(item, frozenset()))
            if missing_parts(item.spec.phases, entry.record, self.settings.parts):
                return dispatch.Again(self._task(item, frozenset(), (reply.key, entry)))
        if losses:
            notes.append(dispatch.after_losses(losses, item.spec.name))
        view = view_of(cache, reply.key, entry)
        view = labelled(view, item.spec.phases, item.spec.name, item.spec.source, reply.revision)
        return written(Measured(view, cached, tuple(notes), kept), self.settings)


def absolute(spec: ModelSpec) -> ModelSpec:
    """Return the model with a path that means the same in another process."""
    return spec if spec.path is None else spec.model_copy(update={"path": expand_user(spec.path).absolute()})
