"""The core against what a user would write instead."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from delta_suite.metrics.layer import spectral_entropy_rank

from tests.benchmarks.measuring import Peak, seconds, timed
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE, GPT2, GPT2_XL, LARGE, NAMES, SMALL, Subject
from tests.benchmarks.ways import core, hidden_states_and_svd, room_beside

pytestmark = pytest.mark.benchmark(group="2. What a user would write instead")

TRANSFORMERLENS = os.environ.get("DELTA_BENCH_TRANSFORMERLENS", sys.executable)
"""The Python that has it."""


@pytest.mark.parametrize("subject", [LARGE], indirect=True)
def test_hidden_states_and_torch_svd(benchmark: Any, subject: Subject, record: Callable[..., Record]) -> None:
    sequences = subject.sequences(2048, drop=True)
    with Peak(subject.device) as peak:
        statistics, own, _ = timed(benchmark, lambda: core(subject, sequences), subject.device, rounds=2)
    hidden_states_and_svd(subject, sequences, layers=1)
    ranks: list[float] = []
    with Peak(subject.device) as other_peak:
        other = seconds(lambda: ranks.extend(hidden_states_and_svd(subject, sequences)), subject.device)
    ours = [{"seconds": own, "device": peak.device, "host": 0}]
    theirs = {"seconds": other, "device": other_peak.device, "host": 0}
    if DEVICE.type == "cuda":
        room = room_beside(subject, sequences.tokens, other_peak.device)
        with Peak(subject.device) as held_peak:
            held = seconds(lambda: core(subject, sequences, room=room), subject.device, 3)
        ours.append({"seconds": held, "device": held_peak.device, "host": 0})
    report = record(f"{subject.name}, 2,048 tokens", subject.rehearsal)
    _compare(report, ours, theirs, "output_hidden_states + torch.linalg.svd", targets=subject.layers == 64)
    mine = [spectral_entropy_rank(layer.eigenvalues) for layer in statistics]
    assert mine[:-1] == pytest.approx(ranks[:-1], rel=1e-3)  # the last state is normed there


@pytest.mark.parametrize("tokens", [512, 2048] if DEVICE.type == "cuda" else [512])
def test_hidden_states_and_torch_svd_alone(benchmark: Any, tokens: int, record: Callable[..., Record]) -> None:
    ours, theirs = benchmark.pedantic(lambda: _both("hidden_states", SMALL, tokens), rounds=1)
    report = record(f"{NAMES[SMALL]}, {tokens:,} tokens, {DEVICE.type}")
    _compare(report, ours, theirs, "output_hidden_states + torch.linalg.svd", targets=False)
    for own in ours:
        assert own["ranks"][:-1] == pytest.approx(theirs["ranks"][:-1], rel=1e-3)


@pytest.mark.parametrize(
    ("which", "everything"), [(GPT2, False), (GPT2, True), (GPT2_XL, False)], ids=["stream", "everything", "xl"]
)
def test_transformer_lens(benchmark: Any, which: str, everything: bool, record: Callable[..., Record]) -> None:
    has = subprocess.run([TRANSFORMERLENS, "-c", "import transformer_lens"], capture_output=True, check=False)
    if has.returncode:
        pytest.skip("no transformer_lens in this environment, and DELTA_BENCH_TRANSFORMERLENS names no other")
    if which == GPT2_XL and DEVICE.type == "cpu":
        pytest.skip("takes minutes without a GPU")
    way = "transformer_lens_everything" if everything else "transformer_lens"
    ours, theirs = benchmark.pedantic(lambda: _both(way, which, 1024), rounds=1)
    name = "TransformerLens run_with_cache" + (", everything cached" if everything else ", the stream alone")
    report = record(f"{NAMES[which]}, 1,024 tokens, {DEVICE.type}")
    _compare(report, ours, theirs, name, targets=DEVICE.type == "cuda")
    report.note(
        "TransformerLens runs `run_with_cache` on the same random model (its bridge forces eager attention) and "
        "`torch.linalg.svd` of each layer's updates; asked for the stream alone by `names_filter`, and as most "
        "notebooks have it, for everything. On the CPU each way runs in a process of its own."
    )
    for own in ours:
        assert own["ranks"] == pytest.approx(theirs["ranks"], rel=1e-3)


def _both(way: str, which: str, tokens: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The core, on a GPU also held to the other's peak memory; and the other."""
    theirs = _alone(way, which, tokens)
    peaks = [0, theirs["device"]] if DEVICE.type == "cuda" else [0]
    return [_alone("core", which, tokens, peak) for peak in peaks], theirs


@functools.cache
def _alone(way: str, which: str, tokens: int, peak: int = 0) -> dict[str, Any]:
    """One way in a process of its own, so that the host's memory is its own, too."""
    python = TRANSFORMERLENS if way.startswith("transformer_lens") else sys.executable
    done = subprocess.run(
        [python, "-m", "tests.benchmarks.ways", way, which, str(tokens), str(DEVICE), str(peak)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def _compare(report: Record, ours: list[dict[str, Any]], theirs: dict[str, Any], name: str, *, targets: bool) -> None:
    place = "device" if DEVICE.type == "cuda" else "host"
    report.add(name, theirs["seconds"], "s")
    if theirs[place]:  # on the host, memory is told apart only in processes of their own
        report.add(f"{name}: peak memory", theirs[place], "B")
    for own, how in zip(ours, ["core", "core, held to the other's memory"], strict=False):
        report.add(how, own["seconds"], "s")
        report.add(f"{how}: times faster", theirs["seconds"] / own["seconds"], "x", target=">= 5" if targets else "")
        if theirs[place]:
            report.add(f"{how}: peak memory", own[place], "B")
            report.add(f"{how}: peak memory over it", own[place] / theirs[place], "x", target="<= 1" if targets else "")
    if len(ours) > 1:
        report.note(
            "The core solves the eigenproblems of as many layers together as the memory allows that is free. *Held to "
            "the other's memory*: it is told that there is no more than the other took."
        )
