"""The core against what a user would pick instead: all in one process, in turns, on the same weights and tokens."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from delta_suite.metrics.layer import spectral_entropy_rank

from tests.benchmarks.measuring import Peak, Spent
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE, EMBEDDED, GPT2, GPT2_XL, LARGE, SMALL, Subject
from tests.benchmarks.ways import EVERY_VARIANT, bare_forward, core, other_ways

CUDA = DEVICE.type == "cuda"
LENGTH = 64
"""Tokens of a document."""

TARGETS = (
    {"raw without intervals": 0.2}
    if CUDA
    else {
        "raw without intervals": 0.6,
        "raw with intervals": 1.0,
        "all variants with intervals": 2.0,
    }
)
"""Of the time of the fastest of the other ways."""


@pytest.mark.benchmark(group="2. What a user would pick instead")
@pytest.mark.parametrize(
    ("subject", "tokens", "rounds"),
    [
        pytest.param(LARGE, 2048, 1, marks=pytest.mark.skipif(not CUDA, reason="needs a GPU"), id="large"),
        pytest.param(GPT2, 1024, 5, id="gpt2"),
        pytest.param(GPT2_XL, 1024 if CUDA else 512, 3 if CUDA else 1, id="gpt2-xl"),
        pytest.param(SMALL, 1024, 3, id="small"),
        pytest.param(EMBEDDED, 1024, 3, id="embedded"),
    ],
    indirect=["subject"],
)
def test_ways(
    benchmark: Any, subject: Subject, tokens: int, rounds: int, tmp_path: Path, record: Callable[..., Record]
) -> None:
    joined, documents = (subject.sequences(tokens, LENGTH, documents=each) for each in (False, True))
    large = subject.layers == 64
    others, missing = other_ways(subject, joined, tmp_path, large=large)
    own: dict[str, Callable[[], Any]] = {"raw without intervals": partial(core, subject, joined)}
    if not large:
        own["raw with intervals"] = partial(core, subject, documents)
        own["all variants with intervals"] = partial(core, subject, documents, variants=EVERY_VARIANT)
    ways = {"bare forward pass": partial(bare_forward, subject, joined), **others, **own}
    rounds = int(os.environ.get("DELTA_BENCH_ROUNDS", rounds))
    tokens = int(os.environ.get("DELTA_BENCH_WAYS_TOKENS", tokens))
    results, peaks, spent = {}, {}, {name: list[Spent]() for name in ways}
    for name, way in ways.items():  # what is allocated or imported once, is
        with Peak(subject.device) as peak:
            results[name] = way()
        peaks[name] = peak.bytes

    def in_turns() -> None:
        for name, way in ways.items():
            spent[name].append(Spent.on(way, subject.device))

    benchmark.pedantic(in_turns, rounds=rounds)
    medians = {name: Spent.median(every) for name, every in spent.items()}
    report = record(f"{subject.name}, {tokens:,} tokens in {tokens // LENGTH} documents, {DEVICE.type}")
    for name, median in medians.items():
        report.spent(f"delta-suite, {name}" if name in own else name, median, peaks[name])
    fastest = min(others, key=lambda name: medians[name].wall)
    share = medians["bare forward pass"].wall / medians[fastest].wall
    bound = f"the bare forward pass alone is {share:.2f} of it; certificate, eigenproblems and metrics are the rest."
    for name in own:
        target = f"<= {TARGETS[name]}" if name in TARGETS else ""
        over = medians[name].wall / medians[fastest].wall
        report.add(f"delta-suite, {name}, over {fastest}", over, "x", target=target, bound=bound)
    for name, why in missing.items():
        report.note(f"{name}: not run ({why}).")
    report.note(
        "Each way runs once before, when its peak memory is taken, and then all run in turns: medians of "
        f"{rounds} round{'s'[: rounds > 1]}. The others give singular values and leading directions of each layer of "
        "the same updates, which have no language-model head where that can be left out; their effective ranks are "
        "asserted to be the core's. *Without intervals*: the same tokens as one document. The core also forms the "
        "certificate and every metric."
    )
    ranks = [spectral_entropy_rank(layer.eigenvalues) for layer in results["raw without intervals"]]
    for name in others:
        assert results[name][:-1] == pytest.approx(ranks[:-1], rel=1e-2), name  # the last state may be normed there
