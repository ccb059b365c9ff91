"""The two streams of a command: stdout for what was asked for, stderr for messages. No text in them is a code."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

import typer

from delta_suite.command_line import ExitCode
from delta_suite.errors import OutputError
from delta_suite.escaping import terminal_lines

if TYPE_CHECKING:
    from delta_suite.publish.table import Table


def prepare_streams() -> None:
    """Make every text writable, and keep files that are opened later off the numbers of streams that are closed."""
    if sys.stdin is None or sys.stdout is None or sys.stderr is None:
        while os.open(os.devnull, os.O_RDWR) <= 2:
            pass
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # such as the mark ° on a terminal of ASCII
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123  (libraries write to it)
    if sys.stdout is None:
        say("the output is closed. Send it to /dev/null if nobody is to read it.")
        sys.exit(ExitCode.FAILED)


def show(*parts: str | Table) -> None:
    """Show texts as they are, and tables that fit the terminal, on stdout, with a line between them.

    Raises OutputError where that takes no more.
    """
    try:
        typer.echo("\n\n".join(terminal_lines(part) if isinstance(part, str) else _drawn(part) for part in parts))
    except OSError as error:
        raise OutputError(error) from None


def _drawn(table: Table) -> str:
    from delta_suite.publish.screen import Screen, draw

    return draw(table, Screen.of(sys.stdout))


def send(content: bytes) -> None:
    """Write a piece of a file on stdout, as it is. Raises OutputError where that takes no more."""
    try:
        typer.echo(content, nl=False)
    except OSError as error:
        raise OutputError(error) from None


def say(message: str) -> None:
    """Show a message on stderr, if that still takes one."""
    with contextlib.suppress(OSError):
        typer.echo(terminal_lines(f"delta-suite: {message}"), err=True)


def flush() -> None:
    """Write what stdout still holds. Raises OutputError where it takes no more."""
    try:
        sys.stdout.flush()
    except OSError as error:
        raise OutputError(error) from None
