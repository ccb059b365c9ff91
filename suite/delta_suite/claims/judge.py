"""Expectations meet measurements: what was observed, what was required, and the verdict."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import numpy as np

from delta_suite.claims.gates import Gate, failed_gates
from delta_suite.claims.loader import Expectation, Hypothesis
from delta_suite.errors import SuiteError
from delta_suite.metrics import nulls
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import combine, detectable_effect, p_value
from delta_suite.metrics.registry import METRICS
from delta_suite.records.record import Measurement


class NotMeasuredError(SuiteError):
    """The number asked for does not exist for this model; the message says why."""


class Verdict(Enum):
    """What a measurement says of a claim; the value is the word that tables show."""

    SUPPORTED = "PASS"
    REFUTED = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_MEASURED = "NOT MEASURED"


AGGREGATES: Mapping[str, Callable[[Iterable[float]], float]] = {
    "mean": statistics.fmean,
    "median": statistics.median,
    "min": min,
    "max": max,
}


@dataclass(frozen=True)
class Observation:
    """One metric over one scope of one model: the estimate, or why there is none, and what each layer says."""

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

    @property
    def value(self) -> float | None:
        return self.estimate.value

    @property
    def interval(self) -> tuple[float, float] | None:
        """95%, over documents."""
        return self.estimate.interval

    @property
    def reason(self) -> str | None:
        return self.estimate.reason

    @property
    def per_layer(self) -> Mapping[int, float | None]:
        """What each layer says: its own value, or its share in the phase's."""
        return {layer: own.value for layer, own in self.each.items()} or self.estimate.per_layer or {}


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
    """Without its bias, where that is known; observation.value is the figure as measured."""
    required: float | None
    margin: float | None
    """How far the observed value is inside the claim (positive) or outside (negative), in the metric's unit."""
    reason: str | None
    """Why the verdict is neither supported nor refuted, where it is not."""
    observation: Observation
    reference: Observation | None
    """What `than` compared with, where that is a figure of a scope."""
    gates: tuple[Gate, ...] = ()
    """Those that did not let a verdict pass."""
    distance: Estimate = field(default_factory=lambda: absent("not measured"))
    """The margin with its interval: the claim holds where it is above 0."""
    p: float | None = None
    """One-sided p of the claim being false; with a null, the larger of the interval's and the null's."""
    vacuous: bool = False
    """The same claim is supported for the same architecture with random weights."""

    @property
    def detectable(self) -> float | None:
        """The margin that this many documents would show, with 95% confidence and 80% power."""
        return detectable_effect(self.distance.replicates) if self.distance.replicates else None

    @property
    def holds_for(self) -> str | None:
        """The thresholds under which the verdict would be the same."""
        found = self.observation.interval
        if self.expectation.threshold is None or self.expectation.over == "each" or found is None or self.gates:
            return None
        below, above = (f"{own:.4g}" for own in found)
        rising = self.expectation.op in {">=", ">"}
        if self.verdict is Verdict.INCONCLUSIVE:
            return f"from {below} to {above}"
        if (self.verdict is Verdict.SUPPORTED) == rising:
            return f"up to {below}"
        return f"from {above}"


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

    def observation(estimate: Estimate, each: Mapping[int, Estimate] | None = None) -> Observation:
        layers = None if isinstance(found, str) else (found[0], found[-1])
        return Observation(measurement.model.name, metric, scope, variant, over, layers, estimate, each or {})

    if isinstance(found, str):
        return observation(absent(found))
    if any(variant not in measurement.layers[layer].metrics for layer in found):
        return observation(absent(f"variant {variant} was not measured"))
    return observation(*_over_layers(measurement, found, metric, variant, over))


def _over_layers(
    measurement: Measurement, found: Sequence[int], metric: str, variant: str, over: str
) -> tuple[Estimate, Mapping[int, Estimate]]:
    """The estimate over these layers, and those of each where the metric is one of layers."""
    aggregate = AGGREGATES["mean" if over == "each" else over]
    definition = METRICS[metric]
    if definition.scope == "layer" or (definition.scope == "pair" and len(found) == 1):
        older = absent(f"the record is older than the metric {metric}")
        own = {layer: measurement.layers[layer].metrics[variant].get(metric, older) for layer in found}
        missing = [f"layer {layer}: {e.reason}" for layer, e in own.items() if e.value is None]
        if missing:
            return absent("; ".join(missing)), own
        together = combine(lambda *values: aggregate(values), *own.values(), low=definition.low, high=definition.high)
        return together, own
    estimate = measurement.over(found, metric, variant)
    per_layer = estimate.per_layer or {}
    if estimate.value is not None and over in {"median", "min", "max"}:
        values = [value for value in per_layer.values() if value is not None]
        # Of single layers' shares there are no replicates, so their median has no interval.
        estimate = (
            Estimate(value=aggregate(values), per_layer=per_layer)
            if values
            else absent(f"{metric} has no values per layer")
        )
    return estimate, {}


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


@dataclass(frozen=True)
class _Requirement:
    """The other side of a comparison."""

    estimate: Estimate
    reference: Observation | None = None
    p: float | None = None
    """Of a null's rank."""
    cannot: str | None = None
    """Why no value, however large, could show the claim."""


def judge(
    hypothesis: Hypothesis, expectation: Expectation, measurement: Measurement, control: Measurement | None = None
) -> Judgement:
    """One expectation against one measurement.

    Supported where the 95% interval lies inside the claim, refuted where it lies wholly outside, else inconclusive; a
    gate that does not open makes any verdict inconclusive. NaN never passes: every comparison must hold to support.

    control: the same architecture with random weights. A claim that is supported there too is marked vacuous.
    """
    observation = observe(measurement, expectation.metric, expectation.scope, expectation.variant, expectation.over)
    required = _requirement(expectation, measurement, control, observation)
    rising = expectation.op in {">=", ">"}

    def judgement(verdict: Verdict, reason: str | None, **found: Any) -> Judgement:
        found = {"observed": observation.estimate.best, "required": required.estimate.best} | found
        if "margin" not in found:
            known = found["observed"] is not None and found["required"] is not None
            sign = 1 if rising or expectation.over == "each" else -1
            found["margin"] = sign * (found["observed"] - found["required"]) if known else None
        return Judgement(
            hypothesis,
            expectation,
            measurement.model.name,
            verdict,
            reason=reason,
            observation=observation,
            reference=required.reference,
            **found,
        )

    if observation.value is None:
        return judgement(Verdict.NOT_MEASURED, observation.reason)
    if required.estimate.value is None:
        return judgement(Verdict.NOT_MEASURED, f"the other side: {required.estimate.reason}")
    sign = 1.0 if rising else -1.0

    def distance_of(estimate: Estimate) -> Estimate:
        if required.estimate.replicates is None:
            bound = required.estimate.value
            return combine(lambda own: sign * (own - bound), estimate)
        return combine(lambda own, bound: sign * (own - bound), estimate, required.estimate)

    gates = failed_gates(expectation, observation, required.reference, measurement)
    if expectation.over == "each":
        verdicts = [_verdict(distance_of(own), expectation.op, expectation.metric) for own in observation.each.values()]
        holding = sum(own is Verdict.SUPPORTED for own in verdicts) / len(verdicts)
        open_ = sum(own is not Verdict.REFUTED for own in verdicts) / len(verdicts)
        shares: dict[str, Any] = {"observed": holding, "required": expectation.mostly}
        if holding >= expectation.mostly:
            verdict = Verdict.SUPPORTED
        else:
            verdict = Verdict.REFUTED if open_ < expectation.mostly else Verdict.INCONCLUSIVE
        if gates:
            return judgement(Verdict.INCONCLUSIVE, _says(gates), gates=gates, **shares)
        why = f"{open_ - holding:.0%} of the layers' intervals reach over the threshold"
        return judgement(verdict, why if verdict is Verdict.INCONCLUSIVE else None, **shares)

    distance = distance_of(observation.estimate)
    p = None
    if distance.replicates is not None and distance.corrected is not None:
        p = p_value(distance.corrected, distance.replicates)
        p = max(p, required.p) if required.p is not None else p
    found: dict[str, Any] = {"distance": distance, "p": p}
    if required.cannot:
        gates = (*gates, Gate("null", required.cannot))
    if gates:
        return judgement(Verdict.INCONCLUSIVE, _says(gates), gates=gates, **found)
    verdict = _verdict(distance, expectation.op, expectation.metric)
    reason = None
    if verdict is Verdict.INCONCLUSIVE:
        assert distance.replicates is not None
        reason = (
            f"the 95% interval of the margin holds 0; these documents show a margin of "
            f"{detectable_effect(distance.replicates):.3g} or more"
        )
    vacuous = False
    if verdict is Verdict.SUPPORTED and control is not None:
        vacuous = judge(hypothesis, expectation, control).verdict is Verdict.SUPPORTED
    return judgement(verdict, reason, vacuous=vacuous, **found)


def _verdict(distance: Estimate, op: str, metric: str) -> Verdict:
    """Of a margin: inside the claim, outside, or neither."""
    interval = distance.interval
    if METRICS[metric].scope == "model" and distance.value is not None:
        interval = (distance.value, distance.value)  # a rank or a p: what is uncertain is in it already
    if interval is None:
        return Verdict.INCONCLUSIVE
    low, high = interval
    if low > 0 or (low == 0 and op in {">=", "<="}):
        return Verdict.SUPPORTED
    return Verdict.REFUTED if high < 0 or (high == 0 and op in {">", "<"}) else Verdict.INCONCLUSIVE


def _says(gates: Sequence[Gate]) -> str:
    return "; ".join(f"{gate.name}: {gate.says}" for gate in gates)


def _requirement(
    expectation: Expectation, measurement: Measurement, control: Measurement | None, observed: Observation
) -> _Requirement:
    than = expectation.than
    if than is None:
        return _Requirement(Estimate(value=expectation.threshold))
    over = "mean" if expectation.over == "each" else expectation.over
    metric, variant = than.metric or expectation.metric, expectation.variant
    if than.null is None or than.null == "random-weights":
        other = measurement if than.null is None else control
        if other is None:
            return _Requirement(
                absent("the random-weights control was not measured (leave --no-control out, or measure it)")
            )
        reference = observe(other, metric, than.scope or expectation.scope, variant, over)
        scaled = combine(than.required, reference.estimate)
        return _Requirement(scaled, reference)
    if observed.value is None or observed.layers is None:
        return _Requirement(absent(observed.reason or "not measured"))
    first, last = observed.layers
    layers = range(first, last + 1)
    high = expectation.op in {">=", ">"}
    if than.null == "window":
        total, count = measurement.model.layers, last - first + 1
        runs = [run for run in nulls.windows(total, count) if run != layers]
        others = [_over_layers(measurement, run, metric, variant, over)[0] for run in runs]
        others = [own for own in others if own.value is not None]
        if not others:
            return _Requirement(absent(f"no other window of {count} layers has a value"))
        allowed = nulls.allowed_above(len(others) + 1, than.quantile)
        p = nulls.rank_p(observed.value, [own.value for own in others if own.value is not None], high=high)
        cannot = None
        if allowed < 0:
            cannot = (
                f"a model of {total} layers has {len(others) + 1} windows of {count}, so no rank among them has a p "
                f"below {1 / (len(others) + 1):.3f}, and {1 - than.quantile:.3g} is asked for"
            )
        return _Requirement(nulls.extreme(others, max(0, allowed), high=high), p=p, cannot=cannot)
    if than.null == "lag":
        return _Requirement(combine(than.required, measurement.lag_matched(layers, metric, variant)))
    drawn = measurement.random_directions(layers, metric, variant)
    if isinstance(drawn, str):
        return _Requirement(absent(drawn))
    quantile = than.quantile if high else 1.0 - than.quantile
    bound = float(np.quantile(drawn, quantile, method="higher" if high else "lower"))
    return _Requirement(Estimate(value=bound), p=nulls.rank_p(observed.value, drawn, high=high))


def across_variants(hypothesis: Hypothesis, expectation: Expectation, measurement: Measurement) -> dict[str, Judgement]:
    """The same claim under every variant that was measured: a verdict that flips rests on the choice of rows."""
    return {
        variant: judge(hypothesis, expectation.model_copy(update={"variant": variant}), measurement)
        for variant in measurement.layers[0].metrics
    }


def combine_verdicts(verdicts: Iterable[Verdict]) -> Verdict:
    """A hypothesis holds when all its expectations hold; one refuted refutes it."""
    seen = list(verdicts)
    for verdict in (Verdict.REFUTED, Verdict.NOT_MEASURED, Verdict.INCONCLUSIVE):
        if verdict in seen:
            return verdict
    return Verdict.SUPPORTED
