"""Honest records in any number, and what it costs to build a leaderboard of them the first time and again.

python -m tests.benchmarks.many_records --layers 6 --counts 10,100,1000,3000

The records are those of tiny models of different weights, measured here under `core`, each under many names and
fingerprints, so that each has to be read, examined and judged. Printed for each number of records are seconds of wall
and of CPU and the peak memory of all processes together; and between two numbers the exponent that CPU grows by.
"""

from __future__ import annotations

import argparse
import hashlib
import tempfile
from collections.abc import Sequence
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

from tests.benchmarks.many import ROOT, Cost, cost_of
from tests.benchmarks.page import exponent
from tests.tiny import make_tiny

BUILD = ["-m", "delta_suite", "leaderboard", "--hypotheses", ROOT / "hypotheses"]


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
            costs[count] = cost_of(BUILD, place), cost_of([*BUILD, "--check"], place)
            for when, cost in zip(("first", "again"), costs[count], strict=True):
                print(
                    f"{count:6,} records, {when}: {cost.wall:7.1f} s, CPU {cost.cpu:7.1f} s "
                    f"({1000 * cost.cpu / count:.0f} ms a record), peak {cost.peak / 1e6:,.0f} MB",
                    flush=True,
                )
        for few, many in pairwise(counts):
            powers = [
                exponent([(few, cost.cpu), (many, larger.cpu)])
                for cost, larger in zip(costs[few], costs[many], strict=True)
            ]
            print(f"{few:,} to {many:,}: CPU grows by the power {powers[0]:.2f} first, {powers[1]:.2f} again")


if __name__ == "__main__":
    main()
