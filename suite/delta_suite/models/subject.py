"""`Subject`: a model to measure, and what is known of it before its weights are loaded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from delta_suite.errors import DeviceError
from delta_suite.models.control import control_fingerprint
from delta_suite.models.device import resolve_device
from delta_suite.models.files import ModelFiles
from delta_suite.models.fingerprint import fingerprint
from delta_suite.models.phases import PhaseMap
from delta_suite.models.sources import locate
from delta_suite.models.spec import ModelSpec
from delta_suite.process_group import current
from delta_suite.progress import Progress, no_progress

if TYPE_CHECKING:
    from delta_suite.models.loading import LoadedModel


class Subject(ABC):
    """A model to measure: what it is called, what tells it from every other one, and how to get it ready."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name in tables and result folders."""

    @property
    @abstractmethod
    def source(self) -> str:
        """Place of the weights, as records write it."""

    @property
    @abstractmethod
    def phases(self) -> PhaseMap | None:
        """Declared phases; None divides by depth."""

    @property
    @abstractmethod
    def layers_path(self) -> str | None:
        """Dotted path of the decoder blocks, where one is given."""

    @property
    @abstractmethod
    def device(self) -> str:
        """Device it runs on: "cpu", "mps", "cuda", "cuda:1", or "sharded". Raises DeviceError."""

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Dtype that was asked for, "auto" for that of the weights."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides what is measured. Raises ModelUnavailableError."""

    @property
    def revision(self) -> str | None:
        """Commit of the hub, where there is one."""
        return None

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the user about where it was found."""
        return ()

    def require_parallel(self) -> None:
        """Raise DeviceError where several processes were started, and cannot load it together."""
        if current().mode:
            raise DeviceError(f"{self.name}: a module in memory is measured by the process that holds it.")

    @abstractmethod
    def opened(self) -> AbstractContextManager[LoadedModel]:
        """Return a context in which the model is ready for forward passes. Raises as `loading.load` does."""


@dataclass(frozen=True)
class StoredModel(Subject):
    """A model in files, on this machine or on the hub. Nothing is looked up before it is asked for."""

    spec: ModelSpec
    device_asked: str = "auto"
    dtype_asked: str | None = None
    """None for the dtype of the model's entry."""
    memo: Path | None = None
    """Folder of the hashes of weight files already read."""
    download: bool = True
    """True to fetch the files of a hub model that are not here."""
    progress: Progress = no_progress
    """Shows how many bytes are hashed, where they are many."""

    @property
    def name(self) -> str:
        """Name of the model's entry."""
        return self.spec.name

    @property
    def source(self) -> str:
        """Place of the weights."""
        return self.spec.source

    @property
    def phases(self) -> PhaseMap | None:
        """Phases of the model's entry."""
        return self.spec.phases

    @property
    def layers_path(self) -> str | None:
        """Path of the blocks in the model's entry."""
        return self.spec.layers_path

    @property
    def dtype(self) -> str:
        """Dtype that was asked for, else that of the model's entry."""
        return self.spec.dtype if self.dtype_asked is None else self.dtype_asked

    @cached_property
    def device(self) -> str:
        """Device that was asked for, or the best one here."""
        return resolve_device(self.device_asked, self.spec)

    @cached_property
    def files(self) -> ModelFiles:
        """Files of the model. Raises ModelUnavailableError."""
        return locate(self.spec, download=self.download)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over the files; for a control over config, tokenizer and seed."""
        if self.spec.random_weights:
            return control_fingerprint(self.files)
        return fingerprint(self.files, self.memo, self.progress)

    @property
    def revision(self) -> str | None:
        """Commit of the hub; a control belongs to none."""
        return None if self.spec.random_weights else self.files.revision or self.spec.revision

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes about the files."""
        return tuple(f"{self.name}: {note}" for note in self.files.notes)

    def require_parallel(self) -> None:
        """Raise DeviceError where several processes were started, and cannot load it together."""
        if current().mode:
            from delta_suite.models.parallel import require_parallel

            require_parallel(self.spec, self.files, current())

    @contextmanager
    def opened(self) -> Iterator[LoadedModel]:
        """Load the model onto its device."""
        from delta_suite.models.loading import load

        yield load(self.spec, self.files, device=self.device, dtype=self.dtype)
