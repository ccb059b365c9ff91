"""Hypothesis files as models: the keys, types and rules of each table.

A field's docstring is its description in the JSON Schema, and what the loader says when the key is missing.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema
from pydantic_core import PydanticCustomError

from delta_suite.capture.writes import SUBLAYERS, Write
from delta_suite.claims.null_kinds import NULLS
from delta_suite.metrics.registry import METRICS, OF_WRITES
from delta_suite.models.phases import PHASE_NAME
from delta_suite.paths import shorten
from delta_suite.reduction.variants import BLOCK_VARIANTS, of_write

_LAYER = r"(0|[1-9][0-9]{0,5})"
"""A layer in the scope of a claim: no model has a million of them."""

ID = r"^[a-z0-9][a-z0-9-]*$"
SCOPE = rf"^({PHASE_NAME}|layer:{_LAYER}|layers:{_LAYER}-{_LAYER})$"
TAG = r"^[A-Za-z][A-Za-z0-9_-]*$"
TEXT = r"\S"

LARGEST = 1e15
"""Bound of the numbers of a claim: no metric comes near it, and sums and squares of such numbers stay finite."""

_TAKEN_MARKERS = (
    *("skip", "skipif", "xfail", "parametrize", "usefixtures", "filterwarnings", "tryfirst", "trylast"),
    *("hypothesis", "and", "or", "not"),
)
"""Markers that pytest acts on (a tag `skip` would skip the claim), the hypothesis library's, and the words of `-m`."""

_BY_RANK = " or ".join(f'null = "{null.name}"' for null in NULLS.values() if null.by_rank)
"""The nulls that a quantile goes with, in words."""

_OPERATOR_SLIPS = {"=>": ">=", "=<": "<=", "≥": ">=", "≤": "<="}

_MEANS_BY_DEFINITION = (
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


def _refuse(why: str, at: str = "", kind: Literal["refused", "no_requirement"] = "refused") -> NoReturn:
    """Raise a validation error with this text; `at` names the key inside the value whose line is reported."""
    raise PydanticCustomError(kind, "{why}", {"why": why, "at": at})


# --- words -----------------------------------------------------------------------------------------------------


def _one_of(what: str, known: Collection[str]) -> AfterValidator:
    """Return the check that a word is in a registry."""

    def checked(word: str) -> str:
        if word not in known:
            _refuse(unknown(what, word, known))
        return word

    return AfterValidator(checked)


def _listed(known: Collection[str]) -> Any:
    """Return the words of a registry for the JSON Schema."""
    return Field(json_schema_extra={"enum": list(known)})


def _layer_range(scope: str) -> tuple[int, int] | None:
    """Return the first and last layer of `layer:3` or `layers:8-15`; None for a phase and for `model`."""
    _, _, numbers = scope.partition(":")
    if not numbers:
        return None
    first, _, last = numbers.partition("-")
    return int(first), int(last or first)


def _is_one_layer(scope: str) -> bool:
    layers = _layer_range(scope)
    return layers is not None and layers[0] == layers[1]


def _forward_range(scope: str) -> str:
    layers = _layer_range(scope)
    if layers and layers[0] > layers[1]:
        _refuse(f"scope '{scope}' runs backwards: write 'layers:{layers[1]}-{layers[0]}'")
    return scope


def _free_marker(tag: str) -> str:
    if tag in _TAKEN_MARKERS:
        _refuse(f"tag '{tag}' already means something to pytest or its plugins: choose another word")
    return tag


def _readable_schema(version: int) -> int:
    if version != 1:
        _refuse(f"schema = {version} cannot be read here, only schema = 1: a higher one needs a newer delta-suite")
    return version


_Id = Annotated[str, Field(pattern=ID)]
_Text = Annotated[str, Field(pattern=TEXT)]
_Scope = Annotated[str, Field(pattern=SCOPE), AfterValidator(_forward_range)]
_Tag = Annotated[
    str,
    Field(pattern=TAG, json_schema_extra={"not": {"enum": list(_TAKEN_MARKERS)}}),
    AfterValidator(_free_marker),
]
_Metric = Annotated[str, _listed(METRICS), _one_of("metric", METRICS)]
_Variant = Annotated[str, _listed(BLOCK_VARIANTS), _one_of("variant", BLOCK_VARIANTS)]
_Null = Annotated[str, _listed(NULLS), _one_of("null", NULLS)]
_SchemaVersion = Annotated[int, Field(json_schema_extra={"enum": [1]}), AfterValidator(_readable_schema)]


def _needs_several_layers(metric: str) -> bool:
    return METRICS[metric].scope == "phase"


def _is_of_the_model(metric: str) -> bool:
    return METRICS[metric].scope == "model"


def _check_layers(metric: str, scope: str, at: str = "") -> None:
    if _is_of_the_model(metric) and scope != "model":
        _refuse(f'{metric} is one number for the whole model under its phase map: write scope = "model"', at)
    if _is_one_layer(scope) and _needs_several_layers(metric):
        _refuse(
            f"{metric} is taken over several layers, and '{scope}' is one: name a phase, model, or a range of layers",
            at,
        )


def _check_aggregation(metric: str, over: str, at: str = "") -> None:
    if over != "mean" and not METRICS[metric].per_layer:
        _refuse(
            f'{metric} is one number for a {METRICS[metric].scope}, with none per layer: remove over = "{over}"', at
        )


def _check_write(metric: str | None, variant: str | None, write: Write, at: str = "") -> None:
    """Refuse attention and MLP for metrics of other sources than spectra and directions, and where sinks enter."""
    if write == "block":
        return
    if metric is not None and METRICS[metric].takes not in OF_WRITES:
        _refuse(
            f"{metric} is measured of whole blocks alone, as attention and mlp have spectra and directions: "
            f'remove write = "{write}", or name another metric',
            at,
        )
    if variant is not None and BLOCK_VARIANTS[variant].keeps_sinks:
        _refuse('what attention and mlp write is measured without sinks: add variant = "sink_free" or "centred"', at)


# --- tables ----------------------------------------------------------------------------------------------------


class _Table(BaseModel):
    # strict: "0.5" is no number and true no integer. Tuples are lax, as TOML has arrays; their items stay strict.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, use_attribute_docstrings=True
    )


class Than(_Table):
    """The other side of a comparison: `times` x a metric over another scope and `plus` more, or a null of the model.

    It is aggregated by the expectation's `over`; where that is "each", every layer is compared with its mean.
    """

    scope: _Scope | None = None
    """what to compare with: a phase, layer:3, layers:8-15 or model"""
    null: _Null | None = Field(
        default=None,
        description="what to compare with instead of a scope: "
        + "; ".join(f"{null.name}, {null.description}" for null in NULLS.values()),
    )
    quantile: float = Field(
        default=0.95,
        gt=0.5,
        lt=1,
        allow_inf_nan=False,
        description=f"with {_BY_RANK}: the share of the null that must lie on the other side of the measured value",
    )
    times: float = Field(default=1.0, gt=0, le=LARGEST, allow_inf_nan=False)
    """the factor before the other side"""
    plus: float = Field(default=0.0, ge=-LARGEST, le=LARGEST, allow_inf_nan=False)
    """what is added to the other side, in the metric's unit; negative to ask for a difference"""
    metric: _Metric | None = None
    """the metric of the other side, where it is not the same"""
    write: Write | None = None
    """what is added to the stream on the other side, where it is not the same: block, attention or mlp"""

    @model_validator(mode="after")
    def _one_other_side(self) -> Self:
        if self.scope is None and self.null is None:
            _refuse('than names no other side: add scope = "E", or null = "window"')
        if self.null is None:
            if "quantile" in self.model_fields_set:
                _refuse(f"quantile goes with {_BY_RANK}: remove it", at="quantile")
            return self
        for key in ("scope", "quantile", "times", "plus", "metric", "write"):
            if key in self.model_fields_set and key not in NULLS[self.null].allows:
                _refuse(f'{key} does not go with null = "{self.null}": remove it', at=key)
        return self

    def required(self, other: float) -> float:
        """Return times * other + plus, which the observed value is compared with."""
        return self.times * other + self.plus


class Xfail(_Table):
    """Models on which a claim is known not to hold."""

    models: Annotated[tuple[_Text, ...], Field(strict=False, min_length=1)]
    """names of models, with * and ? as wildcards"""
    reason: _Text
    """why the claim is expected to fail there"""


class Expectation(_Table):
    """One claim: a metric over a scope, compared with a number or with a metric over another scope."""

    # The order matters: a validator sees the fields above its own, and of those only the ones that are right.
    id: _Id
    """the claim's name, unique in the file"""
    metric: _Metric
    """what is measured, by its name in the table of `delta-suite metrics`"""
    scope: _Scope
    """what it is taken over: a phase, layer:3, layers:8-15 or model"""
    variant: _Variant = "raw"
    """which rows enter"""
    write: Write = "block"
    """what is measured: the whole update of each block, or what attention or mlp adds to the stream alone"""
    over: Literal["mean", "median", "min", "max", "each"] = "mean"
    """how the layers of the scope become one number, or each: layer by layer"""
    mostly: float = Field(default=1.0, gt=0, le=1, allow_inf_nan=False)
    """with over = "each": the share of layers that must hold"""
    op: Literal[">=", "<=", ">", "<"]
    """how the measured side must compare"""
    threshold: float | None = Field(default=None, ge=-LARGEST, le=LARGEST, allow_inf_nan=False)
    """the number to compare with"""
    than: Than | None = Field(default=None, validate_default=True)
    """the other scope to compare with, instead of a threshold"""
    severity: Literal["fail", "warn"] = "fail"
    """whether a refuted claim fails the run or is reported only"""
    rationale: str = ""
    """why the claim is made"""
    origin: _Text
    """where the threshold or the comparison comes from"""
    xfail: Annotated[tuple[Xfail, ...], Field(strict=False)] = ()
    """models on which the claim is known not to hold"""
    line: SkipJsonSchema[int] = 0
    """Line of the claim's table in its file, filled in by the loader; 0 for a claim built in Python."""

    @field_validator("scope")
    @classmethod
    def _enough_layers(cls, scope: str, info: ValidationInfo) -> str:
        if metric := info.data.get("metric"):
            _check_layers(metric, scope)
        return scope

    @field_validator("write")
    @classmethod
    def _measured_apart(cls, write: Write, info: ValidationInfo) -> Write:
        _check_write(info.data.get("metric"), info.data.get("variant"), write)
        return write

    @field_validator("over")
    @classmethod
    def _layers_to_aggregate(cls, over: str, info: ValidationInfo) -> str:
        if metric := info.data.get("metric"):
            _check_aggregation(metric, over)
        return over

    @field_validator("mostly")
    @classmethod
    def _share_of_each(cls, mostly: float, info: ValidationInfo) -> float:
        if mostly != 1 and info.data.get("over", "each") != "each":
            _refuse('mostly is the share of layers that must hold: add over = "each", or remove mostly')
        return mostly

    @field_validator("than", mode="before")
    @classmethod
    def _one_requirement(cls, than: object, info: ValidationInfo) -> object:
        has_threshold = "threshold" not in info.data or info.data["threshold"] is not None  # absent: given, but wrong
        if than is not None and has_threshold:
            _refuse("threshold and than are both given, and a claim compares with one: remove the other")
        if than is None and not has_threshold:
            why = 'nothing to compare with: add threshold = <number>, or than = { scope = "E" }'
            _refuse(why, kind="no_requirement")
        return than

    @field_validator("than")
    @classmethod
    def _another_side(cls, than: Than | None, info: ValidationInfo) -> Than | None:
        metric, scope, over = (info.data.get(key) for key in ("metric", "scope", "over"))
        if than is None or metric is None:
            return than
        other, write = than.metric or metric, info.data.get("write")
        at = "write" if than.write else "metric"
        _check_write(other, info.data.get("variant"), than.write or write or "block", at=at)
        if than.null == "drift" and info.data.get("op") in {"<", "<="}:
            _refuse('null = "drift" is for claims that a phase shares more, with > or >=; use "window"', at="null")
        if than.scope is None:
            return than
        _check_layers(other, than.scope, at="scope")
        if over and over != "each":  # "each" compares with a mean, be it the mean of the same layers
            _check_aggregation(other, over, at="metric")
            if (other, than.scope, than.write or write) == (metric, scope, write):
                _refuse(f"{metric} over {scope} is compared with itself: name another scope or metric", at="scope")
        return than

    @property
    def rising(self) -> bool:
        """True if the claim asks for large values."""
        return self.op in {">=", ">"}

    @property
    def of_writes(self) -> bool:
        """True if the claim names attention or MLP, on either side."""
        return self.write != "block" or (self.than is not None and self.than.write in SUBLAYERS)

    @property
    def figures(self) -> str:
        """The variant under which the claim's figures stand, which names attention or MLP where the claim does."""
        return of_write(self.variant, self.write)

    @property
    def other_figures(self) -> str:
        """The variant of the other side, in the same way."""
        return of_write(self.variant, (self.than and self.than.write) or self.write)

    @property
    def aggregate(self) -> str:
        """How layers become one number where one is needed: `over`, and the mean where that is "each"."""
        return "mean" if self.over == "each" else self.over

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics that the claim names, on either side."""
        return tuple(dict.fromkeys([self.metric, *([self.than.metric] if self.than and self.than.metric else [])]))

    @property
    def phases(self) -> tuple[str, ...]:
        """The phases that the claim names, on either side."""
        scopes = (self.scope, self.than.scope if self.than else None)
        return tuple(scope for scope in scopes if scope is not None and scope != "model" and ":" not in scope)

    def claim(self) -> str:
        """Return the claim in one line, such as `intra_cosine over C >= 2 x intra_cosine over E`."""
        if self.over == "each":
            share = "each layer" if self.mostly == 1 else f"at least {_digits(100 * self.mostly)}% of the layers"
            observed = f"{_written(self.metric, self.write)} of {share} of {self.scope}"
        else:
            observed = _side(self.metric, self.scope, self.over, self.write)
        variant = "" if self.variant == "raw" else f" ({self.variant})"
        return f"{observed} {self.op} {self._required()}{variant}"

    def _required(self) -> str:
        """Return what the claim compares with, in words."""
        if self.than is None:
            assert self.threshold is not None
            return _digits(self.threshold)
        than = self.than
        times = "" if than.times == 1 else f"{_digits(than.times)} x "
        plus = f" {'-' if than.plus < 0 else '+'} {_digits(abs(than.plus))}" if than.plus else ""
        side = _side(than.metric or self.metric, than.scope or self.scope, self.aggregate, than.write or self.write)
        if than.null is None:
            return f"{times}{side}{plus}"
        null = NULLS[than.null]
        words = null.words.format(share=f"{_digits(100 * than.quantile)}%")
        return f"{times}{side} with {words}{plus}" if "scope" in null.allows else f"{times}{words}{plus}"


class Hypothesis(_Table):
    """A prediction about the depth of a model: it holds when all its expectations hold."""

    schema_version: _SchemaVersion = Field(alias="schema")
    """the version of the file format, 1"""
    id: _Id
    """the hypothesis's name, unique among all files"""
    title: _Text
    """a few words for the tables"""
    version: int = Field(ge=1, le=1_000_000_000)
    """1 at first, raised when the meaning changes"""
    rationale: _Text
    """what is predicted, and why"""
    tags: Annotated[tuple[_Tag, ...], Field(strict=False)] = ()
    """pytest markers of the claims, for -m"""
    expect: Annotated[tuple[Expectation, ...], Field(strict=False, min_length=1)]
    """at least one [[expect]] table, each a claim"""
    path: SkipJsonSchema[Path]
    """The file, as the loader was given it."""
    sha256: SkipJsonSchema[str]
    """SHA-256 of the file's bytes."""


def _written(metric: str, write: Write) -> str:
    """Return a metric in words, such as `gamma of the MLP`."""
    return metric + {"block": "", "attention": " of attention", "mlp": " of the MLP"}[write]


def _side(metric: str, scope: str, over: str, write: Write = "block") -> str:
    """Return one side of a comparison in words, such as `mean gamma over C`."""
    one_number = _is_one_layer(scope) or not METRICS[metric].per_layer
    if METRICS[metric].takes == "law" and over == "mean":
        over = "median"  # the value of a metric of the law is the median of its layers
    means_already = over == "mean" and metric in _MEANS_BY_DEFINITION
    shown = _written(metric, write)
    return f"{shown} over {scope}" if one_number or means_already else f"{over} {shown} over {scope}"


def _digits(x: float) -> str:
    """Return all the digits that were written, and 2 rather than 2.0."""
    return f"{x:.15g}"
