"""How verdicts, margins and costs are put into words: the same in Markdown, on the page and on a model card."""

from __future__ import annotations

from delta_suite.claims.verdict import Verdict
from delta_suite.publish.board import Entry, Tally
from delta_suite.publish.rows import WARN, Row, interval_text, margin_text, marks, verdict_text
from delta_suite.publish.table import NONE

SYMBOLS = {
    Verdict.SUPPORTED.value: "✓",
    Verdict.REFUTED.value: "✗",
    WARN: "!",
    Verdict.INCONCLUSIVE.value: "?",
    Verdict.NOT_MEASURED.value: "–",
}
"""Beside each verdict's word, so that neither colour nor language is needed to tell them apart."""


NO_SCORE = (
    "There is no average score, and models stand in the order of their names. A verdict is that of one claim for one "
    "model; a hypothesis holds when all of its claims hold, but for those that only warn."
)
NEVER_MIXED = (
    "Models in different tables were measured under different calibrations, metric versions or settings. Their numbers "
    "are not comparable, and no table mixes them."
)
CHANGED = (
    "A hypothesis file has changed since a run last judged the record. The verdicts here are by the file as it is now; "
    "delta-suite judge RECORD takes note of it."
)
LEGEND = (
    "✓ PASS: supported. ✗ FAIL: refuted. ! WARN: refuted, but the claim only warns. ? INCONCLUSIVE: the measurement "
    "cannot decide. – NOT MEASURED: the number does not exist for this model. `*`: another variant gives another "
    "verdict. `°`: vacuous, the claim also holds where there is nothing to find."
)


def tally_text(tally: Tally) -> str:
    """Return `✗ FAIL (1 supported, 4 refuted)`, without what is 0."""
    counts = {
        "supported": tally.supported,
        "refuted": tally.refuted,
        "inconclusive": tally.inconclusive,
        "not measured": tally.not_measured,
        "of the supported vacuous": tally.vacuous,
    }
    shown = ", ".join(f"{count} {word}" for word, count in counts.items() if count)
    return f"{SYMBOLS[tally.verdict]} {tally.verdict} ({shown})" if tally.verdict else f"{NONE} ({shown})"


def cell_text(row: Row) -> str:
    """Return verdict, value, interval and marks of one claim for one model."""
    interval = "" if row.interval is None else f" {interval_text(row.interval)}"
    return f"{SYMBOLS[row.word]} {verdict_text(row.word, row.observed)}{interval}{marks(row)}"


def worst_text(entry: Entry) -> str:
    """Return the worst margin and the claim that it belongs to."""
    worst = entry.worst
    return NONE if worst is None else f"{margin_text(worst)} {worst.hypothesis}/{worst.expectation}"


def memory_text(entry: Entry) -> str:
    """Return the peak memory of the process, and of the GPUs where there were any."""
    gpu = f", {entry.gpu_bytes / 1e9:.1f} GB GPU" if entry.gpu_bytes else ""
    return f"{entry.host_bytes / 1e9:.1f} GB host{gpu}"
