"""Measures one item after the other in all processes that torchrun started."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from delta_suite.engine import local
from delta_suite.process_group import current

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(
    items: Iterable[Item],
    measure_item: Callable[[Item], Result],
    take_part: Callable[..., None],
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield each item with its result or exception in process 0; the others take part in what it tells them.

    take_part: called with the item and the work, in the processes that are not the first.
    """
    team = current()
    for item in items:
        if team.rank:
            while (work := team.work()) is not None:
                take_part(item, work)
            continue
        for _, result in local.run([item], measure_item):
            team.finish_item()
            yield item, result
