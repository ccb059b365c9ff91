"""Tell GitHub Actions about a run: messages beside the files, and a page with the grid of verdicts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from delta_suite.escaping import markdown, workflow_command
from delta_suite.paths import relative_to
from delta_suite.publish.baseline_tables import BaselineRow, run_table
from delta_suite.publish.rows import Row, mark_lines
from delta_suite.publish.verdict_tables import verdict_grid
from delta_suite.publish.wording import WARN, interval_text, number

SUMMARY = "GITHUB_STEP_SUMMARY"
"""Environment variable with the file that a step's page is added to."""


def verdict_command(row: Row, root: Path) -> str:
    """Return the message beside the claim that a verdict is of: a warning for one that only warns.

    root: the folder that the row's place is relative to.
    """
    file, _, line = row.where.rpartition(":")
    interval = "" if row.interval is None else f" {interval_text(row.interval)}"
    observed = "" if row.observed is None else f"; observed {number(row.observed)}{interval}"
    reason = f"; {row.reason}" if row.reason else ""
    return workflow_command(
        "warning" if row.word == WARN else "error",
        f"{row.claim}{observed}{reason}",
        file=_in_workspace(root / file),
        line=int(line),
        title=f"{row.hypothesis}/{row.expectation}: {row.word} for {row.model}",
    )


def baseline_command(row: BaselineRow) -> str:
    """Return the message about an item of a baseline that fails."""
    change = f"{number(row.old)} before, {number(row.new)} now" if row.difference is not None else row.reason or ""
    file = _in_workspace(Path(row.baseline))
    return workflow_command("error", change, file=file, title=f"{row.item}: {row.status} for {row.model}")


def error_command(message: str) -> str:
    """Return the message about what belongs to no file, such as a model that cannot be measured."""
    return workflow_command("error", " ".join(message.split()), title="not measured")


def _in_workspace(path: Path) -> str:
    return str(relative_to(Path(os.environ.get("GITHUB_WORKSPACE", ".")), path))


def step_summary(
    rows: Sequence[Row], baselines: Sequence[BaselineRow], messages: Iterable[str], models: Sequence[str]
) -> str:
    """Return the page of a run as Markdown: the grid, the baselines, and what could not be measured."""
    parts = ["### delta-suite"]
    if rows:
        parts += [verdict_grid(rows, models).markdown(), *(markdown(line) for line in mark_lines(rows))]
    if baselines:
        parts.append(run_table(baselines).markdown())
    parts += [markdown(" ".join(message.split())) for message in messages]
    return "\n\n".join(parts) + "\n"


def add_to_summary(page: str) -> str | None:
    """Add a page to that of the step, where there is one; return why it cannot be written, or None."""
    path = os.environ.get(SUMMARY)
    if not path:
        return None
    try:
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(page)
    except OSError as error:
        return f"{SUMMARY}: {path} cannot be written: {error.strerror}"
    return None
