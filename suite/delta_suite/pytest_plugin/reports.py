"""Reports: rows of verdicts, words for outcomes, the header, and the tables at the end of a run."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from delta_suite.pytest_plugin.baseline_items import BaselineItem, status_of
from delta_suite.pytest_plugin.collection import ControlItem, ExpectationItem, spec_of
from delta_suite.pytest_plugin.failures import claim_report, put_back
from delta_suite.pytest_plugin.printing import Printer, verdict_status
from delta_suite.pytest_plugin.session import SESSION, Session

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec
    from delta_suite.publish.rows import Row


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Attach the row of a verdict to its report, as plain values that xdist can send between processes."""
    report = yield
    spec = spec_of(item)
    if spec is not None:
        claim_report(item, call, report)
    if spec is None or not (call.when == "call" or report.failed):
        return report
    session = item.config.stash[SESSION]
    report.delta_suite_notes = list(session.notes)  # type: ignore[attr-defined]
    if isinstance(item, BaselineItem | ControlItem):
        if isinstance(item, BaselineItem) and item.row is not None:
            report.delta_suite_baseline = item.row  # type: ignore[attr-defined]
        return report
    from delta_suite.publish.rows import Row

    row = None
    if isinstance(item, ExpectationItem):
        if item.judged is not None:
            row = Row.of(item.judged, str(session.outcome(spec).path), item.where)
            if report.skipped and not hasattr(report, "wasxfail"):
                report.longrepr = (str(item.path), item.expectation.line, row.reason or row.verdict.lower())
    elif call.when == "call":
        row = _function_row(item, call, report, spec, session)
    if row is not None:
        report.delta_suite = row.as_json()  # type: ignore[attr-defined]
    return report


def _function_row(
    item: pytest.Item,
    call: pytest.CallInfo[None],
    report: pytest.TestReport,
    spec: ModelSpec,
    session: Session,
) -> Row | None:
    """Return the row of a plain test; a test that uses a number that does not exist is not measured."""
    from delta_suite.claims.observe import NotMeasuredError
    from delta_suite.claims.verdict import Verdict
    from delta_suite.publish.rows import Row

    path, line, _ = item.reportinfo()
    where = f"{item.nodeid.split('::')[0]}:{(line or 0) + 1}"
    reason = None
    verdict = Verdict.SUPPORTED if report.passed else Verdict.REFUTED
    if call.excinfo is not None and isinstance(call.excinfo.value, NotMeasuredError):
        verdict, reason = Verdict.NOT_MEASURED, str(call.excinfo.value)
        if not item.config.getoption("strict_verdicts"):
            report.outcome = "skipped"
            report.longrepr = (str(path), (line or 0) + 1, reason)
    elif report.skipped and not hasattr(report, "wasxfail"):
        return None  # the test skipped itself
    name = getattr(item, "originalname", None) or item.name
    claim = (getattr(getattr(item, "function", None), "__doc__", None) or "").strip().split("\n")[0]
    return Row(
        Path(where).name.split(":")[0],
        name,
        claim,
        spec.name,
        verdict.value,
        reason=reason,
        where=where,
        record=str(session.outcome(spec).path),
    )


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> Any:
    """Return the category, letter and word for a verdict that neither passes nor fails."""
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    if (compared := getattr(report, "delta_suite_baseline", None)) is not None:
        return status_of(compared)
    row = getattr(report, "delta_suite", None)
    if row is None:
        return None
    return verdict_status("WARN" if row["verdict"] == "FAIL" else row["verdict"])


def pytest_report_header(config: pytest.Config) -> list[str] | None:
    """Return lines with the models of the run and the settings of their measurement."""
    session = config.stash[SESSION]
    if not session.specs:
        return None
    import delta_suite
    from delta_suite.capture.calibration import headline
    from delta_suite.publish.screen import prose

    settings = session.settings
    lines = [
        f"delta-suite {delta_suite.__version__}: {', '.join(spec.name for spec in session.specs)}",
        f"calibration: {headline(settings.calibration, settings.documents)}"
        f"{', in the chat template' if settings.chat_template else ''}, device: {settings.device}, "
        f"dtype: {settings.dtype or 'as the model says'}, "
        f"results: {settings.results}, cache: {settings.cache.root}",
    ]
    if session.shard is not None:
        lines.append(session.shard.line(session.work))
    if session.unavailable:
        lines.append(f"not on this machine: {', '.join(session.unavailable)} (delta-suite models says why)")
    return [prose(line, session.width) for line in lines]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the grid of verdicts; with -q nothing else, and with -v the tables of each model, too."""
    session = config.stash[SESSION]
    put_back(terminalreporter)
    show = Printer(terminalreporter, session.width)
    for note in session.notes:
        show.prose(f"delta-suite: {note}")
    if not session.judged:
        return
    from delta_suite.publish.rows import mark_lines
    from delta_suite.publish.verdict_tables import chance_text, in_several_models, variant_table, verdict_grid

    verbosity, rows = config.get_verbosity(), session.rows
    _show_models(show, session, verbosity)
    if verbosity >= 0:
        _show_runs(show, session, rows)
    if verbosity > 0:
        show.section("verdicts under every variant")
        show(variant_table(rows))
    if verbosity >= 0 and len({row.model for row in rows}) > 1 and (table := in_several_models(rows)):
        show.section("in how many models")
        show(table)
    if verbosity >= 0:
        show.section("verdicts")
    show(verdict_grid(rows, [spec.name for spec in session.measured_specs]))
    for line in filter(None, [chance_text(rows), *mark_lines(rows)]):
        show.prose(line)


def _show_models(show: Printer, session: Session, verbosity: int) -> None:
    """Print what was measured, and with -v the phases, layers and boundaries of each model."""
    from delta_suite.publish import model_tables

    variant = session.config.getoption("variant") or "raw"
    for name, kept in session.kept.items():
        if verbosity >= 0:
            show.section(name)
        if verbosity >= 0 and kept.view is not None:
            show.prose(model_tables.model_line(kept.view))
            show(f"record: {kept.path}")
        for note in kept.notes:
            show.prose(note)
        if verbosity > 0 and kept.view is not None:
            tables = [model_tables.phase_table(kept.view, variant), model_tables.layer_table(kept.view, variant)]
            show()
            show(*tables, *model_tables.boundary_tables(kept.view, variant, session.width))


def _show_runs(show: Printer, session: Session, rows: list[Row]) -> None:
    """Print verdicts and metrics by step for each training run among the models."""
    from delta_suite.metrics.registry import METRICS
    from delta_suite.publish import trajectory

    views = {name: kept.view for name, kept in session.kept.items() if kept.view is not None}
    variant = session.config.getoption("variant") or "raw"
    for name, steps in trajectory.series(session.measured_specs).items():
        measured_at = {step: views[model] for step, model in steps.items() if model in views}
        show.section(f"{name}: over training")
        show(trajectory.verdict_table(rows, steps))
        for change in trajectory.verdict_changes(rows, steps):
            show.prose(f"changed  {change}")
        show()
        metrics = [*METRICS] if session.config.get_verbosity() > 0 else None
        show(trajectory.metric_table(measured_at, variant, metrics))
