"""Tasks for workers, which do no more than their names say."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def answer(text: str) -> bytes:
    return text.encode()


def raise_an_error(text: str) -> bytes:
    raise ValueError(text)


def kill_the_worker(mark: str, times: int) -> bytes:
    """Kill the process that this runs in, so many times."""
    path = Path(mark)
    lives = len(path.read_text()) if path.exists() else 0
    if lives == times:
        return b"lived"
    path.write_text("x" * (lives + 1))
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def wait_for_the_end(mark: str) -> bytes:
    """The first time, write which machine of Ray this runs on, and wait; after that, return at once."""
    import ray

    path = Path(mark)
    if path.exists():
        return b"elsewhere"
    path.with_suffix(".new").write_text(ray.get_runtime_context().get_node_id())
    path.with_suffix(".new").rename(path)
    time.sleep(600)
    return b"in time"


def killed_once(mark: str, function: Callable[..., bytes], *arguments: Any) -> bytes:
    """Run a task, and kill the worker in the middle of it the first time."""
    answer = function(*arguments)
    kill_the_worker(mark, 1)
    return answer


def gpu_seen(mark: str) -> bytes:
    """Return which GPU this worker sees, once it was killed, and while another like it runs in the same folder."""
    kill_the_worker(mark, 1)
    Path(f"{mark}.again").touch()
    until = time.monotonic() + 60
    while len(list(Path(mark).parent.glob("*.again"))) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    return os.environ["CUDA_VISIBLE_DEVICES"].encode()
