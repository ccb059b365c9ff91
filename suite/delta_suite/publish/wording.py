"""The words, marks and numbers of everything that is shown: in a terminal, in Markdown, on a page, on a model card."""

from __future__ import annotations

from dataclasses import dataclass

from delta_suite.claims.verdict import Verdict

NONE = "-"
"""Shown where a number does not exist."""

WARN = "WARN"
"""The word for a refuted claim that only warns."""


@dataclass(frozen=True)
class Mark:
    """A sign with one meaning, wherever it is shown: terminal, Markdown, page and legend take it from here."""

    symbol: str
    word: str
    """The word beside the sign; empty for a sign that stands alone."""
    meaning: str
    colour: str = ""
    """Its colour in a terminal."""
    short: str = ""
    """The word in a cell of a few letters' width."""


VERDICT_MARKS = (
    Mark("✓", Verdict.SUPPORTED.value, "supported", "green", "pass"),
    Mark("✗", Verdict.REFUTED.value, "refuted", "red", "fail"),
    Mark("!", WARN, "refuted, but the claim only warns", "yellow", "warn"),
    Mark("?", Verdict.INCONCLUSIVE.value, "the measurement cannot decide", "yellow", "open"),
    Mark("–", Verdict.NOT_MEASURED.value, "the number does not exist for this model", "bright_black", "none"),
)
"""The mark of each verdict. The symbol tells them apart where neither colour nor language does."""

SYMBOLS = {mark.word: mark.symbol for mark in VERDICT_MARKS}
SHORT = {mark.word: mark.short for mark in VERDICT_MARKS}
COLOURS = {mark.word: mark.colour for mark in VERDICT_MARKS}

OUTCOMES = {
    Verdict.SUPPORTED.value: "supported",
    Verdict.REFUTED.value: "refuted",
    Verdict.INCONCLUSIVE.value: "inconclusive",
    Verdict.NOT_MEASURED.value: "not measured",
}
"""Each verdict as a participle."""

FLIPS, VACUOUS, NO_BETTER = "*", "°", "≈"
"""Marks beside a verdict: another variant reverses it; random weights have it, too; they are as far, but for a gate."""

DIFFERS = "≠"
"""Mark beside a difference whose interval leaves out 0."""

MARKS = {
    FLIPS: "another variant gives another verdict",
    VACUOUS: "vacuous: random weights of the same architecture support the claim, too",
    NO_BETTER: "no better than random weights: their figure meets the claim, too, though a gate keeps them undecided",
}
"""The meaning of each mark beside a verdict."""

LEGEND = " ".join(
    [f"{mark.symbol} {mark.word}: {mark.meaning}." for mark in VERDICT_MARKS]
    + [f"{mark} {meaning}." for mark, meaning in MARKS.items()]
)
"""How to read a verdict."""

ABOUT = (
    "A language model is a stack of layers, and each layer adds an update to what the one before it passed on; "
    "delta-suite measures what these updates look like from the first layer to the last. Here predictions about their "
    "structure, each with a threshold, are held against one model after the other: a row is a model, a column is a "
    "prediction, and a mark says whether the measurement supports it."
)
"""The leaderboard in two sentences, for someone who has never heard of it."""

CONSISTENT = (
    "Every record was checked: its numbers follow from each other. Those of a metric's older version are held against "
    "their range alone. That proves consistency, and not origin."
)
"""The worth of a record on the leaderboard."""

NO_SCORE = (
    "There is no average score, and models stand in the order of their names. A verdict is that of one claim for one "
    "model; a hypothesis holds when all of its claims hold, but for those that only warn."
)

NEVER_MIXED = (
    "Models in different tables were measured under different calibrations, dtypes, quantisations, special tokens, "
    "metric versions or settings. Their numbers are not comparable, and no table mixes them."
)

CHANGED = (
    "A hypothesis file has changed since a run last judged the record. The verdicts here are by the file as it is now; "
    "delta-suite judge RECORD takes note of it."
)


def number(value: float | None, digits: int = 4) -> str:
    """Return a number with about `digits` significant figures, never in a form that hides its size.

    Example:
        >>> number(0.48214), number(17408.3), number(None)
        ('0.4821', '17408', '-')
    """
    if value is None:
        return NONE
    if value == 0 or 1e-3 <= abs(value) < 10**digits:
        return f"{value:#.{digits}g}".rstrip(".")
    return f"{value:.{digits - 1}g}" if abs(value) < 1e-3 else f"{value:.0f}" if abs(value) < 1e7 else f"{value:.3g}"


def interval_text(interval: tuple[float, float] | None) -> str:
    """Return an interval as `[0.350, 0.410]`."""
    return NONE if interval is None else f"[{number(interval[0], 3)}, {number(interval[1], 3)}]"


def verdict_text(word: str, observed: float | None) -> str:
    """Return a verdict with the observed value."""
    return word if observed is None else f"{word} {number(observed, 3)}"
