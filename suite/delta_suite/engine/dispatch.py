"""Deal the items of a sweep out to workers, and take in their replies as they come.

A worker that is lost, with its process or its machine, costs the task that it was at, which another one is given. An
error that a task raises is its result: it would raise it again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from delta_suite.errors import EngineError

Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 3
"""Number of times that a task is given to another worker after the one at it was lost."""

Task = tuple[Callable[..., bytes], tuple[Any, ...]]
"""A function of a module, and its arguments, as they travel to a worker."""


class LostWorkerError(Exception):
    """Error for a worker that ended in the middle of a task; its text says how."""


class Workers(Protocol):
    """Processes, here or on other machines, that run a function of a module each. To be entered before they run any."""

    threads: int
    """Threads that a worker calculates with."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *raised: Any) -> None: ...

    @property
    def slots(self) -> int:
        """The number of tasks that can run at the same time now."""

    def share(self, content: bytes) -> Any:
        """Return an argument for many tasks that arrives as these bytes; they travel once, if that is possible."""

    def submit(self, task: Task) -> Hashable:
        """Start a task, and return its handle."""

    def next_finished(self, handles: Iterable[Any]) -> Any:
        """Wait for one of these tasks, and return its handle."""

    def result(self, handle: Any) -> bytes:
        """Return what a task returned. Raises what it raised, or LostWorkerError."""


@dataclass(frozen=True)
class Again:
    """A reply that is no result yet: another task of the same item."""

    task: Task


@dataclass
class _Running(Generic[Item]):
    """An item that waits for a worker, or whose task is at one."""

    item: Item
    task: Task | None = None
    """The task, where it is not the first one of the item."""
    losses: int = 0
    """The number of workers that were lost at it."""


def run(
    items: Iterable[Item],
    workers: Workers,
    make_task: Callable[[Item], Task],
    finish: Callable[[Item, bytes, int], Result | Again],
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield each item with its result, or the exception that hindered it, as they come.

    items: the next one is asked for when a worker is free, as is `make_task`, which returns its first task. workers:
    entered by the caller.
    finish: makes the result of a reply, here; its last argument is the number of workers that were lost before.
    """
    fresh, waiting = (_Running(item) for item in items), deque[_Running[Item]]()
    running: dict[Any, _Running[Item]] = {}
    while True:
        while len(running) < max(1, workers.slots):
            next_entry = waiting.popleft() if waiting else next(fresh, None)
            if next_entry is None:
                break
            running[workers.submit(next_entry.task or make_task(next_entry.item))] = next_entry
        if not running:
            return
        handle = workers.next_finished(running)
        entry = running.pop(handle)
        try:
            result = finish(entry.item, workers.result(handle), entry.losses)
        except LostWorkerError as lost:
            entry.losses += 1
            if entry.losses <= RETRIES:
                waiting.append(entry)
            else:
                yield entry.item, EngineError(_given_up(entry.losses, lost))
        except Exception as error:  # whatever hinders one item must not hinder the next
            yield entry.item, error
        else:
            if isinstance(result, Again):
                entry.task = result.task
                waiting.appendleft(entry)
            else:
                yield entry.item, result


def _given_up(losses: int, lost: LostWorkerError) -> str:
    return (
        f"{losses} workers were lost at it, the last one so: {lost}. Where memory was short, let fewer run on a "
        "machine; then run the command again: what is measured comes from the cache."
    )


def after_losses(losses: int, name: str) -> str:
    """Return the note on an item that was measured, though workers were lost at it.

    Example:
        >>> after_losses(1, "model")
        'model: measured after 1 worker was lost'
    """
    return f"{name}: measured after {losses} worker{'s were' if losses > 1 else ' was'} lost"
