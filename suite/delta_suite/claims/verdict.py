"""Verdicts on claims, and the figures that they rest on."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

from delta_suite.claims.gates import Gate
from delta_suite.claims.observe import Observation
from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import detectable_effect


class Verdict(Enum):
    """The outcome of judging a claim on a record; the value is the word that tables show."""

    SUPPORTED = "PASS"
    REFUTED = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    NOT_MEASURED = "NOT MEASURED"


NO_DISTANCE = absent("not measured")
"""The margin of a claim that has none."""


@dataclass(frozen=True)
class Judgement:
    """The verdict on one expectation for one model, and the figures that it rests on."""

    hypothesis: Hypothesis
    expectation: Expectation
    model: str
    verdict: Verdict
    observed: float | None
    """The figure without its bias, where that is known; observation.value is the figure as measured."""
    required: float | None
    margin: float | None
    """How far the observed value is inside the claim (positive) or outside (negative), in the metric's unit."""
    reason: str | None
    """Why the verdict is neither supported nor refuted, where it is not."""
    observation: Observation
    reference: Observation | None
    """The figure that `than` compared with, where that is a figure of a scope."""
    gates: tuple[Gate, ...] = ()
    """The gates that stayed closed."""
    distance: Estimate = NO_DISTANCE
    """The margin with its interval: the claim holds where it is above 0."""
    p: float | None = None
    """One-sided p of the claim being false; with a null, the larger of the interval's and the null's."""
    vacuous: bool = False
    """True if the same claim is supported for the same architecture with random weights."""
    no_better: bool = False
    """True if it is supported, and the figure of random weights meets it, too, though a gate keeps them undecided."""
    control_unknown: str | None = None
    """Why it is not known whether the claim is vacuous: what hinders the same claim for random weights."""
    as_measured: float | None = None
    """With over = "each", the share of layers whose values hold; `observed` is the share whose intervals do."""
    ceiling: float | None = None
    """The most that one direction with any f could close, median over layers, for a claim of rank_one_closure."""

    @property
    def notes(self) -> tuple[str, ...]:
        """The share of layers that hold as measured, a ceiling, and why the control was not judged, if they apply."""
        notes = []
        if self.as_measured is not None:
            notes.append(
                f"{self.as_measured:.0%} of the layers hold as measured, {self.observed:.0%} by their intervals"
            )
        if self.ceiling is not None:
            notes.append(f"one direction with any f could close at most {self.ceiling:.3g} (median over layers)")
        if self.control_unknown is not None:
            notes.append(f"not known whether random weights meet it, too: {self.control_unknown}")
        return tuple(notes)

    @property
    def detectable(self) -> float | None:
        """The margin that this many documents would show, at the suite's confidence and power."""
        return detectable_effect(self.distance.replicates) if self.distance.replicates else None

    @property
    def holds_for(self) -> str | None:
        """The thresholds under which the verdict would be the same, in words."""
        interval = self.observation.interval
        if self.expectation.threshold is None or self.expectation.over == "each" or interval is None or self.gates:
            return None
        below, above = (f"{end:.4g}" for end in interval)
        if self.verdict is Verdict.INCONCLUSIVE:
            return f"from {below} to {above}"
        if (self.verdict is Verdict.SUPPORTED) == self.expectation.rising:
            return f"up to {below}"
        return f"from {above}"


def combine_verdicts(verdicts: Iterable[Verdict]) -> Verdict:
    """Return the verdict on a hypothesis: it holds when all its expectations hold; one refuted refutes it.

    Example:
        >>> combine_verdicts([Verdict.SUPPORTED, Verdict.INCONCLUSIVE]).value
        'INCONCLUSIVE'
    """
    seen = list(verdicts)
    for verdict in (Verdict.REFUTED, Verdict.NOT_MEASURED, Verdict.INCONCLUSIVE):
        if verdict in seen:
            return verdict
    return Verdict.SUPPORTED
