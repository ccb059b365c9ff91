"""Judge claims on records: one claim on one record, or many claims on many records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from delta_suite.claims.gates import Gate, failed_gates
from delta_suite.claims.null_kinds import Control, Requirement, control_of, requirement
from delta_suite.claims.observe import Observation, observe
from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.claims.verdict import NO_DISTANCE, Judgement, Verdict
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import PERCENT, combine, detectable_effect, p_value
from delta_suite.metrics.profiles import RANGES
from delta_suite.metrics.registry import METRICS, WITHOUT_VARIANTS, parts_of
from delta_suite.records.assemble import LAW_VARIANT
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import VARIANTS


@dataclass(frozen=True)
class _Decision:
    """The verdict on a claim whose two sides are measured."""

    verdict: Verdict
    reason: str | None = None
    gates: tuple[Gate, ...] = ()
    distance: Estimate = NO_DISTANCE
    p: float | None = None
    holding: float | None = None
    """The share of layers whose intervals hold, where the claim is made of each layer."""
    as_measured: float | None = None
    """The share of layers whose values hold."""


def judge(hypothesis: Hypothesis, expectation: Expectation, view: RecordView, control: Control = None) -> Judgement:
    """Judge one expectation on one record.

    Supported where the interval lies inside the claim, refuted where it lies wholly outside, else inconclusive; a gate
    that stays closed makes any verdict inconclusive. NaN never passes: every comparison must hold to support.

    A p-value, and a rank within a null, that is not significant is no evidence against a claim: it is refuted only
    where the interval lies beyond the other end of the null, as far out as was asked for. A requirement that no value
    of the metric could meet, and a null that cannot decide at this depth, leave the claim not measured.

    A record without the arrays beside it is judged where its figures suffice, which is a comparison with a threshold;
    anything else is not measured, and the reason names the file.

    control: the same architecture with random weights. A claim that is supported there too is marked vacuous; one that
    is not supported needs none, and none is measured for it.
    """
    over, other = expectation.over, expectation.with_metric
    observation = observe(view, expectation.metric, expectation.scope, expectation.figures, over, other)
    other_side = requirement(expectation, view, control, observation)
    observed, required = observation.estimate.best, other_side.estimate.best
    vacuous, no_better, unknown = False, False, None
    if observation.value is None:
        decision = _Decision(Verdict.NOT_MEASURED, observation.reason)
    elif other_side.undecidable:
        decision = _Decision(Verdict.NOT_MEASURED, other_side.undecidable)
    elif other_side.estimate.value is None:
        decision = _Decision(Verdict.NOT_MEASURED, f"the other side: {other_side.estimate.reason}")
    elif problem := _unattainable(expectation, observation, other_side, view):
        decision = _Decision(Verdict.NOT_MEASURED, problem)
    elif expectation.over == "each":
        decision = _decide_layers(expectation, observation, other_side, view)
        observed, required = decision.holding, expectation.mostly
    else:
        decision = _decide(expectation, observation, other_side, view)
    if decision.verdict is Verdict.SUPPORTED and (control_view := control_of(control)) is not None:
        of_control = judge(hypothesis, expectation, control_view)
        vacuous = of_control.verdict is Verdict.SUPPORTED
        no_better = not vacuous and _meets(of_control)
        unknown = of_control.reason if of_control.verdict is Verdict.NOT_MEASURED else None
    sign = 1 if expectation.rising or expectation.over == "each" else -1
    margin = None if observed is None or required is None else sign * (observed - required)
    return Judgement(
        hypothesis,
        expectation,
        view.model.name,
        decision.verdict,
        observed=observed,
        required=required,
        margin=margin,
        reason=decision.reason,
        observation=observation,
        reference=other_side.reference,
        gates=decision.gates,
        distance=decision.distance,
        p=decision.p,
        vacuous=vacuous,
        no_better=no_better,
        control_unknown=unknown,
        as_measured=decision.as_measured,
        ceiling=view.closure_ceiling(observation.layers) if expectation.metric == "rank_one_closure" else None,
    )


def _meets(judgement: Judgement) -> bool:
    """Return True if gates alone keep a claim from being decided, and the figure as it is meets it."""
    if not judgement.gates or judgement.margin is None or judgement.required is None:
        return False
    if judgement.as_measured is not None:
        return judgement.as_measured >= judgement.required
    return judgement.expectation.met_by(judgement.margin)


def _unattainable(
    expectation: Expectation, observation: Observation, other_side: Requirement, view: RecordView
) -> str | None:
    """Return why no value of the metric could meet the requirement, or None if one could.

    The end of a null is a value of the metric itself, but for its bias, so that one is always within reach.
    """
    if other_side.opposite is not None:
        return None
    required = other_side.estimate.best
    assert required is not None
    named, (least, most) = _range(expectation, observation, view)
    end, within = (most, required < most) if expectation.rising else (least, required > least)
    if within or (required == end and not expectation.strict):
        return None
    return (
        f"no value could meet it: {expectation.op} {required:.4g} is asked for, and {named} is "
        f"{'at most' if expectation.rising else 'at least'} {end:g}"
    )


def _range(expectation: Expectation, observation: Observation, view: RecordView) -> tuple[str, tuple[float, float]]:
    """Return what a claim is about in a word, and the range of its values in this model."""
    assert observation.layers is not None
    first, last = observation.layers
    if expectation.over in RANGES:
        of_depth, layers = expectation.over in {"peak", "valley"}, view.model.layers
        return f"a {expectation.over}", (first / layers, last / layers) if of_depth else RANGES[expectation.over]
    metric = METRICS[expectation.metric]
    largest = {"rank": min(view.record.calibration.tokens, view.model.hidden), "layers": last + 1 - first}
    most = min(metric.high, largest[metric.most] if isinstance(metric.most, str) else metric.most)
    return metric.name, (metric.low, most)


def _decide(expectation: Expectation, observation: Observation, other_side: Requirement, view: RecordView) -> _Decision:
    """Return the verdict on one figure, with its margin and p."""
    distance = _distance(expectation, observation.estimate, other_side.estimate)
    p = None
    if distance.replicates is not None and distance.corrected is not None:
        p = p_value(distance.corrected, distance.replicates)
        of_null = observation.value if METRICS[expectation.metric].p_value else other_side.p
        p = max(p, of_null) if of_null is not None else p
    gates = failed_gates(observation, other_side.reference, view)
    if gates:
        return _Decision(Verdict.INCONCLUSIVE, _listed(gates), gates, distance, p)
    verdict, reason = _verdict(distance, expectation), None
    if verdict is Verdict.REFUTED and (opposite := _opposite(expectation, other_side)) is not None:
        verdict = _verdict(_distance(expectation, observation.estimate, opposite), expectation)
        if verdict is not Verdict.REFUTED:
            verdict, reason = Verdict.INCONCLUSIVE, "not significant, which is no evidence against the claim"
    elif verdict is Verdict.INCONCLUSIVE:
        reason = f"the {PERCENT} interval of the margin holds 0"
        if distance.replicates is not None:
            reason += f"; these {view.record.resampling.unit}s show a margin of "
            reason += f"{detectable_effect(distance.replicates):.3g} or more"
    return _Decision(verdict, reason, distance=distance, p=p)


def _opposite(expectation: Expectation, other_side: Requirement) -> Estimate | None:
    """Return the other end of a null, beyond which alone a claim is refuted; None where the claim is no test."""
    if METRICS[expectation.metric].p_value and expectation.threshold is not None:
        return Estimate(value=1.0 - expectation.threshold)
    return other_side.opposite


def _decide_layers(
    expectation: Expectation, observation: Observation, other_side: Requirement, view: RecordView
) -> _Decision:
    """Return the verdict on a claim that must hold layer by layer."""
    if not observation.each:
        reason = f"{expectation.metric} has an interval over all layers together alone, so no single layer is decided"
        return _Decision(Verdict.INCONCLUSIVE, reason)
    verdicts = [
        _verdict(_distance(expectation, estimate, other_side.estimate), expectation)
        for estimate in observation.each.values()
    ]
    holding = sum(verdict is Verdict.SUPPORTED for verdict in verdicts) / len(verdicts)
    not_refuted = sum(verdict is not Verdict.REFUTED for verdict in verdicts) / len(verdicts)
    inside = [_inside(expectation, estimate, other_side.estimate) for estimate in observation.each.values()]
    decision = partial(_Decision, holding=holding, as_measured=sum(inside) / len(inside))
    gates = failed_gates(observation, other_side.reference, view)
    if gates:
        return decision(Verdict.INCONCLUSIVE, _listed(gates), gates)
    if holding >= expectation.mostly:
        return decision(Verdict.SUPPORTED)
    if not_refuted < expectation.mostly:
        return decision(Verdict.REFUTED)
    reason = f"{not_refuted - holding:.0%} of the layers' intervals reach over the threshold"
    return decision(Verdict.INCONCLUSIVE, reason)


def _inside(expectation: Expectation, observed: Estimate, required: Estimate) -> bool:
    """Return True if a figure, without its bias where that is known, meets the claim."""
    assert observed.best is not None
    assert required.best is not None
    return expectation.met_by((observed.best - required.best) * (1.0 if expectation.rising else -1.0))


def _distance(expectation: Expectation, observed: Estimate, required: Estimate) -> Estimate:
    """Return the margin of an observed figure, positive inside the claim."""
    sign = 1.0 if expectation.rising else -1.0
    if required.replicates is not None:
        return combine(lambda value, bound: sign * (value - bound), observed, required, arithmetic=True)
    bound = required.value
    assert bound is not None
    distance = combine(lambda value: sign * (value - bound), observed, arithmetic=True)
    if distance.interval is not None or observed.interval is None or observed.best is None:
        return distance
    # The replicates are gone, and the interval of a difference from a constant is the interval, moved.
    update: dict[str, object] = {"corrected": sign * (observed.best - bound)}
    for name in ("interval", "interval_documents"):
        if (ends := getattr(observed, name)) is not None:
            update[name] = tuple(sorted(sign * (end - bound) for end in ends))
    return distance.model_copy(update=update)


def _verdict(distance: Estimate, expectation: Expectation) -> Verdict:
    """Return the verdict on a margin: inside the claim, outside, or neither."""
    if distance.interval is None:
        return Verdict.INCONCLUSIVE
    low, high = distance.interval
    if expectation.met_by(low):
        return Verdict.SUPPORTED
    return Verdict.INCONCLUSIVE if expectation.met_by(high) else Verdict.REFUTED


def _listed(gates: Sequence[Gate]) -> str:
    return "; ".join(f"{gate.name}: {gate.says}" for gate in gates)


# --- many claims on many records -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """One claim judged on one record, and under every variant of it."""

    view: RecordView
    judgement: Judgement
    variants: Mapping[str, Judgement]
    """The judgement under each variant of the record; a verdict that flips rests on the choice of rows."""

    @property
    def where(self) -> str:
        """File and line of the claim, as `path:line`."""
        return f"{self.judgement.hypothesis.path}:{self.judgement.expectation.line}"

    def __repr__(self) -> str:
        """Return one line: the record and the variants behind it hold thousands of numbers."""
        judgement = self.judgement
        claim = f"{judgement.hypothesis.id}.{judgement.expectation.id} on {judgement.model}"
        observed = "" if judgement.observed is None else f", observed {judgement.observed:.4g}"
        return f"<{claim}: {judgement.verdict.value}{observed}>"


def judge_all(
    hypotheses: Iterable[Hypothesis], views: Iterable[tuple[RecordView, RecordView | None]]
) -> Iterator[Judged]:
    """Judge every claim on every record, record by record, and yield them in that order.

    views: each record with its control, which is the same architecture with random weights, or None.
    """
    hypotheses = list(hypotheses)
    for view, control in views:
        for hypothesis in hypotheses:
            for expectation in hypothesis.expect:
                yield judge_claim(hypothesis, expectation, view, control)


def judge_claim(hypothesis: Hypothesis, expectation: Expectation, view: RecordView, control: Control = None) -> Judged:
    """Judge one claim on one record, under its variant and under every other one that the record has.

    A claim of the law, or of losses, has one variant, that of the rows it is fitted on: under others it would only say
    the same again.
    What attention and MLP write is measured in the variants without sinks alone.
    """
    if all(METRICS[metric].takes in WITHOUT_VARIANTS for metric in expectation.metrics):
        judgement = judge(hypothesis, expectation, view, control)
        return Judged(view, judgement, {LAW_VARIANT: judgement})
    variants = {
        variant: judge(hypothesis, expectation.model_copy(update={"variant": variant}), view, control)
        for variant in view.variants
        if not (expectation.of_writes and VARIANTS[variant].keeps_sinks)
    }
    judgement = variants.get(expectation.variant) or judge(hypothesis, expectation, view, control)
    return Judged(view, judgement, variants)


def parts_of_claims(claims: Iterable[Expectation]) -> frozenset[str]:
    """Return the parts of a measurement that claims need for the metrics and writes on either side."""
    claims = list(claims)
    parts = parts_of([metric for claim in claims for metric in claim.metrics])
    return parts | {"writes"} if any(claim.of_writes for claim in claims) else parts
