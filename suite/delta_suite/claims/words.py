"""Words that claims are made of: names, scopes and their checks, and the texts of what is wrong with them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from typing import Annotated, Any, Literal, NoReturn

from pydantic import AfterValidator, Field
from pydantic_core import PydanticCustomError

from delta_suite.capture.writes import Write
from delta_suite.claims.null_kinds import NULLS
from delta_suite.metrics.profiles import SHAPES
from delta_suite.metrics.registry import METRICS, OF_WRITES
from delta_suite.models.phases import PHASE_NAME
from delta_suite.paths import shorten
from delta_suite.reduction.variants import BLOCK_VARIANTS

_LAYER = r"(0|[1-9][0-9]{0,5})"
"""A layer in the scope of a claim: no model has a million of them."""

_SHARE = r"(0|1|0\.[0-9]{1,6}|1\.0{1,6})"
"""A share of the depth."""

ID = r"^[a-z0-9][a-z0-9-]*$"
SCOPE = rf"^({PHASE_NAME}|layer:{_LAYER}|layers:{_LAYER}-{_LAYER}|depth:{_SHARE}-{_SHARE})$"
TAG = r"^[A-Za-z][A-Za-z0-9_-]*$"
TEXT = r"\S"

LARGEST = 1e15
"""Bound of the numbers of a claim: no metric comes near it, and sums and squares of such numbers stay finite."""

_TAKEN_MARKERS = (
    *("skip", "skipif", "xfail", "parametrize", "usefixtures", "filterwarnings", "tryfirst", "trylast"),
    *("hypothesis", "and", "or", "not"),
)
"""Markers that pytest acts on (a tag `skip` would skip the claim), the hypothesis library's, and the words of `-m`."""

BY_RANK = " or ".join(f'null = "{null.name}"' for null in NULLS.values() if null.by_rank)
"""The nulls that a quantile goes with, in words."""

_OPERATOR_SLIPS = {"=>": ">=", "=<": "<=", "≥": ">=", "≤": "<="}

MEANS_BY_DEFINITION = (
    "intra_cosine",
    "intra_cosine_cross_fitted",
    "intra_cosine_disattenuated",
    "cross_cosine",
    "capture_fraction",
    "capture_fraction_held_out",
)
"""Phase metrics that are means already, over pairs of layers: a claim does not say "mean" a second time."""


def nearest(word: str, known: Collection[str]) -> str | None:
    """Return the known word that was probably meant, or None if none is close.

    Example:
        >>> nearest("treshold", ["threshold", "than"]), nearest("=>", [">=", "<="]), nearest("zzz", ["than"])
        ('threshold', '>=', None)
    """
    return _OPERATOR_SLIPS.get(word) or next(iter(difflib.get_close_matches(word.lower(), known, n=1)), None)


def unknown(what: str, word: str, known: Collection[str]) -> str:
    """Return the message for a word that is none of the known ones: it offers the nearest of them, or all.

    Example:
        >>> unknown("metric", "gama", ["gamma", "alignment"])
        "unknown metric 'gama': did you mean 'gamma'?"
    """
    near = nearest(word, known)
    cure = f"did you mean '{near}'?" if near else f"use one of {', '.join(known)}"
    return f"unknown {what} '{shorten(word)}': {cure}"


def refuse(why: str, at: str = "", kind: Literal["refused", "no_requirement"] = "refused") -> NoReturn:
    """Raise a validation error with this text; `at` names the key inside the value whose line is reported."""
    raise PydanticCustomError(kind, "{why}", {"why": why, "at": at})


# --- words -----------------------------------------------------------------------------------------------------


def _one_of(what: str, known: Collection[str]) -> AfterValidator:
    """Return the check that a word is in a registry."""

    def checked(word: str) -> str:
        if word not in known:
            refuse(unknown(what, word, known))
        return word

    return AfterValidator(checked)


def _listed(known: Collection[str]) -> Any:
    """Return the words of a registry for the JSON Schema."""
    return Field(json_schema_extra={"enum": list(known)})


def is_one_layer(scope: str) -> bool:
    """Return True if a scope is one layer, such as `layer:3` or `layers:3-3`."""
    layers = re.fullmatch(r"layers?:(\d+)(?:-(\d+))?", scope)
    return layers is not None and int(layers[1]) == int(layers[2] or layers[1])


def _forward_range(scope: str) -> str:
    kind, _, ends = scope.partition(":")
    first, _, last = ends.partition("-")
    if not last:
        return scope
    if float(first) > float(last):
        refuse(f"scope '{scope}' runs backwards: write '{kind}:{last}-{first}'")
    if kind == "depth" and float(first) == float(last):
        refuse(f"scope '{scope}' holds no layer: a layer is in it from the first share on and before the second")
    return scope


def _free_marker(tag: str) -> str:
    if tag in _TAKEN_MARKERS:
        refuse(f"tag '{tag}' already means something to pytest or its plugins: choose another word")
    return tag


def _readable_schema(version: int) -> int:
    if version != 1:
        refuse(f"schema = {version} cannot be read here, only schema = 1: a higher one needs a newer delta-suite")
    return version


Id = Annotated[str, Field(pattern=ID)]
Text = Annotated[str, Field(pattern=TEXT)]
Scope = Annotated[str, Field(pattern=SCOPE), AfterValidator(_forward_range)]
Tag = Annotated[
    str,
    Field(pattern=TAG, json_schema_extra={"not": {"enum": list(_TAKEN_MARKERS)}}),
    AfterValidator(_free_marker),
]
MetricName = Annotated[str, _listed(METRICS), _one_of("metric", METRICS)]
VariantName = Annotated[str, _listed(BLOCK_VARIANTS), _one_of("variant", BLOCK_VARIANTS)]
NullName = Annotated[str, _listed(NULLS), _one_of("null", NULLS)]
SchemaVersion = Annotated[int, Field(json_schema_extra={"enum": [1]}), AfterValidator(_readable_schema)]


def check_layers(metric: str, scope: str, at: str = "") -> None:
    """Refuse a scope of which the metric has no number."""
    if METRICS[metric].scope == "model" and scope != "model":
        refuse(f'{metric} is one number for the whole model under its phase map: write scope = "model"', at)
    if is_one_layer(scope) and METRICS[metric].scope == "phase":
        refuse(
            f"{metric} is taken over several layers, and '{scope}' is one: name a phase, model, or a range of layers",
            at,
        )


def check_aggregation(metric: str, over: str, at: str = "") -> None:
    """Refuse an aggregate of layers for a metric that has no number per layer."""
    if over != "mean" and not METRICS[metric].per_layer:
        refuse(f'{metric} is one number for a {METRICS[metric].scope}, with none per layer: remove over = "{over}"', at)


def check_profile(metric: str, over: str, scope: str | None = None, at: str = "") -> None:
    """Refuse a figure of a profile over depth for a metric that is not one of layers, and over one layer."""
    if over not in SHAPES:
        return
    if METRICS[metric].scope != "layer":
        of = METRICS[metric].scope
        refuse(f'over = "{over}" follows a metric of single layers, and {metric} is one of a {of}: name another', at)
    if scope is not None and is_one_layer(scope):
        refuse(f"a {over} is taken over several layers, and '{scope}' is one: name a phase, model, or a range", at)


def check_write(metric: str | None, variant: str | None, write: Write, at: str = "") -> None:
    """Refuse attention and MLP for metrics of other sources than spectra and directions, and where sinks enter."""
    if write == "block":
        return
    if metric is not None and METRICS[metric].takes not in OF_WRITES:
        refuse(
            f"{metric} is measured of whole blocks alone, as attention and mlp have spectra and directions: "
            f'remove write = "{write}", or name another metric',
            at,
        )
    if variant is not None and BLOCK_VARIANTS[variant].keeps_sinks:
        refuse('what attention and mlp write is measured without sinks: add variant = "sink_free" or "centred"', at)
