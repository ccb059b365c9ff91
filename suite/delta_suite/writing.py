"""The one way to write a file: whole or not at all, and what killed runs left is swept away by later ones.

Files are written into a temporary folder beside their places, and then moved there, which is atomic on one file system.
Whoever uses the folder holds its lock. The system gives the lock up when the process ends, however it ends, so that a
later run can tell a folder that is left over from one that is in use.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from string import hexdigits
from typing import TextIO

from delta_suite.errors import RecordError

PREFIX = ".delta-suite-"
"""How the name of every temporary folder begins; a short hash of the machine's name follows."""

FOREIGN_SECONDS = 86400.0
"""Age at which a folder of another machine counts as left over: its locks are not seen here. No write takes a day."""

_in_use: set[Path] = set()


# --- files -----------------------------------------------------------------------------------------------------


def write_atomically(path: Path, text: str) -> None:
    """Write the whole file or nothing, also when two processes write it at once.

    Raises RecordError where the folder cannot be written.
    """
    write_together([(path, text.encode())])


def write_together(content: Iterable[tuple[Path, bytes]], beside: Path | None = None) -> None:
    """Write files that belong together, in this order: each is whole or as it was, and a full disk changes none.

    Until all are written they lie in a temporary folder, so that they need not be in memory together.

    beside: the folder that holds the temporary one, and is made where it is missing; by default that of the first file.

    Raises RecordError that names the file that cannot be written.
    """
    moves: list[tuple[Path, Path]] = []
    path = beside or Path()
    try:
        with ExitStack() as stack:
            for path, packed in content:
                if not moves:
                    parent = beside or path.parent
                    parent.mkdir(parents=True, exist_ok=True)
                    folder = stack.enter_context(temporary_folder(parent))
                whole = folder / str(len(moves))
                whole.write_bytes(packed)
                moves.append((whole, path))
            for whole, path in moves:  # all have had room: only now is one put in its place
                path.parent.mkdir(parents=True, exist_ok=True)
                _move(whole, path)
    except OSError as error:
        raise unwritable(path, error) from None


def _move(whole: Path, path: Path) -> None:
    try:
        os.replace(whole, path)  # noqa: PTH105  (atomic on one file system)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        write_together([(path, whole.read_bytes())])  # a folder of results that is mounted by itself


def unwritable(path: Path, error: OSError) -> RecordError:
    """Return the error of a file that cannot be written."""
    return RecordError(f"{path} cannot be written: {error.strerror}. Choose another folder or free space.")


def require_writable(folder: Path) -> None:
    """Raise RecordError where no file can be written into a folder, so that hours of work are not lost to that.

    What is missing of the folder is not made: a file is written into the innermost one that is there, and removed.
    """
    there = next(place for place in (folder, *folder.absolute().parents) if os.path.lexists(place))
    try:
        with temporary_folder(there) as fresh:
            (fresh / "0").write_bytes(b"\0")
    except OSError as error:
        raise unwritable(folder, error) from None


def require_writable_file(path: Path) -> None:
    """Raise RecordError where a file of this name cannot be written."""
    if path.is_dir():
        raise unwritable(path, IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR)))
    require_writable(path.parent)


# --- a file that names others by their SHA-256 -----------------------------------------------------------------


def write_with_parts(path: Path, content: bytes, parts: Mapping[Path, bytes]) -> None:
    """Write a file and the parts that it names by SHA-256; at any moment a reader finds the old ones or the new ones.

    Until the file itself is new, new parts lie under names with their SHA-256 (`staged_path`), where readers look for a
    part that is not what the file says. Writers of one file must take turns. Raises RecordError as `write_together`.
    """
    hashes = {part: hashlib.sha256(packed).hexdigest() for part, packed in parts.items()}
    staged = [(staged_path(part, hashes[part]), packed) for part, packed in parts.items()]
    write_together([*staged, (path, content)])
    settle_parts(hashes)


def settle_parts(hashes: Mapping[Path, str]) -> None:
    """Put the parts of a file under their own names, and remove staged ones that it does not name.

    hashes: the SHA-256 of each part, as the file says. A writer that was killed left this undone, so the next one does
    it first. Raises RecordError where a part cannot be moved.
    """
    for part, sha256 in hashes.items():
        staged = staged_path(part, sha256)
        try:
            if staged.exists():
                os.replace(staged, part)  # noqa: PTH105
            for other in part.parent.glob(f"{glob.escape(part.stem)}.{'[0-9a-f]' * _DIGITS}{part.suffix}"):
                other.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(part, error) from None


_DIGITS = 16


def staged_path(part: Path, sha256: str) -> Path:
    """Return where a part lies until the file that names it is written.

    Example:
        >>> staged_path(Path("run.safetensors"), "0123456789abcdef" * 4).name
        'run.0123456789abcdef.safetensors'
    """
    digits = "".join(digit for digit in sha256[:_DIGITS] if digit in hexdigits)  # a damaged file may say anything
    return part.with_name(f"{part.stem}.{digits}{part.suffix}")


# --- temporary folders -----------------------------------------------------------------------------------------


@contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """Yield a new folder in this one, which is removed afterwards, or by a later run where this one is killed.

    Raises OSError where it cannot be made.
    """
    sweep(parent)
    folder, lock = _locked_folder(parent)
    _in_use.add(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _in_use.discard(folder)
        os.close(lock)


def sweep(parent: Path) -> None:
    """Remove the temporary folders that runs which were killed left in this one; those in use stay."""
    try:
        names = [name for name in os.listdir(parent) if name.startswith(PREFIX)]  # noqa: PTH208  (names alone)
    except OSError:
        return
    for name in names:
        with suppress(OSError):  # another user's, in use, or gone by now
            descriptor = _open(parent / name)
            try:
                if _left_over(descriptor, name):
                    shutil.rmtree(parent / name, ignore_errors=True)
            finally:
                os.close(descriptor)


def remove_temporary_folders() -> None:
    """Remove the folders that this process uses: it ends now, whatever it was about."""
    for folder in tuple(_in_use):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, for which other processes of this machine wait. It is made where it is missing."""
    with ExitStack() as stack:
        with suppress(OSError):
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def _locked_folder(parent: Path) -> tuple[Path, int]:
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{_machine()}-", dir=parent))
        try:
            descriptor = _open(folder)
        except FileNotFoundError:
            continue
        with suppress(OSError):  # a file system without locks: age alone decides there
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)  # swept between its making and its locking


def _left_over(descriptor: int, name: str) -> bool:
    """Return True if nobody uses the folder. Raises OSError where its lock is held."""
    old = time.time() - os.fstat(descriptor).st_mtime > FOREIGN_SECONDS
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return old
    return old or name.startswith(f"{PREFIX}{_machine()}-")


def _open(folder: Path) -> int:
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)


def _machine() -> str:
    return hashlib.sha256(os.uname().nodename.encode()).hexdigest()[:8]


def discard_output(stream: TextIO) -> None:
    """Send a standard stream nowhere from now on, so that Python does not fail on it again when it ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
