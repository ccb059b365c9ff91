"""Load hypothesis files: TOML in, frozen models out, and every error of every file at once, each with its line.

An error reads `path:line: what is wrong, and what to do`. `schema.py` has the models and their rules.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from delta_suite.claims.schema import Expectation, Hypothesis, Than, Xfail
from delta_suite.claims.words import ID, SCOPE, TAG, TEXT, nearest, unknown
from delta_suite.errors import HypothesisFileError
from delta_suite.escaping import terminal
from delta_suite.paths import hypothesis_files, is_directory, shorten
from delta_suite.reading import TOML_LIMIT, UnreadableFileError, decode, parse_toml, read_bytes
from delta_suite.toml_lines import Loc, key_lines, line_of


def load_hypothesis(path: Path) -> Hypothesis:
    """Return the hypothesis in one file.

    Raises:
        HypothesisFileError: the file cannot be read or is wrong; the message has one line for each error.
    """
    return _all_or_errors([_read(path)], [])[0]


def load_hypotheses(paths: Iterable[Path]) -> list[Hypothesis]:
    """Return the hypotheses in these files, and in the .toml files directly in these folders, in sorted order.

    A file that is named twice is read once; a subfolder is read when it is named. pyproject.toml, models.toml and
    pytest's settings in a folder are no hypothesis files.

    Raises:
        HypothesisFileError: a file cannot be read or is wrong, a folder has no files, or two files have the same id;
            the message has one line for each error of each file.
    """
    files: dict[str, _File] = {}
    errors: list[str] = []
    for path in paths:
        named = hypothesis_files(path) if is_directory(path) else [path]
        if not named:
            errors.append(
                f"{shorten(path)}: no hypothesis files (*.toml) in this folder: name another folder, or a file"
            )
        for file in named:
            place = os.path.realpath(file)  # Path.resolve raises for a link to itself
            if place not in files:
                files[place] = _read(file)
    _compare_ids(files.values())
    return _all_or_errors(files.values(), errors)


def require_known_phases(hypotheses: Iterable[Hypothesis], known: Iterable[str]) -> None:
    """Refuse claims over a phase that no model has: they would never be measured, and so never fail.

    known: the phases of all models, as another model may have a phase that this one lacks.

    Raises:
        HypothesisFileError: a phase is unknown; the message has one line for each.
    """
    phases = dict.fromkeys(known)
    errors = [
        f"{shorten(hypothesis.path)}:{claim.line}: [[expect]] {claim.id}: {unknown('phase', phase, phases)}. "
        "A model's own phases are declared under `phases` of its entry in models.toml."
        for hypothesis in hypotheses
        for claim in hypothesis.expect
        for phase in claim.phases
        if phase not in phases
    ]
    if errors:
        raise HypothesisFileError("\n".join(errors))


# --- one file --------------------------------------------------------------------------------------------------


@dataclass
class _File:
    """A file as far as it could be read, and its errors."""

    path: Path
    table: dict[str, Any] = field(default_factory=dict)
    lines: dict[Loc, int] = field(default_factory=dict)
    hypothesis: Hypothesis | None = None
    errors: list[tuple[int, str]] = field(default_factory=list)
    """Line and text; line 0 for an error of the file as a whole."""

    def line(self, loc: Loc) -> int:
        """Return the line of a value or, where the file has no such value, of the table that lacks it."""
        return line_of(self.lines, loc)

    def wrong(self, loc: Loc, what: str) -> None:
        self.errors.append((self.line(loc), what))

    def sorted_errors(self) -> list[str]:
        errors = sorted(self.errors, key=lambda error: error[0])
        return [f"{shorten(self.path)}{f':{line}' if line else ''}: {terminal(what)}" for line, what in errors]


def _all_or_errors(files: Iterable[_File], errors: list[str]) -> list[Hypothesis]:
    hypotheses = []
    for file in files:
        if file.hypothesis is not None:
            hypotheses.append(file.hypothesis)
        errors = errors + file.sorted_errors()
    if errors:
        raise HypothesisFileError("\n".join(errors))
    return hypotheses


def _read(path: Path) -> _File:
    file = _File(path)
    try:
        content = read_bytes(path, TOML_LIMIT)
        text = decode(content, path)
    except UnreadableFileError as error:
        file.errors.append((error.line, error.why) if error.line else (0, f"cannot be read: {error.why}"))
        return file
    if not text.strip():
        file.errors.append(
            (1, 'is empty: begin with schema = 1 and id = "...", and make a claim in an [[expect]] table')
        )
        return file
    try:
        file.table = parse_toml(text, path)
    except UnreadableFileError as error:
        file.errors.append(_syntax_error(error, text))
        return file
    file.lines = key_lines(text)
    document = _checked_ids(file)
    try:
        file.hypothesis = Hypothesis.model_validate(
            {**document, "path": path, "sha256": hashlib.sha256(content).hexdigest()}
        )
    except ValidationError as invalid:
        for loc, what in _explain_all(invalid.errors(include_url=False)):
            file.wrong(loc, what)
    return file


def _syntax_error(error: UnreadableFileError, text: str) -> tuple[int, str]:
    """Return line and text of a syntax error. tomllib puts the place into its message: "... (at line 3, column 5)"."""
    what, _, place = error.why.removeprefix("not TOML: ").partition(" (at ")
    column = re.search(r", column \d+", place)
    line = error.line or text.rstrip().count("\n") + 1
    where = column[0] if column else ""
    return line, f"not TOML{where}: {what}; correct this first, the rest of the file was not checked"


def _checked_ids(file: _File) -> dict[str, Any]:
    """Return the file's table with the line of each claim; note keys of the loader, and ids that are given twice."""
    document = _without_loader_fields(file, (), file.table)
    claims = document.get("expect")
    if not isinstance(claims, list):
        return document
    document["expect"] = [
        _without_loader_fields(file, ("expect", index), claim) | {"line": file.line(("expect", index))}
        if isinstance(claim, dict)
        else claim
        for index, claim in enumerate(claims)
    ]
    lines: dict[str, int] = {}
    for index, claim in enumerate(claims):
        name = claim.get("id") if isinstance(claim, dict) else None
        if isinstance(name, str):
            loc = ("expect", index, "id")
            if name in lines:
                file.wrong(loc, f"id '{name}' is that of the claim in line {lines[name]} too: rename one of them")
            lines.setdefault(name, file.line(loc))
    return document


def _without_loader_fields(file: _File, loc: Loc, table: dict[str, Any]) -> dict[str, Any]:
    for key in _FROM_LOADER & table.keys():
        file.wrong((*loc, key), _unknown_key((*loc, key)))
    return {key: value for key, value in table.items() if key not in _FROM_LOADER}


def _compare_ids(files: Iterable[_File]) -> None:
    first: dict[str, _File] = {}
    for file in files:
        name = file.table.get("id")
        if isinstance(name, str) and (other := first.setdefault(name, file)) is not file:
            place = f"{other.path}:{other.line(('id',))}"
            file.wrong(("id",), f"hypothesis id '{name}' is that of {place} too: rename one of them")


# --- texts of errors ------------------------------------------------------------------------------------------

_MODELS: dict[str, type[BaseModel]] = {"expect": Expectation, "": Hypothesis, "than": Than, "xfail": Xfail}
"""The model of each table by its name, "" for the top of the file. A misplaced key is looked up in this order."""

_TITLES = {"": "the head of the file", "expect": "[[expect]]", "than": "than", "xfail": "[[expect.xfail]]"}

_FROM_LOADER = {"schema_version", "with_metric", "line", "path", "sha256"}
"""Fields of the models that are no keys of a file."""

_KEYS = {
    table: [key for name, info in model.model_fields.items() if (key := info.alias or name) not in _FROM_LOADER]
    for table, model in _MODELS.items()
}

_KINDS = {
    "string_type": 'a string, "..."',
    "int_type": "a whole number",
    "float_type": "a number",
    "tuple_type": "an array, [...]",
    "model_type": "a table",
}
"""The expected type of a value, by pydantic's name of the error."""

_PATTERN_RULES = {
    ID: "write it in small letters, digits and hyphens, beginning with a letter or digit",
    SCOPE: "name a phase (C), one layer (layer:3), a range of layers (layers:8-15), a share of the depth "
    "(depth:0.5-1) or all layers (model)",
    TAG: "a pytest marker has letters, digits, hyphens and underscores, and begins with a letter",
    TEXT: "write at least a word",
}


def _explain_all(errors: list[ErrorDetails]) -> list[tuple[Loc, str]]:
    """Return place and text of each error, without those that follow from another: a misspelt key is missing, too."""
    meant = {
        (*error["loc"][:-1], near)
        for error in errors
        if error["type"] == "extra_forbidden" and (near := nearest(str(error["loc"][-1]), _KEYS[_table(error["loc"])]))
    }
    explained = []
    for error in errors:
        loc, kind = error["loc"], error["type"]
        table = loc[:-1]
        if kind == "missing" and loc in meant:
            continue
        if kind == "no_requirement" and meant & {(*table, "threshold"), (*table, "than")}:
            continue
        if kind == "too_short" and error["input"]:  # pydantic counts the items that are right
            continue
        at = error.get("ctx", {}).get("at")
        explained.append(((*loc, at) if at else loc, _explain(error)))
    return explained


def _explain(error: ErrorDetails) -> str:
    loc, given, context = error["loc"], error["input"], error.get("ctx", {})
    key = loc[-1]
    name = key if isinstance(key, str) else f"item {key + 1} of {loc[-2]}"
    match error["type"]:
        case "extra_forbidden":
            return _unknown_key(loc)
        case "missing":
            info = next(i for n, i in _MODELS[_table(loc)].model_fields.items() if key in (n, i.alias))
            return f"missing key '{key}' in {_TITLES[_table(loc)]}: add it ({info.description})"
        case "literal_error":
            options = get_args(_MODELS[_table(loc)].model_fields[name].annotation)
            if isinstance(given, str):
                return unknown(name, given, options)
            return f"{name} must be one of {', '.join(options)}, not {_describe(given)}"
        case "tuple_type" if isinstance(given, dict) and name in _TITLES:
            return f"{name} is one table, and must be an array of them: write its header as {_TITLES[name]}"
        case "string_pattern_mismatch":
            return f"{name} is {_describe(given)}: {_PATTERN_RULES[context['pattern']]}"
        case "too_short":
            return f"{name} is empty: give at least one"
        case "finite_number":
            return f"{name} is {given}, which nothing can be compared with: write a finite number"
        case "greater_than" | "greater_than_equal" | "less_than_equal":
            limit = error["msg"].removeprefix("Input should be ")
            return f"{name} is {given}, and must be {limit}"
        case kind if kind in _KINDS:
            return f"{name} must be {_KINDS[kind]}, not {_describe(given)}"
        case _:
            return error["msg"]


def _table(loc: Loc) -> str:
    """Return the name of the table that holds a key, "" for the top of the file."""
    return next((part for part in reversed(loc[:-1]) if isinstance(part, str)), "")


def _unknown_key(loc: Loc) -> str:
    key, table = str(loc[-1]), _table(loc)
    home = next((other for other in _KEYS if key in _KEYS[other]), None)
    if home is not None:
        return f"'{key}' is a key of {_TITLES[home]}, not of {_TITLES[table]}: move it there"
    return unknown("key", key, _KEYS[table])


def _describe(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return f'"{value}"' if len(value) <= 40 else f'"{value[:40]}..."'
        case int() | float():
            return str(value)
        case list():
            return "an array"
        case dict():
            return "a table"
        case _:
            return "a date or time"
