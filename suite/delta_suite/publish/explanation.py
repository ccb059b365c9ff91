"""The text of a verdict: why it is what it is, and the command that shows it again."""

from __future__ import annotations

from delta_suite.claims.judge import Judged
from delta_suite.claims.observe import Observation
from delta_suite.claims.verdict import Judgement, Verdict
from delta_suite.metrics.intervals import CONFIDENCE, PERCENT, POWER
from delta_suite.publish.wording import MARKS, OUTCOMES, VACUOUS, interval_text, number, verdict_text


def explanation(judged: Judged, where: str, reproduce: str) -> str:
    """Return why an expectation has the verdict it has, and the command that shows it again.

    where: file and line of the claim.
    """
    judgement = judged.judgement
    expectation, observation = judgement.expectation, judgement.observation
    lines = [
        f"{judgement.hypothesis.id}/{expectation.id} is {OUTCOMES[judgement.verdict.value]} for {judgement.model}",
        f"  claim      {expectation.claim()}",
        *_observed_lines(judgement),
    ]
    if judgement.reference is not None and judgement.reference.value is not None:
        other = judgement.reference
        lines.append(f"  other side {other.metric} over {_scope(other)} = {number(other.value)}")
    if judgement.reason:
        lines.append(f"  reason     {judgement.reason}")
    if judgement.vacuous:
        lines.append(f"  {VACUOUS}          {MARKS[VACUOUS]}")
    lines.append(f"  over       {_scope(observation)}, variant {observation.variant}")
    lines += _per_layer(observation, expectation.op)
    variants = [
        f"{name} {verdict_text(other.verdict.value, other.observed)}" for name, other in judged.variants.items()
    ]
    lines.append(f"  variants   {', '.join(variants)}")
    lines += [f"  threshold  {expectation.origin}", f"  stated at  {where}", f"  reproduce  {reproduce}"]
    return "\n".join(lines)


def _observed_lines(judgement: Judgement) -> list[str]:
    """Return the observed value with its interval and p, where there is one."""
    expectation, observation = judgement.expectation, judgement.observation
    if judgement.observed is None or judgement.margin is None:
        return []
    if expectation.over == "each":
        return [
            f"  observed   {judgement.observed:.0%} of the layers hold, {expectation.mostly:.0%} required "
            f"(margin {judgement.margin:+.2f})"
        ]
    lines = [
        f"  observed   {number(judgement.observed)}, required {expectation.op} {judgement.required:.6g} "
        f"(margin {judgement.margin:+.4f})"
    ]
    if observation.interval is not None:
        margin = ""
        if expectation.than is not None and judgement.distance.interval is not None:
            margin = f"; of the margin {interval_text(judgement.distance.interval)}"
        lines.append(f"  interval   {PERCENT} {interval_text(observation.interval)}, over documents{margin}")
        lines.append(f"  as it is   {number(observation.value)} of these documents, its bias included")
    if judgement.p is not None:
        lines.append(f"  p          {judgement.p:.2g} that the claim is false (one-sided)")
    if judgement.holds_for is not None:
        lines.append(f"  same for   any threshold {judgement.holds_for}")
    if judgement.verdict is Verdict.INCONCLUSIVE and judgement.detectable is not None:
        sure = f"{CONFIDENCE:.0%} confidence, {POWER:.0%} power"
        lines.append(f"  detectable a margin of {judgement.detectable:.3g} ({sure})")
    return lines


def quantity_lines(observation: Observation, comparison: str) -> list[str]:
    """Return the explanation of a plain assert on a number of the `measurement` fixture."""
    return [
        comparison,
        f"{observation.metric} over {_scope(observation)} of {observation.model}, variant {observation.variant}",
        *(line.strip() for line in _per_layer(observation, comparison)),
    ]


def _scope(observation: Observation) -> str:
    if observation.layers is None:
        return observation.scope
    first, last = observation.layers
    return f"{observation.scope} (layers {first}-{last})" if first != last else f"{observation.scope} (layer {first})"


def _per_layer(observation: Observation, op: str) -> list[str]:
    """Return the layers' values, eight to a line, the worst for the claim marked."""
    values = {layer: value for layer, value in observation.per_layer.items() if value is not None}
    if len(values) < 2:
        return []
    worst = max(values, key=values.__getitem__) if "<" in op else min(values, key=values.__getitem__)
    cells = [f"{layer}: {number(value, 3)}{' <- worst' if layer == worst else ''}" for layer, value in values.items()]
    rows = [cells[start : start + 8] for start in range(0, len(cells), 8)]
    return [f"  {'per layer  ' if index == 0 else '           '}{'  '.join(row)}" for index, row in enumerate(rows)]
