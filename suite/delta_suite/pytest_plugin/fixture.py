"""The `measurement` fixture of plain tests, and the explanation of a failed assert on its numbers."""

from __future__ import annotations

from sys import modules
from typing import TYPE_CHECKING

import pytest

from delta_suite.pytest_plugin.printing import outcome_or_fail
from delta_suite.pytest_plugin.session import SESSION

if TYPE_CHECKING:
    from delta_suite.api import Measurement

_MIRRORED = {">=": "<=", "<=": ">=", ">": "<", "<": ">"}


@pytest.fixture(scope="session")
def measurement(request: pytest.FixtureRequest) -> Measurement:
    """Return the measurement of each --model in turn; a model is measured once in a run."""
    from delta_suite.api import Measurement

    outcome = outcome_or_fail(request.config.stash[SESSION].outcome, request.param)
    return Measurement(outcome.view, outcome.path)


def pytest_assertrepr_compare(config: pytest.Config, op: str, left: object, right: object) -> list[str] | None:
    """Explain a failed comparison with an observed number: both values, and the values of each layer."""
    observing = modules.get("delta_suite.claims.observe")  # not imported yet: then neither side is a Quantity
    if observing is None:
        return None
    from delta_suite.publish.explanation import quantity_lines

    sides = [side for side in (left, right) if isinstance(side, observing.Quantity)]
    if not sides:
        return None
    width = config.stash[SESSION].width
    lines = (
        [f"{float(left):.6g} {op} {float(right):.6g}"]
        if isinstance(left, float | int) and isinstance(right, float | int)
        else [f"{left!r} {op} {right!r}"]
    )
    for side in sides:
        lines += quantity_lines(side.observation, op if side is left else _MIRRORED.get(op, op), width)
    return lines
