"""The ways in which words of the plugin reach pytest: each without codes that a terminal would obey."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from delta_suite.errors import explain, why_not_measured
from delta_suite.escaping import terminal, terminal_lines

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec
    from delta_suite.pipeline import Outcome


class Printer:
    """Writes the sections at the end of a run."""

    def __init__(self, reporter: pytest.TerminalReporter) -> None:
        self._reporter = reporter

    def __call__(self, text: str = "") -> None:
        """Write lines."""
        self._reporter.write_line(terminal_lines(text))

    def section(self, title: str) -> None:
        """Write a heading."""
        self._reporter.section(terminal(title), sep="-")


def usage_error(message: object) -> pytest.UsageError:
    """Return the error that ends a run whose command line or files are wrong."""
    return pytest.UsageError(terminal_lines(str(message)))


def failure_text(error: BaseException, name: str) -> str | None:
    """Return the report of an error that ended an item; None for those that pytest reports itself."""
    return terminal_lines(explain(error, f"running {name}")) if isinstance(error, Exception) else None


def outcome_or_fail(outcome: Callable[[ModelSpec], Outcome], spec: ModelSpec) -> Outcome:
    """Return the outcome within a test; if the model cannot be measured, end the test with the message alone."""
    try:
        return outcome(spec)
    except Exception as error:  # whatever hinders it: an error that was not foreseen says so
        message = why_not_measured(spec.name, error)
    # Outside the handler, or the report would show both errors.
    raise pytest.fail.Exception(terminal_lines(message), pytrace=False)
