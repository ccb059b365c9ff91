"""Units of resampling: the domains of a calibration where it declares them, else its documents. No torch here.

An interval says how far a figure may be from that of other text. Where domains are declared, other text means other
domains, so a domain is deleted as a whole, and the two halves share none. With documents as the unit the same domains
stay in, which answers a narrower question: what the figure would be on other documents of these domains. On planted
domains an interval over documents that claims 0.95 covers about half of the cases.

Groups of units are left out in turn. Group g lies in half a where g is even, in half b where it is odd.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Unit = Literal["document", "domain"]

DOCUMENT_GROUPS = 10
"""Number of groups that documents are left out in; fewer documents make fewer groups."""

DOMAIN_GROUPS = 128
"""Most domains that are left out one by one; more are dealt into so many groups."""

ADDED_GROUPS = 20
"""Most groups of domains where the stream does not stay in memory: each then has moments of its own."""


@dataclass(frozen=True)
class Units:
    """The units of a calibration, and the groups of them that are left out in turn.

    Example:
        >>> Units.of(4, ["a", "b", "b", "a"])
        Units(unit='domain', count=2, groups=(0, 1, 1, 0), documents=(0, 1, 3, 2))
        >>> Units.of(3).groups
        (0, 1, 0)
    """

    unit: Unit
    count: int
    """The number of units."""
    groups: tuple[int, ...]
    """The group of each document. All documents of a unit are in one group."""
    documents: tuple[int, ...] | None = None
    """The group of each document in the narrower question, in the same half; where each domain has several."""

    @classmethod
    def of(cls, documents: int, domains: Sequence[str] = ()) -> Units:
        """Return the units of so many documents, whose domains are given, or none.

        A single domain has no others to be compared with, so documents are then the unit.
        """
        names = list(dict.fromkeys(domains))
        if len(names) < 2:
            return cls("document", documents, tuple(_dealt([1] * documents, _even(documents))))
        sizes = Counter(domains)
        group = dict(zip(names, _dealt([sizes[name] for name in names], DOMAIN_GROUPS), strict=True))
        groups = tuple(group[name] for name in domains)
        return cls("domain", len(names), groups, _within_halves(groups) if min(sizes.values()) > 1 else None)

    def at_most(self, most: int) -> Units:
        """Return the same units in at most so many groups, each of whole units, without the groups of documents."""
        count = self.group_count
        if count <= most:
            return Units(self.unit, self.count, self.groups)
        group = [2 * (group // 2 % (most // 2)) + group % 2 for group in range(count)]
        return Units(self.unit, self.count, tuple(group[each] for each in self.groups))

    @property
    def group_count(self) -> int:
        """The number of groups."""
        return max(self.groups) + 1

    @property
    def document_group_count(self) -> int:
        """The number of groups of documents in the narrower question; 0 where it is not asked."""
        return max(self.documents) + 1 if self.documents else 0

    @property
    def sha256(self) -> str:
        """Hash of unit and groups: replicates of two measurements are paired only where it is the same."""
        return hashlib.sha256(f"{self.unit} {self.groups}".encode()).hexdigest()


def _even(documents: int) -> int:
    """Return the number of groups of documents: even, so that halves are equal; one document makes one group."""
    return min(DOCUMENT_GROUPS, documents // 2 * 2) if documents > 1 else 1


def _dealt(sizes: Sequence[int], most: int) -> list[int]:
    """Return the group of each unit, at most `most` of them, for units of these sizes.

    Units are taken by size, the largest first, and else in order. Of each two the larger one goes to the half with
    fewer documents; within a half they are dealt in turn. So halves have as many units, but for one, and nearly as many
    documents.

    Example:
        >>> _dealt([1] * 12, 10)
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
        >>> _dealt([1, 5, 1, 2], 128)
        [3, 0, 2, 1]
    """
    if most < 2:
        return [0] * len(sizes)
    order = sorted(range(len(sizes)), key=lambda unit: -sizes[unit])
    half, filled = {}, [0, 0]
    for rank in range(0, len(order), 2):
        lighter = int(filled[1] < filled[0])
        for unit, side in zip(order[rank : rank + 2], (lighter, 1 - lighter), strict=False):
            half[unit] = side
            filled[side] += sizes[unit]
    # The half with one unit more is half a, so that groups are numbered without a gap.
    first = int(2 * sum(half.values()) > len(order))
    rank_of = {unit: rank for rank, unit in enumerate(order)}
    return [2 * (rank_of[unit] // 2 % (most // 2)) + (half[unit] ^ first) for unit in range(len(sizes))]


def _within_halves(groups: Sequence[int]) -> tuple[int, ...]:
    """Return a group for each document, of at most DOCUMENT_GROUPS, in the half of the group of its unit."""
    half = [group % 2 for group in groups]
    most = min(DOCUMENT_GROUPS // 2, half.count(0), half.count(1))
    seen, out = [0, 0], []
    for side in half:
        out.append(2 * (seen[side] % most) + side)
        seen[side] += 1
    return tuple(out)
