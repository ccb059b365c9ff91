"""Fixtures of the benchmarks: the model, the machine's rates, and the record that becomes a row of the page.

Environment: DELTA_BENCH_ROUNDS (of ways in turns, and of commands), DELTA_BENCH_WAYS_TOKENS, sizes of an axis such as
"10,100" (DELTA_BENCH_TOKENS, _LAYERS, _HIDDEN, _MODELS, _CLAIMS and _RECORDS),
DELTA_BENCH_SIZES ("512,2048"), DELTA_BENCH_SHARD_GB, DELTA_BENCH_MILLION (tokens, 1000000), DELTA_BENCH_CALIBRATIONS
("seed,core"), DELTA_BENCH_MODEL (a .gguf file in place of the embedded model).
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from delta_suite.provenance import library_version

from tests.benchmarks.page import Record, summary

if TYPE_CHECKING:
    from tests.benchmarks.measuring import Rates
    from tests.benchmarks.subjects import Subject

RECORDS = pytest.StashKey[list[tuple[str, dict[str, Any]]]]()


@pytest.fixture(scope="session")
def rates() -> Rates:
    """Of the device, measured once."""
    from tests.benchmarks.measuring import Rates
    from tests.benchmarks.subjects import DEVICE

    return Rates.of(DEVICE)


@pytest.fixture(scope="session")
def subject(request: pytest.FixtureRequest, rates: Rates) -> Iterator[Subject]:
    """A model by its short name. pytest runs all tests of one before it builds the next, so one is held at a time.

    After the rates: their matrices would not fit beside a large model.
    """
    from delta_suite.errors import SuiteError

    from tests.benchmarks.subjects import build

    try:
        built = build(request.param)
    except SuiteError as error:
        pytest.skip(str(error))
    yield built
    built.free()
    _release()


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[..., Record]:
    """Starts the record of a benchmark, given what it measures, and whether that stands in for something larger."""
    from tests.benchmarks.subjects import DEVICE

    def start(subject: str, rehearsal: bool = False) -> Record:
        request.config.stash[RECORDS].append((benchmark.group or "", benchmark.extra_info))
        return Record(benchmark.extra_info, subject, rehearsal, DEVICE.type == "cpu")

    return start


@pytest.fixture(autouse=True)
def released() -> Iterator[None]:
    """A failed benchmark must not hold the device's memory, which its traceback would."""
    yield
    for name in ("last_traceback", "last_value", "last_exc"):
        if hasattr(sys, name):
            setattr(sys, name, None)
    _release()


def _release() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS] = []
    # The tests check shapes at every call; what is timed is the suite as users have it.
    sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__module__.startswith("jaxtyping")]


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """What the page says of the machine; its network name is nobody's business."""
    import torch

    cpu = machine_info.get("cpu", {}).get("brand_raw") or machine_info.get("processor") or "unknown processor"
    threads = torch.get_num_threads()
    versions = {
        name: library_version(name) for name in ("torch", "transformers", "numpy", "transformer-lens", "nnsight")
    }
    machine_info.clear()
    machine_info |= {
        "cpu": f"{cpu.strip()}, {os.cpu_count()} cores, {threads} thread{'s'[: threads > 1]}",
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "versions": {"python": sys.version.split()[0]} | {k: v for k, v in versions.items() if v != "not installed"},
    }


@pytest.hookimpl(tryfirst=True)
def pytest_benchmark_generate_json(benchmarks: list[Any]) -> None:
    """Leave out what an interruption ended: without a round it has no median, and the others could not be written."""
    benchmarks[:] = [each for each in benchmarks if each.stats.data]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash[RECORDS]:
        terminalreporter.section("figures")
        terminalreporter.write_line(summary(config.stash[RECORDS]))
