"""The program delta-suite with one thing changed, which the environment names, for tests that torchrun starts."""

from __future__ import annotations

import os
import sys
from typing import Any

from delta_suite.__main__ import main
from delta_suite.capture.stream import Memory
from delta_suite.reduction.passes import Passes

FAILS, ROOM = "TEST_FAILS", "TEST_ROOM"
"""Variables that name the process that fails in the middle, and the bytes that a stream may take."""


def change() -> None:
    """Change what the environment names."""
    if FAILS in os.environ:
        run = Passes._reduce

        def reduce(self: Passes, *arguments: Any) -> None:
            if os.environ["RANK"] == os.environ[FAILS]:
                raise ValueError("this process was told to fail")
            run(self, *arguments)

        Passes._reduce = reduce  # type: ignore[method-assign]
    if ROOM in os.environ:
        room = Memory(int(os.environ[ROOM]))
        Memory.free = classmethod(lambda cls, device, share=0.5: room)  # type: ignore[method-assign,assignment]


if __name__ == "__main__":
    change()
    sys.argv[0] = "delta-suite"
    main()
