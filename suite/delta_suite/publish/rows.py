"""Verdicts as rows of plain values, with their margins and marks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from delta_suite.claims.judge import Judged
from delta_suite.claims.verdict import Judgement, Verdict
from delta_suite.metrics.intervals import standard_error
from delta_suite.publish.wording import FLIPS, MARKS, NO_BETTER, NONE, VACUOUS, WARN
from delta_suite.records.store import JudgedBy


@dataclass(frozen=True)
class Row:
    """One verdict as the tables need it; plain values, so that it passes between processes as JSON."""

    hypothesis: str
    expectation: str
    claim: str
    model: str
    verdict: str
    severity: str = "fail"
    observed: float | None = None
    required: float | None = None
    margin: float | None = None
    reason: str | None = None
    where: str = ""
    """file:line of the claim"""
    record: str | None = None
    variants: dict[str, tuple[str, float | None]] = field(default_factory=dict)
    """The verdict and the observed value under every variant."""
    interval: tuple[float, float] | None = None
    """The interval of the observed value."""
    gates: tuple[str, ...] = ()
    """Names of the gates that kept the measurement from deciding."""
    p: float | None = None
    """One-sided p of the claim being false."""
    vacuous: bool = False
    """True if the claim is supported for the same architecture with random weights, too."""
    detectable: float | None = None
    """The margin that this many documents would show."""
    holds_for: str | None = None
    """The thresholds under which the verdict would be the same."""
    no_better: bool = False
    """True if the figure of random weights meets the claim, too, though a gate keeps them undecided."""
    notes: tuple[str, ...] = ()
    """Lines that the verdict must be read with."""
    judged_by: tuple[int, str] | None = None
    """Version and SHA-256 of the hypothesis file; None for a plain test."""
    standard_errors: float | None = None
    """The margin in its standard errors, in which claims of different units are compared; None where it has none."""

    @classmethod
    def of(cls, judged: Judged, record: str | None, where: str | None = None) -> Row:
        """Return the row of a judged claim.

        record: the path of the record. where: file and line of the claim, if not as the hypothesis was loaded.
        """
        judgement = judged.judgement
        expectation = judgement.expectation
        return cls(
            judgement.hypothesis.id,
            expectation.id,
            expectation.claim(),
            judgement.model,
            judgement.verdict.value,
            expectation.severity,
            judgement.observed,
            judgement.required,
            judgement.margin,
            judgement.reason,
            where or judged.where,
            record,
            {name: (other.verdict.value, other.observed) for name, other in judged.variants.items()},
            None if expectation.over == "each" else judgement.observation.interval,
            tuple(gate.name for gate in judgement.gates),
            judgement.p,
            judgement.vacuous,
            judgement.detectable,
            judgement.holds_for,
            judgement.no_better,
            judgement.notes,
            (judgement.hypothesis.version, judgement.hypothesis.sha256),
            _standard_errors(judgement),
        )

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Row:
        """Return the row that `as_json` gave, after it was written as JSON and read."""
        variants = {name: tuple(pair) for name, pair in content["variants"].items()}
        pairs = {name: tuple(content[name]) for name in ("gates", "notes", "interval", "judged_by") if content[name]}
        return cls(**{**content, "gates": (), "notes": (), **pairs, "variants": variants})

    @property
    def flips(self) -> bool:
        """True if another variant gives another verdict."""
        return any(verdict != self.verdict for verdict, _ in self.variants.values())

    @property
    def word(self) -> str:
        """The verdict, or WARN for a refuted claim that does not fail a run."""
        return self.word_of(self.verdict)

    def word_of(self, verdict: str) -> str:
        """Return the word of any verdict on this claim, such as that under another variant."""
        return WARN if self.severity == "warn" and verdict == Verdict.REFUTED.value else verdict

    @property
    def place(self) -> tuple[str, int]:
        """File and line of the claim, to sort by."""
        file, _, line = self.where.rpartition(":")
        return file, int(line)

    def as_json(self) -> dict[str, Any]:
        """Return the row as plain values."""
        return asdict(self)


def _standard_errors(judgement: Judgement) -> float | None:
    distance = judgement.distance
    if distance.replicates is None or distance.best is None:
        return None
    error = standard_error(distance.replicates)
    return distance.best / error if error > 0 else None


# --- what judged a record --------------------------------------------------------------------------------------


def stamps_of(rows: Iterable[Row]) -> dict[str, JudgedBy]:
    """Return the hypothesis files that judged a record in these rows, by hypothesis."""
    judged = {row.hypothesis: row.judged_by for row in rows if row.judged_by is not None}
    return {name: JudgedBy(version=version, sha256=sha256) for name, (version, sha256) in judged.items()}


def changed_files(before: Mapping[str, JudgedBy], now: Mapping[str, JudgedBy]) -> dict[str, str]:
    """Return how each hypothesis's file has changed since it last judged a record; one that never did has not."""
    return {
        name: f"{before[name].text} then, {stamp.text} now"
        for name, stamp in now.items()
        if name in before and before[name] != stamp
    }


def changed_lines(before: Mapping[str, JudgedBy], now: Mapping[str, JudgedBy]) -> list[str]:
    """Return how hypothesis files have changed, one line each."""
    changed = changed_files(before, now)
    return [f"{name} has changed since this record was last judged: {how}" for name, how in changed.items()]


# --- margins and marks ---------------------------------------------------------------------------------------


def relative_margin(row: Row) -> float:
    """Return the margin over what was required; 0 where there is none."""
    if row.margin is None or row.required is None:
        return 0.0
    return row.margin / max(abs(row.required), 1e-12)


def margin_text(row: Row) -> str:
    """Return the margin, and relative to what was required where that is not near 0."""
    if row.margin is None:
        return NONE
    relative = relative_margin(row)
    return f"{row.margin:+.4f}" + (f" ({relative:+.0%})" if abs(relative) < 10 else "")


def marks(row: Row) -> str:
    """Return the marks of a verdict, each after a space."""
    return "".join(f" {mark}" for mark in _marks(row))


def mark_lines(rows: Iterable[Row]) -> list[str]:
    """Return the meaning of each mark that these verdicts have, one line each."""
    present = {mark for row in rows for mark in _marks(row)}
    return [f"{mark} {meaning}" for mark, meaning in MARKS.items() if mark in present]


def _marks(row: Row) -> list[str]:
    present = {FLIPS: row.flips, VACUOUS: row.vacuous, NO_BETTER: row.no_better}
    return [mark for mark, shown in present.items() if shown]
