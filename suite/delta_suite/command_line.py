"""What both front doors, `delta-suite` and pytest, check of their command lines."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

EMPTY_VALUE = "is empty: is a shell variable not set? Give it a value, or leave it out."
"""The end of the message about an option or argument without a value."""


def empty_options(words: Iterable[str]) -> Iterator[str]:
    """Yield the options of a command line whose value is empty, and "" for an empty argument.

    A shell produces them from a variable that is not set; as a path an empty word would be the current folder.

    Example:
        >>> list(empty_options(["--model=", "--device", "", "a"]))
        ['--model', '--device']
    """
    for before, word in pairwise(["", *words]):
        if word.startswith("--") and word.endswith("="):
            yield word.removesuffix("=")
        elif not word:
            yield before if before.startswith("--") else ""
