"""`ModelSpec`: which model is measured, and how it is loaded.

No torch, transformers or huggingface_hub is imported here: `pytest --collect-only` and `--help` import this module.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, field_validator, model_validator

from delta_suite.command_line import Dtype
from delta_suite.models.phases import declared_problems
from delta_suite.models.sources import entry_problems, source_of

RANDOM_WEIGHTS = "random-weights"
"""The word after the @ that asks for the control of a model."""

MEMORY = "memory"
"""Source of a model in memory, as records write it."""

CONTROL_SEED = 0
"""Seed that the weights of a control are drawn with."""

CONTROL_DRAW = f"seed {CONTROL_SEED}, splitmix64"
"""How the weights of a control are drawn, in its source and fingerprint. Another way has other words: no record of the
one is taken for the other."""


class Requires(BaseModel):
    """Requirements of a model on the machine that measures it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_memory_gb: Annotated[float, Field(gt=0, strict=True)] | None = None
    """Memory of the GPU, in units of 10^9 bytes; None if the model runs on a CPU as well."""


class ModelSpec(BaseModel):
    """One model, from models.toml or from a `--model` argument.

    Raises:
        ValidationError: fields are unknown or wrong, or the model has not exactly one source.

    Example:
        >>> spec = ModelSpec(name="pythia-70m", hub="EleutherAI/pythia-70m")
        >>> spec.source, spec.at("step8").name, spec.control().name
        ('hub:EleutherAI/pythia-70m', 'pythia-70m@step8', 'pythia-70m@random-weights')
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """Name in test ids, tables and result folders: one path component, without `/`."""
    hub: str | None = None
    """Hugging Face id, "org/name"."""
    revision: str | None = None
    """Branch, tag or commit of the hub id; None means "main"."""
    path: Path | None = None
    """Directory that holds the model."""
    package: str | None = None
    """Python package that carries the weights; it is looked up, never imported."""
    gguf: str | None = None
    """GGUF file inside the repository, directory or package; None if the weights are safetensors."""
    parts: Annotated[StrictInt, Field(ge=2)] | None = None
    """Number of packages that the GGUF file is cut over: the name of the package, with 1, 2 and so on behind it."""
    licence: str | None = None
    """Licence of the weights, as lists of models show it."""
    dtype: Dtype = "auto"
    """Dtype of the weights."""
    requires: Requires = Requires()
    """Requirements on the machine."""
    phases: dict[str, tuple[StrictInt, StrictInt]] | None = None
    """Declared phases, name -> first and last layer, inclusive; None divides by depth (`phase_map`)."""
    checkpoints: tuple[str, ...] = ()
    """Revisions worth measuring as `name@revision`; others can be measured as well."""
    trust_remote_code: StrictBool = False
    """True to run the Python code that comes with the model."""
    layers_path: str | None = None
    """Dotted path of the decoder blocks, needed only if they cannot be found by structure."""
    allow_pickle: StrictBool = False
    """True to read pytorch_model.bin if there is no safetensors file. A pickle can run code, hence False."""
    random_weights: StrictBool = False
    """True for a control: config and tokenizer are the model's, the weights are freshly initialised and never read."""

    @property
    def argument(self) -> str:
        """The `--model` argument that names this model: its path, or its name."""
        if self.path is None:
            return self.name
        path = str(self.path / self.gguf) if self.gguf else str(self.path)
        return f"{path}@{RANDOM_WEIGHTS}" if self.random_weights else path

    @property
    def series(self) -> tuple[str, int] | None:
        """The training run and the step of a checkpoint, such as ("pythia-410m@step*", 8000).

        They are read from the number at the end of a revision or a directory's name; None if there is no number.
        """
        return series_of(self.name, self.revision if self.path is None else self.path.name)

    @property
    def source(self) -> str:
        """The place of the weights as records write it: "hub:...", "package:.../..." or "directory:...".

        For a control it is the place of its config, such as "random-weights, seed 0, splitmix64, as hub:...".
        """
        place = source_of(self).describe(self)
        return control_source(place) if self.random_weights else place

    @field_validator("phases")
    @classmethod
    def _check_phases(cls, phases: dict[str, tuple[int, int]] | None) -> dict[str, tuple[int, int]] | None:
        if problems := declared_problems(phases or {}):
            raise ValueError("; ".join(problems))
        return phases

    @model_validator(mode="after")
    def _check_source(self) -> Self:
        if problems := entry_problems(self.model_dump()):
            raise ValueError("; ".join(problem for _, problem in problems))
        return self

    def at(self, revision: str) -> ModelSpec:
        """Return the same model at another revision of its hub repository, named `name@revision`."""
        name = f"{self.name}@{revision.replace('/', '--')}"
        return self.model_copy(update={"name": name, "revision": revision})

    def control(self) -> ModelSpec:
        """Return the control: the same architecture and tokenizer with fresh weights, named `name@random-weights`."""
        if self.random_weights:
            return self
        return self.model_copy(update={"name": f"{self.name}@{RANDOM_WEIGHTS}", "random_weights": True})


def control_source(place: str) -> str:
    """Return the source of the control of a model from this place."""
    return f"{RANDOM_WEIGHTS}, {CONTROL_DRAW}, as {place}"


def series_of(name: str, checkpoint: str | None) -> tuple[str, int] | None:
    """Return the training run and the step of a model, from its name and its checkpoint's revision or directory name.

    Example:
        >>> series_of("pythia-410m@step8000", "step8000")
        ('pythia-410m@step*', 8000)
    """
    if not checkpoint or not (number := re.search(r"(\d+)$", checkpoint)) or not name.endswith(number[1]):
        return None
    return f"{name.removesuffix(number[1])}*", int(number[1])


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts step512 before step1000.

    Example:
        >>> sorted(["step1000", "step512"], key=natural_key)
        ['step512', 'step1000']
    """
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]
