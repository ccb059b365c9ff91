"""The processes that measure one model together, which torchrun starts, and what they tell each other.

Process 0 alone reads and writes cache and results. It tells the others what to do (`together`), and they wait for it
(`work`). What fails in one of them ends all: its message is kept in the store of torchrun, which a thread of every
process looks at, because the process itself may wait for the one that failed.

torch is imported only where there are several processes.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from delta_suite.errors import DeviceError, OptionError, why_not_measured
from delta_suite.escaping import terminal_lines
from delta_suite.provenance import keyed_versions, version_problem
from delta_suite.version import __version__

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed.distributed_c10d import Store

T = TypeVar("T")

FSDP, TP = "fsdp", "tp"
"""Devices of a model over several processes: each runs its own documents through weights that are gathered block by
block (FSDP2), or all run the same documents through their part of each matrix (tensor parallel)."""

MODES = (FSDP, TP)
"""The devices that need several processes."""

START = "torchrun --nproc-per-node N -m delta_suite measure MODEL --device {0}"
"""The command that starts several processes."""

POLL = 0.25
"""Seconds between two looks at what the others have told."""

SILENCE = 45.0
"""Seconds without a sign of life after which a process counts as gone. The thread that gives the signs waits for
nothing but Python's lock, which some libraries hold for seconds."""

LEAVE = 4.0
"""Seconds that a failed process waits before it ends, so that the others end by themselves and not by the launcher's
signal; and that process 0 waits for the others at the end."""

GONE = "another process of this run is gone. Was it killed, as for want of memory? The launcher's log names it."

_FAILED = "delta-suite/failed"


@dataclass(frozen=True)
class Launch:
    """Place of this process among those that a launcher such as torchrun has started, by its environment."""

    rank: int
    size: int
    """Number of processes on all hosts."""
    local_rank: int
    local_size: int
    """Number of processes on this host."""


def launched() -> Launch | None:
    """Return the place of this process as a launcher set it; None where the process was started by itself."""
    told = [os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    if not all(told):
        return None
    try:
        rank, size = int(told[0]), int(told[1])
        return Launch(
            rank, size, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", size))
        )
    except ValueError:
        return None


def refuse_processes(what: str) -> None:
    """Raise OptionError where several processes were started for what runs in one.

    Example:
        >>> refuse_processes("`judge`")
    """
    launch = launched()
    if launch is not None and launch.size > 1:
        raise OptionError(
            f"{launch.size} processes were started, and {what} runs in one. Several measure a model: "
            f"{START.format(FSDP)} (or {TP}). Then `delta-suite judge` gives the verdicts."
        )


def wait_for_first() -> None:
    """Let the first process speak where all of them may say the same: the launcher ends the others once it has ended.

    A process that is still there afterwards has something else to say.
    """
    launch = launched()
    if launch is not None and launch.rank > 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(LEAVE)


class Team:
    """The processes that measure together: here one, which has nobody to wait for.

    Example:
        >>> Team().gathered("a"), Team().shared("a")
        (['a'], ['a'])
    """

    mode = ""
    """FSDP or TP; empty for one process."""
    rank, size = 0, 1
    device = ""
    """Device of this process, where there are several."""

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes, in their order, in process 0; in the others none."""
        return [value]

    def shared(self, value: T) -> list[T]:
        """Return the values of all processes, in their order, in each of them."""
        return [value]

    def add_up(self, tensor: Tensor, owner: int) -> None:
        """Add the tensors of all processes into that of `owner`; those of the others are no longer of use."""

    @contextmanager
    def together(self, name: str, work: object) -> Iterator[None]:
        """Give the others their work, and do this process's part inside; what fails there ends all processes.

        name: the model, for the message.
        """
        yield

    def work(self) -> Any:
        """Return what process 0 tells next: work for the model at hand, or None where that is done.

        It may take long: process 0 hashes weights, or waits for another run that measures the same model.
        """

    def finish_item(self) -> None:
        """Tell the others that a model is done, so that they go on to the next."""


_team = Team()


def current() -> Team:
    """Return the processes that this one belongs to."""
    return _team


@contextmanager
def joined(mode: str, device: str) -> Iterator[Team]:
    """Join the processes that the launcher has started, each on its device; leave them at the end.

    Raises DeviceError where they run different versions.
    """
    global _team  # noqa: PLW0603  (a process belongs to one team)
    launch = launched()
    assert launch is not None
    team = _Joined(mode, device, launch)
    try:
        _team = team
        team.compare_versions()
        yield team
        team.disband()
    except BaseException:
        team.abandon()
        raise
    finally:
        _team = Team()
        team.leave()


class _Joined(Team):
    """Several processes, of which this is one."""

    def __init__(self, mode: str, device: str, launch: Launch) -> None:
        from datetime import timedelta

        import torch
        from torch import distributed
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self.mode, self.device, self.rank, self.size = mode, device, launch.rank, launch.size
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // launch.local_size))  # torchrun leaves each one thread
        if device.startswith("cuda"):
            torch.cuda.set_device(torch.device(device))
        store, rank, size = next(rendezvous("env://"))
        # Words go by gloo, which needs no GPU; sums and weights by the fastest way between the devices.
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "cpu:gloo"
        distributed.init_process_group(
            backend,
            store=PrefixStore("delta-suite/torch", store),
            rank=rank,
            world_size=size,
            timeout=timedelta(hours=1),
        )
        self._distributed, self._store = distributed, store.clone()
        self._tasks = count()
        self._left = threading.Event()
        self._watching = threading.Thread(target=self._watch, args=(store.clone(),), daemon=True)
        self._watching.start()

    def compare_versions(self) -> None:
        """Raise DeviceError where the processes run different versions of what is in the cache key."""
        first, *others = self.shared({"delta-suite": __version__} | keyed_versions())
        for rank, theirs in enumerate(others, start=1):
            if problem := version_problem(first, theirs):
                raise DeviceError(f"process {rank} has {problem}. Install the same versions on all hosts.")

    def gathered(self, value: T) -> list[T]:
        """Return the values of all processes in process 0."""
        values: list[Any] | None = [None] * self.size if self.rank == 0 else None
        self._distributed.gather_object(value, values)
        return values or []

    def shared(self, value: T) -> list[T]:
        """Return the values of all processes."""
        values: list[Any] = [None] * self.size
        self._distributed.all_gather_object(values, value)
        return values

    def add_up(self, tensor: Tensor, owner: int) -> None:
        """Add the tensors of all processes into that of `owner`."""
        self._distributed.reduce(tensor, owner)

    @contextmanager
    def together(self, name: str, work: object) -> Iterator[None]:
        """Give the others their work, and do this process's part; what fails there ends all processes."""
        try:
            if self.rank == 0:
                self._tell(work)
            yield
        except Exception as error:
            gone = any(phrase in str(error) for phrase in ("Connection closed by peer", "Connection reset by peer"))
            self._end_all(f"{name} cannot be measured: {GONE}" if gone else why_not_measured(name, error))

    def _tell(self, work: object) -> None:
        self._store.set(f"delta-suite/work/{next(self._tasks)}", "")
        self._distributed.broadcast_object_list([work], src=0)

    def finish_item(self) -> None:
        """Tell the others that a model is done."""
        self._tell(None)

    def work(self) -> Any:
        """Return what process 0 tells next."""
        key = f"delta-suite/work/{next(self._tasks)}"
        while not self._store.check([key]):
            time.sleep(POLL)
        told: list[Any] = [None]
        self._distributed.broadcast_object_list(told, src=0)
        return told[0]

    def disband(self) -> None:
        """Close what connects the processes, once all is done."""
        self._distributed.destroy_process_group()

    def abandon(self) -> None:
        """End the others, which may wait for this process, without a message: its own tells what happened."""
        with suppress(Exception):
            self._left.set()
            self._store.compare_set(_FAILED, "", f"{self.rank}")

    def leave(self) -> None:
        """Give the last sign of life, and in process 0 wait until the others have; the store may end with it."""
        self._left.set()
        self._watching.join(LEAVE)
        with suppress(Exception):
            self._store.set(_alive(self.rank), "left")
            until = time.monotonic() + LEAVE
            while self.rank == 0 and time.monotonic() < until and not all(self._has_left()):
                time.sleep(POLL)

    def _has_left(self) -> Iterator[bool]:
        return (self._store.get(_alive(rank)) == b"left" for rank in range(self.size))

    # --- failures

    def _watch(self, store: Store) -> None:
        """Give signs of life, and end this process where another one has failed or gives none."""
        others = [rank for rank in (range(self.size) if self.rank == 0 else (0,)) if rank != self.rank]
        seen = {rank: (b"", time.monotonic()) for rank in others}
        for number in count():
            try:
                store.set(_alive(self.rank), str(number))
                if store.check([_FAILED]):
                    self._end_quietly()
                now = time.monotonic()
                for rank in others:
                    sign = store.get(_alive(rank)) if store.check([_alive(rank)]) else b""
                    if sign != seen[rank][0] or sign == b"left":
                        seen[rank] = sign, now
                    elif now - seen[rank][1] > SILENCE:
                        self._end_all(f"process {rank} has given no sign of life for {SILENCE:.0f} s")
            except Exception as error:  # the store is on the host of process 0, and gone with it
                if not self._left.is_set():
                    self._write(f"the host of process 0 does not answer ({type(error).__name__})")
                    self._end_quietly()
            if self._left.wait(POLL):
                return

    def _end_all(self, message: str) -> NoReturn:
        """End this process with a message, and with it all others, which do not repeat it."""
        first = True
        with suppress(Exception):
            mine = f"{self.rank}"
            first = self._store.compare_set(_FAILED, "", mine) == mine.encode()
        if first:
            self._write(message)
            time.sleep(LEAVE)
        self._end_quietly()

    def _write(self, message: str) -> None:
        text = terminal_lines(f"delta-suite, process {self.rank} of {self.size}: {message}")
        with suppress(OSError):
            os.write(2, f"{text}\n".encode(errors="backslashreplace"))

    def _end_quietly(self) -> NoReturn:
        """End at once: the main thread may wait for a process that is gone."""
        from delta_suite.writing import remove_temporary_folders

        with suppress(Exception):
            remove_temporary_folders()
        os._exit(1)


def _alive(rank: int) -> str:
    return f"delta-suite/alive/{rank}"
