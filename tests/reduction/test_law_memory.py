"""Memory decides how long the law takes, and no figure of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import fields
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.units import Units
from delta_suite.errors import DeviceError
from delta_suite.reduction import law_sums
from delta_suite.reduction.law_fit import measure_law, measure_law_again
from delta_suite.reduction.law_maps import top_directions
from delta_suite.reduction.law_memory import MATRICES, plan_law
from delta_suite.reduction.law_scores import Law
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.reduction.test_law_fit import planted

CPU = torch.device("cpu")
LAYERS, HIDDEN = 8, 32
PHASES = {"A": (0, 0), "B": (1, 3), "C": (4, 6)}
"""A phase of one layer, two that share, and a layer in no phase."""
FULL, FEWER = (100, 10), (60, 10)
"""Documents and their length: with rows for all 32 dimensions, and for 30 of 128."""


def stream(size: tuple[int, int]) -> ResidualStream:
    hidden = HIDDEN if size == FULL else 4 * HIDDEN
    return planted(*size, hidden, shared=0.5, per_layer=0.3, rank_one=0.6, noise=0.4, layers=LAYERS)[0]


@cache
def whole_law(size: tuple[int, int]) -> Law:
    """Return the law of the stream of this size, fitted at once."""
    return measure_law(stream(size), PHASES)


def assert_same(one: Law, other: Law, tolerance: float = 1e-9) -> None:
    assert one.reason is None
    assert other.reason is None
    for field in fields(Law):
        a, b = getattr(one, field.name), getattr(other, field.name)
        for x, y in [(a[name], b[name]) for name in a] if field.name == "r2" else [(a, b)]:
            if isinstance(x, np.ndarray):
                assert np.array_equal(np.isnan(x), np.isnan(y)), field.name
                assert np.nan_to_num(x) == pytest.approx(np.nan_to_num(y), rel=tolerance, abs=tolerance), field.name
            else:
                assert x == y, field.name


def sums_bytes(layers: int, k: int) -> int:
    return MATRICES * 8 * k**2 * layers


@pytest.mark.parametrize(
    ("size", "place", "layers"),
    [(FULL, "device", 4), (FULL, "disk", LAYERS), (FEWER, "host", LAYERS), (FEWER, "disk", 6)],
)
def test_the_law_is_the_same_in_less_memory(size: tuple[int, int], place: str, layers: int) -> None:
    """All sums on disk or beside the device; and the sums of four or six layers at a time."""
    rows = stream(size)
    whole = whole_law(size)
    beside = plan_least(rows, whole.components)
    room = {"device": beside, "host": 0, "disk": 0}
    room[place] += sums_bytes(layers, whole.components)
    room["device"] += room["device"] // 2  # of which rows take a quarter
    fits = Fits()
    assert_same(whole, measure_law(rows, PHASES, memory=Memory(**room), progress=fits))
    assert sum(fits.done) == fits.total > 0


class Fits:
    """Counts the fits that are told as done."""

    def __init__(self) -> None:
        self.total, self.done = 0, list[int]()

    def __call__(self, fits: int) -> AbstractContextManager[Fits]:
        self.total = fits
        return nullcontext(self)

    def update(self, done: int) -> None:
        self.done.append(done)


def plan_least(rows: ResidualStream, k: int) -> int:
    """Return the bytes of the device with which a law is just planned, if its sums lie elsewhere."""
    low, high = 0, 1 << 40
    while high - low > 1:
        middle = (low + high) // 2
        try:
            plan_law(LAYERS, rows.hidden, k, len(rows.kept), PHASES, CPU, Memory(middle, host=1 << 50))
            high = middle
        except DeviceError:
            low = middle
    return high


@pytest.mark.parametrize(("size", "shards"), [(FULL, 5), (FEWER, 3)])
def test_the_law_is_the_same_in_shards(size: tuple[int, int], shards: int) -> None:
    rows = stream(size)
    whole = whole_law(size)
    asked: list[list[int]] = []
    alive: list[weakref.ref[ResidualStream]] = []

    def streams(layers: Any) -> Iterator[ResidualStream]:
        asked.append(list(layers))
        for part in torch.arange(len(rows.kept)).chunk(shards):
            assert all(shard() is None for shard in alive)  # one at a time
            shard = rows.take(part)
            alive.append(weakref.ref(shard))
            yield shard
            del shard

    beside = plan_least(rows, whole.components)
    for memory in (Memory(1 << 40), Memory(beside, disk=sums_bytes(4, whole.components))):
        asked.clear()
        law = measure_law_again(
            streams,
            rows.kept,
            rows.document,
            PHASES,
            [CPU],
            units=Units.of(int(rows.document.max()) + 1),
            layers=LAYERS,
            hidden=rows.hidden,
            memory=memory,
        )
        assert_same(whole, law)
        assert (len(asked) > 2) == (memory.disk > 0)  # a pass for the basis and one for the sums, where they fit


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stream(FEWER)
    whole = whole_law(FEWER)
    walk = law_sums.walk_rows
    monkeypatch.setattr("delta_suite.reduction.law_fit.walk_rows", lambda *args: walk(*args[:4], 70))
    assert_same(whole, measure_law(rows, PHASES))


def test_parts_of_a_phase_take_the_same_steps_of_the_iteration() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([[3.0, 1.0], [1.02, 1.0], [1.3, 1.0], [2.0, 1.9]], dtype=torch.float64)  # slow and fast
    turns = torch.linalg.qr(torch.randn(4, 30, 30, generator=generator, dtype=torch.float64))[0]
    values = torch.cat([spread, torch.rand(4, 28, generator=generator, dtype=torch.float64)], dim=1)
    matrices = turns * values[:, None] @ turns.mT
    start = torch.linalg.qr(torch.randn(4, 30, 1, generator=generator, dtype=torch.float64))[0]
    (together,) = top_directions([matrices], [start], 1e-5)
    apart = top_directions(list(matrices.split([1, 2, 1])), list(start.split([1, 2, 1])), 1e-5)
    assert (torch.cat(apart) - together).abs().max() < 1e-12
    (alone,) = top_directions([matrices[:1]], [start[:1]], 1e-5)
    assert (alone - together[:1]).abs().max() > 1e-9  # which stops earlier


class Peak(TorchDispatchMode):
    """Largest number of bytes of all tensors that were made inside and lived at the same time."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.now = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self._seen:
                    self._seen.add(key)
                    self.now += size
                    self.bytes = max(self.bytes, self.now)
                    weakref.finalize(storage, self._freed, key, size)
        return out

    def _freed(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self.now -= size


@pytest.mark.repeats
@pytest.mark.parametrize(("size", "layers"), [(FULL, 4), (FEWER, LAYERS)])
def test_the_law_stays_within_the_memory_it_may_take(size: tuple[int, int], layers: int) -> None:
    rows = stream(size)
    k = whole_law(size).components
    limit = (plan_least(rows, k) + sums_bytes(layers, k)) * 3 // 2
    with Peak() as peak:
        measure_law(rows, PHASES, memory=Memory(limit))
    vectors = 14 * LAYERS * (4 * rows.hidden + 5) * 8 + LAYERS * rows.hidden * 8 * 40  # of no account in a real model
    assert sums_bytes(layers, k) < peak.bytes <= limit + vectors


def test_the_figures_of_the_documentation() -> None:
    """GiB of the sums and maps of one basis, as the docstring of law_fit lists them."""
    for (layers, k), gibibytes in {
        (30, 576): 3.1,
        (24, 859): 5.5,
        (24, 896): 6.0,
        (64, 859): 14.8,
        (64, 5120): 525,
    }.items():
        assert sums_bytes(layers, k) / 2**30 == pytest.approx(gibibytes, rel=0.02)


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        (Memory(1000, 10**12, 10**12), "for one layer of 32 dimensions"),
        (Memory(10**6, 1000, 1000), r"for the sums over documents of 4 layers \(the largest phase\) in 32 dimensions"),
    ],
)
def test_memory_that_is_not_there_is_an_error(memory: Memory, says: str) -> None:
    with pytest.raises(DeviceError, match=says) as error:
        measure_law(stream(FULL), PHASES, memory=memory)
    assert "May be taken: " in str(error.value)
    assert "leave out the claims about the law" in str(error.value)
