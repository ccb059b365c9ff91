"""Expectations meet measurements: what was observed, what was required, and the verdict.

Until intervals exist a verdict comes from the value alone: supported where it meets the claim, refuted where not.
"""

from __future__ import annotations

import math
import operator
import re
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from suite.analysis.metrics import METRICS, Estimate, absent
from suite.claims.spec import Expectation, Hypothesis
from suite.errors import SuiteError
from suite.records.measurement import Measurement


class NotMeasuredError(SuiteError):
    """The number asked for does not exist for this model; the message says why."""


class Verdict(Enum):
    """What a measurement says of a claim; the value is the word that tables show."""

    SUPPORTED = "PASS"
    REFUTED = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_MEASURED = "NOT MEASURED"


OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

AGGREGATES: Mapping[str, Callable[[Iterable[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "max": max,
}


@dataclass(frozen=True)
class Observation:
    """One metric over one scope of one model: the number, or why there is none, and what each layer says."""

    model: str
    metric: str
    scope: str
    variant: str
    over: str
    layers: tuple[int, int] | None
    """First and last layer of the scope."""
    value: float | None
    reason: str | None = None
    per_layer: Mapping[int, float | None] = field(default_factory=dict)


class Quantity(float):
    """An observed number that remembers what it is, so that a plain `assert` on it can explain itself."""

    observation: Observation

    def __new__(cls, observation: Observation) -> Quantity:
        if observation.value is None:
            raise NotMeasuredError(
                f"{observation.metric} over {observation.scope} of {observation.model} is not measured: "
                f"{observation.reason}"
            )
        self = super().__new__(cls, observation.value)
        self.observation = observation
        return self


@dataclass(frozen=True)
class Judgement:
    """The verdict on one expectation for one model, and what it rests on."""

    hypothesis: Hypothesis
    expectation: Expectation
    model: str
    verdict: Verdict
    observed: float | None
    required: float | None
    margin: float | None
    """How far the observed value is inside the claim (positive) or outside (negative), in the metric's unit."""
    reason: str | None
    """Why there is no verdict, where there is none."""
    observation: Observation
    reference: Observation | None
    """What `than` compared with."""


def observe(
    measurement: Measurement, metric: str, scope: str = "model", variant: str = "raw", over: str = "mean"
) -> Observation:
    """A metric over a scope: a phase of the record, `layers:8-15`, `layer:3`, or `model`.

    A layer metric over several layers is aggregated by `over` (mean, median, min, max; with `each` the value is the
    mean and the layers' own values decide). So is a phase metric's per-layer part, but for the mean, which is the
    metric's own value.

    Raises ValueError for a metric or an aggregate that does not exist.
    """
    if metric not in METRICS:
        raise ValueError(f"no metric {metric!r}; `delta-suite metrics` lists them")
    if over != "each" and over not in AGGREGATES:
        raise ValueError(f"no aggregate {over!r}; one of {', '.join(AGGREGATES)}, each")
    found = scope_layers(measurement, scope)

    def observation(estimate: Estimate, per_layer: Mapping[int, float | None] | None = None) -> Observation:
        layers = None if isinstance(found, str) else (found[0], found[-1])
        return Observation(
            measurement.model.name,
            metric,
            scope,
            variant,
            over,
            layers,
            estimate.value,
            estimate.reason,
            per_layer or {},
        )

    if isinstance(found, str):
        return observation(absent(found))
    estimates = [measurement.layers[layer].metrics.get(variant) for layer in found]
    if any(own is None for own in estimates):
        return observation(absent(f"variant {variant} was not measured"))
    aggregate = AGGREGATES["mean" if over == "each" else over]
    if METRICS[metric].scope == "layer" or (METRICS[metric].scope == "pair" and len(found) == 1):
        older = absent(f"the record is older than the metric {metric}")
        own = {layer: measurement.layers[layer].metrics[variant].get(metric, older) for layer in found}
        per_layer = {layer: estimate.value for layer, estimate in own.items()}
        missing = [f"layer {layer}: {e.reason}" for layer, e in own.items() if e.value is None]
        if missing:
            return observation(absent("; ".join(missing)), per_layer)
        return observation(Estimate(value=aggregate(v for v in per_layer.values() if v is not None)), per_layer)
    estimate = measurement.over(found, metric, variant)
    per_layer = estimate.per_layer or {}
    if estimate.value is not None and over in {"median", "min", "max"}:
        values = [value for value in per_layer.values() if value is not None]
        estimate = Estimate(value=aggregate(values)) if values else absent(f"{metric} has no values per layer")
    return observation(estimate, per_layer)


def scope_layers(measurement: Measurement, scope: str) -> range | str:
    """The layers of a scope, or why the model has none."""
    layers = measurement.model.layers
    if scope == "model":
        return range(layers)
    if scope in measurement.phases:
        first, last = measurement.phases[scope]
        return range(first, last + 1)
    if written := re.fullmatch(r"layers?:(\d+)(?:-(\d+))?", scope):
        first, last = int(written[1]), int(written[2] or written[1])
        if first <= last < layers:
            return range(first, last + 1)
        return f"the model has layers 0-{layers - 1}, so no {scope}"
    return f"a model of {layers} layers has no phase {scope} (its phases: {', '.join(measurement.phases)})"


def judge(hypothesis: Hypothesis, expectation: Expectation, measurement: Measurement) -> Judgement:
    """One expectation against one measurement. NaN never passes: every comparison must hold to support."""
    observation = observe(measurement, expectation.metric, expectation.scope, expectation.variant, expectation.over)
    reference = None
    required = expectation.threshold
    reason = observation.reason
    if expectation.than is not None:
        than = expectation.than
        reference = observe(
            measurement,
            than.metric or expectation.metric,
            than.scope,
            expectation.variant,
            "mean" if expectation.over == "each" else expectation.over,
        )
        required = None if reference.value is None else than.times * reference.value
        reason = reason or (
            reference.reason and f"the other side, {reference.metric} over {than.scope}: {reference.reason}"
        )

    def judgement(verdict: Verdict, observed: float | None, bound: float | None, why: str | None) -> Judgement:
        margin = None
        if observed is not None and bound is not None:
            margin = (
                observed - bound if expectation.op in {">=", ">"} or expectation.over == "each" else bound - observed
            )
        return Judgement(
            hypothesis,
            expectation,
            measurement.model.name,
            verdict,
            observed,
            bound,
            margin,
            why,
            observation,
            reference,
        )

    if observation.value is None or required is None:
        return judgement(Verdict.NOT_MEASURED, observation.value, required, reason)
    holds = OPERATORS[expectation.op]
    if expectation.over == "each":
        values = [math.nan if value is None else value for value in observation.per_layer.values()]
        share = sum(holds(value, required) for value in values) / len(values)
        verdict = Verdict.SUPPORTED if share >= expectation.mostly else Verdict.REFUTED
        return judgement(verdict, share, expectation.mostly, None)
    verdict = Verdict.SUPPORTED if holds(observation.value, required) else Verdict.REFUTED
    return judgement(verdict, observation.value, required, None)


def across_variants(hypothesis: Hypothesis, expectation: Expectation, measurement: Measurement) -> dict[str, Judgement]:
    """The same claim under every variant that was measured: a verdict that flips rests on the choice of rows."""
    return {
        variant: judge(hypothesis, expectation.model_copy(update={"variant": variant}), measurement)
        for variant in measurement.layers[0].metrics
    }


def combine(verdicts: Iterable[Verdict]) -> Verdict:
    """A hypothesis holds when all its expectations hold; one refuted refutes it."""
    seen = list(verdicts)
    for verdict in (Verdict.REFUTED, Verdict.NOT_MEASURED, Verdict.INCONCLUSIVE):
        if verdict in seen:
            return verdict
    return Verdict.SUPPORTED
