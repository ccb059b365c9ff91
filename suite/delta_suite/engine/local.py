"""Measures one item after the other: in this process, or in all processes that torchrun started."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from delta_suite.process_group import current

Item = TypeVar("Item")
Result = TypeVar("Result")


def run(items: Iterable[Item], measure_item: Callable[[Item], Result]) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield each item with its result, or with the exception that it raised, so that one failure stops no other.

    Example:
        >>> [(item, type(result).__name__) for item, result in run([1, 0], lambda n: 1 / n)]
        [(1, 'float'), (0, 'ZeroDivisionError')]
    """
    for item in items:
        try:
            yield item, measure_item(item)
        except Exception as error:  # whatever hinders one item must not hinder the next
            _forget_locals(error)
            yield item, error


def run_together(
    items: Iterable[Item], measure_item: Callable[[Item], Result], take_part: Callable[..., None]
) -> Iterator[tuple[Item, Result | Exception]]:
    """Yield as `run` does in process 0 of those that torchrun started; the others take part in what it tells them.

    take_part: called with the item and the work, in the processes that are not the first.
    """
    team = current()
    for item in items:
        if team.rank:
            while (work := team.work()) is not None:
                take_part(item, work)
            continue
        for _, result in run([item], measure_item):
            team.finish_item()
            yield item, result


def _forget_locals(error: BaseException) -> None:
    """Clear the variables of all frames of an error, which may be kept: a model may be among them. The lines stay."""
    seen: list[BaseException] = []
    waiting: list[BaseException | None] = [error]
    while waiting:
        each = waiting.pop()
        if each is not None and each not in seen:
            seen.append(each)
            traceback.clear_frames(each.__traceback__)
            waiting += [each.__cause__, each.__context__]
