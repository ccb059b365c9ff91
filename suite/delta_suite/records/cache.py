"""The content-addressed cache of measurements, shared by every project and process of a user."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from delta_suite.errors import RecordError
from delta_suite.provenance import code_version
from delta_suite.reading import ARRAYS_LIMIT, UnreadableFileError, read_bytes, read_text
from delta_suite.records.arrays import ArrayFile, pack, unpack
from delta_suite.records.assemble import Assembled
from delta_suite.records.format import from_json, to_json
from delta_suite.records.problem import Problem, quoted
from delta_suite.records.verify import problems, require_consistent
from delta_suite.records.verify_arrays import direction_problems
from delta_suite.version import __version__
from delta_suite.writing import sweep, temporary_folder, write_together

RECORD, ARRAYS, DIRECTIONS = "record.json", "arrays.safetensors", "directions.safetensors"
"""The files of an entry."""

KEPT_SECONDS = 30 * 86400.0
"""How long what was formed of records is kept; whether it is used is not known."""

_DIGITS = 64
"""Length of a key, which is a SHA-256."""


def cache_key(**parts: Any) -> str:
    """Return the SHA-256 of everything that the numbers depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """Entries `<root>/measurements/<key>/`: a record, its arrays and its directions, under the last run's phases."""

    root: Path

    def entry(self, key: str) -> Path:
        """Return the folder of an entry, whether there is one or not; the newest while one replaces another."""
        return max(self._entries(key), key=_written, default=self.root / "measurements" / key)

    def _entries(self, key: str) -> list[Path]:
        return list((self.root / "measurements").glob(f"{key}*"))

    def keys(self, newer_than: float | None = None) -> frozenset[str]:
        """Return the keys of all entries, but for those made before `newer_than` (seconds since the epoch)."""
        folders = self._entries("")
        return frozenset(folder.name[:_DIGITS] for folder in folders if _written(folder) > (newer_than or 0.0))

    def directions(self, key: str) -> ArrayFile:
        """Return the directions of an entry, which are read when they are asked for."""
        return ArrayFile(self.entry(key) / DIRECTIONS)

    @property
    def memo(self) -> Path:
        """The folder of the content hashes of weight files already read."""
        return self.root / "fingerprints"

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of a key while a model is measured: a second process waits, and then reads the entry.

        A cache that cannot be written has no lock; nobody can change an entry in it.
        """
        path = self.root / "locks" / f"{key}.lock"
        with ExitStack() as stack:
            with suppress(OSError):
                path.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(path))
            yield

    def get(self, key: str, newer_than: float | None = None) -> Assembled | None:
        """Return the entry, or None. One made before `newer_than` (seconds since the epoch) does not count.

        Raises RecordError for a damaged entry, which is removed: the next time there is none.
        """
        sweep(self.root / "measurements")
        folder = self.entry(key)
        try:
            entry = self.read(key, newer_than)
        except RecordError as error:
            shutil.rmtree(folder, ignore_errors=True)
            raise RecordError(f"{error}, and {'cannot be' if folder.exists() else 'is'} removed") from None
        if entry is not None:
            self._remove_older(key, folder)
        return entry

    def read(self, key: str, newer_than: float | None = None) -> Assembled | None:
        """Return the entry as `get` does, and leave it as it is also where it is damaged, so that no lock is needed."""
        folder = self.entry(key)
        path = folder / RECORD
        if not path.exists() or _written(folder) < (newer_than or 0.0):
            return None
        try:
            record, _ = from_json(read_text(path), path)
            arrays, directions = (
                unpack(read_bytes(folder / name, ARRAYS_LIMIT), folder / name) for name in (ARRAYS, DIRECTIONS)
            )
            contradictions = problems(record, arrays)
            if record.provenance.cache_key != key:
                contradictions.append(
                    Problem("cache_key", f"it is that of another entry, {quoted(record.provenance.cache_key)}")
                )
            require_consistent(path, contradictions or [*direction_problems(record, arrays, directions)])
        except (RecordError, UnreadableFileError):
            if self.entry(key) != folder:  # replaced while it was read, without the lock of a cache that others write
                return self.read(key, newer_than)
            raise RecordError(f"the cache entry {folder} was damaged") from None
        return Assembled(record, arrays, directions)

    def put(self, key: str, entry: Assembled) -> None:
        """Keep an entry, whole or not at all; an older one of this key is replaced.

        The new folder is in its place before the old one is removed, so that there is one at any moment. Raises
        RecordError where the cache cannot be written.
        """
        folder = self.root / "measurements" / key
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with temporary_folder(folder.parent) as written:
                fresh = written / "entry"
                fresh.mkdir()
                (fresh / ARRAYS).write_bytes(pack(entry.arrays))
                (fresh / DIRECTIONS).write_bytes(pack(entry.directions))
                (fresh / RECORD).write_text(to_json(entry.record), "utf-8")
                newest = folder.with_name(f"{key}-{time.time_ns()}") if folder.exists() else folder
                fresh.rename(newest)
                self._remove_older(key, newest)
        except OSError as error:
            raise _unwritable(folder, error) from None

    def _remove_older(self, key: str, newest: Path) -> None:
        """Remove the entries that this one replaced; a run that was killed may not have come to it."""
        for other in self._entries(key):
            if _written(other) < _written(newest):
                shutil.rmtree(other, ignore_errors=True)

    # --- records that were examined before

    def verified(self, sha256: str) -> bool:
        """Return True if a record with this SHA-256 was found right by this version of the suite."""
        return sha256 in self._verified

    def remember(self, sha256: str) -> None:
        """Keep that the record with this SHA-256 is right; without a word where the cache cannot be written."""
        if sha256 in self._verified:
            return
        self._verified.add(sha256)
        with suppress(OSError):
            self.root.mkdir(parents=True, exist_ok=True)
            with self._verified_path.open("a", encoding="ascii") as file:
                file.write(f"{sha256}\n")

    @property
    def _verified_path(self) -> Path:
        return self.root / f"verified-{__version__}.txt"

    @cached_property
    def _verified(self) -> set[str]:
        try:
            lines = read_text(self._verified_path).split()
        except UnreadableFileError:
            return set()
        return {line for line in lines if len(line) == _DIGITS}  # not what a run that was killed left of one

    # --- what was formed of records

    def kept(self, name: str) -> Any | None:
        """Return what this very code kept under a name, or None."""
        try:
            return json.loads(zlib.decompress(read_bytes(self._formed / name)))
        except (UnreadableFileError, zlib.error, ValueError, RecursionError):
            return None

    def keep(self, formed: Mapping[str, Any]) -> None:
        """Keep plain values by name until the code changes; without a word where the cache cannot be written."""
        packed = ((self._formed / name, zlib.compress(json.dumps(each).encode(), 1)) for name, each in formed.items())
        with suppress(RecordError):
            write_together(packed, beside=self.root)

    def sweep_formed(self) -> None:
        """Remove what other code kept, and what has been there for KEPT_SECONDS: it is formed again where needed."""
        old = time.time() - KEPT_SECONDS
        with suppress(OSError):
            for folder in self._formed.parent.iterdir():
                for path in folder.iterdir():
                    if folder != self._formed or path.stat().st_mtime < old:
                        path.unlink(missing_ok=True)
                if folder != self._formed:
                    folder.rmdir()

    @property
    def _formed(self) -> Path:
        return self.root / "formed" / code_version()


class NoCache(Cache):
    """A cache that holds and keeps nothing, for a model that is never met again, as one in training."""

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold nothing, as there is no entry to wait for."""
        yield

    def get(self, key: str, newer_than: float | None = None) -> Assembled | None:
        """Return None."""
        return None

    def put(self, key: str, entry: Assembled) -> None:
        """Leave the disk as it is."""


def _written(folder: Path) -> float:
    """Return when an entry was written; 0 where there is none."""
    try:
        return (folder / RECORD).stat().st_mtime
    except OSError:
        return 0.0


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(
        f"{path}, in the cache, cannot be written: {error.strerror}. "
        f"Free space, or set DELTA_SUITE_CACHE to another folder."
    )
