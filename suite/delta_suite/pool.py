"""A function over many items, here or in processes of this machine. Results come in the order of the items."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import chain
from multiprocessing import get_context, parent_process, resource_tracker
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

TOGETHER = 16
"""Items that go to a process at a time, so that what they share is sent once."""

WORTHWHILE = 6.0
"""Seconds of work from which processes are started: each takes a second or two to import what it needs."""

TRIED = 8
"""Items that are done here first, to know how long the others take."""

AHEAD = 4
"""Batches for each process that are under way or done before their turn; more would only take memory."""


class Pool:
    """Processes that are started with the first work that is worth it, and end with the block that holds the pool.

    Where processes cannot be started, or one is killed, the work goes on here.
    """

    def __init__(self, processes: int = 1, worthwhile: float = WORTHWHILE) -> None:
        self.processes, self.worthwhile = processes, worthwhile
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        """Start nothing yet."""
        return self

    def __exit__(self, *raised: object) -> None:
        """End the processes."""
        if self._executor is not None:
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def map(self, function: Callable[[_Item], _Result], items: Sequence[_Item]) -> Iterator[_Result]:
        """Yield function(item) of each item, in order. What is sent to processes and back must be picklable."""
        spent = 0.0
        for done, item in enumerate(items):
            remaining = len(items) - done
            long = done >= TRIED and spent / done * remaining > self.worthwhile
            if self.processes > 1 and (long or self._executor is not None):
                yield from chain.from_iterable(self._batches(function, [*_batched(items[done:])]))
                return
            started = time.perf_counter()
            result = function(item)
            spent += time.perf_counter() - started
            yield result

    def _batches(
        self, function: Callable[[_Item], _Result], batches: Sequence[Sequence[_Item]]
    ) -> Iterator[Sequence[_Result]]:
        waiting: deque[tuple[Sequence[_Item], Future[list[_Result]] | None]] = deque()
        remaining = iter(batches)
        while True:
            while len(waiting) < AHEAD * self.processes and (batch := next(remaining, None)) is not None:
                waiting.append((batch, self._submit(function, batch)))
            if not waiting:
                return
            batch, future = waiting.popleft()
            try:
                yield _each(function, batch) if future is None else future.result()
            except BrokenProcessPool:
                self.processes = 1
                yield _each(function, batch)

    def _submit(self, function: Callable[[_Item], _Result], batch: Sequence[_Item]) -> Future[list[_Result]] | None:
        """Give a batch to the processes; None where there are none."""
        if self.processes < 2:
            return None
        try:
            with starting_processes():
                if self._executor is None:
                    # Spawned: a fork of a process with threads, as numpy has them, may hang.
                    self._executor = ProcessPoolExecutor(self.processes, get_context("spawn"), end_with_the_parent)
                return self._executor.submit(_each, function, batch)
        except (BrokenProcessPool, OSError, RuntimeError):
            self.processes = 1
            return None


_QUIET = "ignore::UserWarning:multiprocessing.resource_tracker"
"""Python's own process that removes semaphores says so where an interruption ends this one before it does."""


@contextmanager
def starting_processes() -> Iterator[None]:
    """Start processes that Ctrl-C does not reach, and that say nothing where it ends this one, which answers it."""
    warnings = os.environ.get("PYTHONWARNINGS")
    with environment({"PYTHONWARNINGS": f"{warnings},{_QUIET}" if warnings else _QUIET}):
        resource_tracker.ensure_running()  # it unblocks the signal when it has started, so it starts first
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def environment(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables of the environment within a block, for the processes that are started in it."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


HERE = Pool()
"""The pool of this process alone."""


def _batched(items: Sequence[_Item]) -> Iterator[Sequence[_Item]]:
    return (items[first : first + TOGETHER] for first in range(0, len(items), TOGETHER))


def _each(function: Callable[[_Item], _Result], items: Iterable[_Item]) -> list[_Result]:
    return [function(item) for item in items]


def usable_processors() -> int:
    """Return the number of processors that this process may use."""
    affinity: Any = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Variables of the environment from which numeric libraries take their number of threads when they are loaded."""


def end_with_the_parent() -> None:
    """Have this process end with the one that started it, however that ends; Ctrl-C is for that one to answer."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = parent_process()
    assert parent is not None

    def wait_for_it() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait_for_it, daemon=True).start()
