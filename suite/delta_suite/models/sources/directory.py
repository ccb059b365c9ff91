"""Models in a directory, as save_pretrained writes it or with one GGUF file in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import UnavailableError
from delta_suite.models.files import ModelFiles
from delta_suite.models.sources.base import Source
from delta_suite.paths import expand_user, is_directory, shorten

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec


class Directory(Source):
    """A directory on this machine."""

    key = "path"

    def provides(self, spec: ModelSpec) -> bool:
        """Return True if the model is a directory, and no GGUF file in it is named."""
        return spec.path is not None and spec.gguf is None

    def describe(self, spec: ModelSpec) -> str:
        """Return "directory:" and the path as the user wrote it."""
        # A path need not be UTF-8, but a record is.
        return "directory:" + str(spec.path).encode("utf-8", "backslashreplace").decode()

    def locate(self, spec: ModelSpec, *, download: bool) -> ModelFiles:
        """Return the files in the directory; nothing is ever downloaded.

        Raises:
            UnavailableError: the directory or files in it are missing, or damaged.
        """
        assert spec.path is not None, f"{spec.name} has no path"
        directory = expand_user(spec.path)
        if not is_directory(directory):
            raise UnavailableError(
                spec.name, f"no directory {shorten(directory)}", "Correct `path` of its entry in models.toml."
            )
        return self.complete_files(spec, directory)

    def entry_for_path(self, path: Path) -> dict[str, Any] | None:
        """Return the entry of a directory; None for a file."""
        return {"path": path} if path.is_dir() else None
