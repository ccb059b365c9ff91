"""The 32B shape under as many documents as `core` has, after loading: every clock, and the peak memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.units import Units
from delta_suite.models.phases import phase_map
from delta_suite.provenance import Clock
from delta_suite.reduction.passes import Captured, Passes

from tests.benchmarks.measuring import Peak, Spent
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE, LARGE, Subject, build

CUDA = DEVICE.type == "cuda"
TOKENS_OF_DOCUMENT = 155 if CUDA else 24
"""`core` has 155.4 in the mean under SmolLM2's tokenizer."""

pytestmark = pytest.mark.benchmark(group="1. A 32B shape under core")


@pytest.mark.parametrize("writes", [False, True], ids=["default-parts", "writes"])
def test_after_loading(benchmark: Any, record: Callable[..., Record], writes: bool) -> None:
    subject = build(LARGE)
    weights = sum(tensor.nbytes for tensor in subject.model.parameters())
    run = _Run(subject, writes=writes)
    benchmark.pedantic(run.measure, rounds=1)
    report = record(f"{subject.name}, {run.tokens:,} tokens of {run.units.count} domains", subject.rehearsal)
    each = run.seconds["analysis"] / subject.layers
    bound = (
        f"the analysis, {each:.2f} s a layer: three variants with a Gram matrix for each of "
        f"{run.units.group_count} groups, and one eigenproblem of the hidden size each (about 0.22 s on an H100)."
    )
    what, target = ("with writes", "<= 140") if writes else ("default parts", "<= 75")
    report.spent(f"after loading, {what}", run.spent, run.peak.bytes, target=target if CUDA else "", bound=bound)
    for name in ("capture", "analysis", "law", *(("writes",) if writes else ())):
        report.add(f"of it {name}", run.seconds[name], "s")
    report.add("in no clock", run.spent.wall - sum(run.seconds.values()), "s")
    report.add("weights", weights, "B")
    report.add("weights and peak", weights + run.peak.bytes, "B", target="<= 80e9" if CUDA else "")
    report.add("peak host memory", run.peak.host, "B")
    report.note(f"The law: {run.law}. The stream lies in {run.storage}.")


class _Run:
    """One measurement of the parts spectra and law, as `delta_suite.pipeline` runs it; boundaries take no model."""

    def __init__(self, subject: Subject, *, writes: bool = False) -> None:
        """Take a subject, whose weights are gone afterwards."""
        self.subject, self.writes = subject, writes
        self.units: Units = load_calibration("core").units
        documents = len(self.units.groups)
        self.tokens = documents * TOKENS_OF_DOCUMENT
        self.sequences = subject.sequences(self.tokens, TOKENS_OF_DOCUMENT, documents=True, drop=True)
        self.clock = Clock()
        self.captured: Captured

    def measure(self) -> None:
        with Peak(self.subject.device) as self.peak:
            self.spent = Spent.on(self._run, self.subject.device)

    def _run(self) -> None:
        subject = self.subject
        passes = Passes(
            subject.model, subject.decoder, self.sequences, [subject.device], self.clock, writes=self.writes
        )
        self.captured = passes.run(phase_map(subject.layers), units=self.units, release=subject.free)

    @property
    def seconds(self) -> Mapping[str, float]:
        return self.clock.seconds

    @property
    def law(self) -> str:
        """What became of it, in words."""
        law = self.captured.law
        return f"not measured ({law})" if isinstance(law, Exception) or law is None else law.reason or "measured"

    @property
    def storage(self) -> str:
        return ", ".join(f"{place} ({size / 1e9:.1f} GB)" for place, size in self.captured.storage)
