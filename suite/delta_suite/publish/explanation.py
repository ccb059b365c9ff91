"""The text of a verdict: why it is what it is, and the command that shows it again."""

from __future__ import annotations

from collections.abc import Iterable

from delta_suite.claims.judge import Judged
from delta_suite.claims.observe import Observation
from delta_suite.claims.verdict import Judgement, Verdict
from delta_suite.metrics.intervals import CONFIDENCE, PERCENT, POWER
from delta_suite.publish.screen import WITHOUT_TERMINAL, command, listed, prose
from delta_suite.publish.wording import MARKS, NO_BETTER, OUTCOMES, VACUOUS, interval_text, number, verdict_text


def explanation(
    judged: Judged, where: str, reproduce: str, width: int = WITHOUT_TERMINAL, *, brief: bool = False
) -> str:
    """Return why an expectation has the verdict it has, and the command that shows it again.

    where: file and line of the claim. width: columns of a line. brief: without the values of the layers, the verdicts
    under every variant, and what else is known of the observed value.
    """
    judgement = judged.judgement
    expectation, observation = judgement.expectation, judgement.observation
    facts = [("claim", expectation.claim()), *_observed_facts(judgement, brief=brief)]
    details: list[str] = []
    if judgement.reference is not None and judgement.reference.value is not None:
        other = judgement.reference
        facts.append(("other side", f"{other.metric} over {_scope(other)} = {number(other.value)}"))
    if judgement.reason:
        facts.append(("reason", judgement.reason))
    facts += [("note", note) for note in judgement.notes]
    marked = ((VACUOUS, judgement.vacuous), (NO_BETTER, judgement.no_better))
    facts += [(mark, MARKS[mark]) for mark, shown in marked if shown]
    if not brief:
        facts.append(("over", f"{_scope(observation)}, variant {observation.variant}"))
        if values := _per_layer(observation, expectation.op):
            details.append(listed(values, width, "  per layer"))
        variants = [
            f"{name} {verdict_text(other.verdict.value, other.observed)}" for name, other in judged.variants.items()
        ]
        details.append(prose(", ".join(variants), width, "  variants"))
    outcome = f"{expectation_name(judged)} is {OUTCOMES[judgement.verdict.value]} for {judgement.model}"
    origin = [("threshold", expectation.origin), ("stated at", where)]
    return "\n".join(
        [
            prose(outcome, width),
            *_fact_lines(facts, width),
            *details,
            *_fact_lines(origin, width),
            command(reproduce, width, "  reproduce"),
        ]
    )


def _fact_lines(facts: Iterable[tuple[str, str]], width: int) -> list[str]:
    return [prose(" ".join(text.split()), width, f"  {label}") for label, text in facts]


def expectation_name(judged: Judged) -> str:
    """Return the hypothesis and the expectation, as `hypothesis/expectation`."""
    return f"{judged.judgement.hypothesis.id}/{judged.judgement.expectation.id}"


def headline(judged: Judged, where: str) -> str:
    """Return one line on a verdict: where the claim is, what it claims, and what was observed."""
    judgement = judged.judgement
    known = "" if judgement.observed is None else f", observed {number(judgement.observed)}"
    why = f": {judgement.reason}" if judgement.reason else ""
    return (
        f"{where}: {expectation_name(judged)}[{judgement.model}] is {OUTCOMES[judgement.verdict.value]}: "
        f"{judgement.expectation.claim()}{known}{why}"
    )


def _observed_facts(judgement: Judgement, *, brief: bool) -> list[tuple[str, str]]:
    """Return the observed value with its interval and p, where there is one."""
    expectation, observation = judgement.expectation, judgement.observation
    if judgement.observed is None or judgement.margin is None:
        return []
    if expectation.over == "each":
        held = f"{judgement.observed:.0%} of the layers' intervals hold, {expectation.mostly:.0%} required"
        return [("observed", f"{held} (margin {judgement.margin:+.2f})")]
    required = f"required {expectation.op} {judgement.required:.6g} (margin {judgement.margin:+.4f})"
    interval = "" if observation.interval is None else f" {interval_text(observation.interval)}"
    facts = [("observed", f"{number(judgement.observed)}{interval}, {required}")]
    if observation.interval is not None and not brief:
        margin = ""
        if expectation.than is not None and judgement.distance.interval is not None:
            margin = f"; of the margin {interval_text(judgement.distance.interval)}"
        facts.append(("interval", f"{PERCENT}, over {observation.unit}s{margin}"))
        if (narrower := observation.estimate.interval_documents) is not None:
            facts.append(("on these", f"{interval_text(narrower)} on other documents of these domains"))
    if judgement.verdict is Verdict.INCONCLUSIVE and judgement.detectable is not None:
        sure = f"{CONFIDENCE:.0%} confidence, {POWER:.0%} power"
        facts.append(("detectable", f"a margin of {judgement.detectable:.3g} ({sure})"))
    if brief:
        return facts
    if observation.interval is not None:
        facts.append(("as it is", f"{number(observation.value)} of these documents, its bias included"))
    if judgement.p is not None:
        facts.append(("p", f"{judgement.p:.2g} that the claim is false (one-sided)"))
    if judgement.holds_for is not None:
        facts.append(("same for", f"any threshold {judgement.holds_for}"))
    return facts


def quantity_lines(observation: Observation, comparison: str, width: int = WITHOUT_TERMINAL) -> list[str]:
    """Return the explanation of a plain assert on a number of the `measurement` fixture."""
    return [
        comparison,
        f"{observation.metric} over {_scope(observation)} of {observation.model}, variant {observation.variant}",
        *(listed(values, width, "per layer").split("\n") if (values := _per_layer(observation, comparison)) else []),
    ]


def _scope(observation: Observation) -> str:
    if observation.layers is None:
        return observation.scope
    first, last = observation.layers
    return f"{observation.scope} (layers {first}-{last})" if first != last else f"{observation.scope} (layer {first})"


def _per_layer(observation: Observation, op: str) -> list[str]:
    """Return the layers' values, the worst for the claim marked; none where there are not two."""
    values = {layer: value for layer, value in observation.per_layer.items() if value is not None}
    if len(values) < 2:
        return []
    worst = max(values, key=values.__getitem__) if "<" in op else min(values, key=values.__getitem__)
    return [f"{layer}: {number(value, 3)}{' <- worst' if layer == worst else ''}" for layer, value in values.items()]
