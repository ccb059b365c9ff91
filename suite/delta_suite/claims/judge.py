"""Claims meet records: one claim on one record, and many claims on many records."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from delta_suite.claims.gates import Gate, failed_gates
from delta_suite.claims.null_kinds import Requirement, requirement
from delta_suite.claims.observe import Observation, observe
from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.claims.verdict import Judgement, Verdict
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import PERCENT, combine, detectable_effect, p_value
from delta_suite.metrics.registry import METRICS, parts_of
from delta_suite.records.view import RecordView


def judge(
    hypothesis: Hypothesis, expectation: Expectation, view: RecordView, control: RecordView | None = None
) -> Judgement:
    """Judge one expectation on one record.

    Supported where the interval lies inside the claim, refuted where it lies wholly outside, else inconclusive; a gate
    that stays closed makes any verdict inconclusive. NaN never passes: every comparison must hold to support.

    control: the same architecture with random weights. A claim that is supported there too is marked vacuous.
    """
    observation = observe(view, expectation.metric, expectation.scope, expectation.variant, expectation.over)
    other_side = requirement(expectation, view, control, observation)
    verdict: dict[str, Any]
    if observation.value is None:
        verdict = {"verdict": Verdict.NOT_MEASURED, "reason": observation.reason}
    elif other_side.estimate.value is None:
        verdict = {"verdict": Verdict.NOT_MEASURED, "reason": f"the other side: {other_side.estimate.reason}"}
    else:
        gates = failed_gates(expectation, observation, other_side.reference, view)
        decide = _decide_layers if expectation.over == "each" else _decide
        verdict = decide(expectation, observation, other_side, gates)
        if verdict["verdict"] is Verdict.SUPPORTED and control is not None and expectation.over != "each":
            verdict["vacuous"] = judge(hypothesis, expectation, control).verdict is Verdict.SUPPORTED
    observed = verdict.pop("observed", observation.estimate.best)
    required = verdict.pop("required", other_side.estimate.best)
    sign = 1 if expectation.rising or expectation.over == "each" else -1
    margin = None if observed is None or required is None else sign * (observed - required)
    return Judgement(
        hypothesis,
        expectation,
        view.model.name,
        observed=observed,
        required=required,
        margin=margin,
        observation=observation,
        reference=other_side.reference,
        **verdict,
    )


def _decide(
    expectation: Expectation, observation: Observation, other_side: Requirement, gates: tuple[Gate, ...]
) -> dict[str, Any]:
    """Return the verdict on one figure, with its margin and p."""
    distance = _distance(expectation, observation.estimate, other_side.estimate)
    p = None
    if distance.replicates is not None and distance.corrected is not None:
        p = p_value(distance.corrected, distance.replicates)
        p = max(p, other_side.p) if other_side.p is not None else p
    if other_side.undecidable:
        gates = (*gates, Gate("null", other_side.undecidable))
    outcome: dict[str, Any] = {"distance": distance, "p": p, "gates": gates}
    if gates:
        return outcome | {"verdict": Verdict.INCONCLUSIVE, "reason": _listed(gates)}
    verdict = _verdict(distance, expectation)
    reason = None
    if verdict is Verdict.INCONCLUSIVE:
        reason = f"the {PERCENT} interval of the margin holds 0"
        if distance.replicates is not None:
            reason += f"; these documents show a margin of {detectable_effect(distance.replicates):.3g} or more"
    return outcome | {"verdict": verdict, "reason": reason}


def _decide_layers(
    expectation: Expectation, observation: Observation, other_side: Requirement, gates: tuple[Gate, ...]
) -> dict[str, Any]:
    """Return the verdict on a claim that must hold layer by layer."""
    verdicts = [
        _verdict(_distance(expectation, estimate, other_side.estimate), expectation)
        for estimate in observation.each.values()
    ]
    holding = sum(verdict is Verdict.SUPPORTED for verdict in verdicts) / len(verdicts)
    not_refuted = sum(verdict is not Verdict.REFUTED for verdict in verdicts) / len(verdicts)
    outcome: dict[str, Any] = {"observed": holding, "required": expectation.mostly, "gates": gates, "reason": None}
    if gates:
        return outcome | {"verdict": Verdict.INCONCLUSIVE, "reason": _listed(gates)}
    if holding >= expectation.mostly:
        return outcome | {"verdict": Verdict.SUPPORTED}
    if not_refuted < expectation.mostly:
        return outcome | {"verdict": Verdict.REFUTED}
    reason = f"{not_refuted - holding:.0%} of the layers' intervals reach over the threshold"
    return outcome | {"verdict": Verdict.INCONCLUSIVE, "reason": reason}


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
    ends = sorted(sign * (end - bound) for end in observed.interval)
    return distance.model_copy(update={"corrected": sign * (observed.best - bound), "interval": (ends[0], ends[1])})


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
    """One claim on one record, and the same claim under every other variant."""

    view: RecordView
    judgement: Judgement
    variants: Mapping[str, Judgement]
    """A verdict that flips between variants rests on the choice of rows."""

    @property
    def where(self) -> str:
        """The place of the claim: file and line."""
        return f"{self.judgement.hypothesis.path}:{self.judgement.expectation.line}"


def judge_all(
    hypotheses: Iterable[Hypothesis], views: Iterable[tuple[RecordView, RecordView | None]]
) -> Iterator[Judged]:
    """Judge every claim on every record, record by record.

    views: each record with its control, the same architecture with random weights, or None.
    """
    hypotheses = list(hypotheses)
    for view, control in views:
        for hypothesis in hypotheses:
            for expectation in hypothesis.expect:
                yield judge_claim(hypothesis, expectation, view, control)


def judge_claim(
    hypothesis: Hypothesis, expectation: Expectation, view: RecordView, control: RecordView | None = None
) -> Judged:
    """Judge one claim on one record, under its variant and under every other."""
    variants = {
        variant: judge(hypothesis, expectation.model_copy(update={"variant": variant}), view)
        for variant in view.variants
    }
    return Judged(view, judge(hypothesis, expectation, view, control), variants)


def parts_of_claims(hypotheses: Iterable[Hypothesis]) -> frozenset[str]:
    """Return the parts of a measurement that the claims of these hypotheses need."""
    return parts_of([metric for hypothesis in hypotheses for claim in hypothesis.expect for metric in claim.metrics])
