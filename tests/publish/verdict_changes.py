"""The page of verdicts before and after the rules that issue from an independent recomputation.

`python -m tests.publish.verdict_changes` makes results/verdict-changes.md anew, in a checkout with its history.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from delta_suite.claims.judge import judge_all
from delta_suite.claims.loader import load_hypotheses
from delta_suite.publish.rows import Row
from delta_suite.publish.table import Table
from delta_suite.publish.wording import interval_text, number, verdict_text
from delta_suite.records.store import load, newest_control, record_paths
from delta_suite.records.view import RecordView

RESULTS, PAGE = Path("results"), Path("results/verdict-changes.md")

BEFORE = "144f5b5"
"""The last commit whose verdicts are by the earlier rules."""

FILES = ("boundaries.toml", "phase_c.toml", "phase_e.toml", "update_law.toml")

RENAMED = {"edges-that-no-drift-has": "most-shared-window"}
"""Claims that took another's place, and its name."""

STATED = {
    "few-ranks": "stated by the equal cosine, >= 0.53: what 0.35 of N asks for in 22 layers, in 10 it asked for 0.67",
    "full-rank": "stated by the equal cosine, <= 0.26: what 0.8 of N tolerates in 12 layers",
    "edges-that-no-drift-has": "smooth drifts in place of a rank among windows",
}
"""Why claims are stated otherwise."""

LONGEST = 240
"""Characters of a reason."""


@dataclass(frozen=True)
class Old:
    """A verdict that was published before."""

    text: str
    verdict: str
    claim: str
    calibration: str
    """SHA-256 of the texts."""


def at_commit(path: str) -> str:
    return subprocess.run(["git", "show", f"{BEFORE}:{path}"], check=True, capture_output=True, text=True).stdout


def old_verdicts() -> dict[tuple[str, str, str], Old]:
    """Return the verdicts of the leaderboard before, by model, name of the calibration, and claim."""
    out = {}
    for group in json.loads(at_commit("results/leaderboard.json"))["groups"]:
        for model in group["models"]:
            for row in model["verdicts"]:
                name = f"{row['hypothesis']}/{row['expectation']}"
                text = shown(row["verdict"], row["observed"], row["interval"])
                old = Old(text, row["verdict"], row["claim"], group["calibration"]["sha256"])
                out[model["model"], group["calibration"]["name"], name] = old
    return out


def shown(verdict: str, observed: float | None, interval: Any) -> str:
    text = verdict_text(verdict, observed)
    return text if interval is None else f"{text} {interval_text(tuple(interval))}"


def rows_of(view: RecordView, control: RecordView | None, hypotheses: Iterable[Any]) -> dict[str, Row]:
    judged = judge_all(hypotheses, [(view, control)])
    rows = (Row.of(each, None) for each in judged)
    return {f"{row.hypothesis}/{row.expectation}": row for row in rows}


def reason(row: Row, *, claim_before: str, anew: bool) -> str:
    """Return why a verdict or its claim is another one."""
    reasons = []
    if claim_before != row.claim:
        reasons.append(STATED.get(row.expectation, f"stated otherwise: it was {claim_before}"))
    if anew:
        reasons.append("measured anew, on the new core, with intervals over its domains")
    if row.reason and row.verdict != "FAIL":
        reasons.append(row.reason)
    elif row.required is not None:
        reasons.append(f"{number(row.required, 3)} is asked for")
    text = "; ".join(reasons)
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."


def record_name(view: RecordView) -> str:
    return f"{view.model.name}, {view.record.calibration.name}"


def page() -> str:
    """Return the page."""
    today = load_hypotheses([Path("hypotheses") / name for name in FILES])
    with tempfile.TemporaryDirectory() as folder:
        for name in FILES:
            Path(folder, name).write_text(at_commit(f"hypotheses/{name}"), "utf-8")
        earlier = load_hypotheses([Path(folder)])
    before = old_verdicts()
    known = {(model, calibration) for model, calibration, _ in before}
    compared = {True: 0, False: 0}
    changes: dict[bool, list[list[str]]] = {True: [], False: []}
    for path in record_paths(RESULTS):
        view = load(path)
        control = newest_control(RESULTS, view)
        rows = rows_of(view, control, today)
        calibration = view.record.calibration
        published = (view.model.name, calibration.name) in known
        old_rows: Mapping[str, Row] = {} if published else rows_of(view, control, earlier)
        for name, row in rows.items():
            hypothesis, _, expectation = name.partition("/")
            old_name = f"{hypothesis}/{RENAMED.get(expectation, expectation)}"
            if published:
                old = before[view.model.name, calibration.name, old_name]
            else:
                earlier_row = old_rows[old_name]
                text = shown(earlier_row.verdict, earlier_row.observed, earlier_row.interval)
                old = Old(text, earlier_row.verdict, earlier_row.claim, calibration.sha256)
            compared[published] += 1
            if (old.verdict, old.claim) == (row.verdict, row.claim):
                continue
            label = name if old_name == name else f"{old_name}, now {expectation}"
            why = reason(row, claim_before=old.claim, anew=old.calibration != calibration.sha256)
            after = shown(row.verdict, row.observed, row.interval)
            changes[published].append([record_name(view), label, old.text, after, why])
    head = ["record", "claim", "before", "after", "reason"]
    again, since = (Table.of(head, changes[kind]).markdown() for kind in (True, False))
    return PAGE_TEXT.format(
        commit=BEFORE,
        again=again,
        since=since,
        **{name: len(changes[kind]) for name, kind in (("changed_again", True), ("changed_since", False))},
        **{name: compared[kind] for name, kind in (("all_again", True), ("all_since", False))},
    )


PAGE_TEXT = """# Verdicts before and after

Made by `python -m tests.publish.verdict_changes` from the records in `runs/` and the hypothesis files of today, and
from the verdicts that were published before the rules of [Reading verdicts](../docs/verdicts.md) (commit {commit}).
Only claims whose verdict or statement changed are listed; all others have the verdict that they had.

## Records that had verdicts before

Before: by the earlier rules and files. After: by those of today, on the newest record of the same model and
calibration. {changed_again} of {all_again} verdicts changed, or are of a claim that is stated otherwise. "Measured
anew" says that the earlier record was of the core set of 17 domains, with intervals over documents.

{again}

## Records measured since

They were never judged by the earlier rules. Before: by the rules of today and the earlier files. After: by those of
today. {changed_since} of {all_since} verdicts changed, or are of a claim that is stated otherwise.

{since}
"""


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
