"""The JSON Schema of hypothesis files, for editors, generated from their models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from delta_suite.claims.schema import Hypothesis


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a hypothesis file, in Draft 4, which is what the taplo editor server reads.

    It knows the keys, types and words of each table. Rules between keys are checked by the loader, which says what to
    do about a violation.
    """
    return {"$schema": "http://json-schema.org/draft-04/schema#", **_draft4(Hypothesis.model_json_schema())}


def _draft4(schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return pydantic's 2020-12 schema as Draft 4, without titles, and without null, which TOML does not have."""
    draft: dict[str, Any] = {}
    for keyword, value in schema.items():
        match keyword:
            case "title":
                pass
            case "default" if value is None:
                pass
            case "$ref":  # Draft 4 ignores what stands beside a $ref, so that one stands alone
                draft["allOf"] = [{"$ref": value.replace("#/$defs/", "#/definitions/")}]
            case "exclusiveMinimum":
                draft |= {"minimum": value, "exclusiveMinimum": True}
            case "exclusiveMaximum":
                draft |= {"maximum": value, "exclusiveMaximum": True}
            case "anyOf":
                [other_than_null] = (branch for branch in value if branch != {"type": "null"})
                draft |= _draft4(other_than_null)
            case "$defs":
                draft["definitions"] = {name: _draft4(definition) for name, definition in value.items()}
            case "properties":  # a property may be called `title`
                draft["properties"] = {name: _draft4(definition) for name, definition in value.items()}
            case "items":
                draft["items"] = _draft4(value)
            case _:
                draft[keyword] = value
    return draft
