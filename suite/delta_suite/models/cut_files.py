"""GGUF files that are cut into parts, each in a Python package of its own, and joined in the cache."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

from delta_suite.errors import ModelUnavailableError, UnavailableError
from delta_suite.models.fingerprint import file_hashes
from delta_suite.paths import cache_root, shorten
from delta_suite.reading import system_reason
from delta_suite.writing import temporary_folder


def largest_file(folder: Path) -> Path | None:
    """Return the largest file in a folder and those below it, which in a package of weights is the weights."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix != ".py"]
    return max(files, key=lambda path: path.stat().st_size, default=None)


def joined(model: str, parts: list[Path], name: str) -> Path:
    """Return the folder in the cache that holds the parts joined in this order, under this name.

    The folder is found by the content of the parts: `joined/<SHA-256 over their SHA-256>`. What is joined once is not
    joined again, and other parts never come to lie under the same name.

    Raises:
        UnavailableError: a part cannot be read, or the cache cannot hold the file; the message says how large it is.
    """
    root = cache_root()
    try:
        hashes = file_hashes(parts, root / "fingerprints")
        folder = root / "joined" / hashlib.sha256("".join(hashes[path] for path in parts).encode()).hexdigest()
        size = sum(path.stat().st_size for path in parts)
        if not _whole(folder / name, size):
            _join(parts, folder, name)
        return folder
    except OSError as error:
        what = f"{name} cannot be joined from its {len(parts)} parts in {shorten(root)}: {system_reason(error)}"
        do = "Set DELTA_SUITE_CACHE to a folder that can be written and has room for the file."
        raise UnavailableError(model, what, do) from None
    except ModelUnavailableError as error:  # a part was changed while it was read
        raise UnavailableError(model, str(error).partition(". ")[0], "Run again when it is whole.") from None


def _whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _join(parts: list[Path], folder: Path, name: str) -> None:
    """Write the file whole or not at all. Where two processes do, the later one replaces an equal file."""
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_folder(folder.parent) as fresh:
        with (fresh / name).open("wb") as whole:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, whole, 1 << 20)
        (fresh / name).replace(folder / name)
