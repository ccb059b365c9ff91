"""One target: inputs that follow from a seed, each under a time limit, and what came of them."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from tests.fuzz.targets import TARGETS

KEPT = ".fuzz"
"""Folder of the inputs that nothing foresaw."""

SECONDS = 20
"""Longest time for one input; more is a hang."""

MEMORY = 12 << 30
"""Most address space of a process; what asks for more raises MemoryError, which is not foreseen."""


class HangError(BaseException):
    """Error for an input that takes too long; no reader catches it."""


@dataclass
class Result:
    """What came of the inputs of one target."""

    name: str
    inputs: int = 0
    read: int = 0
    refused: int = 0
    unforeseen: list[str] = field(default_factory=list)
    """The last line of each traceback."""

    def add(self, part: Result) -> None:
        """Add what came of further inputs of the same target."""
        self.inputs += part.inputs
        self.read += part.read
        self.refused += part.refused
        self.unforeseen += part.unforeseen

    def line(self) -> str:
        """Return the counts in one line."""
        kinds = sorted(set(self.unforeseen))[:5]
        return f"{self.name}: {self.inputs} inputs, {len(self.unforeseen)} unforeseen {kinds or ''}"


def run(target: str, inputs: int, seed: str, keep: bool = True) -> Result:
    """Try so many inputs of a target. With `keep`, what is not foreseen is written to KEPT."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if keep:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    warnings.simplefilter("ignore")
    result = Result(target)
    rng = random.Random(f"{target} {seed}")
    current = Path(KEPT) / f"{target}-{seed}-current.input"
    with tempfile.TemporaryDirectory() as folder, _silence():
        made = TARGETS[target](Path(folder))
        assert made.try_one(made.seeds[0]) == "read", f"{target}: its own valid input is refused"
        for content in islice(made.inputs(rng), inputs):
            result.inputs += 1
            if keep:
                current.write_bytes(content)  # so that it is there where the process ends
            try:
                with _time_limit():
                    outcome = made.try_one(content)
            except (Exception, HangError) as error:
                last = traceback.format_exception_only(error)[-1].strip()[:200]
                result.unforeseen.append(f"{last} [{_place(error)}]")
                if keep:
                    stem = Path(KEPT) / f"{target}-{seed}-{len(result.unforeseen)}"
                    stem.with_suffix(".input").write_bytes(content)
                    stem.with_suffix(".txt").write_text("".join(traceback.format_exception(error)))
                continue
            result.read += outcome == "read"
            result.refused += outcome == "refused"
    current.unlink(missing_ok=True)
    return result


def run_apart(target: str, inputs: int, seed: str) -> Result:
    """Try so many inputs in a process of their own; one that ends it is kept in KEPT, and is not foreseen."""
    command = [sys.executable, "-m", "tests.fuzz.run", target, str(inputs), seed]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if done.returncode == 0:
        return Result(**json.loads(done.stdout.splitlines()[-1]))
    return Result(target, inputs, unforeseen=[f"the process ended with {done.returncode}: {done.stderr[-300:]}"])


def _place(error: BaseException) -> str:
    """Return the innermost place in the package that the error came through."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "delta_suite" in f.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"


@contextmanager
def _time_limit() -> Iterator[None]:
    def ring(*_: Any) -> None:
        raise HangError(f"more than {SECONDS} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def _silence() -> Iterator[None]:
    with Path(os.devnull).open("w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


if __name__ == "__main__":
    print(json.dumps(asdict(run(sys.argv[1], int(sys.argv[2]), sys.argv[3]))))
