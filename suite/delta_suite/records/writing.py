"""Files written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from delta_suite.errors import RecordError


def write_atomically(path: Path, text: str) -> None:
    """Write the whole file or nothing, also when two processes write it at once.

    Raises RecordError where the folder cannot be written.
    """
    write_together({path: text.encode()})


def write_together(content: Mapping[Path, bytes]) -> None:
    """Write files that belong together, in this order: each is whole or as it was, and a full disk changes none.

    Raises RecordError that names the file that cannot be written.
    """
    temporary: dict[Path, Path] = {}
    path = Path()
    try:
        for path, packed in content.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
                temporary[path] = Path(file.name)
                file.write(packed)
            temporary[path].chmod(0o644)
        for path, whole in temporary.items():  # all have had room: only now is one put in its place
            os.replace(whole, path)  # noqa: PTH105  (atomic on one file system)
    except OSError as error:
        raise RecordError(f"{path} cannot be written: {error.strerror}. Choose another folder or free space.") from None
    finally:
        for unfinished in temporary.values():
            unfinished.unlink(missing_ok=True)
