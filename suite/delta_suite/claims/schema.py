"""Hypothesis files as models: the keys, types and rules of each table.

A field's docstring is its description in the JSON Schema, and what the loader says when the key is missing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic.json_schema import SkipJsonSchema

from delta_suite.capture.writes import SUBLAYERS, Write
from delta_suite.claims.null_kinds import NULLS
from delta_suite.claims.words import (
    BY_RANK,
    LARGEST,
    MEANS_BY_DEFINITION,
    Id,
    MetricName,
    NullName,
    SchemaVersion,
    Scope,
    Tag,
    Text,
    VariantName,
    check_aggregation,
    check_layers,
    check_profile,
    check_write,
    is_one_layer,
    refuse,
)
from delta_suite.metrics.profiles import SHAPES
from delta_suite.metrics.registry import METRICS
from delta_suite.reduction.variants import of_write

_OF_PROFILES = ("random-weights", "window")
"""The nulls that a figure of a profile over depth can be held against."""

_OF_SHAPE = {
    "trend": "trend of {} with depth",
    "peak": "depth of the peak of {}",
    "valley": "depth of the valley of {}",
    "correlation": "correlation of {}",
}
"""Figures of a profile in the text of a claim."""


class _Table(BaseModel):
    # strict: "0.5" is no number and true no integer. Tuples are lax, as TOML has arrays; their items stay strict.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, populate_by_name=True, use_attribute_docstrings=True
    )


class Than(_Table):
    """The other side of a comparison: `times` x a metric over another scope and `plus` more, or a null of the model.

    It is aggregated by the expectation's `over`; where that is "each", every layer is compared with its mean.
    """

    scope: Scope | None = None
    """what to compare with: a phase, layer:3, layers:8-15, depth:0.5-1 or model"""
    null: NullName | None = Field(
        default=None,
        description="what to compare with instead of a scope: "
        + "; ".join(f"{null.name}, {null.description}" for null in NULLS.values()),
    )
    quantile: float = Field(
        default=0.95,
        gt=0.5,
        lt=1,
        allow_inf_nan=False,
        description=f"with {BY_RANK}: the share of the null that must lie on the other side of the measured value",
    )
    times: float = Field(default=1.0, gt=0, le=LARGEST, allow_inf_nan=False)
    """the factor before the other side"""
    plus: float = Field(default=0.0, ge=-LARGEST, le=LARGEST, allow_inf_nan=False)
    """what is added to the other side, in the metric's unit; negative to ask for a difference"""
    metric: MetricName | None = None
    """the metric of the other side, where it is not the same"""
    write: Write | None = None
    """what is added to the stream on the other side, where it is not the same: block, attention or mlp"""

    @model_validator(mode="after")
    def _one_other_side(self) -> Self:
        if self.scope is None and self.null is None:
            refuse('than names no other side: add scope = "E", or null = "window"')
        if self.null is None:
            if "quantile" in self.model_fields_set:
                refuse(f"quantile goes with {BY_RANK}: remove it", at="quantile")
            return self
        for key in ("scope", "quantile", "times", "plus", "metric", "write"):
            if key in self.model_fields_set and key not in NULLS[self.null].allows:
                refuse(f'{key} does not go with null = "{self.null}": remove it', at=key)
        return self

    def required(self, other: float) -> float:
        """Return times * other + plus, which the observed value is compared with."""
        return self.times * other + self.plus


class Xfail(_Table):
    """Models on which a claim is known not to hold."""

    models: Annotated[tuple[Text, ...], Field(strict=False, min_length=1)]
    """names of models, with * and ? as wildcards"""
    reason: Text
    """why the claim is expected to fail there"""


class Expectation(_Table):
    """One claim: a metric over a scope, compared with a number or with a metric over another scope."""

    # The order matters: a validator sees the fields above its own, and of those only the ones that are right.
    id: Id
    """the claim's name, unique in the file"""
    metric: MetricName
    """what is measured, by its name in the table of `delta-suite metrics`"""
    scope: Scope
    """what it is taken over: a phase, layer:3, layers:8-15, depth:0.5-1 (a share of the depth) or model"""
    variant: VariantName = "raw"
    """which rows enter"""
    write: Write = "block"
    """what is measured: the whole update of each block, or what attention or mlp adds to the stream alone"""
    over: Literal["mean", "median", "min", "max", "each", "trend", "peak", "valley", "correlation"] = "mean"
    """how the layers of the scope become one number, or each: layer by layer. trend is the rank correlation with depth,
    peak and valley the depth (0 to 1) of the layer with the largest and the smallest value, correlation the rank
    correlation with another metric over the layers"""
    with_metric: MetricName | None = Field(default=None, alias="with", validate_default=True)
    """with over = "correlation": the other metric"""
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
    origin: Text
    """where the threshold or the comparison comes from"""
    xfail: Annotated[tuple[Xfail, ...], Field(strict=False)] = ()
    """models on which the claim is known not to hold"""
    line: SkipJsonSchema[int] = 0
    """Line of the claim's table in its file, filled in by the loader; 0 for a claim built in Python."""

    @field_validator("scope")
    @classmethod
    def _enough_layers(cls, scope: str, info: ValidationInfo) -> str:
        if metric := info.data.get("metric"):
            check_layers(metric, scope)
        return scope

    @field_validator("write")
    @classmethod
    def _measured_apart(cls, write: Write, info: ValidationInfo) -> Write:
        check_write(info.data.get("metric"), info.data.get("variant"), write)
        return write

    @field_validator("over")
    @classmethod
    def _layers_to_aggregate(cls, over: str, info: ValidationInfo) -> str:
        if metric := info.data.get("metric"):
            check_aggregation(metric, over)
            check_profile(metric, over, info.data.get("scope"))
        return over

    @field_validator("with_metric")
    @classmethod
    def _another_metric(cls, other: str | None, info: ValidationInfo) -> str | None:
        over, metric = info.data.get("over"), info.data.get("metric")
        if over == "correlation" and other is None:
            refuse('over = "correlation" is one metric with another over the layers: add with = "<metric>"')
        if other is None or over is None:
            return other
        if over != "correlation":
            refuse('with names the other metric of a correlation: add over = "correlation", or remove with')
        if other == metric:
            refuse(f"{other} is correlated with itself: name another metric")
        check_profile(other, over)
        check_write(other, info.data.get("variant"), info.data.get("write", "block"))
        return other

    @field_validator("mostly")
    @classmethod
    def _share_of_each(cls, mostly: float, info: ValidationInfo) -> float:
        if mostly != 1 and info.data.get("over", "each") != "each":
            refuse('mostly is the share of layers that must hold: add over = "each", or remove mostly')
        return mostly

    @field_validator("than", mode="before")
    @classmethod
    def _one_requirement(cls, than: object, info: ValidationInfo) -> object:
        has_threshold = "threshold" not in info.data or info.data["threshold"] is not None  # absent: given, but wrong
        if than is not None and has_threshold:
            refuse("threshold and than are both given, and a claim compares with one: remove the other")
        if than is None and not has_threshold:
            why = 'nothing to compare with: add threshold = <number>, or than = { scope = "E" }'
            refuse(why, kind="no_requirement")
        return than

    @field_validator("than")
    @classmethod
    def _another_side(cls, than: Than | None, info: ValidationInfo) -> Than | None:
        metric, scope, over = (info.data.get(key) for key in ("metric", "scope", "over"))
        if than is None or metric is None:
            return than
        other, write = than.metric or metric, info.data.get("write")
        at = "write" if than.write else "metric"
        check_write(other, info.data.get("variant"), than.write or write or "block", at=at)
        if than.null == "drift" and info.data.get("op") in {"<", "<="}:
            refuse('null = "drift" is for claims that a phase shares more, with > or >=; use "window"', at="null")
        if over in SHAPES and than.null is not None and than.null not in _OF_PROFILES:
            refuse(f'null = "{than.null}" is not formed of a {over}: use {" or ".join(_OF_PROFILES)}', at="null")
        if than.scope is None:
            return than
        check_layers(other, than.scope, at="scope")
        if over and over != "each":  # "each" compares with a mean, be it the mean of the same layers
            check_aggregation(other, over, at="metric")
            check_profile(other, over, than.scope, at="metric" if than.metric else "scope")
            if (other, than.scope, than.write or write) == (metric, scope, write):
                refuse(f"{metric} over {scope} is compared with itself: name another scope or metric", at="scope")
        return than

    @property
    def rising(self) -> bool:
        """True if the claim asks for large values."""
        return self.op in {">=", ">"}

    @property
    def strict(self) -> bool:
        """True if the required value itself does not meet the claim."""
        return self.op in {">", "<"}

    def met_by(self, margin: float) -> bool:
        """Return True if a claim whose figure is inside by this margin is met; a negative one is outside."""
        return margin > 0 or (margin == 0 and not self.strict)

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
        """The metrics that the claim names."""
        named = (self.metric, self.with_metric, self.than.metric if self.than else None)
        return tuple(dict.fromkeys(metric for metric in named if metric is not None))

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
            observed = self._side(self.metric, self.scope, self.over, self.write)
        variant = "" if self.variant == "raw" else f" ({self.variant})"
        return f"{observed} {self.op} {self._required()}{variant}"

    def _side(self, metric: str, scope: str, over: str, write: Write) -> str:
        """Return one side of a comparison in words, such as `mean gamma over C`."""
        shown = _written(metric, write)
        if over in SHAPES:
            other = "" if self.with_metric is None else f" with {_written(self.with_metric, write)}"
            return f"{_OF_SHAPE[over].format(shown)}{other} over {scope}"
        one_number = is_one_layer(scope) or not METRICS[metric].per_layer
        if METRICS[metric].takes == "law" and over == "mean":
            over = "median"  # the value of a metric of the law is the median of its layers
        means_already = over == "mean" and metric in MEANS_BY_DEFINITION
        return f"{shown} over {scope}" if one_number or means_already else f"{over} {shown} over {scope}"

    def _required(self) -> str:
        """Return what the claim compares with, in words."""
        if self.than is None:
            assert self.threshold is not None
            return _digits(self.threshold)
        than = self.than
        times = "" if than.times == 1 else f"{_digits(than.times)} x "
        plus = f" {'-' if than.plus < 0 else '+'} {_digits(abs(than.plus))}" if than.plus else ""
        metric, scope, write = than.metric or self.metric, than.scope or self.scope, than.write or self.write
        side = self._side(metric, scope, self.aggregate, write)
        if than.null is None:
            return f"{times}{side}{plus}"
        null = NULLS[than.null]
        words = null.words.format(share=f"{_digits(100 * than.quantile)}%")
        return f"{times}{side} with {words}{plus}" if "scope" in null.allows else f"{times}{words}{plus}"


class Hypothesis(_Table):
    """A prediction about the depth of a model: it holds when all its expectations hold."""

    schema_version: SchemaVersion = Field(alias="schema")
    """the version of the file format, 1"""
    id: Id
    """the hypothesis's name, unique among all files"""
    title: Text
    """a few words for the tables"""
    version: int = Field(ge=1, le=1_000_000_000)
    """1 at first, raised when the meaning changes"""
    rationale: Text
    """what is predicted, and why"""
    tags: Annotated[tuple[Tag, ...], Field(strict=False)] = ()
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


def _digits(x: float) -> str:
    """Return all the digits that were written, and 2 rather than 2.0."""
    return f"{x:.15g}"
