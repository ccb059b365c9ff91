"""The fingerprint of a model: one SHA-256 over the files that decide what is measured."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from delta_suite.errors import ModelUnavailableError, RecordError
from delta_suite.models.files import ModelFiles

PROGRESS_ABOVE = 2_000_000_000
"""Bytes to hash above which a progress bar is shown; this many take about a second."""


def fingerprint(files: ModelFiles, memo: Path | None = None) -> str:
    """Return the SHA-256, in hex, over the name and the SHA-256 of each file that decides the measurement.

    These are weights, config, tokenizer and trusted code, but not generation settings or the README. The same files
    have the same fingerprint wherever they are.

    memo: a JSON file that keeps the hashes by real path, size and time of change, so that large weights are
        read once. Blobs of the Hugging Face cache are named by their hash, and are not read at all.

    Raises:
        RecordError: the memo cannot be written.
        ModelUnavailableError: a file was removed meanwhile.
    """
    paths = sorted((*files.weights, *files.others), key=lambda path: path.relative_to(files.directory).as_posix())
    try:
        hashes = {path: _hash_in_name(path) for path in paths}
        unknown = [path for path, digest in hashes.items() if digest is None]
        if unknown:
            hashes |= _hash_files(unknown) if memo is None else _hash_with_memo(unknown, memo)
    except FileNotFoundError as error:
        raise ModelUnavailableError(f"{error.filename} was removed while it was read. Run again.") from error
    total = hashlib.sha256()
    for path in paths:
        total.update(f"{path.relative_to(files.directory).as_posix()}\0{hashes[path]}\n".encode())
    return total.hexdigest()


def _hash_in_name(path: Path) -> str | None:
    """Return the SHA-256 by which the Hugging Face cache names a large file; None for any other file.

    A snapshot's file is a link to ../../blobs/<etag>. The etag of a large file is its SHA-256 (64 digits), of a small
    one the Git hash (40 digits). Only that first link is followed: the blob may itself be a link into a store shared
    between repositories, which names files by another 64-digit hash.
    """
    if not path.is_symlink():
        return None
    blob = Path(os.path.normpath(path.parent / path.readlink()))
    in_cache = blob.parent.name == "blobs" and blob.parent.parent.name.startswith("models--")
    return blob.name if in_cache and re.fullmatch(r"[0-9a-f]{64}", blob.name) else None


def _hash_files(paths: list[Path]) -> dict[Path, str]:
    total = sum(path.stat().st_size for path in paths)
    if total < PROGRESS_ABOVE:
        return {path: _sha256(path, lambda _: None) for path in paths}
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc="Fingerprint of the weights", leave=False) as bar:
        return {path: _sha256(path, bar.update) for path in paths}


def _sha256(path: Path, report: Callable[[int], object]) -> str:
    """Return the SHA-256 of a file, and report each number of bytes read."""
    digest, buffer = hashlib.sha256(), bytearray(1 << 22)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(view[:count])
            report(count)
    return digest.hexdigest()


def _hash_with_memo(paths: list[Path], memo: Path) -> dict[Path, str]:
    from filelock import FileLock

    keys = {path: f"{path.resolve()}|{(stat := path.stat()).st_size}|{stat.st_mtime_ns}" for path in paths}
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{memo}.lock").acquire()
    except OSError as error:
        raise _cannot_write(memo, error) from error
    # The lock is held while hashing: of several processes that meet new weights, one reads them and the others wait.
    with lock:
        known = _read_memo(memo)
        new = [path for path, key in keys.items() if key not in known]
        if new:
            known |= {keys[path]: digest for path, digest in _hash_files(new).items()}
            try:
                _write_memo(memo, known)
            except OSError as error:
                raise _cannot_write(memo, error) from error
    return {path: known[key] for path, key in keys.items()}


def _cannot_write(memo: Path, error: OSError) -> RecordError:
    return RecordError(
        f"the memo of fingerprints {memo} cannot be written ({error.strerror or error}).\n"
        "  Free space, make its folder writable, remove what is in its place, or set DELTA_SUITE_CACHE to another one."
    )


def _read_memo(memo: Path) -> dict[str, str]:
    """Return the hashes in the memo; none if it is missing or damaged, as all of them can be computed again."""
    try:
        known = json.loads(memo.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(known, dict):
        return {}
    return {key: digest for key, digest in known.items() if isinstance(digest, str)}


def _write_memo(memo: Path, hashes: dict[str, str]) -> None:
    with tempfile.NamedTemporaryFile("w", dir=memo.parent, prefix=memo.name, delete=False) as file:
        temporary = Path(file.name)
        try:
            json.dump(hashes, file, indent=1, sort_keys=True)
            file.close()
            temporary.replace(memo)
        finally:
            temporary.unlink(missing_ok=True)
