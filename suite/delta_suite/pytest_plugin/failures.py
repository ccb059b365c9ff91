"""The failures of a run: claims, items of baselines, and models that cannot be measured, each told once.

pytest would tell them in its sections and again in its short summary. They are kept from both, unless -r asks for the
latter; failures of plain tests stay pytest's.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable
from typing import Any

import pytest

from delta_suite.escaping import terminal
from delta_suite.pytest_plugin.baseline_items import BaselineItem
from delta_suite.pytest_plugin.baseline_session import REGRESSION
from delta_suite.pytest_plugin.collection import ExpectationItem
from delta_suite.pytest_plugin.printing import Printer
from delta_suite.pytest_plugin.session import SESSION

DEFAULT_SHORT_SUMMARY = "fE"
"""Categories of pytest's short summary where -r says nothing."""

UNMEASURED = "delta_suite_unmeasured"
"""Attribute of a report whose model cannot be measured: why."""

_TOLD_HERE = "delta_suite_told"
"""Attribute of a report that is told here, and not by pytest."""

_HIDDEN: pytest.StashKey[dict[str, list[pytest.TestReport]]] = pytest.StashKey()
"""Key of the reports that pytest does not see."""


def claim_report(item: pytest.Item, call: pytest.CallInfo[None], report: pytest.TestReport) -> None:
    """Mark the report of a failure that the plugin explains itself."""
    if not report.failed:
        return
    raised = call.excinfo.value if call.excinfo is not None else None
    if call.when == "setup" and isinstance(raised, pytest.fail.Exception) and not raised.pytrace:
        setattr(report, UNMEASURED, str(raised))
    if hasattr(report, UNMEASURED) or isinstance(item, ExpectationItem | BaselineItem):
        setattr(report, _TOLD_HERE, True)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> Generator[None, object, object]:
    """Show the failures before everything else, and hide them from what pytest shows."""
    stats = terminalreporter.stats
    hidden: dict[str, list[pytest.TestReport]] = {}
    config.stash[_HIDDEN] = hidden
    failures: list[pytest.TestReport] = []
    for category in ("failed", "error"):
        reports = stats.get(category, [])
        if told := [report for report in reports if hasattr(report, _TOLD_HERE)]:
            hidden[category] = reports
            stats[category] = [report for report in reports if not hasattr(report, _TOLD_HERE)]
            failures += told
    _show(terminalreporter, config, failures)
    try:
        return (yield)
    finally:
        stats.update(hidden)
        if os.environ.get("GITHUB_ACTIONS") == "true" and not hasattr(config, "workerinput"):
            _tell_github(terminalreporter, failures)


def put_back(reporter: pytest.TerminalReporter) -> None:
    """Let pytest's short summary see every failure, if -r asks for it."""
    if reporter.config.getoption("reportchars") != DEFAULT_SHORT_SUMMARY:
        hidden = reporter.config.stash[_HIDDEN]
        reporter.stats.update(hidden)


def _show(reporter: pytest.TerminalReporter, config: pytest.Config, reports: list[Any]) -> None:
    """Show failures as long as --tb says; with -q alone only why models cannot be measured."""
    from delta_suite.publish.screen import paragraphs

    style = config.getoption("tbstyle")
    if style == "no" or config.getoption("no_summary"):
        return
    if config.get_verbosity() < 0 and style == "auto":
        reports = [report for report in reports if hasattr(report, UNMEASURED)]
    if style == "line":  # a table has a line for each item of a baseline
        reports = [report for report in reports if not hasattr(report, "delta_suite_baseline")]
    groups: dict[object, list[Any]] = {}
    for report in reports:
        groups.setdefault(_cause(report), []).append(report)
    show = Printer(reporter, config.stash[SESSION].width)
    if groups:
        show.section("failures")
    for group in groups.values():
        message = getattr(group[0], UNMEASURED, None)
        show.failure(str(group[0].longrepr) if message is None else paragraphs(message, show.screen.width))
        if len(group) > 1:
            show.prose(f"and {len(group) - 1} more items for the same reason")
        if style != "line":
            show()


def _tell_github(reporter: pytest.TerminalReporter, failed: Iterable[pytest.TestReport]) -> None:
    """Write the commands that put failures and warnings beside the files, and add the grid to the step's page."""
    from delta_suite.publish import github_actions
    from delta_suite.publish.baseline_tables import BaselineRow
    from delta_suite.publish.rows import Row

    session, root = reporter.config.stash[SESSION], reporter.config.rootpath
    regression = reporter.config.stash.get(REGRESSION, None)
    compared = [BaselineRow(**row) for row in regression.compared_rows] if regression is not None else []
    messages: dict[str, None] = {}
    commands = [github_actions.verdict_command(row, root) for row in session.rows if row.word == "WARN"]
    for report in failed:
        if (message := getattr(report, UNMEASURED, None)) is not None:
            messages[message] = None
        elif (row := getattr(report, "delta_suite", None)) is not None:
            commands.append(github_actions.verdict_command(Row(**row), root))
        elif (row := getattr(report, "delta_suite_baseline", None)) is not None:
            commands.append(github_actions.baseline_command(BaselineRow(**row)))
    for command in [*commands, *map(github_actions.error_command, messages)]:
        reporter.write_line(command)
    models = [spec.name for spec in session.measured_specs]
    if session.judged or compared or messages:
        page = github_actions.step_summary(session.rows, compared, messages, models)
        if problem := github_actions.add_to_summary(page):
            reporter.write_line(terminal(problem))


def _cause(report: Any) -> object:
    """Return a key that reports share which are shown as one."""
    if hasattr(report, UNMEASURED):
        return getattr(report, UNMEASURED)
    row = getattr(report, "delta_suite_baseline", None)
    if row is not None and row["difference"] is None:
        return row["model"], row["status"], row["reason"]
    return report.nodeid
