"""Judge claims on records: one claim on one record, or many claims on many records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from delta_suite.claims.gates import Gate, failed_gates
from delta_suite.claims.null_kinds import Requirement, requirement
from delta_suite.claims.observe import Observation, observe
from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.claims.verdict import NO_DISTANCE, Judgement, Verdict
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import PERCENT, combine, detectable_effect, p_value
from delta_suite.metrics.registry import METRICS, parts_of
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
    """The share of layers that hold, where the claim is made of each layer."""


def judge(
    hypothesis: Hypothesis, expectation: Expectation, view: RecordView, control: RecordView | None = None
) -> Judgement:
    """Judge one expectation on one record.

    Supported where the interval lies inside the claim, refuted where it lies wholly outside, else inconclusive; a gate
    that stays closed makes any verdict inconclusive. NaN never passes: every comparison must hold to support.

    A record without the arrays beside it is judged where its figures suffice, which is a comparison with a threshold;
    anything else is not measured, and the reason names the file.

    control: the same architecture with random weights. A claim that is supported there too is marked vacuous.
    """
    observation = observe(view, expectation.metric, expectation.scope, expectation.figures, expectation.over)
    other_side = requirement(expectation, view, control, observation)
    observed, required = observation.estimate.best, other_side.estimate.best
    vacuous = False
    if observation.value is None:
        decision = _Decision(Verdict.NOT_MEASURED, observation.reason)
    elif other_side.estimate.value is None:
        decision = _Decision(Verdict.NOT_MEASURED, f"the other side: {other_side.estimate.reason}")
    elif expectation.over == "each":
        decision = _decide_layers(expectation, observation, other_side, view)
        observed, required = decision.holding, expectation.mostly
    else:
        decision = _decide(expectation, observation, other_side, view)
        if decision.verdict is Verdict.SUPPORTED and control is not None:
            vacuous = judge(hypothesis, expectation, control).verdict is Verdict.SUPPORTED
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
    )


def _decide(expectation: Expectation, observation: Observation, other_side: Requirement, view: RecordView) -> _Decision:
    """Return the verdict on one figure, with its margin and p."""
    distance = _distance(expectation, observation.estimate, other_side.estimate)
    p = None
    if distance.replicates is not None and distance.corrected is not None:
        p = p_value(distance.corrected, distance.replicates)
        p = max(p, other_side.p) if other_side.p is not None else p
    gates = failed_gates(expectation, observation, other_side.reference, view)
    if other_side.undecidable:
        gates = (*gates, Gate("null", other_side.undecidable))
    if gates:
        return _Decision(Verdict.INCONCLUSIVE, _listed(gates), gates, distance, p)
    verdict = _verdict(distance, expectation)
    reason = None
    if verdict is Verdict.INCONCLUSIVE:
        reason = f"the {PERCENT} interval of the margin holds 0"
        if distance.replicates is not None:
            reason += f"; these {view.record.resampling.unit}s show a margin of "
            reason += f"{detectable_effect(distance.replicates):.3g} or more"
    return _Decision(verdict, reason, distance=distance, p=p)


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
    gates = failed_gates(expectation, observation, other_side.reference, view)
    if gates:
        return _Decision(Verdict.INCONCLUSIVE, _listed(gates), gates, holding=holding)
    if holding >= expectation.mostly:
        return _Decision(Verdict.SUPPORTED, holding=holding)
    if not_refuted < expectation.mostly:
        return _Decision(Verdict.REFUTED, holding=holding)
    reason = f"{not_refuted - holding:.0%} of the layers' intervals reach over the threshold"
    return _Decision(Verdict.INCONCLUSIVE, reason, holding=holding)


def _distance(expectation: Expectation, observed: Estimate, required: Estimate) -> Estimate:
    """Return the margin of an observed figure, positive inside the claim."""
    sign = 1.0 if expectation.rising else -1.0
    if required.replicates is not None:
        return combine(lambda value, bound: sign * (value - bound), observed, required)
    bound = required.value
    assert bound is not None
    distance = combine(lambda value: sign * (value - bound), observed)
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
    interval = distance.interval
    if METRICS[expectation.metric].scope == "model" and distance.value is not None:
        interval = (distance.value, distance.value)  # a rank or p-value already accounts for uncertainty
    if interval is None:
        return Verdict.INCONCLUSIVE
    low, high = interval
    if low > 0 or (low == 0 and expectation.op in {">=", "<="}):
        return Verdict.SUPPORTED
    return Verdict.REFUTED if high < 0 or (high == 0 and expectation.op in {">", "<"}) else Verdict.INCONCLUSIVE


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


def judge_claim(
    hypothesis: Hypothesis, expectation: Expectation, view: RecordView, control: RecordView | None = None
) -> Judged:
    """Judge one claim on one record, under its variant and under every other one that the record has.

    What attention and MLP write is measured in the variants without sinks alone.
    """
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
