"""Who is measured: models.toml -> `ModelSpec`, and what a `--model` argument means.

No torch, transformers or huggingface_hub here: `pytest --collect-only` and `--help` come through this file.
"""

import difflib
import glob
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationError,
    field_validator,
    model_validator,
)

from delta_suite.errors import ModelsFileError, UnknownModelError
from delta_suite.models.phases import DEFAULT_64, declared_problems
from delta_suite.paths import bundled, expand_user, is_directory, path_error, shorten

RANDOM_WEIGHTS = "random-weights"
"""What stands behind the @ of a control."""

CONTROL_SEED = 0
"""The seed that the weights of a control are drawn with."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB_ID_OR_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
"""The hub knows a few models without an organisation ("gpt2"): an entry may name them, `--model` may not."""


class Requires(BaseModel):
    """What a machine must have to measure the model."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpu_memory_gb: Annotated[float, Field(gt=0, strict=True)] | None = None
    """Memory of the GPU, in units of 10^9 bytes; None where the model runs on a CPU as well."""


class ModelSpec(BaseModel):
    """One model, from models.toml or from a `--model` argument."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    """What items, tables and result folders call it: one path component, without `/`."""
    hub: str | None = None
    """Hugging Face id, "org/name"."""
    revision: str | None = None
    """Branch, tag or commit of the hub id; None is "main"."""
    path: Path | None = None
    """A directory."""
    package: str | None = None
    """A Python package that carries the weights; it is looked up, never imported."""
    gguf: str | None = None
    """The GGUF file inside the repository, directory or package; None where the weights are safetensors."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    requires: Requires = Requires()
    phases: dict[str, tuple[StrictInt, StrictInt]] | None = None
    """Declared phases, name -> first and last layer, inclusive; None divides by depth (`phase_map`)."""
    checkpoints: tuple[str, ...] = ()
    """Revisions worth measuring as `name@revision`; others may be asked for as well."""
    trust_remote_code: StrictBool = False
    layers_path: str | None = None
    """Dotted path of the decoder blocks, where they cannot be found by structure."""
    allow_pickle: StrictBool = False
    """Read pytorch_model.bin where there is no safetensors file. A pickle can run code, hence off."""
    random_weights: StrictBool = False
    """The control: config and tokenizer are the model's, the weights are freshly initialised and never read."""

    @property
    def argument(self) -> str:
        """What `--model` calls it: its path, or its name."""
        if self.path is None:
            return self.name
        path = str(self.path / self.gguf) if self.gguf else str(self.path)
        return f"{path}@{RANDOM_WEIGHTS}" if self.random_weights else path

    @property
    def series(self) -> tuple[str, int] | None:
        """The training run and the step that a checkpoint is of, such as ("pythia-410m@step*", 8000).

        Told from a number at the end of a revision, or of a directory's name; None for what has none.
        """
        path = None if self.path is None else self.path.name
        return series_of(self.name, path if self.hub is None else self.revision)

    @property
    def source(self) -> str:
        """Where the weights come from, as records write it: "hub:...", "package:.../...", "directory:...".

        Of a control, where its config comes from: "random-weights, seed 0, as hub:...".
        """
        if self.random_weights:
            return (
                f"{RANDOM_WEIGHTS}, seed {CONTROL_SEED}, as {self.model_copy(update={'random_weights': False}).source}"
            )
        if self.hub is not None:
            return f"hub:{self.hub}" + (f"/{self.gguf}" if self.gguf else "")
        if self.package is not None:
            return f"package:{self.package}/{self.gguf}"
        path = str(self.path).encode("utf-8", "backslashreplace").decode()  # a path need not be UTF-8, a record is
        return f"directory:{path}" + (f"/{self.gguf}" if self.gguf else "")

    @field_validator("hub")
    @classmethod
    def _hub_is_an_id(cls, hub: str | None) -> str | None:
        if hub is not None and not _HUB_ID_OR_NAME.fullmatch(hub):
            raise ValueError(f'{hub!r} is not a hub id: write "org/name", and the revision under `revision`')
        return hub

    @field_validator("phases")
    @classmethod
    def _phases_hold_together(cls, phases: dict[str, tuple[int, int]] | None) -> dict[str, tuple[int, int]] | None:
        if problems := declared_problems(phases or {}):
            raise ValueError("; ".join(problems))
        return phases

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if problems := _source_problems(self.model_dump()):
            raise ValueError("; ".join(problems))
        return self

    def at(self, revision: str) -> "ModelSpec":
        """The same model at another revision of its hub repository, named `name@revision`."""
        name = f"{self.name}@{revision.replace('/', '--')}"
        return self.model_copy(update={"name": name, "revision": revision})

    def control(self) -> "ModelSpec":
        """The same architecture and tokenizer with freshly initialised weights, named `name@random-weights`."""
        if self.random_weights:
            return self
        return self.model_copy(update={"name": f"{self.name}@{RANDOM_WEIGHTS}", "random_weights": True})


@dataclass(frozen=True)
class Registry:
    """The models of one models.toml."""

    specs: Mapping[str, ModelSpec]
    path: Path

    @property
    def phases(self) -> tuple[str, ...]:
        """Every name that a phase can have: those by depth, and those that a model of the file declares."""
        declared = (name for spec in self.specs.values() for name in spec.phases or {})
        return tuple(dict.fromkeys([*DEFAULT_64, *declared]))

    def resolve(self, argument: str) -> ModelSpec:
        """What `--model argument` means: a registry name, a directory or GGUF file, name@revision, a hub id.

        `@random-weights` behind any of them is its control.
        Asked in that order, so a name of the registry wins over a directory called the same (write ./name for
        the directory). A hub id that one entry has is that entry, with its phases and what it requires.
        Raises `UnknownModelError`.
        """
        if argument in self.specs:
            return self.specs[argument]
        where = expand_user(argument)
        if argument and path_error(where) is None:
            return _spec_of_path(argument, where)
        if argument.endswith(f"@{RANDOM_WEIGHTS}") and argument != f"@{RANDOM_WEIGHTS}":
            return self.resolve(argument.removesuffix(f"@{RANDOM_WEIGHTS}")).control()
        base, at, revision = argument.partition("@")
        if not argument.strip() or (at and not revision):
            raise UnknownModelError(f"--model {argument!r} names no model{' revision' if at else ''}. {_HOW}")
        if base in self.specs:
            return self._at_revision(self.specs[base], argument, revision)
        if _looks_like_a_path(base):
            raise UnknownModelError(_no_such_path(argument, where))
        if _HUB_ID.fullmatch(base):
            known = [spec for spec in self.specs.values() if spec.hub == base and spec.gguf is None]
            spec = known[0] if len(known) == 1 else ModelSpec(name=base.replace("/", "--"), hub=base)
            return spec.at(revision) if at else spec
        raise UnknownModelError(self._unknown(argument, base, at + revision))

    def resolve_all(self, argument: str) -> list[ModelSpec]:
        """The same for an argument that may stand for several checkpoints, in the order of their steps.

        `name@step*` means those of the entry's `checkpoints` that match, `runs/tiny/checkpoint-*` the directories and
        GGUF files that do. Raises `UnknownModelError`, also where nothing matches.
        """
        if not any(sign in argument for sign in "*?[") or argument in self.specs or path_error(Path(argument)) is None:
            return [self.resolve(argument)]
        if argument.endswith(f"@{RANDOM_WEIGHTS}"):
            return [spec.control() for spec in self.resolve_all(argument.removesuffix(f"@{RANDOM_WEIGHTS}"))]
        base, at, pattern = argument.partition("@")
        if at and base in self.specs:
            spec = self.specs[base]
            found = sorted((own for own in spec.checkpoints if fnmatchcase(own, pattern)), key=natural)
            if not found:
                known = ", ".join(spec.checkpoints) or "none: list them under `checkpoints`"
                raise UnknownModelError(
                    f"--model {argument}: no checkpoint of {base} matches {pattern!r}. {self.path} names {known}."
                )
            return [self._at_revision(spec, argument, revision) for revision in found]
        if at and _HUB_ID.fullmatch(base):
            raise UnknownModelError(
                f"--model {argument}: the hub is not asked which revisions there are. Make {base} an entry of "
                f"{self.path} with `checkpoints`, or name each revision."
            )
        written = str(expand_user(argument))
        paths = [Path(path) for path in glob.glob(written)]  # noqa: PTH207  (absolute and relative alike)
        models = [path for path in paths if path.is_dir() or path.suffix == ".gguf"]
        if not models:
            there = f"{len(paths)} matches, but no directory or .gguf file" if paths else "nothing matches"
            raise UnknownModelError(
                f"--model {shorten(argument)}: {there} (looked from {Path.cwd()}). Quote the pattern, so that the "
                f"shell leaves it as it is, and check the folder's name."
            )
        return [_spec_of_path(str(path), path) for path in sorted(models, key=lambda path: natural(str(path)))]

    def _at_revision(self, spec: ModelSpec, argument: str, revision: str) -> ModelSpec:
        if spec.hub is None:
            raise UnknownModelError(
                f"--model {argument}: {spec.name} is {spec.source}, which has no revisions; "
                f"name@revision is for models of the hub. Use --model {spec.name}."
            )
        return spec.at(revision)

    def _unknown(self, argument: str, base: str, suffix: str) -> str:
        near = difflib.get_close_matches(base.lower(), self.specs, n=5, cutoff=0.5)
        near = near or [name for name in self.specs if base.lower() in name][:5]
        return (
            f"no model {shorten(argument)!r}: {self.path} has no entry {shorten(base)!r}, "
            "and a name without a slash can only be an entry or a directory that is here.\n"
            + (f"  Nearest names: {', '.join(name + suffix for name in near)}\n" if near else "")
            + f"  {_HOW}\n"
            + "  `delta-suite models` lists every name."
        )


_HOW = (
    "--model takes a name from models.toml, name@revision, a directory (./checkpoints/step-8000), "
    "a .gguf file, a hub id (org/name or org/name@revision), or a pattern (name@step*, './checkpoints/step-*'); "
    "@random-weights behind any of them is its control."
)


def series_of(name: str, checkpoint: str | None) -> tuple[str, int] | None:
    """The training run and the step of a model of this name, from its checkpoint's revision or directory."""
    if not checkpoint or not (number := re.search(r"(\d+)$", checkpoint)) or not name.endswith(number[1]):
        return None
    return f"{name.removesuffix(number[1])}*", int(number[1])


def load_registry(path: Path | None = None) -> Registry:
    """Read a models file.

    Without a path: models.toml of the working directory, else the one that ships with the package. Paths of
    directories in the file count from the file. Raises `ModelsFileError`, which lists every error of the file at once,
    each with file and line.
    """
    candidates = [path] if path is not None else [Path("models.toml"), bundled("models.toml")]
    found = next((candidate for candidate in candidates if path_error(candidate) is None and candidate.is_file()), None)
    if found is None:
        listed = ", ".join(shorten(candidate) for candidate in candidates)
        raise ModelsFileError(f"no models file: looked for {listed}. Pass one with --models-file.")
    try:
        text = found.read_text(encoding="utf-8")
        content = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelsFileError(f"{found} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        line = re.search(r"at line (\d+)", str(error))
        raise ModelsFileError(f"{found}{':' + line[1] if line else ''}: not TOML: {error}") from error

    top = 'models are written as [models."name"]'
    problems = [(_line_of(text, key), f"unknown key {key!r} at the top: {top}") for key in content if key != "models"]
    entries = content.get("models", {})
    if not isinstance(entries, dict):
        raise ModelsFileError(f"{found}:{_line_of(text, 'models')}: `models` is not a table: {top}")
    specs: dict[str, ModelSpec] = {}
    for name, entry in entries.items():
        spec, wrong = _read_entry(name, entry, found.parent)
        problems += [(_line_of(text, key, name), f'[models."{name}"] {problem}') for key, problem in wrong]
        if spec is not None:
            specs[name] = spec
    if problems:
        count = f"{len(problems)} error{'s' if len(problems) > 1 else ''}"
        listed = "".join(f"\n  {found}:{line}: {problem}" for line, problem in sorted(problems))
        raise ModelsFileError(f"{count} in {found}:{listed}")
    return Registry(specs=MappingProxyType(specs), path=found)


def _read_entry(name: str, entry: object, folder: Path) -> tuple[ModelSpec | None, list[tuple[str, str]]]:
    """The spec of one entry, or its problems, each with the key that it is about ("" for the entry)."""
    wrong: list[tuple[str, str]] = []
    if not _NAME.fullmatch(name):
        wrong.append(("", "a name starts with a letter or digit and holds letters, digits, '.', '_' and '-' alone"))
    if not isinstance(entry, dict):
        return None, [*wrong, ("", f"is not a table but {entry!r}")]
    if "name" in entry:
        wrong.append(("name", "`name` is the table's own name: take the key out"))
    values = {**entry, "name": name}
    if isinstance(values.get("path"), str):
        # Paths count from the file that names them, so that a run from elsewhere finds the same directory.
        values["path"] = folder / expand_user(values["path"])
    spec = None
    try:
        spec = ModelSpec.model_validate(values)
    except ValidationError as error:
        wrong += [_explain(dict(detail)) for detail in error.errors() if detail["loc"]]
        # pydantic asks the rules that span keys only where every key is right by itself; here all are told.
        wrong += [("", problem) for problem in _source_problems(entry)]
    return (None, wrong) if wrong else (spec, [])


def _source_problems(entry: Mapping[str, Any]) -> list[str]:
    sources = [key for key in ("hub", "path", "package") if entry.get(key)]
    problems = []
    if len(sources) != 1:
        named = f"names {' and '.join(sources)}" if sources else "names no source"
        problems.append(f"{named}: a model has exactly one of hub, path and package")
    if entry.get("package") and not entry.get("gguf"):
        problems.append("`package` needs `gguf`, the file inside the package")
    problems += [
        f"`{key}` is for models of the hub, and this one is not"
        for key in ("revision", "checkpoints")
        if entry.get(key) and sources and "hub" not in sources
    ]
    return problems


def _explain(detail: dict[str, Any]) -> tuple[str, str]:
    """A pydantic error in our words, with the top key it is about."""
    loc = [str(part) for part in detail["loc"]]
    if detail["type"] == "extra_forbidden":
        known = Requires.model_fields if len(loc) > 1 else ModelSpec.model_fields
        near = difflib.get_close_matches(loc[-1], [key for key in known if key != "name"], n=1)
        hint = (
            f": did you mean {near[0]!r}?" if near else f": the keys are {', '.join(k for k in known if k != 'name')}"
        )
        return loc[0], f"unknown key {'.'.join(loc)!r}{hint}"
    if detail["type"] == "value_error":
        return loc[0], str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "missing":
        return loc[0], f"{'.'.join(loc[:-1])} = {detail['input']!r} is too short: a phase is [first layer, last layer]"
    return loc[0], f"{'.'.join(loc)} = {detail['input']!r} {str(detail['msg']).removeprefix('Input ')}"


def _line_of(text: str, key: str, name: str | None = None) -> int:
    """The line where an entry (or a key of it) stands; tomllib tells lines of syntax errors alone."""
    header = re.compile(rf"\s*\[\s*models\s*\.\s*([\"']?){re.escape(name)}\1\s*(\.|\])") if name else None
    start, inside = 1, header is None
    for number, line in enumerate(text.splitlines(), start=1):
        if header is not None and line.lstrip().startswith("["):
            inside = header.match(line) is not None
            start = number if inside and start == 1 else start
        if inside and key and re.match(rf"\s*\[*\s*[\"']?{re.escape(key)}[\"']?\s*[=.\]]", line):
            return number
        if inside and key and header is not None and re.match(rf".*\.\s*{re.escape(key)}\s*\]", line):
            return number
    return start


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts step512 before step1000."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _looks_like_a_path(argument: str) -> bool:
    return (
        argument.startswith((".", "/", "~"))
        or argument.endswith(("/", ".gguf", ".safetensors"))
        or argument.count("/") > 1
    )


def _no_such_path(argument: str, where: Path) -> str:
    there = where.parent
    while not is_directory(there):
        there = there.parent
    kind = "file" if where.suffix in (".gguf", ".safetensors") else "directory"
    hint = f"{there.absolute()} is there, but nothing below it."
    if there == where.parent:
        names = sorted(child.name for child in there.iterdir() if child.is_dir() == (kind == "directory"))
        names = [name for name in names if not name.startswith(".") and (kind != "file" or ".gguf" in name)]
        near = difflib.get_close_matches(where.name, names, n=3)
        hint = f"{'Nearest' if near else 'What is'} there: {', '.join(near or names[:8]) or f'no {kind}'}."
    return (
        f"no {kind} {shorten(argument)} (looked for {shorten(where.absolute())}: {path_error(where)}). {hint}\n"
        "  A model's directory holds config.json, safetensors weights and a tokenizer, or one .gguf file."
    )


def _spec_of_path(argument: str, where: Path) -> ModelSpec:
    if where.is_dir():
        return ModelSpec(name=_name_of_path(where), path=where)
    if where.suffix == ".gguf":
        return ModelSpec(name=_name_of_path(where.with_suffix("")), path=where.parent, gguf=where.name)
    raise UnknownModelError(
        f"--model {argument} is a file. Pass the directory that holds config.json and the weights, or a .gguf file."
    )


def _name_of_path(where: Path) -> str:
    """A directory's name for items and folders: one path component that tells runA/final from runB/final.

    Below the working directory it is the whole path, elsewhere the last two parts, joined by "--".
    """
    absolute, here = where.resolve(), Path.cwd().resolve()
    below = absolute != here and absolute.is_relative_to(here)
    parts = absolute.relative_to(here).parts if below else absolute.parts[1:][-2:]
    return re.sub(r"[^\w.+@-]", "_", "--".join(parts)).lstrip(".-") or "model"
