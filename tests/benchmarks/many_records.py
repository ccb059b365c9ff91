"""Honest records in any number, and what it costs to build a leaderboard of them the first time and again.

python -m tests.benchmarks.many_records --layers 6 --counts 10,100,1000,3000

The records are those of tiny models of different weights, measured here under `core`, each under many names and
fingerprints, so that each has to be read, examined and judged. Printed for each number of records are seconds of wall
and of CPU and the peak memory of all processes together; and between two numbers the exponent that CPU grows by.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure_view
from delta_suite.records.arrays import pack
from delta_suite.records.cache import Cache
from delta_suite.records.format import to_json
from delta_suite.records.record import ArrayReference
from delta_suite.records.store import record_path
from delta_suite.records.view import RecordView

from tests.tiny import make_tiny

ROOT = Path(__file__).parents[2]


def measured_views(folder: Path, layers: int, variety: int, calibration: str = "core") -> list[RecordView]:
    """Measure tiny models of so many layers, which differ in their weights."""
    views = []
    for seed in range(variety):
        spec = ModelSpec(name=f"tiny-{seed}", path=make_tiny(folder / f"tiny-{seed}", layers=layers, seed=seed))
        settings = Settings(calibration=calibration, device="cpu", cache=Cache(folder / "cache"))
        views.append(measure_view(spec, settings).view)
    return views


def write_records(results: Path, views: Sequence[RecordView], count: int) -> None:
    """Write records of so many models, from these views in turn; those that are there stay."""
    packed = [pack(view.content()) for view in views]
    for number in range(count):
        view, arrays = views[number % len(views)], packed[number % len(views)]
        name = f"family-{number:04d}-instruct"  # no number at its end, which would be the step of a run
        fingerprint = hashlib.sha256(name.encode()).hexdigest()
        model = view.model.model_copy(update={"name": name, "fingerprint": fingerprint})
        record = view.record.model_copy(update={"model": model})
        path = record_path(results, record)
        beside = path.with_suffix(".safetensors")
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(arrays)
            reference = ArrayReference(file=beside.name, sha256=hashlib.sha256(arrays).hexdigest())
            path.write_text(to_json(record.model_copy(update={"arrays": reference})))


@dataclass(frozen=True)
class Cost:
    """What one run of a command took."""

    wall: float
    cpu: float
    """Seconds of CPU of the command and its processes."""
    peak: int
    """Most bytes that all of its processes held at once, looked at every tenth of a second."""


def cost_of(folder: Path, *arguments: str) -> Cost:
    """Run `delta-suite leaderboard` in a folder with a cache of its own."""
    command = [sys.executable, "-m", "delta_suite", "leaderboard", "--hypotheses", str(ROOT / "hypotheses")]
    environment = os.environ | {"DELTA_SUITE_CACHE": str(folder / "cache")}
    before, started = os.times(), time.perf_counter()
    process = subprocess.Popen([*command, *arguments], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    peaks = [0]

    def watch() -> None:
        while process.poll() is None:
            peaks.append(bytes_held(process.pid))
            time.sleep(0.1)

    watcher = threading.Thread(target=watch)
    watcher.start()
    code = process.wait()
    watcher.join()
    if code:
        raise SystemExit(f"delta-suite leaderboard ended with {code}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Cost(time.perf_counter() - started, cpu, max(peaks))


def bytes_held(process: int) -> int:
    """Return the bytes that a process and its children hold; pages that they share count once for each."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                total += 1024 * int(line.split()[1])
        for child in Path(f"/proc/{process}/task/{process}/children").read_text().split():
            total += bytes_held(int(child))
    except OSError:
        pass  # it has ended
    return total


def exponent(few: int, many: int, cost: float, larger: float) -> float:
    """Return the power of the number that a cost grows by."""
    return math.log(larger / cost) / math.log(many / few)


def main() -> None:
    """Measure, build, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--counts", default="10,100,1000,3000")
    parser.add_argument("--variety", type=int, default=3, help="models that are measured")
    parser.add_argument("--folder", type=Path, help="keep everything here")
    chosen = parser.parse_args()
    counts = [int(count) for count in chosen.counts.split(",")]
    with tempfile.TemporaryDirectory() as temporary:
        folder = chosen.folder or Path(temporary)
        views = measured_views(folder, chosen.layers, chosen.variety)
        costs: dict[int, tuple[Cost, Cost]] = {}
        for count in counts:
            place = folder / str(count)
            write_records(place / "results", views, count)
            costs[count] = cost_of(place), cost_of(place, "--check")
            for when, cost in zip(("first", "again"), costs[count], strict=True):
                print(
                    f"{count:6,} records, {when}: {cost.wall:7.1f} s, CPU {cost.cpu:7.1f} s "
                    f"({1000 * cost.cpu / count:.0f} ms a record), peak {cost.peak / 1e6:,.0f} MB",
                    flush=True,
                )
        for few, many in pairwise(counts):
            powers = [
                exponent(few, many, cost.cpu, larger.cpu) for cost, larger in zip(costs[few], costs[many], strict=True)
            ]
            print(f"{few:,} to {many:,}: CPU grows by the power {powers[0]:.2f} first, {powers[1]:.2f} again")


if __name__ == "__main__":
    main()
