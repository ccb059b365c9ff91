"""Workers that run tasks in this process: nothing is started, and a test decides what becomes of each task."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from delta_suite.engine.dispatch import Task
from delta_suite.engine.processes import Processes

from tests.engines import tasks


class Here:
    """Runs each task where it is asked for; of those that wait, the last one ends first."""

    threads = 1

    def __init__(self, slots: int = 1, before: Callable[[str, int], None] = lambda name, number: None) -> None:
        """Take how many tasks wait together, and what is called with the name and the number of each."""
        self.slots, self.before = slots, before
        self.ran: list[str] = []
        """The names of the tasks, in the order in which they ran."""
        self._waiting: dict[int, Task] = {}
        self._submitted = 0

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *raised: Any) -> None:
        pass

    def share(self, content: bytes) -> bytes:
        return content

    def submit(self, task: Task) -> int:
        self._submitted += 1
        self._waiting[self._submitted] = task
        return self._submitted

    def next_finished(self, handles: Iterable[int]) -> int:
        return max(handles)

    def result(self, handle: int) -> bytes:
        function, arguments = self._waiting.pop(handle)
        self.before(function.__name__, self.ran.count(function.__name__))
        self.ran.append(function.__name__)
        return function(*arguments)


class OneIsKilled(Processes):
    """Processes of which one is killed in the middle of a unit of work."""

    def __init__(self, count: int, mark: str) -> None:
        super().__init__(count, 1)
        self.mark = mark
        self.units = 0

    def submit(self, task: Task) -> Any:
        function, arguments = task
        if function.__name__ == "sum_unit":
            self.units += 1
            if self.units == 3:
                return super().submit((tasks.killed_once, (self.mark, function, *arguments)))
        return super().submit(task)
