"""Work in processes: the same results in the same order as here, also where a process is lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from delta_suite.pool import HERE, TRIED, Pool


def square(item: int) -> int:
    return item * item


def killed_at(here: int, item: int) -> int:
    """Return the item, but in another process end that at once."""
    if os.getpid() != here:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def where(item: int) -> int:
    return os.getpid()


def test_results_come_in_order_and_short_work_is_done_here() -> None:
    with Pool(2) as pool:
        assert list(pool.map(square, range(40))) == [item * item for item in range(40)]
        assert set(pool.map(where, range(40))) == {os.getpid()}
    assert list(HERE.map(square, [3])) == [9]


def test_work_that_takes_long_goes_to_processes_which_end_with_the_pool() -> None:
    with Pool(2, worthwhile=0.0) as pool:
        processes = list(pool.map(where, range(100)))
        assert set(processes[:TRIED]) == {os.getpid()}
        others = set(processes[TRIED:])
        assert os.getpid() not in others
        assert list(pool.map(square, range(40))) == [item * item for item in range(40)]
    assert not any(Path(f"/proc/{other}").exists() for other in others)


INTERRUPTED = """
import time
from delta_suite.interruption import end_when_interrupted
from delta_suite.pool import Pool
end_when_interrupted()
with Pool(2, worthwhile=0.0) as pool:
    for count, _ in enumerate(pool.map(time.sleep, [0.02] * 3000)):
        if count == {after}:
            print("begun", flush=True)
"""


@pytest.mark.parametrize("after", [TRIED - 1, TRIED + 20])
def test_an_interruption_ends_all_processes_with_one_line(after: int) -> None:
    code = INTERRUPTED.format(after=after)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    os.killpg(process.pid, signal.SIGINT)
    output, errors = process.communicate(timeout=60)  # the pipes close only when all processes have ended
    assert (process.returncode, output, errors) == (130, "", "delta-suite: interrupted\n")


def test_where_a_process_is_killed_the_work_goes_on_here() -> None:
    with Pool(2, worthwhile=0.0) as pool:
        assert list(pool.map(partial(killed_at, os.getpid()), range(100))) == [*range(100)]
        assert pool.processes == 1
