"""Records of schema 2, as delta-suite 0.1 wrote them, in the shape of today.

Their `centred` took all rows less their mean, and their `token_normalised` divided each update by its norm. Both keep
their names with version 1, so that nothing is compared with them. Their replicates stood in the JSON itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from delta_suite.records.arrays import LARGEST

VARIANT_VERSION = 1
"""The version of every variant in a record of schema 2."""

_RENAMED = {"found": "detected", "returns": "recurrence", "found_cost": "detected_cost"}
"""Keys of the boundaries that have another name today."""

_LAW_VARIANT = "sink_free"


def upgraded(content: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Return the content of a schema-2 record in the shape of `Record`, and the replicates that it held as arrays.

    Raises KeyError, TypeError, AttributeError or ValueError where it is no whole record.
    """
    arrays: dict[str, np.ndarray] = {}
    layers, scopes = content["layers"], content["scopes"]
    variants = list(layers[0]["metrics"])
    for variant in variants:
        for name in layers[0]["metrics"][variant]:
            rows = [layer["metrics"][variant].get(name, {}).pop("replicates", None) for layer in layers]
            _keep(arrays, f"{variant}.units.{name}", rows, transpose=True)
        for name in next(iter(scopes.values()))["metrics"][variant] if scopes else ():
            rows = [scope["metrics"][variant].get(name, {}).pop("replicates", None) for scope in scopes.values()]
            _keep(arrays, f"{variant}.scope_units.{name}", rows)
    law = content.get("law")
    if law is not None:
        for name in next(iter(law["metrics"].values()), {}):
            rows = [metrics[name].pop("replicates", None) for metrics in law["metrics"].values()]
            _keep(arrays, f"law.units.{name}", rows)
        for phase, metrics in law["metrics"].items():
            if phase in scopes and _LAW_VARIANT in scopes[phase]["metrics"]:
                scopes[phase]["metrics"][_LAW_VARIANT] |= metrics
    boundaries = {}
    for variant, boundary in content.get("boundaries", {}).items():
        search = {_RENAMED.get(key, key): value for key, value in (boundary.pop("search", None) or {}).items()}
        boundaries[variant] = {_RENAMED.get(key, key): value for key, value in boundary.items()}
        boundaries[variant]["search"] = search or None
    groups = max((array.shape[0] for name, array in arrays.items() if ".units." in name), default=1)
    kept = ("schema", "model", "calibration", "sinks", "certificate", "provenance", "phases", "layers", "scopes")
    return {
        **{key: content[key] for key in kept},
        "resampling": {"units": content["calibration"]["documents"], "groups": groups},
        "parts": ["spectra", *(["boundaries"] if boundaries else []), *(["law"] if law is not None else [])],
        "variants": dict.fromkeys(variants, VARIANT_VERSION),
        "law": None if law is None else {"phases": law["phases"]},
        "boundaries": boundaries,
    }, arrays


def _keep(arrays: dict[str, np.ndarray], name: str, rows: list[Any], *, transpose: bool = False) -> None:
    """Keep lists of replicates as one array, NaN where a list is absent; nothing where all are."""
    length = max((len(row) for row in rows if row is not None), default=0)
    if not length:
        return
    array = np.array([[np.nan] * length if row is None else row for row in rows], dtype=np.float64)
    if (np.abs(array) > LARGEST).any():
        raise ValueError(f"{name} holds a number above {LARGEST:g}")
    arrays[name] = array.T if transpose else array
