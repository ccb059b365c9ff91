"""The words about who contributed a record: a handle, the hardware, and a note."""

from __future__ import annotations

import re

HANDLE = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,38}[A-Za-z0-9_])?")
"""Form of a handle: what GitHub (39 letters, digits and hyphens) and the Hugging Face hub allow."""

LONGEST = {"hardware": 200, "note": 500}
"""Most characters of what is said beside the handle: it stands in a cell of a table."""


def submitter_problem(handle: str, hardware: str | None, note: str | None) -> str | None:
    """Return what is wrong with the words about a submitter, or None.

    Example:
        >>> submitter_problem("ada", "2 x H100", None), submitter_problem("a b", None, None)
        (None, "'a b' cannot be a handle: write letters, digits, '-', '_' or '.', at most 40")
    """
    if not HANDLE.fullmatch(handle):
        return f"{handle[:60]!a} cannot be a handle: write letters, digits, '-', '_' or '.', at most 40"
    for name, words in (("hardware", hardware), ("note", note)):
        if words is not None and (not words.strip() or len(words) > LONGEST[name] or not words.isprintable()):
            return f"the {name} is not one line of 1 to {LONGEST[name]} characters"
    return None
