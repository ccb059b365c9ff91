"""Errors of transformers about a config, told as key, value, and what belongs there.

transformers names the field of a class, or the bare word that a table does not have, and never the file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from delta_suite.errors import UnavailableError, brief
from delta_suite.models.files import nested
from delta_suite.models.spec import ModelSpec
from delta_suite.paths import shorten

CORRECT = "Correct it, or save or download the file again."
"""The cure for a value that cannot be."""

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "bool": "true or false",
    "list": "a list",
    "dict": "a table",
    "NoneType": "null",
}
"""Type of Python -> what JSON calls it."""

_FIELD = re.compile(r"Validation error for field '(\w+)'")
_EXPECTED = re.compile(r"expected (\w+), got")


def impossible(spec: ModelSpec, where: Path, key: str, value: object, why: str) -> UnavailableError:
    """Return the error for a value that a config cannot have."""
    shown = json.dumps(value) if value is None or isinstance(value, bool) else shorten(repr(value))
    return UnavailableError(spec.name, f"{where} says {key} = {shown}, {why}", CORRECT)


def wrong_value(spec: ModelSpec, where: Path, content: Mapping[str, Any], error: Exception) -> UnavailableError | None:
    """Return what an error of transformers while it reads a config says, by key and value; None where it tells neither.

    content: that of the file.
    """
    if not type(error).__name__.startswith("StrictDataclass"):
        return None
    if (field := _FIELD.search(str(error))) is None:  # of values that do not fit each other the cause says which
        why = " ".join((str(error).partition("\n")[2].strip() or brief(error))[:300].split()).removesuffix(".")
        return UnavailableError(spec.name, f"{where} has values that cannot be ({why})", CORRECT)
    kinds = set(_EXPECTED.findall(str(error)))
    kinds -= {"int"} if "float" in kinds else set()
    belongs = [word for kind, word in _WORDS.items() if kind in kinds]
    for key, value in _all_keys(content):
        if key.rpartition(".")[2] == field[1] and f"{value!r}" in str(error):
            return impossible(spec, where, key, value, f"where {' or '.join(belongs) or 'another value'} belongs")
    return None


def unknown_word(spec: ModelSpec, where: Path, content: Mapping[str, Any], error: Exception) -> UnavailableError | None:
    """Return the error for a word of a config that transformers looked up in a table and did not find, such as a
    `hidden_act`; None for any other error.
    """
    word = error.args[0] if isinstance(error, KeyError) and error.args else None
    keys = [key for key, value in nested(dict(content)) if isinstance(value, str) and value == word]
    if not keys:
        return None
    import transformers

    says = " and ".join(f"{key} = {word!r}" for key in keys)
    what = f"{where} says {says}, which transformers {transformers.__version__} does not know"
    return UnavailableError(spec.name, what, f"{CORRECT[:-1]}, or upgrade transformers, which may know it since.")


def _all_keys(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Return all keys with their values: also those of tables, whose own keys stand beside them."""
    tables = [(key, value) for key, value in content.items() if isinstance(value, dict)]
    inner = [(f"{key}.{name}", value) for key, table in tables for name, value in _all_keys(table)]
    return [*content.items(), *inner]
