"""Ending a command that is interrupted (Ctrl-C, SIGTERM): at once, with one line that says what is kept.

It ends in the signal's handler, and not by an exception: that can be lost in a library's `__del__`, come in the middle
of an import, or end as a traceback. Nothing is half-written by it, as by no other end of the process (`writing`).

Little is imported here and in the modules before, as an interruption before `end_when_interrupted` is called is
Python's own.
"""

from __future__ import annotations

import os
import signal
import sys

_kept = ""


def end_when_interrupted() -> None:
    """From now on, end this process with one line and 130 at Ctrl-C, or 143 at SIGTERM. For programs, not libraries."""
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as `nohup` and background jobs of a shell have it
            signal.signal(number, _end)


def keep(line: str) -> None:
    """Set what is kept of the work so far, to be said if it is interrupted (`measured_so_far`)."""
    global _kept  # noqa: PLW0603  (there is one process to end)
    _kept = line


def measured_so_far(count: int, total: int, folder: object) -> str:
    """Return what is kept of models that are being measured.

    Example:
        >>> measured_so_far(2, 5, "results/runs")
        '2 of 5 models are measured and kept in results/runs'
    """
    models = "1 model is" if total == 1 else f"{total} models {'is' if count == 1 else 'are'}"
    return f"{count} of {models} measured and kept in {folder}"


def _end(number: int, frame: object) -> None:
    for other in (signal.SIGINT, signal.SIGTERM):
        signal.signal(other, signal.SIG_IGN)
    try:  # noqa: SIM105  (contextlib may be half imported now)
        sys.stdout.flush()
    except Exception:  # the signal came in the middle of a print, or nobody reads
        pass
    line = f"delta-suite: interrupted{f': {_kept}' if _kept else ''}\n"
    try:  # noqa: SIM105
        os.write(2, ("\n" + line if os.isatty(2) else line).encode())
    except OSError:
        pass
    if (writing := sys.modules.get("delta_suite.writing")) is not None:
        getattr(writing, "remove_temporary_folders", lambda: None)()
    os._exit(128 + number)
