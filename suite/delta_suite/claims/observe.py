"""Observations: one metric over one scope of one record, as a number that knows where it comes from."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import NoReturn

from delta_suite.capture.units import Unit
from delta_suite.capture.writes import SUBLAYERS
from delta_suite.errors import RecordError, SuiteError, UnknownNameError
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import combine
from delta_suite.metrics.profiles import SHAPES, profile_figure
from delta_suite.metrics.registry import METRICS, WITHOUT_VARIANTS
from delta_suite.models.phases import PhaseMap
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import VARIANTS


class NotMeasuredError(SuiteError):
    """The number asked for does not exist for this model; the message says why."""


AGGREGATES: Mapping[str, Callable[[Iterable[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "max": max,
}
"""How the layers of a scope become one number."""


@dataclass(frozen=True)
class Observation:
    """One metric over one scope of one model: the estimate, or why there is none, and the values of its layers."""

    model: str
    metric: str
    scope: str
    variant: str
    over: str
    layers: tuple[int, int] | None
    """First and last layer of the scope."""
    estimate: Estimate
    each: Mapping[int, Estimate] = field(default_factory=dict)
    """The estimates of the single layers, where the metric is one of layers."""
    unit: Unit = "document"
    """The unit that the interval is over."""

    @property
    def value(self) -> float | None:
        """The value as measured, with its bias."""
        return self.estimate.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval of the estimate."""
        return self.estimate.interval

    @property
    def reason(self) -> str | None:
        """Why there is no value."""
        return self.estimate.reason

    @property
    def per_layer(self) -> Mapping[int, float | None]:
        """The value of each layer, or its share in the value of the phase."""
        values = {layer: estimate.value for layer, estimate in self.each.items()}
        return values or self.estimate.per_layer or {}


class Quantity(float):
    """An observed number, so that a plain `assert` on it can explain itself.

    Where the number does not exist, comparing or computing with it raises NotMeasuredError with the reason; `value`,
    `interval` and `reason` can be read all the same.
    """

    observation: Observation

    def __new__(cls, observation: Observation) -> Quantity:
        """Return the observed value as a float that remembers its observation."""
        quantity = super().__new__(cls, math.nan if observation.value is None else observation.value)
        quantity.observation = observation
        return quantity

    @property
    def value(self) -> float | None:
        """The number, or None."""
        return self.observation.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """The interval, or None."""
        return self.observation.interval

    @property
    def reason(self) -> str | None:
        """Why there is no number."""
        return self.observation.reason

    def _missing(self) -> NoReturn:
        seen = self.observation
        raise NotMeasuredError(f"{seen.metric} over {seen.scope} of {seen.model} is not measured: {seen.reason}")

    def __repr__(self) -> str:
        """Return the number with its interval, or the reason why there is none."""
        if self.value is None:
            return f"not measured: {self.reason}"
        span = "" if self.interval is None else " [{:.6g}, {:.6g}]".format(*self.interval)
        return f"{float(self):.6g}{span}"


def _checked(name: str) -> Callable[..., object]:
    """Return the operation of float that raises NotMeasuredError where there is no number."""
    operation = getattr(float, name)

    def checked(self: Quantity, *others: object) -> object:
        if self.value is None:
            self._missing()
        return operation(self, *others)

    return checked


for _name in (
    *("__lt__", "__le__", "__gt__", "__ge__", "__eq__", "__ne__", "__bool__", "__neg__", "__abs__"),
    *("__add__", "__radd__", "__sub__", "__rsub__", "__mul__", "__rmul__", "__truediv__", "__rtruediv__"),
):
    setattr(Quantity, _name, _checked(_name))
Quantity.__hash__ = float.__hash__  # type: ignore[method-assign]


def observe(
    view: RecordView,
    metric: str,
    scope: str = "model",
    variant: str = "raw",
    over: str = "mean",
    with_metric: str | None = None,
) -> Observation:
    """Observe a metric over a scope: a phase of the record, `layers:8-15`, `layer:3`, `depth:0.5-1`, or `model`.

    A layer metric over several layers is aggregated by `over` (mean, median, min, max; with `each` the value is the
    mean, and each layer is decided by itself). So are the layers' shares in a phase metric, but for the mean: that is
    the value of the metric itself. A metric of the law is the median of its layers already. `over` may also name a
    figure of the profile over depth: trend, peak, valley, or the correlation with `with_metric`.

    What attention or the MLP writes alone is a variant of its own: `sink_free.attention`, `centred.mlp`.

    Raises:
        UnknownNameError: no metric, variant or aggregate has this name, or the scope is no text. A variant that this
            record lacks, or that meant something else when it was measured, is no error: the estimate is absent, with
            the reason.
    """
    require_names(metric, variant, over, with_metric)
    if not isinstance(scope, str):
        raise UnknownNameError(f"no scope {scope!r}: a phase, layer:3, layers:8-15, depth:0.5-1 or model")
    layers, unit = layers_of(scope, view.model.layers, view.phases), view.record.resampling.unit

    def observation(estimate: Estimate, each: Mapping[int, Estimate] | None = None) -> Observation:
        ends = None if isinstance(layers, str) else (layers[0], layers[-1])
        return Observation(view.model.name, metric, scope, variant, over, ends, estimate, each or {}, unit)

    if isinstance(layers, str):
        return observation(absent(layers))
    if METRICS[metric].takes not in WITHOUT_VARIANTS and (problem := view.variant_problem(variant)):
        return observation(absent(problem))
    return observation(*over_layers(view, layers, metric, variant, over, with_metric))


def require_names(metric: str, variant: str, over: str = "mean", with_metric: str | None = None) -> None:
    """Raise UnknownNameError for a metric, a variant or an aggregate that does not exist, or does not fit."""
    rows, _, write = str(variant).partition(".")
    for kind, word, known in (
        ("metric", metric, METRICS),
        ("variant", rows if write in SUBLAYERS else variant, VARIANTS),
        ("aggregate", over, [*AGGREGATES, "each", *SHAPES]),
        *([("metric", with_metric, METRICS)] if with_metric is not None else []),
    ):
        if not isinstance(word, str) or word not in known:
            listed = "`delta-suite metrics` lists them" if kind == "metric" else f"one of {', '.join(known)}"
            raise UnknownNameError(f"no {kind} {word!r}: {listed}")
    if (over == "correlation") != (with_metric is not None):
        raise UnknownNameError("a correlation is of two metrics: give over='correlation' together with with_metric")
    for name in (metric, with_metric or metric):
        if over in SHAPES and METRICS[name].scope != "layer":
            raise UnknownNameError(f"no {over} of {name}: it is a metric of a {METRICS[name].scope}, not of layers")


def over_layers(
    view: RecordView, layers: Sequence[int], metric: str, variant: str, over: str, with_metric: str | None = None
) -> tuple[Estimate, Mapping[int, Estimate]]:
    """Return the estimate over these layers, and those of each layer where the metric is one of layers.

    Without the arrays beside the record several layers have no common interval. A value without it is given only for
    `each`, where every layer is decided by its own interval.
    """
    if over in SHAPES:
        return _profile(view, layers, metric, variant, over, with_metric)
    aggregate = AGGREGATES["mean" if over == "each" else over]
    definition = METRICS[metric]
    if definition.scope == "layer" or (definition.scope == "pair" and len(layers) == 1):
        each = {layer: view.layer(layer, metric, variant) for layer in layers}
        if missing := _missing(each):
            return absent(missing), each
        if len(each) == 1:
            return each[layers[0]], each
        if over != "each" and (problem := _replicates_gone(view, each.values())):
            return absent(problem), each
        whole = combine(lambda *values: aggregate(values), *each.values(), low=definition.low, high=definition.high)
        return whole, each
    estimate = view.over(layers, metric, variant)
    per_layer = estimate.per_layer or {}
    value_is = "median" if definition.takes == "law" else "mean"
    if estimate.value is not None and over not in {"mean", "each", value_is}:
        values = [value for value in per_layer.values() if value is not None]
        # There are no replicates of single layers' shares, so their median has no interval.
        estimate = (
            Estimate(value=aggregate(values), per_layer=per_layer)
            if values
            else absent(f"{metric} has no values per layer")
        )
    return estimate, {}


def _missing(each: Mapping[int, Estimate]) -> str | None:
    """Return which layers have no value, and why; a reason that all of them share is given once."""
    reasons = {layer: estimate.reason for layer, estimate in each.items() if estimate.value is None}
    if len(reasons) == len(each) > 1 and len(set(reasons.values())) == 1:
        return reasons[min(reasons)]
    return "; ".join(f"layer {layer}: {reason}" for layer, reason in reasons.items()) or None


def _profile(
    view: RecordView, layers: Sequence[int], metric: str, variant: str, shape: str, with_metric: str | None
) -> tuple[Estimate, Mapping[int, Estimate]]:
    """Return a figure of the profile of a metric over these layers, and the estimate of each layer."""
    profile, other = (
        {layer: view.layer(layer, name, variant) for layer in layers} for name in (metric, with_metric or metric)
    )
    for each in (profile, other):
        if problem := _missing(each) or _replicates_gone(view, each.values()):
            return absent(problem), profile
    depth = [layer / view.model.layers for layer in layers]
    return profile_figure(shape, list(profile.values()), list(other.values()), depth), profile


def _replicates_gone(view: RecordView, estimates: Iterable[Estimate]) -> str | None:
    """Return why intervals that the record holds cannot be combined: their replicates are in a file that is gone."""
    if all(estimate.interval is None or estimate.replicates is not None for estimate in estimates):
        return None
    try:
        view.content()
    except RecordError as error:
        return str(error)
    return None


def layers_of(scope: str, layers: int, phases: PhaseMap) -> range | str:
    """Return the layers of a scope in a model of so many layers, or the reason why it has none.

    `depth:0.5-1` are the layers L of N with 0.5 <= L / N < 1, as phases by share of the depth are.

    Example:
        >>> layers_of("C", 12, {"C": (2, 5)}), layers_of("layer:12", 12, {})
        (range(2, 6), 'the model has layers 0-11, so no layer:12')
        >>> layers_of("depth:0-0.5", 5, {}), layers_of("depth:0.5-1", 5, {})
        (range(0, 3), range(3, 5))
    """
    if scope == "model":
        return range(layers)
    if scope in phases:
        first, last = phases[scope]
        return range(first, last + 1)
    if written := re.fullmatch(r"depth:(\d*\.?\d+)-(\d*\.?\d+)", scope):
        shares = [Fraction(share) for share in written.groups()]  # 0.3 * 10 is 3, and not 3.0000000000000004
        if shares[1] > 1:
            return f"the depth ends at 1, so no {scope}"
        first, last = (math.ceil(share * layers) for share in shares)
        return range(first, last) if first < last else f"no layer of {layers} is in {scope}"
    if written := re.fullmatch(r"layers?:(\d+)(?:-(\d+))?", scope):
        first, last = int(written[1]), int(written[2] or written[1])
        if first <= last < layers:
            return range(first, last + 1)
        return f"the model has layers 0-{layers - 1}, so no {scope}"
    return f"a model of {layers} layers has no phase {scope} (its phases: {', '.join(phases)})"
