"""From 512 to 131,072 tokens, and 1,000,000: time, memory, and cost per token."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from delta_suite.capture.stream import Memory
from delta_suite.reduction.eigen import Eigen, Eigensolver

from tests.benchmarks.measuring import Peak, Rates, seconds, timed
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE, LARGE, SMALL, TINY, Subject
from tests.benchmarks.ways import EVERY_VARIANT, RAW, bare_forward, core, reduced

CUDA = DEVICE.type == "cuda"
SIZES = [int(n) for n in os.environ.get("DELTA_BENCH_SIZES", "").split(",") if n] or [512 << i for i in range(9)]
LENGTH = 2048 if CUDA else 512
"""Tokens of a sequence."""

SHARD_BYTES = int(float(os.environ.get("DELTA_BENCH_SHARD_GB", "20")) * 1e9) if CUDA else 8192 * 5 * 64 * 2
"""Of the sweep, given rather than found from free memory: 30,048 tokens of the large model, 8,192 of the rehearsal."""

MOMENTS_AT = 65536 if CUDA else 16384
"""Tokens at which capture with moments is held against the bare forward pass."""


@dataclass(frozen=True)
class Run:
    """One size: seconds, seconds at the least, and bytes beyond the weights."""

    whole: float
    floor: float
    further: float | None
    """Seconds for each token beyond half of them, of several shards above the hidden size."""
    device: int
    host: int


_runs: dict[int, Run] = {}


@pytest.mark.benchmark(group="7. From 512 to 131,072 tokens")
@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("subject", [LARGE], indirect=True)
def test_size(benchmark: Any, subject: Subject, tokens: int, rates: Rates, record: Callable[..., Record]) -> None:
    sequences = subject.sequences(tokens, LENGTH)
    length = min(tokens, LENGTH)
    memory = Memory(device=SHARD_BYTES)
    # The large sizes take long enough for one round to tell; those before have warmed the device up.
    rounds, warmup = (3, 1) if tokens <= 2048 else (1, 0)
    with Peak(subject.device) as peak:
        _, whole, _ = timed(
            benchmark, lambda: core(subject, sequences, memory), subject.device, rounds=rounds, warmup=warmup
        )
    bare = seconds(lambda: bare_forward(subject, sequences), subject.device, rounds)
    shards = -(-tokens * subject.stream_bytes // SHARD_BYTES)
    floor = rates.forward(subject, tokens, length) + rates.grams(subject, tokens) + rates.eigenproblems(subject, tokens)
    further = None
    report = record(f"{subject.name}, {tokens:,} tokens")
    report.add("everything after loading", whole, "s", floor=floor)
    report.add("per token", whole / tokens, "s")
    half = _runs.get(tokens // 2)
    if half is not None and shards > 1 and tokens // 2 > subject.hidden:  # the eigenproblems are the same
        further = (whole - half.whole) / (tokens / 2)
        report.add("per further token", further, "s", floor=(floor - half.floor) / (tokens / 2))
        report.add("per further token, over the bare forward pass", further / (bare / tokens), "x")
    _runs[tokens] = own = Run(whole, floor, further, peak.device, peak.host)
    if CUDA:
        report.add(f"peak device memory ({shards} shard{'s'[: shards > 1]})", own.device, "B")
    report.add("peak host memory", own.host, "B")
    report.note(
        f"Sequences of {LENGTH:,} tokens, all of one document, and variant raw, so one eigenproblem per layer; "
        "document halves would add two, the other variants as much again each. The stream comes in shards of "
        f"{SHARD_BYTES / 1e9:.3g} GB. Above the hidden size each layer has one eigenproblem of that size, however many "
        "tokens there are, so *per further token*, the difference to half as many tokens, is forward pass, capture, "
        "certificate, token figures and moments. The bare forward pass has no hooks and no language-model head."
    )


@pytest.mark.benchmark(group="7. From 512 to 131,072 tokens")
@pytest.mark.parametrize("subject", [LARGE], indirect=True)
def test_flat_beyond_a_shard(benchmark: Any, subject: Subject, record: Callable[..., Record]) -> None:
    """Memory, and what each further token costs, between sizes of several shards; timed above."""
    several = [(tokens, run.further, run) for tokens, run in sorted(_runs.items()) if run.further is not None]
    if len(several) < 2:
        pytest.skip("needs two sizes of several shards each; they run in the same session")
    benchmark.pedantic(lambda: None, rounds=1)
    (first, first_further, a), (last, last_further, b) = several[0], several[-1]
    report = record(f"{subject.name}, {last:,} over {first:,} tokens")
    report.add("per further token", last_further / first_further, "x", target="<= 1.1" if CUDA else "")
    if CUDA:
        report.add("peak device memory", b.device / a.device, "x", target="<= 1.05")
    report.add("peak host memory, difference", b.host - a.host, "B")


@pytest.mark.benchmark(group="7. From 512 to 131,072 tokens")
@pytest.mark.parametrize("variants", [RAW, EVERY_VARIANT], ids=["raw", "all"])
@pytest.mark.parametrize("subject", [LARGE], indirect=True)
def test_moments_against_the_bare_forward_pass(
    benchmark: Any,
    subject: Subject,
    variants: tuple[str, ...],
    rates: Rates,
    monkeypatch: pytest.MonkeyPatch,
    record: Callable[..., Record],
) -> None:
    sequences = subject.sequences(MOMENTS_AT, LENGTH)
    everything_at_once = Memory(device=subject.stream_bytes * MOMENTS_AT)

    def no_eigenproblem(solver: Eigensolver, matrices: Iterable[torch.Tensor], sizes: Sequence[int]) -> list[Eigen]:
        return [(matrix.diagonal(), matrix) for matrix in matrices]

    monkeypatch.setattr(Eigensolver, "__call__", no_eigenproblem)
    with Peak(subject.device) as peak:
        _, own, bare = timed(
            benchmark,
            lambda: reduced(subject, sequences, everything_at_once, variants),
            subject.device,
            rounds=1 if CUDA else 3,
            warmup=0 if CUDA else 1,
            beside=lambda: bare_forward(subject, sequences),
        )
    report = record(f"{subject.name}, {MOMENTS_AT:,} tokens, one shard, variants: {', '.join(variants)}")
    forward, grams = rates.forward(subject, MOMENTS_AT, LENGTH), rates.grams(subject, MOMENTS_AT)
    report.add("bare forward pass", bare, "s", floor=forward)
    # Raw, sink-free and centred updates share their Gram matrices; normalised ones need their own.
    report.add("capture and moments", own, "s", floor=forward + (1 if variants == RAW else 2) * grams)
    report.add("over the bare forward pass", own / bare, "x", target="<= 1.4" if subject.layers == 64 else "")
    if CUDA:
        report.add("peak device memory", peak.device, "B")


MILLION = int(os.environ.get("DELTA_BENCH_MILLION", "1000000"))


@pytest.mark.benchmark(group="8. A million tokens in shards")
@pytest.mark.parametrize("subject", [SMALL if CUDA else TINY], indirect=True)
def test_million(benchmark: Any, subject: Subject, rates: Rates, record: Callable[..., Record]) -> None:
    shard = 2_000_000_000 if CUDA else 50_000_000
    memory = Memory(device=shard)
    per_shard = shard // subject.stream_bytes // LENGTH * LENGTH
    one = subject.sequences(min(per_shard, MILLION // 2), LENGTH, documents=True)
    everything = subject.sequences(MILLION, LENGTH, documents=True)
    core(subject, one, memory, EVERY_VARIANT)  # what is allocated once, is
    with Peak(subject.device) as alone:
        core(subject, one, memory, EVERY_VARIANT)
    with Peak(subject.device) as peak:
        _, whole, _ = timed(
            benchmark, lambda: core(subject, everything, memory, EVERY_VARIANT), subject.device, rounds=1, warmup=0
        )
    shards = -(-MILLION * subject.stream_bytes // shard)
    report = record(f"{subject.name}, {MILLION:,} tokens in {shards} shards")
    floor = rates.forward(subject, MILLION, LENGTH) + 2 * rates.grams(subject, MILLION)
    floor += 3 * len(EVERY_VARIANT) * rates.eigenproblems(subject, MILLION)
    report.add("everything after loading, all variants", whole, "s", floor=floor)
    report.add("per token", whole / MILLION, "s")
    report.add("stream of all tokens", subject.stream_bytes * MILLION, "B")
    own, single = (peak.device, alone.device) if CUDA else (peak.host, alone.host)
    report.add("peak memory of one shard", single, "B")
    report.add("peak memory of all", own, "B")
    report.add("all over one shard", own / max(1, single), "x", target="<= 1.1" if CUDA else "")
    report.note(
        "*One shard* is a run over as many tokens as one shard holds. Each sequence is a document, so each layer has "
        "an eigenproblem for the whole and for both halves, in every variant."
    )


@pytest.mark.benchmark(group="7. From 512 to 131,072 tokens")
@pytest.mark.parametrize("subject", [LARGE], indirect=True)
def test_intervals(benchmark: Any, subject: Subject, record: Callable[..., Record]) -> None:
    """2,048 tokens as 64 documents: halves, replicates and every interval, beside the same tokens as one document."""
    tokens = 2048 if not subject.rehearsal else 512
    documents = subject.sequences(tokens, tokens // 64, documents=True)
    joined = subject.sequences(tokens, tokens // 64)
    rounds = 3 if CUDA else 1
    whole = seconds(lambda: core(subject, documents), subject.device, rounds)
    benchmark.pedantic(lambda: core(subject, documents), rounds=1)
    alone = seconds(lambda: core(subject, joined), subject.device, rounds)
    report = record(f"{subject.name}, {tokens:,} tokens in 64 documents", subject.rehearsal)
    report.add("everything after loading, variant raw, with intervals", whole, "s", target="<= 10" if CUDA else "")
    report.add("the same tokens as one document, without", alone, "s")
    report.add("intervals over it", whole / alone, "x")
