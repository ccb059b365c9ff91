"""One model's record on CPU and CUDA in float32, in bfloat16 beside them, and split over two GPUs.

The model is the embedded one; where its weights are not, a Llama of its size with random weights.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.errors import SuiteError
from delta_suite.models import loading
from delta_suite.models.sources import locate
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache
from delta_suite.records.view import RecordView

from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE, embedded_spec
from tests.tiny import make_tiny

pytestmark = pytest.mark.benchmark(group="10. CPU, CUDA and bfloat16")

CALIBRATIONS = os.environ.get("DELTA_BENCH_CALIBRATIONS", "seed,core" if DEVICE.type == "cuda" else "seed").split(",")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str, str], RecordView]]:
    """The record for (calibration, device, dtype). The tokenizer, rebuilt from GGUF in seconds, is built once."""
    folder: Path = tmp_path_factory.mktemp("devices")
    spec = embedded_spec()
    try:
        locate(spec)
    except SuiteError:
        spec = ModelSpec(
            name="random-30x576", path=make_tiny(folder / "random-30x576", layers=30, hidden=576, scale=0.02)
        )
    original = loading.load_tokenizer
    loading.load_tokenizer = functools.cache(lambda *_: original(spec, locate(spec)))

    @functools.cache
    def run(calibration: str, device: str, dtype: str) -> RecordView:
        settings = Settings(
            calibration=calibration, device=device, dtype=dtype, results=folder, cache=Cache(folder / "cache")
        )
        return measure(spec, settings).view

    yield run
    loading.load_tokenizer = original


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_split_over_two_gpus(
    benchmark: Any, measured: Callable[[str, str, str], RecordView], calibration: str, record: Callable[..., Record]
) -> None:
    one = measured(calibration, "cuda", "float32")
    two = benchmark.pedantic(lambda: measured(calibration, "sharded", "float32"), rounds=1)
    name, (relative, where) = max(compare(one, two).items(), key=lambda item: item[1][0])
    report = record(f"{one.model.name}, calibration {calibration}: split over two GPUs against one, float32")
    report.add(f"largest: {name}, {where}", relative, target="<= 1e-5")


PAIRS = [("cuda", "float32"), ("cuda", "bfloat16")] if DEVICE.type == "cuda" else [("cpu", "bfloat16")]


@pytest.mark.parametrize("calibration", CALIBRATIONS)
@pytest.mark.parametrize(("device", "dtype"), PAIRS)
def test_record_against_cpu_float32(
    benchmark: Any,
    measured: Callable[[str, str, str], RecordView],
    calibration: str,
    device: str,
    dtype: str,
    record: Callable[..., Record],
) -> None:
    reference = measured(calibration, "cpu", "float32")
    other = benchmark.pedantic(lambda: measured(calibration, device, dtype), rounds=1)
    report = record(f"{other.model.name}, calibration {calibration}: {device} {dtype} against cpu float32")
    differences = compare(reference, other)
    target = "<= 1e-4" if dtype == "float32" else ""
    ranked = sorted(differences.items(), key=lambda item: -item[1][0])
    for place, (name, (relative, where)) in enumerate(ranked[:3]):
        report.add(f"{'largest' if place == 0 else 'next'}: {name}, {where}", relative, target="" if place else target)
    every = ", ".join(f"{name} {relative:.1e}" for name, (relative, _) in ranked)
    report.note(f"*calibration {calibration}, {device} {dtype}*: {every}.")
    report.note(
        "Differences are relative to the value, or to a hundredth of the metric's largest value where its own is "
        "smaller than that; each is the largest over layers, phases and variants. bfloat16 has no target: it shows "
        "what rounding weights and stream to 8 bits does."
    )


def compare(reference: RecordView, other: RecordView) -> dict[str, tuple[float, str]]:
    """By metric: the largest relative difference, and where it is."""
    values = _values(reference)
    others = _values(other)
    assert values.keys() == others.keys()
    worst: dict[str, tuple[float, str]] = {}
    largest: dict[str, float] = {}
    for (name, _), value in values.items():
        largest[name] = max(largest.get(name, 0.0), abs(value))
    for (name, where), value in values.items():
        scale = max(abs(value), largest[name] / 100)
        relative = abs(others[name, where] - value) / scale if scale else 0.0
        if relative >= worst.get(name, (-1.0, ""))[0]:
            worst[name] = (relative, where)
    return worst


def _values(measurement: RecordView) -> dict[tuple[str, str], float]:
    found: dict[tuple[str, str], float] = {}
    places = [(f"layer {layer.layer}", layer.metrics) for layer in measurement.layers]
    places += [(f"phase {phase}", scope.metrics) for phase, scope in measurement.scopes.items()]
    for place, variants in places:
        for variant, metrics in variants.items():
            for name, estimate in metrics.items():
                if estimate.value is not None and name != "rounding_share":  # which tells the dtypes apart by design
                    found[name, f"{place}, {variant}"] = estimate.value
    return found
