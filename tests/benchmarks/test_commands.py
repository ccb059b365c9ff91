"""Whole processes, as a user starts them: a run from the cache, and collection."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.errors import SuiteError
from delta_suite.models.models_file import load_registry
from delta_suite.models.sources import locate

from tests.benchmarks.measuring import seconds, timed
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE

pytestmark = [
    pytest.mark.benchmark(group="7. Whole commands"),
    pytest.mark.skipif(DEVICE.type == "cuda", reason="timed on the CPU machine, where the suite is installed"),
]

ROOT = Path(__file__).parents[2]
MODEL = "smollm2-135m-q4"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pytest_run(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., None]:
    """Runs `pytest hypotheses/ --model=...` with a cache of its own."""
    try:
        locate(load_registry().resolve(MODEL))
    except SuiteError as error:
        pytest.skip(str(error))
    plugins = {entry.value for entry in importlib.metadata.entry_points(group="pytest11")}
    register = [] if "delta_suite.pytest_plugin.plugin" in plugins else ["-p", "delta_suite.pytest_plugin.plugin"]
    folder = tmp_path_factory.mktemp("commands")
    environment = os.environ | {"DELTA_SUITE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "pytest", *register, "hypotheses/", f"--model={MODEL}", "--device=cpu"]
    command += ["--results-dir", str(folder / "results"), "-p", "no:cacheprovider"]

    def run(*options: str) -> None:
        done = subprocess.run(
            [*command, *options], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        # 1 is pytest's status where a prediction is refuted, which is a result.
        assert done.returncode in (0, 1), done.stdout[-4000:] + done.stderr[-4000:]
        assert "error" not in done.stdout.splitlines()[-1], done.stdout[-4000:]

    return run


def test_run_from_the_cache(benchmark: Any, pytest_run: Callable[..., None], record: Callable[..., Record]) -> None:
    first = seconds(pytest_run, CPU)
    _, own, _ = timed(benchmark, pytest_run, CPU, rounds=5)
    report = record(f"pytest hypotheses/ --model={MODEL}")
    report.add("first run: load, capture, reduce, judge", first, "s")
    report.add("from the cache", own, "s", target="<= 3")


def test_collection(benchmark: Any, pytest_run: Callable[..., None], record: Callable[..., Record]) -> None:
    _, own, _ = timed(benchmark, lambda: pytest_run("--collect-only"), CPU, rounds=5)
    bare = seconds(lambda: subprocess.run([sys.executable, "-m", "pytest", "--version"], check=True), CPU, 3)
    report = record(f"pytest hypotheses/ --model={MODEL} --collect-only")
    report.add("collection", own, "s", target="<= 1")
    report.add("python -m pytest --version, for comparison", bare, "s")
