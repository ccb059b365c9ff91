"""Draw, measure and judge planted populations many times, count, and hold the counts against the bounds.

A repeat is one draw of documents: through the reduction, the metrics, the intervals and the judge that a model's
residual stream goes through. Repeats are independent and seeded one by one, so neither the number of processes nor the
order changes a figure.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from delta_suite.claims.judge import judge
from delta_suite.claims.observe import observe
from delta_suite.claims.schema import Expectation, Hypothesis, nearest
from delta_suite.claims.verdict import Verdict
from delta_suite.errors import SuiteError
from delta_suite.metrics.intervals import CONFIDENCE
from delta_suite.pipeline import metric_versions
from delta_suite.progress import Progress, no_progress
from delta_suite.provenance import hardware, library_version
from delta_suite.records.arrays import ArrayFile
from delta_suite.records.assemble import assemble, with_law
from delta_suite.records.record import CalibrationRecord, CertificateRecord, ModelRecord, Provenance, SinkRecord
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import VARIANTS
from delta_suite.selftest.documents import DOCUMENTS
from delta_suite.selftest.law_worlds import LAW_TOKENS
from delta_suite.selftest.planted import TOKENS, WORLDS, Claim, World, gated
from delta_suite.version import __version__

COVERAGE = (0.92, 0.98)
"""What a 95% interval may cover."""

FALSE_POSITIVES = 0.07
"""What a rate of false positives may be."""

SEED = 20261124
"""Of every draw here, so that the table can be made again."""

AT_ONCE = 4
"""Repeats that one task of a process makes."""

TRUTH_DOCUMENTS = 20_000
"""Drawn for averages over tokens: 250 times a repeat's, so that their error is a sixteenth of a repeat's."""

Outcomes = dict[str, Any]
"""Of one repeat: (scope, metric) -> interval, or None; ridges of the law's maps; number of the claim -> verdict."""


class SelftestError(SuiteError):
    """No such planted population, or no repeats to make."""


# --- one repeat ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    world: str
    repeats: range


def _generator(world: str, *key: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(SEED, spawn_key=(list(WORLDS).index(world), *key)))


_PLANTED, _REPEAT, _TRUTH = 0, 1, 2


def _run(task: _Task) -> list[Outcomes]:
    world = WORLDS[task.world]
    out = []
    for repeat in task.repeats:
        population = world.plant(_generator(task.world, _PLANTED, *([repeat] if world.anew else [])))
        view = measured(population.stream(_generator(task.world, _REPEAT, repeat)), world)
        intervals = {
            (scope, metric): observe(view, metric, scope, world.variants[0]).interval
            for scope, metrics in (world.covered or {}).items()
            for metric in metrics
        }
        verdicts = [judge(_hypothesis(claim.expectation), claim.expectation, view).verdict for claim in world.claims]
        out.append({"intervals": intervals, "ridges": _ridges(view), "verdicts": verdicts})
    return out


def _ridges(view: RecordView) -> tuple[float, ...]:
    """Return the ridges of the law's maps, where it was measured."""
    scopes = view.record.scopes.values() if view.record.law else ()
    details = (
        estimate.detail for scope in scopes for estimate in scope.metrics["sink_free"].values() if estimate.detail
    )
    return next((tuple(detail["ridge"]) for detail in details if "ridge" in detail), ())


def measured(stream: Any, world: World) -> RecordView:
    """Return what the pipeline makes of a stream, without a model: its certificate has nothing to certify."""
    import torch

    from delta_suite.capture.sinks import SINK_RATIO
    from delta_suite.reduction.law_fit import measure_law
    from delta_suite.reduction.reduce import reduce_stream

    sinks: list[Any] = []
    with torch.no_grad():
        spectra = reduce_stream(
            [stream],
            layers=stream.layers,
            tokens=len(stream.kept),
            documents=DOCUMENTS,
            variants=[VARIANTS[name] for name in world.variants],
            on_sinks=sinks.append,
        )
        law = measure_law(stream, world.scopes, sinks=sinks[-1]) if world.of_law else None
    entry = assemble(
        spectra,
        dict(world.scopes) if law else {},  # the claims form the figures that they need
        model=ModelRecord(
            name="planted",
            source="planted",
            fingerprint="",
            architecture="planted",
            layers=stream.layers,
            hidden=stream.hidden,
        ),
        calibration=CalibrationRecord(
            name="planted", sha256="", documents=DOCUMENTS, tokens=len(stream.kept), dropped=0
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
    )
    record, arrays = with_law(entry.record, law) if law else (entry.record, {})
    record = record.model_copy(update={"phases": dict(world.scopes)})
    in_memory = Path("planted")
    return RecordView(
        record,
        ArrayFile(in_memory, content={**entry.arrays, **arrays}),
        ArrayFile(in_memory, content=entry.directions),
    )


def _hypothesis(expectation: Expectation) -> Hypothesis:
    said = {"schema": 1, "id": "planted", "title": "planted", "version": 1, "rationale": "planted"}
    return Hypothesis.model_validate(said | {"expect": [expectation], "path": Path("planted"), "sha256": ""})


# --- the table -------------------------------------------------------------------------------------------------


def wilson(hits: int, of: int) -> tuple[float, float]:
    """The 95% range of a rate that was seen `hits` times in `of` (Wilson 1927)."""
    z = 1.959964
    rate, spread = hits / of, z**2 / of
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / of + spread / of / 4) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


@dataclass(frozen=True)
class Coverage:
    """How often the interval of one figure held its true value."""

    world: str
    metric: str
    scope: str
    truth: float
    covered: int
    below: int
    """Intervals that lie wholly below the truth: errors of a claim `<=` whose threshold is the truth."""
    above: int
    without: int = 0
    """Repeats in which the figure had no interval."""
    bounded: bool = True
    note: str = ""

    @property
    def repeats(self) -> int:
        """That had an interval."""
        return self.covered + self.below + self.above

    @property
    def name(self) -> str:
        return f"{self.metric} over {self.scope}"

    @property
    def violation(self) -> str | None:
        if not self.bounded:
            return None
        if self.repeats == 0:
            return f"{self.world}: {self.name} never had an interval"
        low, high = wilson(self.covered, self.repeats)
        if high >= COVERAGE[0] and low <= COVERAGE[1]:
            return None
        return (
            f"{self.world}: the {CONFIDENCE:.0%} interval of {self.name} holds the truth in "
            f"{self.covered / self.repeats:.3f} of {self.repeats} repeats (binomial range {low:.3f} to {high:.3f}), "
            f"outside {COVERAGE[0]} to {COVERAGE[1]}"
        )


@dataclass(frozen=True)
class Rate:
    """How often one claim was supported, rightly (power) or wrongly (false positives)."""

    world: str
    claim: Claim
    verdicts: Mapping[Verdict, int]

    @property
    def repeats(self) -> int:
        return sum(self.verdicts.values())

    @property
    def supported(self) -> int:
        return self.verdicts.get(Verdict.SUPPORTED, 0)

    @property
    def violation(self) -> str | None:
        if self.claim.kind == "power" or not self.claim.bounded:
            return None
        low, _ = wilson(self.supported, self.repeats)
        if low <= FALSE_POSITIVES:
            return None
        return (
            f"{self.world}: {self.claim.expectation.claim()} is supported in {self.supported / self.repeats:.3f} of "
            f"{self.repeats} repeats, and more than {FALSE_POSITIVES} are false positives"
        )


@dataclass(frozen=True)
class Proof:
    """Everything that was counted, and how."""

    repeats: int
    coverage: Sequence[Coverage]
    rates: Sequence[Rate]
    worlds: Sequence[str]
    seconds: float
    processes: int
    made: Mapping[str, str] = field(default_factory=dict)
    """Command, date, versions, hardware."""

    @cached_property
    def violations(self) -> list[str]:
        """One line for each bound that does not hold."""
        rows: Iterable[Coverage | Rate] = [*self.coverage, *self.rates]
        return [line for row in rows if (line := row.violation) is not None]

    def tables(self, style: str = "simple") -> dict[str, str]:
        """By heading, in a style of tabulate."""
        from tabulate import tabulate

        def table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
            return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True)

        out = {}
        if self.coverage:
            out[f"Coverage of {CONFIDENCE:.0%} intervals"] = table(
                ["planted", "figure", "true value", "coverage", "binomial 95%", "below", "above", "none", "bound"],
                [_coverage_row(row) for row in self.coverage],
            )
        for kind in ("false positives", "power"):
            chosen = [row for row in self.rates if row.claim.kind == kind]
            if chosen:
                headers = ["planted", "claim", "supported", "binomial 95%", "refuted", "inconclusive", "bound"]
                out[kind.capitalize()] = table(headers, [_rate_row(row) for row in chosen])
        return out

    def markdown(self) -> str:
        """The page that is kept in the repository."""
        lines = [
            "# The suite proves itself",
            "",
            f"Made by `{self.made['command']}` on {self.made['date']}, in {self.seconds:.0f} seconds.",
            "",
            *(f"- {name}: {value}" for name, value in self.made.items() if name not in ("command", "date")),
            "",
            f"{self.repeats} repeats. Each draws {DOCUMENTS} documents of {TOKENS} tokens, {LAW_TOKENS} where the law "
            "is planted, from every population, reduces them, takes every interval and judges every claim, by the code "
            "that a model's residual stream goes through. True values of the law are those of maps with the ridge that "
            "was chosen; where it differs between repeats, the table has the mean.",
            "",
            *(f"- {name}: {WORLDS[name].says}" for name in self.worlds),
            "",
            RULE,
            "",
        ]
        for heading, table in self.tables("github").items():
            lines += [f"## {heading}", "", table, ""]
        notes = dict.fromkeys(row.note for row in self.coverage if row.note)
        notes |= dict.fromkeys(row.claim.note for row in self.rates if row.claim.note)
        lines += [f"- shown, not bounded: {note}" for note in notes]
        lines += ["", "## Bounds that do not hold" if self.violations else "Every bound holds.", ""]
        lines += [f"- {line}" for line in self.violations]
        return "\n".join(lines).rstrip() + "\n"


RULE = (
    f"A bound is violated where the binomial 95% range (Wilson) of a coverage does not meet [{COVERAGE[0]}, "
    f"{COVERAGE[1]}], or that of a rate of false positives lies above {FALSE_POSITIVES}. `below` and `above` are "
    f"intervals wholly below and above the truth, the errors of a claim whose threshold is the truth; `none` are "
    f"repeats in which the figure had no interval, which coverage leaves out. A claim that is not measured counts as "
    f"inconclusive."
)


def _share(count: int, of: int) -> str:
    return f"{count / of:.3f}" if of else "-"


def _range(count: int, of: int) -> str:
    return "{:.3f} - {:.3f}".format(*wilson(count, of)) if of else "-"


def _bound(row: Coverage | Rate, bounded: bool) -> str:
    return "shown" if not bounded else "VIOLATED" if row.violation else "holds"


def _coverage_row(row: Coverage) -> list[str]:
    return [
        row.world,
        row.name,
        f"{row.truth:.4g}",
        _share(row.covered, row.repeats),
        _range(row.covered, row.repeats),
        _share(row.below, row.repeats),
        _share(row.above, row.repeats),
        str(row.without) if row.without else "",
        _bound(row, row.bounded),
    ]


def _rate_row(row: Rate) -> list[str]:
    refuted = row.verdicts.get(Verdict.REFUTED, 0)
    return [
        row.world,
        row.claim.expectation.claim(),
        _share(row.supported, row.repeats),
        _range(row.supported, row.repeats),
        _share(refuted, row.repeats),
        _share(row.repeats - row.supported - refuted, row.repeats),
        _bound(row, row.claim.bounded and row.claim.kind != "power"),
    ]


# --- all repeats -----------------------------------------------------------------------------------------------


def selftest(
    repeats: int,
    *,
    processes: int = 1,
    only: str | None = None,
    progress: Progress = no_progress,
    truth_documents: int = TRUTH_DOCUMENTS,
    origin: Mapping[str, str] | None = None,
) -> Proof:
    """Run every planted population, or one, so many times. Raises SelftestError."""
    if only is not None and only not in WORLDS:
        near = nearest(only, WORLDS)
        raise SelftestError(
            f"nothing planted is called '{only}': "
            + (f"did you mean '{near}'?" if near else f"use one of {', '.join(WORLDS)}")
        )
    if repeats < 1 or processes < 1:
        raise SelftestError(f"{repeats} repeats in {processes} processes: both must be 1 or more")
    started = time.perf_counter()
    names = [only] if only else list(WORLDS)
    tasks = [
        _Task(name, range(first, min(first + AT_ONCE, repeats)))
        for name in names
        for first in range(0, repeats, AT_ONCE)
    ]
    by_world: dict[str, list[Outcomes]] = {name: [] for name in names}
    with progress("selftest", repeats * len(names), "repeat") as bar, _mapper(processes) as run:
        for task, outcomes in zip(tasks, run(tasks), strict=True):
            by_world[task.world] += outcomes
            bar.update(len(outcomes))
    coverage = [row for name in names for row in _coverage(name, by_world[name], truth_documents)]
    rates = [row for name in names for row in _rates(name, by_world[name])]
    return Proof(repeats, coverage, rates, names, time.perf_counter() - started, processes, origin or {})


@contextmanager
def _mapper(processes: int) -> Iterator[Any]:
    """map over tasks: here, or in processes that are started afresh, with one thread each."""
    if processes == 1:
        yield lambda tasks: map(_run, tasks)
        return
    # Read by the numeric libraries when they are loaded, which is before any code of ours runs in the process.
    threads = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in threads}
    os.environ.update(threads)
    try:
        with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
            yield lambda tasks: pool.map(_run, tasks)
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _coverage(name: str, outcomes: Sequence[Outcomes], truth_documents: int) -> Iterator[Coverage]:
    world = WORLDS[name]
    if not world.covered:
        return
    population = world.plant(_generator(name, _PLANTED))
    truth = cache(population.truth(_generator(name, _TRUTH), truth_documents))
    for scope, metrics in world.covered.items():
        for metric in metrics:
            intervals = [(outcome["intervals"][scope, metric], outcome["ridges"]) for outcome in outcomes]
            note = world.shown.get((scope, metric), world.degenerate)
            if gated(metric, population):
                note = note or "too few tokens a dimension: the gate n/d is shut"
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


def coverage_of(intervals: Sequence[tuple[float, float]], truths: Sequence[float], **row: Any) -> Coverage:
    """Count intervals that hold the truth, up to rounding, and those that lie below and above it."""
    below = above = 0
    for (low, high), truth in zip(intervals, truths, strict=True):
        slack = 1e-9 * abs(truth)
        below += high < truth - slack
        above += low > truth + slack
    truth = float(np.mean(truths)) if truths else math.nan
    return Coverage(truth=truth, covered=len(intervals) - below - above, below=below, above=above, **row)


def _rates(name: str, outcomes: Sequence[Outcomes]) -> Iterator[Rate]:
    for number, claim in enumerate(WORLDS[name].claims):
        verdicts = [outcome["verdicts"][number] for outcome in outcomes]
        yield Rate(name, claim, {verdict: verdicts.count(verdict) for verdict in Verdict})


def origin(command: str) -> dict[str, str]:
    """Return how a table was produced, for those who keep it."""
    versions = [f"{name} {library_version(name)}" for name in ("numpy", "torch", "pydantic")]
    return {
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "versions": ", ".join([f"delta-suite {__version__}", f"python {platform.python_version()}", *versions]),
        "seed": str(SEED),
        "hardware": hardware(),
    }
