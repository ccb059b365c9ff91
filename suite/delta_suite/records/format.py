"""A record as text: compact JSON with one line per layer and variant, and numbers to 9 significant digits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from delta_suite.errors import RecordError
from delta_suite.paths import shorten
from delta_suite.reading import UnreadableFileError, parse_json
from delta_suite.records.record import SCHEMA, Record
from delta_suite.records.schema2 import upgraded

DIGITS = 9
"""Significant digits of every number in a record."""


def to_json(record: Record) -> str:
    """Return the record as JSON. NaN and Infinity are never written, nor is a value that does not exist."""
    content = rounded(record.model_dump(mode="json", by_alias=True))
    lines = []
    for key, value in content.items():
        if key == "layers":
            text = "[\n" + ",\n".join(_with_metrics(layer) for layer in value) + "\n]"
        elif key in {"scopes", "boundaries"}:
            items = (f"{_dump(name)}:{_with_metrics(item)}" for name, item in value.items())
            text = "{\n" + ",\n".join(items) + "\n}"
        elif key == "causes":
            text = _with_metrics(value)
        else:
            text = _dump(value)
        lines.append(f"{_dump(key)}:{text}")
    return "{" + ",\n".join(lines) + "}\n"


def _with_metrics(item: dict[str, Any]) -> str:
    """Return an object whose `metrics` have a line for each variant, or for each metric where there are no variants."""
    head = _dump({key: value for key, value in item.items() if key != "metrics"}).removesuffix("}")
    comma = "," if len(head) > 1 else ""
    rows = ",\n".join(f"{_dump(name)}:{_dump(value)}" for name, value in item["metrics"].items())
    return f'{head}{comma}"metrics":{{\n{rows}}}}}'


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def rounded(value: Any) -> Any:
    """Return nested lists and dictionaries with every float at 9 significant digits.

    Example:
        >>> rounded({"value": 0.12345678949})
        {'value': 0.123456789}
    """
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return value


def from_json(text: str, where: object) -> tuple[Record, dict[str, np.ndarray] | None]:
    """Return the record in a text, and the arrays that a record of schema 2 holds itself.

    Raises RecordError for anything that is not a whole record of schema 2 or 3.
    """
    arrays = None
    try:
        content = parse_json(text, Path(str(where)))
    except UnreadableFileError as error:
        raise _not_a_record(where, "the whole file", error.why) from None
    if not isinstance(content, dict) or "schema" not in content:
        raise _not_a_record(where, "the whole file", "it has no `schema`")
    if content["schema"] == 2:
        try:
            content, arrays = upgraded(content)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError) as error:
            raise _not_a_record(where, "schema 2", f"{type(error).__name__}: {error}") from None
    elif content["schema"] is True or content["schema"] != SCHEMA:
        why = f"{shorten(repr(content['schema']))} is not a schema that this version reads"
        raise _not_a_record(where, "schema", f"{why}; a higher one needs a newer delta-suite")
    try:
        record = Record.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"]) or "the whole file"
        more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
        raise _not_a_record(where, at, f"{first['msg']}{more}") from None
    if problem := _inconsistency(record):
        raise RecordError(f"{where} is not a whole record: {problem}. Measure again: delta-suite measure --fresh.")
    return record, arrays


def _not_a_record(where: object, at: str, why: str) -> RecordError:
    return RecordError(
        f"{where} is not a measurement record of schema {SCHEMA}: at {at}: {why}. "
        f"Records are written by `delta-suite measure`."
    )


def _inconsistency(record: Record) -> str | None:
    """Return how the parts of a record do not fit together, or None where they do."""
    layers, variants = record.model.layers, set(record.variants)
    if not layers or len(record.layers) != layers or [layer.layer for layer in record.layers] != [*range(layers)]:
        return f"it says {layers} layers and holds {len(record.layers)}"
    measured = [set(layer.metrics) for layer in record.layers]
    measured += [set(scope.metrics) for scope in record.scopes.values()]
    measured_alike = all(names == variants for names in measured) and record.boundaries.keys() <= variants
    if "raw" not in variants or not measured_alike:
        return "its layers and phases were not all measured in the same variants"
    if any(not 0 <= first <= last < layers for first, last in record.phases.values()):
        return f"a phase reaches past its {layers} layers"
    if {name: scope.layers for name, scope in record.scopes.items()} != record.phases:
        return "its scopes are not its phases"
    return None
