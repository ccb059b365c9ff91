"""The content-addressed cache of measurements, shared by every project and process of a user."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from delta_suite.errors import RecordError
from delta_suite.paths import shorten
from delta_suite.reading import ARRAYS_LIMIT, UnreadableFileError, read_bytes, read_text, system_reason
from delta_suite.records.arrays import ArrayFile, pack, unpack
from delta_suite.records.assemble import Assembled
from delta_suite.records.format import from_json, to_json
from delta_suite.records.problem import Problem, number
from delta_suite.records.verify import problems, require
from delta_suite.records.verify_arrays import direction_problems

RECORD, ARRAYS, DIRECTIONS = "record.json", "arrays.safetensors", "directions.safetensors"
"""The files of an entry."""

_ANOTHER = "Set DELTA_SUITE_CACHE to a folder that can be written."


def cache_root() -> Path:
    """Return $DELTA_SUITE_CACHE, else $XDG_CACHE_HOME/delta-suite, else ~/.cache/delta-suite.

    Raises RecordError where no path can be there: without a home, below a file, or with too long a name.
    """
    if chosen := os.environ.get("DELTA_SUITE_CACHE"):
        root = Path(chosen)
    else:
        try:
            root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delta-suite"
        except RuntimeError:  # a container with neither HOME nor an entry for its user
            raise RecordError(f"there is no home folder for the cache. {_ANOTHER}") from None
    try:
        (root / "measurements" / ("0" * 80) / DIRECTIONS).stat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise RecordError(f"{shorten(root)} cannot be the cache: {system_reason(error)}. {_ANOTHER}") from None
    return root


def cache_key(**parts: Any) -> str:
    """Return the SHA-256 of everything that the numbers depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """Entries `<root>/measurements/<key>/`: a record, its arrays and its directions, under the last run's phases."""

    root: Path

    def entry(self, key: str) -> Path:
        """Return the folder of an entry."""
        return self.root / "measurements" / key

    def directions(self, key: str) -> ArrayFile:
        """Return the directions of an entry, which are read when they are asked for."""
        return ArrayFile(self.entry(key) / DIRECTIONS)

    @property
    def memo(self) -> Path:
        """The folder of the content hashes of weight files already read."""
        return self.root / "fingerprints"

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Hold the lock of a key while a model is measured: a second process waits, and then reads the entry."""
        path = self._folder("locks") / f"{key}.lock"
        try:
            held = FileLock(path).acquire()
        except OSError as error:
            raise _unwritable(path, error) from None
        with held:
            yield

    def _folder(self, name: str = "") -> Path:
        folder = self.root / name
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unwritable(folder, error) from None
        return folder

    def get(self, key: str, newer_than: float | None = None) -> Assembled | None:
        """Return the entry, or None. One made before `newer_than` (seconds since the epoch) does not count.

        Raises RecordError for a damaged entry, which is removed: the next time there is none.
        """
        try:
            return self.read(key, newer_than)
        except RecordError as error:
            shutil.rmtree(self.entry(key), ignore_errors=True)
            raise RecordError(f"{error}, and is removed") from None

    def read(self, key: str, newer_than: float | None = None) -> Assembled | None:
        """Return the entry as `get` does, and leave it as it is also where it is damaged, so that no lock is needed."""
        folder = self.entry(key)
        path = folder / RECORD
        if not path.exists() or (newer_than is not None and path.stat().st_mtime < newer_than):
            return None
        try:
            record, _ = from_json(read_text(path), path)
            arrays, directions = (
                unpack(read_bytes(folder / name, ARRAYS_LIMIT), folder / name) for name in (ARRAYS, DIRECTIONS)
            )
            contradictions = problems(record, arrays)
            if record.provenance.cache_key != key:
                contradictions.append(
                    Problem("cache_key", f"it is that of another entry, {number(record.provenance.cache_key)}")
                )
            require(path, contradictions or [*direction_problems(record, arrays, directions)])
        except (RecordError, UnreadableFileError):
            raise RecordError(f"the cache entry {folder} was damaged") from None
        return Assembled(record, arrays, directions)

    def put(self, key: str, entry: Assembled) -> None:
        """Keep an entry, whole or not at all; an older one of this key is replaced.

        Raises RecordError where the cache cannot be written.
        """
        folder = self.entry(key)
        for unfinished in self._folder("measurements").glob(f".{key[:8]}-*"):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed: the lock is ours now
        try:
            with tempfile.TemporaryDirectory(
                prefix=f".{key[:8]}-", dir=self._folder("measurements"), ignore_cleanup_errors=True
            ) as written:
                fresh = Path(written) / "entry"
                fresh.mkdir()
                (fresh / ARRAYS).write_bytes(pack(entry.arrays))
                (fresh / DIRECTIONS).write_bytes(pack(entry.directions))
                (fresh / RECORD).write_text(to_json(entry.record), "utf-8")
                if folder.exists():
                    shutil.rmtree(folder)
                fresh.rename(folder)
        except OSError as error:
            raise _unwritable(folder, error) from None


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(
        f"{path}, in the cache, cannot be written: {error.strerror}. "
        f"Free space, or set DELTA_SUITE_CACHE to another folder."
    )
