"""Check the shapes that annotated functions of the core state, at run time, each combination of them once.

jaxtyping reads the annotations and beartype checks them. Whether they hold depends on the types and shapes of what a
function takes and returns, and on nothing else, so that a call like an earlier one is not checked again: half of the
time of the tests of a reduction went into that.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jaxtyping
from beartype import beartype

ROOMS = (
    "delta_suite.reduction",
    "delta_suite.metrics",
    *(f"delta_suite.capture.{name}" for name in ("residual", "stream", "sinks", "tap", "forward", "intervene")),
)
"""Modules whose functions are checked."""


def install() -> None:
    """Check the modules that are imported from now on."""
    jaxtyping.jaxtyped = partial(_decorated, jaxtyping.jaxtyped)
    jaxtyping.install_import_hook(list(ROOMS), f"{__name__}.checked")


def switch(*, on: bool) -> None:
    """Check calls from now on, or leave them alone."""
    jaxtyping.config.update("jaxtyping_disable", not on)


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that checks its arguments, but for those like earlier ones."""
    checking, seen = beartype(function), set[tuple[object, ...]]()

    def check(*args: Any, **kwargs: Any) -> Any:
        values = (*args, *kwargs.values())
        if any(isinstance(value, list | tuple | dict | set) for value in values):
            return checking(*args, **kwargs)
        call = (*kwargs, *map(_kind, values))
        if call in seen:
            return function(*args, **kwargs)
        returned = checking(*args, **kwargs)
        seen.add(call)
        return returned

    return check


def _kind(value: Any) -> object:
    """Return all of a value that an annotation speaks of, but for what a container holds."""
    shape = getattr(value, "shape", None)
    if shape is not None:
        return type(value), getattr(value, "dtype", None), shape
    return value if isinstance(value, str) else type(value)


def _decorated(jaxtyped: Callable[..., Any], function: Any = None, **options: Any) -> Any:
    """Decorate as jaxtyping does, but for functions inside functions, which name no shapes.

    It would write and compile new checks each time that the outer function runs, a millisecond, also where shapes are
    not checked.
    """
    if function is None:
        return partial(_decorated, jaxtyped, **options)
    return function if "<locals>" in getattr(function, "__qualname__", "") else jaxtyped(function, **options)
