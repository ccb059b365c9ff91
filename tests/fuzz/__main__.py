"""`python -m tests.fuzz`: thousands of damaged inputs of every format; exits with 1 where one is not foreseen.

An input that makes anything but a result or a SuiteError is kept in .fuzz/, with its traceback.
"""

from __future__ import annotations

import argparse
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from delta_suite.publish.table import Table

from tests.fuzz.run import KEPT, Result, run_apart
from tests.fuzz.targets import TARGETS

PART = 1000
"""Number of inputs that one process tries at a time."""


def main() -> int:
    """Run the targets named, or all, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--inputs", type=int, default=12_000, help="inputs of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    started = time.monotonic()
    results = [Result(name) for name in options.targets]
    parts = [(name, first) for first in range(0, options.inputs, PART) for name in options.targets]
    with ThreadPoolExecutor(options.processes) as pool:
        jobs = [
            pool.submit(run_apart, name, min(PART, options.inputs - first), f"{options.seed}-{first // PART}")
            for name, first in parts
        ]
        for (name, _), job in zip(parts, jobs, strict=True):
            results[options.targets.index(name)].add(part := job.result())
            if part.unforeseen:
                print(part.line(), flush=True)
    rows = [(r.name, f"{r.inputs:,}", f"{r.read:,}", f"{r.refused:,}", f"{len(r.unforeseen):,}") for r in results]
    total = sum(r.inputs for r in results)
    print(Table.of(("format", "inputs", "read", "refused", "unforeseen"), rows, align="lrrrr").text())
    unforeseen = sum(len(r.unforeseen) for r in results)
    print(f"{total:,} inputs in {time.monotonic() - started:.0f} s, {unforeseen} unforeseen")
    if unforeseen:
        print(f"The inputs and tracebacks are in {KEPT}/.")
    return 1 if unforeseen else 0


if __name__ == "__main__":
    Path(KEPT).mkdir(exist_ok=True)
    sys.exit(main())
