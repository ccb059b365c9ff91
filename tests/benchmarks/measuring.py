"""Seconds, peak memory, and the machine's own rates, against which every figure is read."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.benchmarks.subjects import Subject


@dataclass(frozen=True)
class Spent:
    """What a call took. CPU seconds, of all threads, tell also where other programs share the machine."""

    wall: float
    cpu: float

    @classmethod
    def on(cls, run: Callable[[], Any], device: torch.device) -> Spent:
        """Run, everything it starts on the device included."""
        _wait(device)
        started, before = time.perf_counter(), time.process_time()
        run()
        _wait(device)
        return cls(time.perf_counter() - started, time.process_time() - before)

    @classmethod
    def median(cls, rounds: Iterable[Spent]) -> Spent:
        """Return the medians of both."""
        every = list(rounds)
        return cls(statistics.median(one.wall for one in every), statistics.median(one.cpu for one in every))


def seconds(
    run: Callable[[], Any],
    device: torch.device,
    rounds: int = 1,
    of: Callable[[list[float]], float] = statistics.median,
) -> float:
    """Median wall seconds of a call, or another statistic of them, everything it started on the device included."""
    return of([Spent.on(run, device).wall for _ in range(rounds)])


def timed(
    benchmark: Any,
    run: Callable[[], Any],
    device: torch.device,
    *,
    rounds: int = 3,
    warmup: int = 1,
    beside: Callable[[], Any] | None = None,
) -> tuple[Any, float, float]:
    """The last result of `run`, its median seconds, and those of `beside`, which runs before each round."""
    own: list[float] = []
    others: list[float] = []

    def once() -> Any:
        _wait(device)
        started = time.perf_counter()
        result = run()
        _wait(device)
        own.append(time.perf_counter() - started)
        return result

    def before() -> None:
        if beside is not None:
            others.append(seconds(beside, device))

    result = benchmark.pedantic(once, setup=before, rounds=rounds, warmup_rounds=warmup, iterations=1)
    return result, statistics.median(own[-rounds:]), statistics.median(others[-rounds:] or [float("nan")])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Peak:
    """Most memory taken beyond what was held on entering, in bytes: on the device, and of this process on the host."""

    device = host = 0

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def __enter__(self) -> Peak:
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # not everywhere is the C library glibc
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, and does not hide what is taken next
        if self._cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self._held = torch.cuda.memory_allocated()
        with contextlib.suppress(OSError):  # where it is refused the peak of the whole process so far counts
            Path("/proc/self/clear_refs").write_text("5")  # the kernel's peak starts anew from what is held
        self._resident = _status("VmRSS")
        return self

    @property
    def bytes(self) -> int:
        """The bytes of the device where there is one, else of the host."""
        return self.device if self._cuda else self.host

    def __exit__(self, *error: object) -> None:
        self.host = max(0, _status("VmHWM") - self._resident)
        if self._cuda:
            torch.cuda.synchronize()
            self.device = torch.cuda.max_memory_allocated() - self._held


def _status(key: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Rates:
    """What this machine does at its best: operations per second of a matrix product, bytes per second of a copy."""

    product: dict[torch.dtype, float]
    copy: float

    @classmethod
    def of(cls, device: torch.device) -> Rates:
        large = device.type == "cuda"
        n = 8192 if large else 1024
        product = {}
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            if not large and dtype == torch.bfloat16:
                continue  # emulated on many CPUs; no floor is taken from it
            a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
            out = torch.empty_like(a)
            torch.mm(a, b, out=out)
            product[dtype] = 2.0 * n**3 / seconds(partial(torch.mm, a, b, out=out), device, 10, min)
        source = torch.randn((1 << 31) if large else (1 << 26), device=device)
        target = torch.empty_like(source)
        target.copy_(source)
        copy = 2.0 * source.nbytes / seconds(lambda: target.copy_(source), device, 10, min)
        return cls(product, copy)

    def floor(self, operations: float, dtype: torch.dtype, moved: float = 0.0) -> float:
        """Seconds that no program goes below: operations at the product's rate, or bytes at the copy's."""
        return max(operations / self.product.get(dtype, self.product[torch.float32]), moved / self.copy)

    def eigenproblem(self, n: int) -> float:
        """Values and vectors, float64: 4/3 n^3 operations to tridiagonal form and 2 n^3 back to the vectors."""
        return self.floor(10 / 3 * n**3, torch.float64)

    def forward(self, subject: Subject, tokens: int, length: int) -> float:
        return self.floor(subject.operations(tokens, length), subject.model.dtype)

    def grams(self, subject: Subject, tokens: int) -> float:
        """All layers' Gram matrices on the smaller side, one triangle."""
        small, big = sorted((tokens, subject.hidden))
        return subject.layers * self.floor(float(small) ** 2 * big, torch.float64)

    def eigenproblems(self, subject: Subject, tokens: int) -> float:
        """All layers' eigenproblems on the smaller side."""
        return subject.layers * self.eigenproblem(min(tokens, subject.hidden))
