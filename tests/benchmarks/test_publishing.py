"""The leaderboard: time and memory for each record, of 100 records and of 800, in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure_view
from delta_suite.records.cache import Cache

from tests.benchmarks.measuring import timed
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE
from tests.planted_records import write_copies
from tests.tiny import make_tiny

pytestmark = [
    pytest.mark.benchmark(group="8. The leaderboard"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="timed on the CPU machine, where the suite is installed"),
]

ROOT = Path(__file__).parents[2]
COUNTS = [int(n) for n in os.environ.get("DELTA_BENCH_RECORDS", "").split(",") if n] or [100, 800]
"""Numbers of records, of models of six layers."""


def test_leaderboard(benchmark: Any, tmp_path: Path, record: Callable[..., Record]) -> None:
    spec = ModelSpec(name="tiny", path=make_tiny(tmp_path / "tiny", layers=6))
    view = measure_view(spec, Settings(calibration="seed", device="cpu", cache=Cache(tmp_path / "cache"))).view
    for count in COUNTS:
        write_copies(tmp_path / str(count) / "results", view, count)
    used: dict[int, tuple[float, int]] = {}

    def build_all() -> None:
        for count in COUNTS:
            used[count] = _built(tmp_path / str(count))

    timed(benchmark, build_all, torch.device("cpu"), rounds=1, warmup=0)
    empty, _ = _built(tmp_path / "none")
    report = record("delta-suite leaderboard, models of six layers")
    for count, (seconds, peak) in used.items():
        report.add(f"{count:,} records", seconds, "s")
        report.add(f"{count:,} records, peak memory", peak, "B")
    first, last = COUNTS[0], COUNTS[-1]
    each = {count: (used[count][0] - empty) / count for count in (first, last)}
    report.add(f"time for a record, of {last:,} over of {first:,}", each[last] / each[first], "x", target="<= 1.5")


MEASURED = """
import resource, sys
from delta_suite.cli import app
try:
    app(["leaderboard", "--hypotheses", sys.argv[1]])
finally:
    used = resource.getrusage(resource.RUSAGE_SELF)
    status = open("/proc/self/status").read()  # ru_maxrss counts what the process was before it became Python
    peak = 1024 * int(status.partition("VmHWM:")[2].split()[0])
    print(used.ru_utime + used.ru_stime, peak, file=sys.stderr)
"""


def _built(folder: Path) -> tuple[float, int]:
    """Build the leaderboard of a folder in a new process; return its seconds of CPU, and its peak memory in bytes."""
    (folder / "results" / "runs").mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", MEASURED, str(ROOT / "hypotheses")]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    seconds, peak = done.stderr.split()
    return float(seconds), int(peak)
