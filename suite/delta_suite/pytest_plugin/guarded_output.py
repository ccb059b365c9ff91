"""Guard of the output of pytest: where it takes no more (a full disk, a closed pipe), one line, and the run ends.

pytest itself fails again while it reports that failure, and shows the traceback of its own code.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from typing import Any, TextIO

import pytest

from delta_suite.command_line import ExitCode
from delta_suite.errors import OutputError
from delta_suite.writing import discard_output


class GuardedOutput:
    """A stream of text that, once it takes no more, drops what is written, and asks the session to stop."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.failed = False
        self.session: pytest.Session | None = None

    def write(self, text: str) -> int:
        """Write a text, if the stream still takes one."""
        if not self.failed:
            try:
                self.stream.write(text)
            except OSError as error:
                self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Write what is held back, if the stream still takes it."""
        if not self.failed:
            try:
                self.stream.flush()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.failed = True
        discard_output(self.stream)
        message = str(OutputError(error))
        sys.stderr.write(f"delta-suite: {message}\n")
        if self.session is not None:
            self.session.shouldstop = message

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


OUTPUT = pytest.StashKey[GuardedOutput]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Guard stdout before the reporter takes it."""
    if sys.stdout is None:
        return
    original = sys.stdout
    guarded = config.stash[OUTPUT] = GuardedOutput(original)
    sys.stdout = guarded

    def restore() -> None:
        if sys.stdout is guarded:
            sys.stdout = original
        if guarded.failed:  # once more, as capturing puts back what it had replaced
            discard_output(original)

    config.add_cleanup(restore)


def pytest_sessionstart(session: pytest.Session) -> None:
    """Keep the session, so that it can be stopped."""
    if (output := session.config.stash.get(OUTPUT, None)) is not None:
        output.session = session


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> Generator[None, int | pytest.ExitCode | None, Any]:
    """Return the exit code of a failure where the output was not written."""
    code = yield
    output = config.stash.get(OUTPUT, None)
    if output is None:
        return code
    output.flush()
    return ExitCode.FAILED if output.failed else code
