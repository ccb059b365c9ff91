"""Run a function in a process of its own, forked from one that has imported what a measurement needs.

A program that measures imports for four seconds and measures for one. Here a process imports once, and each function
runs in a fork of it, which ends as any process does: with a code, or by a signal. What a program does about its imports
does not show in it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

IMPORTED = (
    "pytest",
    "delta_suite.api",
    "delta_suite.cli",
    "delta_suite.models.loading",
    "delta_suite.reduction.passes",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)
"""Modules that a measurement of the tiny model imports, and that take long."""


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code, minus the number of the signal that ended it, and what it wrote."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Apart:
    """A function that runs in a process of its own."""

    process: ForkServerProcess
    written: Path

    def ended(self, seconds: float = 120.0) -> Ended:
        """Wait for its end."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            self.process.join()
        assert self.process.exitcode is not None
        out, err = ((self.written / name).read_text("utf-8") for name in ("out", "err"))
        shutil.rmtree(self.written)
        return Ended(self.process.exitcode, out, err)


def start(function: Callable[..., object], *arguments: Any, folder: Path | None = None, **environment: str) -> Apart:
    """Start a function of a module in a process of its own, in a folder, with these variables of the environment."""
    written = Path(mkdtemp())
    variables = {**os.environ, **environment}
    process = _context().Process(target=_run, args=(function, arguments, folder or Path.cwd(), written, variables))
    process.start()
    return Apart(process, written)


def run(function: Callable[..., object], *arguments: Any, folder: Path | None = None, **environment: str) -> Ended:
    """Run a function of a module in a process of its own, to its end."""
    return start(function, *arguments, folder=folder, **environment).ended()


def _context() -> ForkServerContext:
    context = get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    return context


def _run(
    function: Callable[..., object], arguments: tuple[Any, ...], folder: Path, written: Path, variables: dict[str, str]
) -> None:
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(written / name, os.O_WRONLY | os.O_CREAT), number)
    function(*arguments)
