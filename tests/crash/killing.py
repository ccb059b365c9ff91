"""Kill a process at a chosen step: when it is about to change the file system, or inside a write."""

from __future__ import annotations

import os
import resource
import signal
import sys
from collections.abc import Callable

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
"""Audit events by which a file or folder is made, moved or removed; a file opened for writing counts besides."""


def on_changes(below: str, call: Callable[[int], object]) -> None:
    """Call a function just before each change of this process below a folder, with the change's number from 1."""
    seen = 0

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal seen
        if event not in (*CHANGES, "open"):
            return
        changes = True
        if event == "open":
            changes = isinstance(arguments[2], int) and bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        named = (os.fsdecode(part) for part in arguments[:2] if isinstance(part, str | bytes | os.PathLike))
        if changes and any(os.path.abspath(path).startswith(below) for path in named):  # noqa: PTH100
            seen += 1
            call(seen)

    sys.addaudithook(watch)


def kill_before(step: int, below: str, number: int = signal.SIGKILL) -> None:
    """Send this process a signal just before its `step`-th change below a folder."""
    on_changes(below, lambda seen: os.kill(os.getpid(), number) if seen == step else None)


def kill_inside_a_write(size: int) -> None:
    """Have the system kill this process when a file that it writes grows past a size: a part of it is there then."""
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
