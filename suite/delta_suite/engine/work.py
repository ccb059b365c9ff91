"""The list of what a sweep measures, and the shards that it is divided into.

The list depends on the command line alone, so that processes that know nothing of each other divide it alike: item k
belongs to shard k mod n.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from delta_suite.errors import OptionError
from delta_suite.models.spec import ModelSpec
from delta_suite.paths import shorten

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One measurement of a sweep: a model on a calibration."""

    spec: ModelSpec
    calibration: str

    @property
    def key(self) -> tuple[str, bool, str]:
        """A key that tells the items of one list apart; a folder may be named like the control of another model."""
        return self.spec.name, self.spec.random_weights, self.calibration


def work_list(specs: Iterable[ModelSpec], calibrations: Sequence[str], *, controls: bool = False) -> list[Item]:
    """Return every measurement once: model by model in the order given, each on every calibration.

    controls: behind each model comes its control, which has random weights.

    Example:
        >>> specs = [ModelSpec(name="a", hub="org/a"), ModelSpec(name="b", hub="org/b")]
        >>> [item.spec.name for item in work_list(specs, ["core"], controls=True)]
        ['a', 'a@random-weights', 'b', 'b@random-weights']
    """
    models = [model for spec in specs for model in ([spec, spec.control()] if controls else [spec])]
    items = (Item(model, calibration) for model in models for calibration in calibrations)
    return list({item.key: item for item in items}.values())


@dataclass(frozen=True)
class Shard:
    """A share of a work list.

    Example:
        >>> Shard.parse("1/3").of(["a", "b", "c", "d", "e"])
        ['b', 'e']
    """

    index: int
    """The number of the shard, from 0."""
    count: int
    """The number of shards."""

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Return the shard that `i/n` names. Raises OptionError."""
        match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
        if match is None or not int(match[1]) < int(match[2]):
            raise OptionError(
                f"--shard {shorten(repr(text))} names no shard: it is i/n, with i from 0 to n - 1. Of four jobs, the "
                "first has --shard 0/4, and the last --shard 3/4."
            )
        return cls(int(match[1]), int(match[2]))

    def of(self, work: Sequence[T]) -> list[T]:
        """Return the items of the work list that belong to this shard."""
        return list(work[self.index :: self.count])

    def line(self, work: Sequence[Item]) -> str:
        """Return one line about which of the measurements are this shard's."""
        names = ", ".join(dict.fromkeys(item.spec.name for item in self.of(work)))
        return f"shard {self}: {len(self.of(work))} of {len(work)} measurements{f': {names}' if names else ''}"

    def __str__(self) -> str:
        """Return it as the command line has it."""
        return f"{self.index}/{self.count}"
