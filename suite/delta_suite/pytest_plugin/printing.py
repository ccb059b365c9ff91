"""The ways in which words and tables of the plugin reach pytest: no word is a code that a terminal would obey."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from delta_suite.errors import explain, why_not_measured
from delta_suite.escaping import terminal, terminal_lines

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec
    from delta_suite.pipeline import Outcome
    from delta_suite.publish.table import Table


class Printer:
    """Writer of the text at the end of a pytest run."""

    def __init__(self, reporter: pytest.TerminalReporter, width: int) -> None:
        from delta_suite.publish.screen import Screen

        self._reporter = reporter
        self.screen = replace(Screen.of(sys.stdout), width=width, colour=reporter.hasmarkup)

    def __call__(self, *parts: str | Table) -> None:
        """Write texts as they are, and tables that fit, with a line between them."""
        from delta_suite.publish.screen import draw

        texts = (terminal_lines(part) if isinstance(part, str) else draw(part, self.screen) for part in parts)
        self._reporter.write_line("\n\n".join(texts))

    def prose(self, text: str) -> None:
        """Write a text as lines that fit."""
        from delta_suite.publish.screen import prose

        self(prose(text, self.screen.width))

    def failure(self, text: str) -> None:
        """Write lines as they are, the first of them as a heading."""
        first, *others = terminal_lines(text).split("\n")
        self._reporter.write_line(first, red=True, bold=True)
        if others:
            self("\n".join(others))

    def section(self, title: str) -> None:
        """Write a heading."""
        self._reporter.write_sep("-", terminal(title), fullwidth=self.screen.width)


def verdict_status(word: str) -> tuple[str, str, tuple[str, dict[str, bool]]]:
    """Return pytest's category, letter and word for a verdict that neither passes nor fails."""
    from delta_suite.publish.wording import SYMBOLS

    category = "warned" if word == "WARN" else word.lower()
    return category, SYMBOLS[word], (word, {"yellow": True})


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
