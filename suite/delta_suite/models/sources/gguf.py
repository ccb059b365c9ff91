"""GGUF files that a user names by their path. (A package or a repository of the hub may hold GGUF files as well.)"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.models.sources.directory import Directory

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec

SUFFIX = ".gguf"


class GgufFile(Directory):
    """One GGUF file, which holds weights, config and tokenizer, named among the files of a directory."""

    def provides(self, spec: ModelSpec) -> bool:
        """Return True if the model is a GGUF file in a directory."""
        return spec.path is not None and spec.gguf is not None

    def describe(self, spec: ModelSpec) -> str:
        """Return "directory:", the path of the directory, and the name of the file."""
        return f"{super().describe(spec)}/{spec.gguf}"

    def entry_for_path(self, path: Path) -> dict[str, Any] | None:
        """Return the entry of a .gguf file; None for anything else."""
        return {"path": path.parent, "gguf": path.name} if path.is_file() and path.suffix == SUFFIX else None
