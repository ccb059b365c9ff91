"""A folder to start from: the claims that ship, a models.toml, a workflow, and what git leaves out."""

from __future__ import annotations

import os
from pathlib import Path

from delta_suite.errors import SuiteError
from delta_suite.paths import PACKAGE, bundled
from delta_suite.reading import read_bytes
from delta_suite.writing import write_together

STARTER = PACKAGE / "sharing" / "starter"
"""The folder of the files that are written beside the claims."""

WORKFLOW = Path(".github/workflows/checkpoint.yml")
"""The place of the workflow that compares a checkpoint with a baseline."""

GITIGNORE = Path(".gitignore")

PLACES = {"models.toml": Path("models.toml"), "checkpoint.yml": WORKFLOW, "gitignore": GITIGNORE}
"""The files of STARTER, with their places."""


class StarterError(SuiteError):
    """Error for a folder to start from in which a file is there already."""


def starter_files() -> dict[Path, bytes]:
    """Return the files that `write_starter` writes: place, relative to the folder, and content."""
    claims = bundled("hypotheses")
    names = sorted(path.name for path in claims.iterdir() if path.suffix in {".toml", ".json", ".py"})
    content = {Path("hypotheses") / name: read_bytes(claims / name) for name in names if name != "__init__.py"}
    return content | {place: read_bytes(STARTER / name) for name, place in PLACES.items()}


def write_starter(folder: Path) -> list[Path]:
    """Write hypotheses/, models.toml, a workflow and .gitignore into a folder, and return the files: all or none.

    A .gitignore that is there stays as it is, and is not among them.

    Raises:
        StarterError: another file is there already; the message names each.
        RecordError: the folder cannot be written.
    """
    files = {folder / place: content for place, content in starter_files().items()}
    if os.path.lexists(folder / GITIGNORE):  # most repositories have one
        del files[folder / GITIGNORE]
    taken = [str(path) for path in files if os.path.lexists(path)]
    if taken:
        raise StarterError(
            f"{', '.join(taken)} {'is' if len(taken) == 1 else 'are'} there already, and nothing was written. "
            "Choose another folder: delta-suite init DIR"
        )
    write_together(files.items())
    return list(files)
