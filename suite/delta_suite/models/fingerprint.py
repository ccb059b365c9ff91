"""The fingerprint of a model: one SHA-256 over the files that decide what is measured."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from delta_suite.errors import ModelUnavailableError
from delta_suite.models.files import ModelFiles
from delta_suite.progress import Progress, no_progress
from delta_suite.reading import UnreadableFileError, read_json, system_reason

PROGRESS_ABOVE = 2_000_000_000
"""Bytes to hash above which a progress bar is shown; one thread hashes about a billion in a second."""

MEMO_ABOVE = 32 << 20
"""Smallest file whose hash is kept. Smaller ones are hashed each time, which takes 0.04 seconds at most, so that no
trick of a file system can hide that one has changed."""

SETTLED = 2.0
"""Seconds that a file must have been left alone before it is hashed, for its hash to be kept. A change within one tick
of the file system's clock (2 s on FAT, 1 s on some network file systems, milliseconds elsewhere) leaves no trace."""

MAX_THREADS = 16
"""Most files that are hashed at once: one thread gives about 1 GB/s, 16 gave 7 on a host with 16 cores."""

_CHUNK = 1 << 20

_Report = Callable[[int], object]
"""Function that is told of each number of bytes that was hashed; it raises an error where the run was stopped."""


def fingerprint(files: ModelFiles, memo: Path | None = None, progress: Progress = no_progress) -> str:
    """Return the SHA-256, in hex, over the name and the SHA-256 of each file that decides the measurement.

    The files are weights, config, tokenizer with chat templates, trusted code, and generation_config.json where it
    says what a decoder reads first; not the README. The same files have the same fingerprint wherever they are: it is
    the SHA-256 over one line a file, `<name>\\0<SHA-256 in hex>\\n`, sorted by name, which is the path below the
    model's folder, with `/`, in UTF-8.

    memo: a folder that keeps the hashes of large files by real path, device, inode, size and times of change, so that
        weights are read once. Where it cannot be written or read, they are hashed each time.
    progress: shows how many bytes are hashed, where they are many.

    Raises:
        ModelUnavailableError: a file was removed or changed meanwhile, or cannot be read.
    """
    paths = sorted((*files.weights, *files.others), key=files.relative)
    try:
        hashes = file_hashes(paths, memo, progress)
    except OSError as error:
        if isinstance(error, FileNotFoundError):
            raise ModelUnavailableError(f"{error.filename} was removed while it was read. Run again.") from None
        raise ModelUnavailableError(
            f"{error.filename or files.directory} cannot be read: {system_reason(error)}. Copy or download it again."
        ) from None
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{files.relative(path)}\0{hashes[path]}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def file_hashes(paths: list[Path], memo: Path | None, progress: Progress = no_progress) -> dict[Path, str]:
    """Return the SHA-256 of each file, from the memo or computed, several files at once.

    Raises OSError for a file that cannot be read, and ModelUnavailableError for one that changed meanwhile.
    """
    kept = {path: _Kept.of(path, memo) for path in paths}
    known = {path: entry.remembered() for path, entry in kept.items()}
    hashes = {path: digest for path, digest in known.items() if digest is not None}
    unknown = [kept[path] for path in paths if path not in hashes]
    total = sum(entry.size for entry in unknown)
    show = progress if total >= PROGRESS_ABOVE else no_progress
    with show("fingerprint of the weights", total, "B") as bar:
        return hashes | _in_threads(unknown, bar.update)


def _in_threads(entries: list[_Kept], advance: _Report) -> dict[Path, str]:
    """Return the SHA-256 of each entry's file. hashlib releases Python's lock, so threads share the work."""
    stopped, one_at_a_time = threading.Event(), threading.Lock()

    def report(count: int) -> None:
        if stopped.is_set():
            raise CancelledError
        with one_at_a_time:
            advance(count)

    largest_first = sorted(entries, key=lambda entry: -entry.size)
    executor = ThreadPoolExecutor(max_workers=min(os.cpu_count() or 1, MAX_THREADS))
    try:
        digests = executor.map(lambda entry: entry.digest(report), largest_first)
        return dict(zip((entry.path for entry in largest_first), digests, strict=True))
    finally:
        stopped.set()  # after Ctrl-C or an error the other threads end at their next chunk
        executor.shutdown(cancel_futures=True)


def _sha256(path: Path, report: _Report) -> str:
    """Return the SHA-256 of a file, and report each number of bytes read."""
    digest, buffer = hashlib.sha256(), bytearray(_CHUNK)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            report(count)
    return digest.hexdigest()


@dataclass(frozen=True)
class _Kept:
    """A file, and where its hash is kept: each in a small file of its own, so that no two models wait for each other.

    A kept hash counts only while device, inode, size and both times of change are what they were. The hash by which the
    Hugging Face cache names a blob counts for nothing, as a blob can be rewritten in place.
    """

    path: Path
    state: tuple[int, ...]
    memo: Path | None
    """None for a small file, whose hash is not kept."""

    @classmethod
    def of(cls, path: Path, memo: Path | None) -> _Kept:
        state = _state(path)
        if memo is None or state[_SIZE] < MEMO_ABOVE:
            return cls(path, state, None)
        return cls(path, state, memo / f"{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()}.json")

    @property
    def size(self) -> int:
        return self.state[_SIZE]

    def remembered(self) -> str | None:
        """Return the hash that is kept of this very content; None without one, or where it is damaged."""
        if self.memo is None:
            return None
        try:
            content = read_json(self.memo, limit=_CHUNK)
        except UnreadableFileError:
            return None
        if not isinstance(content, dict) or content.get("state") != list(self.state):
            return None
        digest = content.get("sha256")
        return digest if isinstance(digest, str) and len(digest) == 64 else None

    def digest(self, report: _Report) -> str:
        """Return the hash of the file, computed by this process or by another one that was first."""
        if self.memo is None:
            return self._computed(report)
        with _lock(self.memo, report) as is_ours:
            if (digest := self.remembered()) is not None:
                report(self.size)
                return digest
            started = time.time()
            digest = self._computed(report)
            if is_ours and max(self.state[_TIMES]) < (started - SETTLED) * 1e9:
                self._write(digest)
            return digest

    def _computed(self, report: _Report) -> str:
        digest = _sha256(self.path, report)
        if _state(self.path) != self.state:
            raise ModelUnavailableError(f"{self.path} was changed while it was read. Run again when it is whole.")
        return digest

    def _write(self, digest: str) -> None:
        assert self.memo is not None
        unfinished = self.memo.with_suffix(".tmp")  # one name, as the lock is ours: what a killed run left is replaced
        try:
            unfinished.write_text(json.dumps({"state": self.state, "sha256": digest}), "utf-8")
            unfinished.replace(self.memo)
        except OSError:  # a full disk, say: the file is hashed again next time
            with suppress(OSError):
                unfinished.unlink()


_SIZE, _TIMES = 2, slice(3, 5)
"""Places of the size and of the two times in a state."""


def _state(path: Path) -> tuple[int, ...]:
    """Return what changes with a file's content: device, inode, size, time of change of content and of inode (ns)."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _lock(memo: Path, report: _Report) -> Iterator[bool]:
    """Hold the lock of one file's hash, and yield True; yield False at once where there can be no lock."""
    lock = FileLock(memo.with_suffix(".lock"))
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        while not lock.is_locked:
            try:
                lock.acquire(timeout=1)
            except Timeout:
                report(0)  # ends the wait where the run was stopped
    except (OSError, NotImplementedError):  # a read-only cache, or a file system without locks
        yield False
        return
    try:
        yield True
    finally:
        lock.release()
