"""Draw, measure and judge planted populations many times, and count how often intervals and verdicts are right.

A repeat draws documents once, and puts them through the reduction, metrics, intervals and judge that measure a model.
Every repeat has a seed of its own, so neither their order nor the number of processes changes a figure.
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from delta_suite.capture.writes import SUBLAYERS, Write
from delta_suite.claims.judge import judge
from delta_suite.claims.observe import observe
from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.claims.verdict import Verdict
from delta_suite.claims.words import nearest
from delta_suite.errors import OptionError
from delta_suite.metrics.registry import metric_versions
from delta_suite.pool import THREADS, end_with_the_parent, environment
from delta_suite.progress import Progress, no_progress
from delta_suite.provenance import hardware_in_words, library_version
from delta_suite.records.arrays import ArrayFile
from delta_suite.records.assemble import assemble, with_law, with_writes
from delta_suite.records.losses_part import with_causes
from delta_suite.records.record import (
    CalibrationRecord,
    CertificateRecord,
    IdentityRecord,
    ModelRecord,
    Provenance,
    SinkRecord,
)
from delta_suite.records.view import RecordView
from delta_suite.reduction.losses import Causes
from delta_suite.reduction.variants import VARIANTS
from delta_suite.selftest.causal_worlds import Caused
from delta_suite.selftest.documents import DOCUMENTS, ValueOf
from delta_suite.selftest.report import Coverage, Proof, Rate
from delta_suite.selftest.world import World
from delta_suite.selftest.worlds import WORLDS, gated
from delta_suite.version import __version__

if TYPE_CHECKING:
    from delta_suite.reduction.replicates import LayerSpectra

    Spectra = dict[str, list[LayerSpectra]]

SEED = 20261124
"""Seed of every draw here, so that the table can be reproduced."""

AT_ONCE = 4
"""Number of repeats in one task of a process."""

TRUTH_DOCUMENTS = 20_000
"""Documents drawn for true averages over tokens: 250 times a repeat's, so the error is a sixteenth of a repeat's."""

Interval = tuple[float, float]


class SelftestError(OptionError):
    """An unknown planted population, or fewer than one repeat or process."""


# --- one repeat ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """Consecutive repeats of one planted population, by number, or its true values."""

    world: str
    repeats: range
    truth_documents: int = 0
    """Number of documents that true values are taken from; 0 where the task is repeats."""


@dataclass(frozen=True)
class Repeat:
    """Result of one repeat."""

    intervals: Mapping[tuple[str, str], Interval | None]
    """Intervals by scope and metric; None where the figure had none."""
    ridges: tuple[float, ...]
    """Ridges of the law's maps; empty where the law was not measured."""
    verdicts: Sequence[Verdict]
    """Verdicts of the population's claims, in order."""
    true: Sequence[bool]
    """True for each claim that is true of the population, in the same order."""


def _generator(world: str, *key: int) -> np.random.Generator:
    """Return the generator of one draw from a planted population."""
    return np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(list(WORLDS).index(world), *key)))


_PLANTED, _REPEAT, _TRUTH = 0, 1, 2
"""Keys of the generators of populations, of repeats, and of true values."""


def _run(task: Task) -> Any:
    """Return the true values of a population, or its repeats, as the task says."""
    if not task.truth_documents:
        return run_task(task)
    population = WORLDS[task.world].plant(_generator(task.world, _PLANTED))
    return population.truth(_generator(task.world, _TRUTH), task.truth_documents)


def run_task(task: Task) -> list[Repeat]:
    """Run the repeats of a task, in order."""
    world = WORLDS[task.world]
    out = []
    for repeat in task.repeats:
        population = world.plant(_generator(task.world, _PLANTED, *([repeat] if world.redrawn else [])))
        stream = population.stream(_generator(task.world, _REPEAT, repeat))
        causes = None
        if isinstance(population, Caused):  # the same draw again gives the same documents
            causes = population.causes(_generator(task.world, _REPEAT, repeat), stream, world.units)
        view = measured(stream, world, causes)
        intervals = {
            (scope, metric): observe(view, metric, scope, world.variants[0]).interval
            for scope, metrics in (world.covered or {}).items()
            for metric in metrics
        }
        verdicts = [judge(_hypothesis(claim.expectation), claim.expectation, view).verdict for claim in world.claims]
        out.append(Repeat(intervals, _ridges(view), verdicts, [claim.holds_in(population) for claim in world.claims]))
    return out


def _ridges(view: RecordView) -> tuple[float, ...]:
    """Return the ridges of the law's maps; empty where the law was not measured."""
    scopes = view.record.scopes.values() if view.record.law else ()
    details = (
        estimate.detail for scope in scopes for estimate in scope.metrics["sink_free"].values() if estimate.detail
    )
    return next((tuple(detail["ridge"]) for detail in details if "ridge" in detail), ())


def measured(stream: Any, world: World, causes: Causes | None = None) -> RecordView:
    """Return the record view of a stream, and of causes, measured as the pipeline measures a model's.

    There is no model, so its certificate certifies nothing, and nothing is written to disk.
    """
    from delta_suite.capture.sinks import SINK_RATIO
    from delta_suite.reduction.law_fit import measure_law

    spectra, writes, sinks = _reduced(stream, world)
    law = measure_law(stream, world.scopes, units=world.units, sinks=sinks[-1]) if world.needs_law else None
    entry = assemble(
        spectra,
        dict(world.scopes) if law else {},  # claims compute the figures that they need from the view
        model=ModelRecord(
            name="planted",
            source="planted",
            fingerprint="",
            architecture="planted",
            layers=stream.layers,
            hidden=stream.hidden,
        ),
        calibration=CalibrationRecord(
            name="planted",
            sha256="",
            documents=DOCUMENTS,
            tokens=len(stream.kept),
            dropped=0,
            domains=world.units.count if world.in_domain else None,
        ),
        sinks=SinkRecord(
            position_zero=sum(shard.first for shard in sinks),
            large_norm=sum(shard.large for shard in sinks),
            ratio=SINK_RATIO,
            largest=(),
        ),
        certificate=CertificateRecord(holds=True, blocks=stream.layers, forward_passes=0, final_norm=(), identities={}),
        provenance=Provenance(
            created="",
            suite=__version__,
            dtype="float32",
            attention="",
            device="cpu",
            hardware="",
            versions={},
            settings={},
            metric_versions=metric_versions(),
            seconds={},
            peak_memory_bytes={},
            cache_key="",
        ),
        units=world.units,
    )
    if writes:
        entry = with_writes(entry, writes, IdentityRecord(says="planted", error=0.0, tolerance=0.0))
    if law is not None:
        entry = with_law(entry, law)
    if causes is not None:
        entry = with_causes(entry, causes)
    entry = entry.plus({}, phases=dict(world.scopes))
    in_memory = Path("planted")
    return RecordView(
        entry.record,
        ArrayFile(in_memory, content=entry.arrays),
        ArrayFile(in_memory, content=entry.directions),
    )


def _reduced(stream: Any, world: World) -> tuple[Spectra, Spectra, list[Any]]:
    """Return the spectra of whole blocks, those of sublayers where the stream has them, and the sinks."""
    import torch

    from delta_suite.capture.sinks import find_sinks
    from delta_suite.reduction.reduce import reduce_stream

    sinks: list[Any] = []

    def recorded(stream: Any) -> Any:
        sinks.append(find_sinks(stream))
        return sinks[-1]

    def of_write(write: Write) -> Spectra:
        return reduce_stream(
            [stream.of_write(write)],
            layers=stream.layers,
            tokens=len(stream.kept),
            units=world.units,
            variants=[VARIANTS[name] for name in world.variants if VARIANTS[name].write == write],
            sinks=recorded if write == "block" else lambda _: sinks[-1],
        )

    with torch.no_grad():
        blocks = of_write("block")
        writes: Spectra = {}
        for write in SUBLAYERS if stream.middles else ():
            writes |= of_write(write)
    return blocks, writes, sinks


def _hypothesis(expectation: Expectation) -> Hypothesis:
    """Return a hypothesis that holds one expectation, as the judge takes it."""
    header = {"schema": 1, "id": "planted", "title": "planted", "version": 1, "rationale": "planted"}
    return Hypothesis.model_validate(header | {"expect": [expectation], "path": Path("planted"), "sha256": ""})


# --- all repeats -----------------------------------------------------------------------------------------------


def selftest(
    repeats: int,
    *,
    processes: int = 1,
    only: str | None = None,
    progress: Progress = no_progress,
    truth_documents: int = TRUTH_DOCUMENTS,
    origin: Mapping[str, str] | None = None,
    ended: Callable[[Proof], object] = lambda proof: None,
) -> Proof:
    """Run every planted population, or the one named `only`, this number of times, or a share of it (`World.repeats`).

    `truth_documents` are drawn for true values without a closed form; `origin` is kept in the result. `ended` is called
    after each population with the result so far. Raises SelftestError for an unknown population, and unless `repeats`
    and `processes` are 1 or more.
    """
    if only is not None and only not in WORLDS:
        near = nearest(only, WORLDS)
        raise SelftestError(
            f"nothing planted is called '{only}': "
            + (f"did you mean '{near}'?" if near else f"use one of {', '.join(WORLDS)}")
        )
    if repeats < 1 or processes < 1:
        raise SelftestError(f"--repeats {repeats} --processes {processes}: both must be 1 or more")
    started = time.perf_counter()
    names = [only] if only else list(WORLDS)
    tasks = {name: _tasks(name, repeats, truth_documents) for name in names}
    coverage: list[Coverage] = []
    rates: list[Rate] = []
    total = sum(len(task.repeats) for name in names for task in tasks[name])
    with progress("selftest", total, "repeat") as bar, _mapper(processes) as run:
        results = iter(run([task for name in names for task in tasks[name]]))
        for number, name in enumerate(names, start=1):
            truth, rows = None, []
            for task in tasks[name]:
                result = next(results)
                if task.truth_documents:
                    truth = result
                else:
                    rows += result
                    bar.update(len(result))
            coverage += _coverage(name, rows, truth)
            rates += _rates(name, rows)
            proof = Proof(
                repeats,
                tuple(coverage),
                tuple(rates),
                names[:number],
                time.perf_counter() - started,
                processes,
                origin or {},
                unfinished=names[number:],
            )
            ended(proof)
    return proof


def _tasks(name: str, repeats: int, truth_documents: int) -> list[Task]:
    """Return the tasks of a population: its true values, where there are any, and then its repeats."""
    repeats = WORLDS[name].repeats(repeats)
    truth = [Task(name, range(0), truth_documents)] if WORLDS[name].covered else []
    return truth + [Task(name, range(first, min(first + AT_ONCE, repeats))) for first in range(0, repeats, AT_ONCE)]


@contextmanager
def _mapper(processes: int) -> Iterator[Any]:
    """Yield a function that runs tasks and yields their results: here, or in new processes with one thread each."""
    if processes == 1:
        yield lambda tasks: map(_run, tasks)
        return
    # The libraries are loaded before any code of the suite runs in the process.
    with (
        environment(dict.fromkeys(THREADS, "1")),
        ProcessPoolExecutor(processes, get_context("spawn"), end_with_the_parent) as pool,
    ):
        yield lambda tasks: pool.map(_run, tasks)


def _coverage(name: str, repeats: Sequence[Repeat], true_values: ValueOf | None) -> Iterator[Coverage]:
    """Yield the coverage of every figure of a planted population that is compared with its true value."""
    world = WORLDS[name]
    if true_values is None:
        return
    population, truth = world.plant(_generator(name, _PLANTED)), cache(true_values)
    assert world.covered is not None
    for scope, metrics in world.covered.items():
        for metric in metrics:
            intervals = [(repeat.intervals[scope, metric], repeat.ridges) for repeat in repeats]
            note = world.shown.get((scope, metric), world.degenerate)
            if gated(metric, population):
                note = note or "too few tokens per dimension, so the gate n/d makes claims inconclusive"
            yield coverage_of(
                [interval for interval, _ in intervals if interval is not None],
                [truth(metric, world.layers(scope), ridges) for interval, ridges in intervals if interval is not None],
                world=name,
                metric=metric,
                scope=scope,
                without=sum(interval is None for interval, _ in intervals),
                bounded=not note,
                note=note,
            )


def coverage_of(intervals: Sequence[Interval], truths: Sequence[float], **row: Any) -> Coverage:
    """Count the intervals that hold their true values, up to rounding, and those that lie below and above."""
    below = above = 0
    for (low, high), truth in zip(intervals, truths, strict=True):
        slack = 1e-9 * abs(truth)
        below += high < truth - slack
        above += low > truth + slack
    truth = float(np.mean(truths)) if truths else math.nan
    return Coverage(truth=truth, covered=len(intervals) - below - above, below=below, above=above, **row)


def _rates(name: str, repeats: Sequence[Repeat]) -> Iterator[Rate]:
    """Yield the rate of every claim on a planted population; where only some draws make it true, the rate of each."""
    for number, claim in enumerate(WORLDS[name].claims):
        verdicts = [(repeat.verdicts[number], repeat.true[number]) for repeat in repeats]
        for true in (True, False):
            counts = {verdict: verdicts.count((verdict, true)) for verdict in Verdict}
            if not sum(counts.values()):
                continue
            if claim.true_of is None:
                yield Rate(name, claim, counts)
            else:
                yield Rate(name, replace(claim, kind="power" if true else "false positives"), counts, true)


def origin(command: str) -> dict[str, str]:
    """Return how a table was produced: command, date, versions, seed and hardware."""
    versions = [f"{name} {library_version(name)}" for name in ("numpy", "torch", "pydantic")]
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": ", ".join([f"delta-suite {__version__}", f"python {platform.python_version()}", *versions]),
        "seed": str(SEED),
        "hardware": hardware_in_words(),
    }
