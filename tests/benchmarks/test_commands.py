"""Whole processes, as a user starts them: what it takes to start, and one measurement on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import many
from tests.benchmarks.measuring import Spent
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE, EMBEDDED, Subject, embedded_spec
from tests.benchmarks.ways import bare_forward

pytestmark = pytest.mark.skipif(DEVICE.type == "cuda", reason="timed on the CPU machine")

CPU = torch.device("cpu")

BOUND = (
    "loading, the law and the analysis come on top of the passes: three variants of each layer with their replicates, "
    "and the law's fits in two folds."
)
ROUNDS = int(os.environ.get("DELTA_BENCH_ROUNDS", "5"))


@pytest.mark.benchmark(group="4. Start-up")
def test_start(benchmark: Any, tmp_path: Path, record: Callable[..., Record]) -> None:
    models = many.write_models(tmp_path, 1)
    chosen = [f"--models-file={models}", "--calibration=seed", "--documents=12", "--device=cpu"]
    claims = [many.ROOT / "hypotheses", "--all-models", "--no-control", *chosen]
    suite: list[str | Path] = ["-m", "delta_suite"]
    commands: dict[str, tuple[list[str | Path], str]] = {
        "python -c pass": (["-c", "pass"], ""),
        "python -m pytest --version": (["-m", "pytest", "--version"], ""),
        "delta-suite --help": ([*suite, "--help"], "<= 1"),
        "delta-suite measure, from the cache": ([*suite, "measure", "m-0000", "--parts=spectra", *chosen], "<= 1"),
        "pytest hypotheses/, from the cache": (many.pytest_command(*claims), "<= 1"),
        "pytest hypotheses/ --collect-only": (many.pytest_command(*claims, "--collect-only"), "<= 0.7"),
    }
    rounds: dict[str, list[many.Cost]] = {name: [] for name in commands}

    def in_turns() -> None:
        for name, (words, _) in commands.items():
            rounds[name].append(many.cost_of(words, tmp_path, codes=(0, 1)))

    in_turns()  # what is compiled or completed once, is
    for costs in rounds.values():
        costs.clear()
    benchmark.pedantic(in_turns, rounds=ROUNDS)
    report = record("processes, the model of 6 layers in the cache")
    for name, (words, target) in commands.items():
        peak = max(cost.peak for cost in rounds[name])
        bound = _imported(words, tmp_path) if target else ""
        report.spent(name, Spent.median(rounds[name]), peak, target=target, by_cpu=True, bound=bound)
    report.note("The targets are held against CPU seconds, as each command runs on one thread and machines are shared.")


def _imported(words: list[str | Path], folder: Path) -> str:
    """Return what share of a command's time its imports take, by `python -X importtime`."""
    command, started = [sys.executable, "-X", "importtime", *words], time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=many.users(folder), capture_output=True, text=True, check=False)
    whole = (time.perf_counter() - started) * 1e6
    rows = [
        line[12:].split("|") for line in done.stderr.splitlines() if line.startswith("import time:") and "|" in line
    ]
    packages: Counter[str] = Counter()
    for own, _, name in rows[1:]:
        packages[name.strip().split(".")[0]] += int(own)
    most = ", ".join(f"{name} {100 * spent / whole:.0f}%" for name, spent in packages.most_common(6))
    return f"importing {len(rows) - 1:,} modules takes {100 * packages.total() / whole:.0f}% of it ({most})."


@pytest.mark.benchmark(group="5. A measurement on the CPU")
@pytest.mark.parametrize("subject", [EMBEDDED], indirect=True)
def test_measure(benchmark: Any, subject: Subject, tmp_path: Path, record: Callable[..., Record]) -> None:
    sequences = subject.core
    assert sequences is not None
    bare, whole = [], []

    def in_turns() -> None:
        bare.append(Spent.on(lambda: bare_forward(subject, sequences), CPU))
        options = ["--fresh", "--device=cpu", "--results-dir=results"]
        words: list[str | Path] = ["-m", "delta_suite", "measure", embedded_spec().name, *options]
        whole.append(many.cost_of(words, tmp_path))

    benchmark.pedantic(in_turns, rounds=1)
    forward, command = Spent.median(bare), Spent.median(whole)
    (path,) = (tmp_path / "results" / "runs").glob("*/*.json")
    clocks = json.loads(path.read_text("utf-8"))["provenance"]["seconds"]
    report = record(f"{subject.name}, core, {sequences.tokens:,} tokens")
    report.spent("bare forward passes in float32", forward)
    report.spent("delta-suite measure --fresh, default parts", command, whole[0].peak)
    report.add("wall time over the bare passes", command.wall / forward.wall, "x", target="<= 1.5", bound=BOUND)
    report.add("CPU time over the bare passes", command.cpu / forward.cpu, "x")
    for name, seconds in clocks.items():
        report.add(f"of it {name}", seconds, "s")
    report.add("in no clock of the record", command.wall - sum(clocks.values()), "s")
