"""The models of models.toml, and what a `--model` argument means.

No torch, transformers or huggingface_hub is imported here: `pytest --collect-only` and `--help` import this module.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from delta_suite.errors import ModelsFileError, UnknownModelError
from delta_suite.escaping import terminal
from delta_suite.models.phases import DEFAULT_64
from delta_suite.models.sources import SOURCES, entry_problems, source_of
from delta_suite.models.sources.hub import HUB_ID
from delta_suite.models.spec import RANDOM_WEIGHTS, ModelSpec, Requires, natural_key
from delta_suite.paths import bundled, expand_user, is_directory, path_error, shorten
from delta_suite.reading import TOML_LIMIT, UnreadableFileError, parse_toml, read_text
from delta_suite.toml_lines import Loc, key_lines, line_of

MODELS_FILE = "models.toml"
"""Name of the models file, in the working directory or in the package."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_HOW = (
    f"--model takes a name from {MODELS_FILE}, name@revision, a directory (./checkpoints/step-8000), "
    "a .gguf file, a hub id (org/name or org/name@revision), or a pattern (name@step*, './checkpoints/step-*'); "
    f"@{RANDOM_WEIGHTS} behind any of them is its control."
)

_Problem = tuple[Loc, str]
"""The place in the file that an error is about, and its text."""


@dataclass(frozen=True)
class Registry:
    """The models of one models file.

    Example:
        >>> registry = Registry(specs={}, path=None)
        >>> registry.resolve("acme/tiny@step8").source
        'hub:acme/tiny'
    """

    specs: Mapping[str, ModelSpec]
    """Name -> model, in the order of the file."""
    path: Path | None
    """The file; None if there is none, which paths and hub ids do without."""

    @property
    def phases(self) -> tuple[str, ...]:
        """Every name that a phase can have: those by depth, and those that a model of the file declares."""
        declared = (name for spec in self.specs.values() for name in spec.phases or {})
        return tuple(dict.fromkeys([*DEFAULT_64, *declared]))

    def resolve(self, argument: str) -> ModelSpec:
        """Return the model that `--model argument` means.

        That is, in this order: an entry of the models file, an existing directory or GGUF file, an entry at a revision
        (`name@revision`), a hub id. With `@random-weights` behind it, it is the control of that model. So an entry wins
        over a directory of the same name (write ./name for the directory). A hub id that exactly one entry has stands
        for that entry, with its phases and requirements.

        Raises:
            UnknownModelError: it means none of these; the message names what is near.
        """
        if argument in self.specs:
            return self.specs[argument]
        path = expand_user(argument)
        if argument and path_error(path) is None:
            return _spec_of_path(argument, path)
        if argument.endswith(f"@{RANDOM_WEIGHTS}") and argument != f"@{RANDOM_WEIGHTS}":
            return self.resolve(argument.removesuffix(f"@{RANDOM_WEIGHTS}")).control()
        base, at, revision = argument.partition("@")
        if not argument.strip() or (at and not revision):
            raise UnknownModelError(f"--model {argument!r} names no model{' revision' if at else ''}. {_HOW}")
        if base in self.specs:
            return _at_revision(self.specs[base], argument, revision)
        if _looks_like_a_path(base):
            raise UnknownModelError(_no_such_path(argument, path))
        if HUB_ID.fullmatch(base):
            entries = [spec for spec in self.specs.values() if spec.hub == base and spec.gguf is None]
            spec = entries[0] if len(entries) == 1 else ModelSpec(name=base.replace("/", "--"), hub=base)
            return spec.at(revision) if at else spec
        raise UnknownModelError(self._unknown(argument, base, at + revision))

    def resolve_all(self, argument: str) -> list[ModelSpec]:
        """Return the models that an argument with or without wildcards means, in the order of their steps.

        `name@step*` means the matching `checkpoints` of the entry, `runs/tiny/checkpoint-*` the matching directories
        and GGUF files. A folder that is there under the very name that is written, brackets and all, is that folder.

        Raises:
            UnknownModelError: nothing matches, or an argument without wildcards means no model.
        """
        has_wildcard = any(sign in argument for sign in "*?[")
        if not has_wildcard or argument in self.specs or path_error(expand_user(argument)) is None:
            return [self.resolve(argument)]
        if argument.endswith(f"@{RANDOM_WEIGHTS}"):
            return [spec.control() for spec in self.resolve_all(argument.removesuffix(f"@{RANDOM_WEIGHTS}"))]
        base, at, pattern = argument.partition("@")
        if at and base in self.specs:
            return self._matching_checkpoints(self.specs[base], argument, pattern)
        paths = list(_matching(Path(), expand_user(argument).parts))
        if at and not paths and HUB_ID.fullmatch(base):
            raise UnknownModelError(
                f"--model {argument}: the hub is not asked which revisions there are. Make {base} an entry of "
                f"{self.path or MODELS_FILE} with `checkpoints`, or name each revision."
            )
        return _models_of_paths(argument, paths)

    def told_apart(self, specs: Sequence[ModelSpec]) -> list[ModelSpec]:
        """Return the models of one run, in the same order, so that equal names mean equal models.

        Models that paths name get longer names where two would share one, or would look like checkpoints of one
        training run: of `/a/run/step-5` and `/b/run/step-5` these are a--run--step-5 and b--run--step-5.

        Raises:
            UnknownModelError: two models share a name that cannot be made longer.
        """
        named, more = list(specs), [0] * len(specs)
        while groups := self._clashing(named):
            changed = False
            for index in (index for group in groups for index in group if self._is_named_by_path(specs[index])):
                more[index] += 1
                longer = _name_of_spec(specs[index], more[index])
                changed = changed or longer != named[index].name
                named[index] = specs[index].model_copy(update={"name": longer})
            if not changed:
                first, second = (named[group[0]] for group in groups[:2])
                raise UnknownModelError(
                    f"{_place(first)} and {_place(second)} are two models, and their names do not tell them apart "
                    f"({', '.join(dict.fromkeys([first.name, second.name]))}). Measure one at a time, or give one an "
                    f"entry with a name of its own in {MODELS_FILE}."
                )
        return named

    def _clashing(self, specs: Sequence[ModelSpec]) -> list[list[int]]:
        """Return the positions of models that share a name, or a training run's in two folders, grouped by model."""
        sharing: dict[str, dict[str, list[int]]] = {}
        for index, spec in enumerate(specs):
            path = None if spec.path is None else expand_user(spec.path).resolve()
            same = repr(spec.model_copy(update={"path": path}))
            sharing.setdefault(spec.name, {}).setdefault(same, []).append(index)
            if path is not None and spec.series is not None and self._is_named_by_path(spec):
                sharing.setdefault(spec.series[0], {}).setdefault(str(path.parent), []).append(index)
        return next((list(models.values()) for models in sharing.values() if len(models) > 1), [])

    def _is_named_by_path(self, spec: ModelSpec) -> bool:
        """Return True for a model that a path names, and not an entry of the file."""
        entry = self.specs.get(spec.name.removesuffix(f"@{RANDOM_WEIGHTS}"))
        return spec.path is not None and (entry is None or entry.path != spec.path)

    def _matching_checkpoints(self, spec: ModelSpec, argument: str, pattern: str) -> list[ModelSpec]:
        revisions = [revision for revision in spec.checkpoints if fnmatchcase(revision, pattern)]
        if not revisions:
            known = ", ".join(spec.checkpoints) or "none: list them under `checkpoints`"
            raise UnknownModelError(
                f"--model {argument}: no checkpoint of {spec.name} matches {pattern!r}. {self.path} names {known}."
            )
        return [_at_revision(spec, argument, revision) for revision in sorted(revisions, key=natural_key)]

    def _unknown(self, argument: str, base: str, suffix: str) -> str:
        """Return the message about a bare name that is no entry."""
        if suffix and is_directory(Path(base)):
            known = f"{shorten(base)} is a folder, which has no revisions"
            return f"no model {shorten(argument)!r}: {known}. Leave {shorten(suffix)} out."
        if self.path is None:
            return (
                f"no model {shorten(argument)!r}: there is no models file (looked for {_looked_for()}), and a name "
                f"without a slash can only be an entry of one or a directory that is here.\n  {_HOW}\n"
                "  Pass a models file with --models-file."
            )
        near = difflib.get_close_matches(base.lower(), self.specs, n=5, cutoff=0.5)
        near = near or [name for name in self.specs if base.lower() in name][:5]
        return (
            f"no model {shorten(argument)!r}: {self.path} has no entry {shorten(base)!r}, "
            "and a name without a slash can only be an entry or a directory that is here.\n"
            + (f"  Nearest names: {', '.join(name + suffix for name in near)}\n" if near else "")
            + f"  {_HOW}\n"
            + "  `delta-suite models` lists every name."
        )


# --- reading the file ------------------------------------------------------------------------------------------


def load_registry(path: Path | None = None) -> Registry:
    """Return the models of a models file.

    Without a path it is models.toml of the working directory, or else the one that ships with the package; if neither
    is there, the registry is empty and its path None. Paths of directories in the file count from the file.

    Raises:
        ModelsFileError: the path is not a file, or the file cannot be read or has errors; the message lists every
            error with file and line.
    """
    candidates = _default_files() if path is None else [path]
    # A pipe or a broken link of that name is refused: another file in its place would hold other models.
    file = next((candidate for candidate in candidates if os.path.lexists(candidate)), None)
    if file is not None:
        return _read(file)
    if path is None:
        return Registry(specs=MappingProxyType({}), path=None)
    raise ModelsFileError(f"no models file: looked for {shorten(path)}. Pass another one with --models-file.")


def _default_files() -> list[Path]:
    return [Path(MODELS_FILE), bundled(MODELS_FILE)]


def _looked_for() -> str:
    return " and ".join(shorten(candidate.absolute()) for candidate in _default_files())


def _read(file: Path) -> Registry:
    try:
        text = read_text(file, TOML_LIMIT)
        content = parse_toml(text, file)
    except UnreadableFileError as error:
        raise ModelsFileError(str(error)) from None

    entries = content.get("models", {})
    top = 'models are written as [models."name"]'
    problems: list[_Problem] = [
        ((key,), f"unknown key {key!r} at the top: {top}") for key in content if key != "models"
    ]
    if not isinstance(entries, dict):
        problems.append((("models",), f"`models` is not a table: {top}"))
        entries = {}
    specs: dict[str, ModelSpec] = {}
    for name, entry in entries.items():
        spec, entry_errors = _read_entry(name, entry, file.parent)
        problems += [
            (("models", name, *loc), f'[models."{terminal(name)}"] {problem}') for loc, problem in entry_errors
        ]
        if spec is not None:
            specs[name] = spec
    if problems:
        lines = key_lines(text)
        errors = sorted((line_of(lines, loc), problem) for loc, problem in problems)
        count = f"{len(errors)} error{'s' if len(errors) > 1 else ''}"
        listed = "".join(f"\n  {file}:{line}: {problem}" for line, problem in errors)
        raise ModelsFileError(f"{count} in {file}:{listed}")
    return Registry(specs=MappingProxyType(specs), path=file)


def _read_entry(name: str, entry: object, folder: Path) -> tuple[ModelSpec | None, list[_Problem]]:
    """Return the spec of one entry, or None and its problems, each with its place in the entry."""
    problems: list[_Problem] = []
    if not _NAME.fullmatch(name):
        problems.append(((), "a name starts with a letter or digit and holds only letters, digits, '.', '_' and '-'"))
    if not isinstance(entry, dict):
        return None, [*problems, ((), f"is not a table but {entry!r}")]
    if "name" in entry:
        problems.append((("name",), "`name` is the table's name already: take the key out"))
    values = {**entry, "name": name}
    if isinstance(values.get("path"), str):
        # Paths count from the file that names them, so that a run from elsewhere finds the same directory.
        values["path"] = folder / expand_user(values["path"])
    spec = None
    try:
        spec = ModelSpec.model_validate(values)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors() if detail["loc"]]
        # pydantic checks rules that span keys only if every key is right by itself; here all are told at once.
        problems += [((key,) if key else (), problem) for key, problem in entry_problems(entry)]
    return (None, problems) if problems else (spec, [])


def _explain(detail: ErrorDetails) -> _Problem:
    """Return the place and the text of a pydantic error."""
    loc = detail["loc"]
    words = [str(part) for part in loc]
    dotted = ".".join(words)
    match detail["type"]:
        case "extra_forbidden":
            fields = Requires.model_fields if len(loc) > 1 else ModelSpec.model_fields
            keys = [key for key in fields if key != "name"]
            near = difflib.get_close_matches(words[-1], keys, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(keys)}"
            return loc, f"unknown key {dotted!r}: {hint}"
        case "value_error":
            return loc, detail["msg"].removeprefix("Value error, ")
        case "missing":
            phase = ".".join(words[:-1])
            return loc, f"{phase} = {_shown(detail['input'])} is too short: a phase is [first layer, last layer]"
        case "path_type":
            return loc, f"{dotted} = {_shown(detail['input'])} should be a path, as text"
        case "tuple_type" if words[0] == "phases":
            return loc, f"{dotted} = {_shown(detail['input'])} is no phase, which is [first layer, last layer]"
        case _:
            return loc, f"{dotted} = {_shown(detail['input'])} {detail['msg'].removeprefix('Input ')}"


def _shown(value: Any) -> str:
    return shorten(repr(value))


# --- models from paths -----------------------------------------------------------------------------------------


def _at_revision(spec: ModelSpec, argument: str, revision: str) -> ModelSpec:
    if not source_of(spec).has_revisions:
        raise UnknownModelError(
            f"--model {argument}: {spec.name} is {spec.source}, which has no revisions; "
            f"name@revision is for models of the hub. Use --model {spec.name}."
        )
    return spec.at(revision)


def _entry_for_path(path: Path) -> dict[str, Any] | None:
    entries = (source.entry_for_path(path) for source in SOURCES)
    return next((entry for entry in entries if entry is not None), None)


def _spec_of_path(argument: str, path: Path) -> ModelSpec:
    entry = _entry_for_path(path)
    if entry is None:
        raise UnknownModelError(
            f"--model {argument} is a file. Pass the directory that holds config.json and the weights, or a .gguf file."
        )
    spec = ModelSpec(name="model", **entry)
    return spec.model_copy(update={"name": _name_of_spec(spec)})


def _matching(folder: Path, parts: Sequence[str]) -> Iterator[Path]:
    """Yield the paths below a folder that match a pattern, part by part."""
    if not parts:
        yield folder
        return
    as_written = path_error(folder / parts[0]) is None
    for name in [parts[0]] if as_written else glob.glob(parts[0], root_dir=folder):  # noqa: PTH207  (no hidden files)
        yield from _matching(folder / name, parts[1:])


def _models_of_paths(argument: str, paths: list[Path]) -> list[ModelSpec]:
    """Return the models among the paths that match an argument, in the order of their steps."""
    models = [path for path in paths if _entry_for_path(path) is not None]
    if not models:
        reason = f"{len(paths)} matches, but no directory or .gguf file" if paths else "nothing matches"
        bracket = " A bracket stands for one of the signs in it; write [[] for the bracket itself."
        raise UnknownModelError(
            f"--model {shorten(argument)}: {reason} (looked from {Path.cwd()}). Quote the pattern, so that the "
            f"shell leaves it as it is, and check the folder's name.{bracket if '[' in argument else ''}"
        )
    return [_spec_of_path(str(path), path) for path in sorted(models, key=lambda path: natural_key(str(path)))]


def _looks_like_a_path(argument: str) -> bool:
    return (
        argument.startswith((".", "/", "~"))
        or argument.endswith(("/", ".gguf", ".safetensors"))
        or argument.count("/") > 1
    )


def _no_such_path(argument: str, path: Path) -> str:
    """Return the message about a path that does not exist, with what its nearest existing folder holds."""
    folder = path.parent
    while not is_directory(folder):
        folder = folder.parent
    kind = "file" if path.suffix in (".gguf", ".safetensors") else "directory"
    hint = f"{folder.absolute()} is there, but nothing below it."
    if folder == path.parent:
        names = sorted(child.name for child in folder.iterdir() if child.is_dir() == (kind == "directory"))
        names = [name for name in names if not name.startswith(".") and (kind != "file" or ".gguf" in name)]
        near = difflib.get_close_matches(path.name, names, n=3)
        listed = ", ".join(near or names[:8])
        hint = (
            f"{'Nearest' if near else 'Others'} there: {listed}." if listed else f"{folder.absolute()} has no {kind}."
        )
    return (
        f"no {kind} {shorten(argument)} (looked for {shorten(path.absolute())}: {path_error(path)}). {hint}\n"
        "  A model's directory holds config.json, safetensors weights and a tokenizer, or one .gguf file."
    )


def _name_of_spec(spec: ModelSpec, more: int = 0) -> str:
    """Return a name for the model of a path that is one path component, and tells runA/final from runB/final.

    Below the working directory it is made of the whole path, elsewhere of the last two parts, joined by "--".

    more: how many more parents it is made of.
    """
    assert spec.path is not None, f"{spec.name} has no path"
    path = spec.path if spec.gguf is None else (spec.path / spec.gguf).with_suffix("")
    absolute, here = path.resolve(), Path.cwd().resolve()
    below = absolute != here and absolute.is_relative_to(here)
    usual = len(absolute.relative_to(here).parts) if below else 2
    name = re.sub(r"[^\w.+@-]", "_", "--".join(absolute.parts[1:][-usual - more :])).lstrip(".-") or "model"
    return f"{name}@{RANDOM_WEIGHTS}" if spec.random_weights else name


def _place(spec: ModelSpec) -> str:
    """Return what a user knows a model by."""
    return spec.argument if spec.path is not None else f"{spec.source} at {spec.revision or 'main'}"
