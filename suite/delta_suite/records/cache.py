"""The content-addressed cache of measurements, shared by every project and process of a user."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from delta_suite.errors import RecordError
from delta_suite.records.record import Measurement, arrays_bytes, read_arrays


def cache_root() -> Path:
    """$DELTA_SUITE_CACHE, else $XDG_CACHE_HOME/delta-suite, else ~/.cache/delta-suite."""
    if own := os.environ.get("DELTA_SUITE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "delta-suite"


def cache_key(**parts: Any) -> str:
    """SHA-256 of everything that the numbers depend on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Cache:
    """Entries `<root>/measurements/<key>/`: measurement.json (without phases) and arrays.safetensors."""

    root: Path

    def entry(self, key: str) -> Path:
        return self.root / "measurements" / key

    def arrays(self, key: str) -> Path:
        return self.entry(key) / "arrays.safetensors"

    @property
    def memo(self) -> Path:
        """Content hashes of weight files already read. Raises RecordError where the cache cannot be written."""
        return self._folder() / "fingerprints.json"

    @contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Held while a model is measured: a second process waits, and then finds the entry."""
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

    def get(self, key: str, newer_than: float | None = None) -> Measurement | None:
        """The entry, or None. One made before `newer_than` (seconds since the epoch) does not count.

        Raises RecordError for a damaged entry, which is removed: the next time there is none.
        """
        path = self.entry(key) / "measurement.json"
        if not path.exists() or (newer_than is not None and path.stat().st_mtime < newer_than):
            return None
        try:
            measurement = Measurement.from_json(path.read_text("utf-8"), path)
            read_arrays(self.arrays(key))
        except (RecordError, OSError, UnicodeDecodeError):
            shutil.rmtree(self.entry(key), ignore_errors=True)
            raise RecordError(f"the cache entry {self.entry(key)} was damaged, and is removed") from None
        return measurement.with_arrays(self.arrays(key))

    def put(self, key: str, measurement: Measurement, arrays: Mapping[str, np.ndarray]) -> Measurement:
        """Keep an entry, whole or not at all; an older one of this key is replaced.

        Raises RecordError where the cache cannot be written.
        """
        entry = self.entry(key)
        for left in self._folder("measurements").glob(f".{key[:8]}-*"):
            shutil.rmtree(left, ignore_errors=True)  # by a run that was killed while it wrote: the lock is ours now
        try:
            with tempfile.TemporaryDirectory(
                prefix=f".{key[:8]}-", dir=self._folder("measurements"), ignore_cleanup_errors=True
            ) as folder:
                fresh = Path(folder)
                (fresh / "arrays.safetensors").write_bytes(arrays_bytes(arrays))
                (fresh / "measurement.json").write_text(measurement.to_json(), "utf-8")
                if entry.exists():
                    shutil.rmtree(entry)
                fresh.rename(entry)
        except OSError as error:
            raise _unwritable(entry, error) from None
        return measurement.with_arrays(self.arrays(key))


def _unwritable(path: Path, error: OSError) -> RecordError:
    return RecordError(
        f"{path}, in the cache, cannot be written: {error.strerror}. "
        f"Free space, or set DELTA_SUITE_CACHE to another folder."
    )
