"""The interface of a model source: a kind of place that weights come from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from delta_suite.errors import UnavailableError
from delta_suite.models.files import ModelFiles, model_files
from delta_suite.models.weights import weights_problem

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec


class Source(ABC):
    """A kind of place that weights come from. Subclasses hold all that is particular to one kind."""

    key: ClassVar[str]
    """Key of a models.toml entry, and field of `ModelSpec`, that names the place."""
    has_revisions: ClassVar[bool] = False
    """True if one place holds several revisions of a model, which `name@revision` picks from."""

    @abstractmethod
    def provides(self, spec: ModelSpec) -> bool:
        """Return True if the weights of `spec` come from this source. Exactly one source answers True."""

    @abstractmethod
    def describe(self, spec: ModelSpec) -> str:
        """Return the place as records write it, such as "hub:org/name"."""

    @abstractmethod
    def locate(self, spec: ModelSpec, *, download: bool) -> ModelFiles:
        """Return the model's files, checked to be complete.

        download: fetch missing files if the source can.

        Raises:
            UnavailableError: files are missing or damaged.
        """

    def availability(self, spec: ModelSpec) -> tuple[bool, str]:
        """Return whether the model can be loaded without a network, and where it is, or the problem and its cure."""
        try:
            files = self.locate(spec, download=False)
        except UnavailableError as error:
            return False, f"{error.what}. {error.do}"
        return True, self.whereabouts(files)

    def whereabouts(self, files: ModelFiles) -> str:
        """Return in a few words where the files of a model are."""
        return f"in {files.directory}"

    def entry_problems(self, entry: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Return the problems of an entry that has this source's key, each with the key it is about.

        The key is "" for a problem of the entry as a whole. Values may be of any type: they are checked elsewhere.
        """
        return []

    def entry_for_path(self, path: Path) -> dict[str, Any] | None:
        """Return the entry that an existing path given to `--model` stands for; None if it is not of this source."""
        return None

    def repair(self, spec: ModelSpec, path: Path, problem: str) -> str:
        """Return what to do about a damaged file, without the full stop."""
        return "Run `git lfs pull` there" if "LFS" in problem else "Copy or download it again"

    def complete_files(self, spec: ModelSpec, directory: Path, revision: str | None = None) -> ModelFiles:
        """Return the files of the model in `directory`.

        Raises:
            UnavailableError: files are missing, or damaged as far as headers and sizes show.
        """
        files = model_files(spec, directory, revision)
        for path in (*files.weights, *files.others):
            if problem := weights_problem(path):
                cure = self.repair(spec, path, problem)
                raise UnavailableError(spec.name, f"{problem} (in {directory})", f"{cure}.")
        return files
