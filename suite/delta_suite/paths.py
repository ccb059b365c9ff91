"""Look-ups of paths that a user wrote, some of which the system rejects, and of files that ship with the package."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from delta_suite.errors import RecordError

LONGEST_QUOTED = 200
"""Most characters of a user's word that a message repeats; someone may pass a whole text in place of its path."""

PACKAGE = Path(__file__).parent
"""The folder of the installed package."""


def bundled(name: str) -> Path:
    """Return the path of a file or folder that ships with delta-suite: `hypotheses` or `models.toml`.

    A wheel holds them inside the package. A checkout, also one that is installed editable, has them at its top, two
    folders above the package.

    Example:
        >>> bundled("models.toml").name
        'models.toml'
    """
    inside, checkout = PACKAGE / name, PACKAGE.parents[1] / name
    return inside if inside.exists() or not checkout.exists() else checkout


def expand_user(written: str | Path) -> Path:
    """Return the path with the home folder in place of `~`; `~name` of an unknown user stays as it is.

    Example:
        >>> expand_user("checkpoints/step-8").as_posix()
        'checkpoints/step-8'
    """
    path = Path(written)
    try:
        return path.expanduser()
    except (RuntimeError, ValueError):  # ValueError: a null byte in the name of a user
        return path


def relative_to(folder: Path, path: Path) -> Path:
    """Return a path as counted from a folder that it lies below, and the whole path of one that lies elsewhere."""
    folder, path = folder.resolve(), path.resolve()
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def path_error(path: Path) -> str | None:
    """Return the system's error for `path`, or None if something is there.

    `Path.exists` gives no reason, and before Python 3.14 raises for some paths: too long a name, a folder without
    permission.

    Example:
        >>> path_error(Path("/no/such/file"))
        'No such file or directory'
    """
    try:
        path.stat()
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:  # such as "embedded null byte"
        return str(error)
    return None


def not_a_file(path: Path) -> str | None:
    """Return why `path` cannot be read as a file: it is gone, or a folder, a pipe or a device; None if it can.

    Reading a pipe or a device may never end, so this is asked before a file is opened.

    Example:
        >>> not_a_file(Path("/dev/zero"))
        'cannot be read: not a regular file'
    """
    if error := path_error(path):
        return f"cannot be read: {error}"
    if path.is_dir():
        return "cannot be read: a folder, not a file"
    return None if path.is_file() else "cannot be read: not a regular file"


def is_directory(path: Path) -> bool:
    """Return True if `path` is an accessible directory."""
    return path_error(path) is None and path.is_dir()


def shorten(word: str | Path) -> str:
    """Return a user's word for a message, cut if it is longer than LONGEST_QUOTED characters.

    Example:
        >>> shorten("qwen3-0.6b")
        'qwen3-0.6b'
    """
    text = str(word)
    return text if len(text) <= LONGEST_QUOTED else f"{text[:LONGEST_QUOTED]}... ({len(text)} characters)"


OTHER_TOML = frozenset({"pyproject.toml", "models.toml", "pytest.toml", ".pytest.toml"})
"""Names of .toml files that are never hypothesis files, though they may lie beside them."""


def hypothesis_files(folder: Path) -> list[Path]:
    """Return the .toml files directly in a folder, in sorted order, without those that are never hypothesis files."""
    return sorted(path for path in folder.glob("*.toml") if path.name not in OTHER_TOML)


_ANOTHER_CACHE = "Set DELTA_SUITE_CACHE to a folder that can be written."


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
            raise RecordError(f"there is no home folder for the cache. {_ANOTHER_CACHE}") from None
    longest = root / "measurements" / ("0" * 80) / "directions.safetensors"
    if (error := path_error(longest)) and error != os.strerror(errno.ENOENT):
        raise RecordError(f"{shorten(root)} cannot be the cache: {error}. {_ANOTHER_CACHE}")
    return root
