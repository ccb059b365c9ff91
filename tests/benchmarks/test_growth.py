"""What the work costs as it grows, one axis at a time: time, peak memory, and the power that each grows by."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.benchmarks import many
from tests.benchmarks.many_records import BUILD, measured_views, write_records
from tests.benchmarks.measuring import Peak, Spent
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE, SMALL, Subject, build, shaped
from tests.benchmarks.ways import EVERY_VARIANT, core

CUDA = DEVICE.type == "cuda"
LENGTH = 128
"""Tokens of a document."""

on_cpu = pytest.mark.skipif(CUDA, reason="measured on the CPU")
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a GPU")
pytestmark = pytest.mark.benchmark(group="3. Cost as work grows")

Run = Callable[[int], tuple[Spent, float]]


def points(name: str, *default: int) -> list[int]:
    """Return the sizes of an axis; DELTA_BENCH_<NAME> gives others, such as "10,100"."""
    given = os.environ.get(f"DELTA_BENCH_{name}", "")
    return [int(n) for n in given.split(",") if n] or list(default)


def swept(benchmark: Any, report: Record, what: str, sizes: list[int], run: Run) -> None:
    """Measure every size once, and report seconds, bytes and powers."""
    costs: dict[int, tuple[Spent, float]] = {}

    def every_size() -> None:
        for size in sizes:
            costs[size] = run(size)

    benchmark.pedantic(every_size, rounds=1)
    for size, (spent, peak) in costs.items():
        report.spent(f"{size:,} {what}", spent, peak)
    time = "cpu" if not CUDA else "wall"
    report.grows("time" if CUDA else "CPU time", [(size, getattr(spent, time)) for size, (spent, _) in costs.items()])
    report.grows("peak memory", [(size, peak) for size, (_, peak) in costs.items()])


def measured(subject: Subject, tokens: int, length: int = LENGTH) -> tuple[Spent, float]:
    """Return what everything after loading costs: capture, spectra, every metric, all variants with intervals."""
    documents = subject.sequences(tokens, length, documents=True)
    with Peak(subject.device) as peak:
        spent = Spent.on(partial(core, subject, documents, variants=EVERY_VARIANT), subject.device)
    return spent, peak.bytes


def test_tokens(benchmark: Any, record: Callable[..., Record]) -> None:
    subject = build(SMALL)
    measured(subject, 512)  # what is allocated once, is
    sizes = points("TOKENS", *((512, 8192, 131_072, 1_000_000) if CUDA else (512, 2048, 8192, 32_768)))
    report = record(f"{subject.name}, all variants with intervals: tokens")
    swept(benchmark, report, "tokens", sizes, lambda tokens: measured(subject, tokens))
    report.note(
        f"Documents of {LENGTH} tokens; each size once, after a small one. Below the hidden size the eigenproblems "
        "grow with the tokens, above it they stay, and a shard of the stream bounds the memory."
    )
    subject.free()


@on_cpu
def test_layers(benchmark: Any, record: Callable[..., Record]) -> None:
    def run(layers: int) -> tuple[Spent, float]:
        subject = shaped(layers=layers)
        cost = measured(subject, 1024)
        subject.free()
        return cost

    run(1)
    report = record("hidden 576, 1,024 tokens: layers")
    swept(benchmark, report, "layers", points("LAYERS", 12, 30, 63, 126), run)


@on_gpu
def test_hidden(benchmark: Any, record: Callable[..., Record]) -> None:
    def run(hidden: int) -> tuple[Spent, float]:
        subject = shaped(layers=4, hidden=hidden, dtype=torch.bfloat16)
        cost = measured(subject, 112 * 155, 155)
        subject.free()
        return cost

    run(192)
    report = record("4 layers, 17,360 tokens in 112 documents: hidden size")
    swept(benchmark, report, "hidden", points("HIDDEN", 576, 1152, 2304, 4608, 8192), run)


@on_cpu
def test_models(benchmark: Any, tmp_path: Path, record: Callable[..., Record]) -> None:
    sizes = points("MODELS", 1, 10, 100, 1000)
    claims = many.write_claims(tmp_path / "claims", 1, 5)
    models = {size: many.write_models(tmp_path / str(size), size) for size in sizes}

    def run(size: int) -> tuple[Spent, float]:
        words = [claims, "--all-models", f"--models-file={models[size]}", "--calibration=seed", "--documents=12"]
        cost = many.cost_of(
            many.pytest_command(*words, "--device=cpu", "--no-control"), tmp_path / str(size), codes=(0, 1)
        )
        return cost, cost.peak

    report = record("pytest, five claims, tiny models from the cache: models")
    swept(benchmark, report, "models", sizes, run)


@on_cpu
def test_claims(benchmark: Any, tmp_path: Path, record: Callable[..., Record]) -> None:
    sizes = points("CLAIMS", 20, 200, 2000)
    models = many.write_models(tmp_path, 1)

    def run(size: int) -> tuple[Spent, float]:
        claims = many.write_claims(tmp_path / str(size), size // 20)
        words = [claims, "--all-models", f"--models-file={models}", "--calibration=seed", "--documents=12"]
        cost = many.cost_of(many.pytest_command(*words, "--device=cpu", "--no-control"), tmp_path, codes=(0, 1))
        return cost, cost.peak

    report = record("pytest, a tiny model from the cache, files of 20 claims: claims")
    swept(benchmark, report, "claims", sizes, run)


@on_cpu
def test_records(benchmark: Any, tmp_path: Path, record: Callable[..., Record]) -> None:
    views = measured_views(tmp_path, layers=6, variety=3)

    def run(size: int) -> tuple[Spent, float]:
        place = tmp_path / str(size)
        write_records(place / "results", views, size)
        cost = many.cost_of(BUILD, place)
        return cost, cost.peak

    report = record("delta-suite leaderboard, models of six layers, the first time: records")
    swept(benchmark, report, "records", points("RECORDS", 10, 100, 1000, 3000), run)
    report.note("`python -m tests.benchmarks.many_records` also times what a board costs again.")


@on_cpu
def test_many_entries(benchmark: Any, tmp_path: Path, record: Callable[..., Record]) -> None:
    """500 hypothesis files of 20 claims, and a models file of 2,000 entries."""
    claims = many.write_claims(tmp_path / "claims", 500)
    one = many.write_claims(tmp_path / "one", 1)
    models = many.write_models(tmp_path, 1)
    entries = tmp_path / "many"
    entries.mkdir()
    listed = many.write_entries(entries, 2000)
    (entries / "models.toml").write_text(listed.read_text() + models.read_text())
    named = [f"--models-file={models}", "--all-models", "--device=cpu"]
    many_named = [f"--models-file={entries / 'models.toml'}", "--all-models", "--device=cpu"]
    commands = {
        "collecting 500 hypothesis files of 20 claims": (many.pytest_command(claims, "--collect-only", *named), 6),
        "`delta-suite models` with 2,000 entries": (["-m", "delta_suite", "models", *many_named[:1]], 3),
        "`--all-models --collect-only` with 2,000 entries": (
            many.pytest_command(one, "--collect-only", *many_named),
            3,
        ),
    }
    costs: dict[str, many.Cost] = {}

    def every_command() -> None:
        for name, (command, _) in commands.items():
            costs[name] = many.cost_of(command, tmp_path)

    benchmark.pedantic(every_command, rounds=1)
    report = record("many entries")
    for name, (_, seconds) in commands.items():
        report.spent(name, costs[name], costs[name].peak, target=f"<= {seconds}", by_cpu=True)
    report.note("Targets of commands are held against CPU seconds, as each runs on one thread and machines are shared.")
