"""Workers in processes of this machine."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from typing import Any

from delta_suite.engine.dispatch import LostWorkerError, Task
from delta_suite.pool import end_with_the_parent, starting_processes


class Processes:
    """A fixed number of processes. Each is a pool of its own, so that one that is killed loses no other's task."""

    def __init__(self, count: int, threads: int, gpus: Sequence[str] = ()) -> None:
        """Take the number of processes, and of threads in each.

        gpus: values of CUDA_VISIBLE_DEVICES, dealt to the processes in turn; without them each sees all GPUs.
        """
        self.slots, self.threads = count, threads
        self._gpus = deque(gpus[number % len(gpus)] for number in range(count) if gpus)
        self._gpu_of: dict[ProcessPoolExecutor, str] = {}
        self._idle: list[ProcessPoolExecutor] = []
        self._busy: dict[Future[bytes], ProcessPoolExecutor] = {}
        self._children_before: set[BaseProcess] = set()

    def __enter__(self) -> Processes:
        """Note which processes are none of these; they are started with their first tasks."""
        self._children_before = set(active_children())
        return self

    def __exit__(self, *raised: Any) -> None:
        """End the processes, and where the caller gives up, in the middle of their tasks."""
        if self._busy:
            for child in set(active_children()) - self._children_before:
                child.terminate()
        for pool in (*self._idle, *self._busy.values()):
            pool.shutdown()

    def share(self, content: bytes) -> bytes:
        """Return the bytes, which travel with every task."""
        return content

    def submit(self, task: Task) -> Future[bytes]:
        """Start a task in a process that is idle, or a new one."""
        function, arguments = task
        with starting_processes():
            pool = self._idle.pop() if self._idle else self._new_pool()
            future = pool.submit(function, *arguments)
        self._busy[future] = pool
        return future

    def _new_pool(self) -> ProcessPoolExecutor:
        environment = {"DELTA_SUITE_WORKERS": str(self.slots)}  # they share the memory of the machine
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus.popleft()
        # Spawned: a fork of a process with threads, as torch has them, may hang.
        pool = ProcessPoolExecutor(1, get_context("spawn"), begin, (environment,))
        if "CUDA_VISIBLE_DEVICES" in environment:
            self._gpu_of[pool] = environment["CUDA_VISIBLE_DEVICES"]
        return pool

    def next_finished(self, handles: Iterable[Future[bytes]]) -> Future[bytes]:
        """Wait for one of these tasks."""
        return next(iter(wait(handles, return_when=FIRST_COMPLETED).done))

    def result(self, handle: Future[bytes]) -> bytes:
        """Return what a task returned."""
        pool = self._busy.pop(handle)
        try:
            reply = handle.result()
        except BrokenProcessPool:
            pool.shutdown()
            if pool in self._gpu_of:
                self._gpus.append(self._gpu_of.pop(pool))
            raise LostWorkerError("its process ended, as one that is killed does") from None
        except BaseException:
            self._idle.append(pool)
            raise
        self._idle.append(pool)
        return reply


def begin(environment: Mapping[str, str]) -> None:
    """Begin a process that sees these variables, and that ends with its parent."""
    os.environ.update(environment)
    end_with_the_parent()
