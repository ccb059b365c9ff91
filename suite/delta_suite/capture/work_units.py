"""Units of work: parts of a calibration that are captured apart, and whose sums are added. No torch here.

The cut follows from the calibration alone, so that the sums are the same on any number of workers. Each unit of work
lies in one group of the units that are left out in turn, because each group has sums of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delta_suite.capture.units import ADDED_GROUPS, Units

DOCUMENTS_EACH = 4096
"""Most documents of a unit of work. A unit is what is lost with a worker, and more units than workers end together."""


@dataclass(frozen=True)
class WorkUnit:
    """Documents that one worker captures."""

    number: int
    """Place in the order in which sums are added."""
    group: int
    """The group of all its documents, of at most ADDED_GROUPS."""
    documents: Sequence[int]
    """The documents, in the order of the calibration."""


def work_units(units: Units, documents_each: int = DOCUMENTS_EACH) -> list[WorkUnit]:
    """Return the units of work of a calibration, in the order in which their sums are added.

    Example:
        >>> [list(unit.documents) for unit in work_units(Units.of(5), documents_each=1)]
        [[0], [4], [1], [2], [3]]
        >>> [list(unit.documents) for unit in work_units(Units.of(4, ["a", "b", "b", "a"]), documents_each=8)]
        [[0, 3], [1, 2]]
    """
    dealt = units.at_most(ADDED_GROUPS)
    members: list[list[int]] = [[] for _ in range(dealt.group_count)]
    for document, group in enumerate(dealt.groups):
        members[group].append(document)
    parts = [
        (group, documents[start : start + documents_each])
        for group, documents in enumerate(members)
        for start in range(0, len(documents), documents_each)
    ]
    return [WorkUnit(number, group, documents) for number, (group, documents) in enumerate(parts)]
