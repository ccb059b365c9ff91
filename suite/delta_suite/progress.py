"""Progress: bars with rates and time left on a terminal, silence elsewhere."""

from __future__ import annotations

import os
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from delta_suite.escaping import terminal

SCALED_FROM = 10_000
"""Length of a step from which its figures are shown in thousands, millions, and so on."""


class Progress(Protocol):
    """Shows how far a step is: entered with what it does and its length, told with `update(n)` what was done."""

    def __call__(self, what: str, total: int, unit: str) -> AbstractContextManager[Any]: ...


class _Silent:
    def update(self, done: int) -> None:
        """Nothing to show."""


def no_progress(what: str, total: int, unit: str) -> AbstractContextManager[_Silent]:
    """Show nothing."""
    return nullcontext(_Silent())


def bars() -> Progress:
    """tqdm bars where stderr is a terminal. Where it is not, the loading bars of transformers are silenced, too."""
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        return no_progress

    def bar(what: str, total: int, unit: str) -> AbstractContextManager[Any]:
        from tqdm import tqdm

        thousands = total >= SCALED_FROM
        return tqdm(desc=terminal(what), total=total, unit=unit, unit_scale=thousands, leave=False, dynamic_ncols=True)

    return bar
