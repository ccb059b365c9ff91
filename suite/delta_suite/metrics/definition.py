"""Define a metric: its name, formula, unit, range, scope and version, and the function that computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

Scope = Literal["layer", "pair", "phase", "model"]
"""The scope that a metric describes; `model` is the whole model under its phase map."""

Source = Literal["tokens", "spectrum", "directions", "law", "boundaries", "stream", "causes", "damage"]
"""The input that a metric is computed from."""

Bias = Literal["replicates", "halves", "groups", "none"]
"""How a metric's bias is estimated and removed: see `intervals.with_interval`."""

PART_OF: dict[Source, str] = {
    "tokens": "spectra",
    "spectrum": "spectra",
    "directions": "spectra",
    "law": "law",
    "boundaries": "boundaries",
    "stream": "stream",
    "causes": "causal",
    "damage": "damage",
}
"""The part of a measurement that provides each source."""


@dataclass(frozen=True)
class Metric:
    """A metric: one row of the reference table, and the function that computes it."""

    name: str
    scope: Scope
    takes: Source
    formula: str
    unit: str
    """The unit; "1" for a number without one."""
    low: float
    high: float
    """The range that the formula allows; bounds that depend on the hidden size or the depth are infinite."""
    source: str
    """The source of the formula."""
    version: int
    """The version, which is raised when the numbers change for the same input."""
    per_layer: bool
    """True where a phase's value comes with one number per layer; always true of layer and pair metrics."""
    compute: Callable[..., Any] = field(repr=False)
    adjacent: bool
    """True for a pair metric that takes neighbouring layers only."""
    bias: Bias
    most: float | Literal["rank", "layers"] = math.inf
    """The largest value where the range has no upper end: the smaller of tokens and hidden size, the number of layers
    of the phase, or a number. Corrected values and intervals may exceed it."""
    p_value: bool = False
    """True if the figure is a p-value: one above the level asked for is no evidence against the claim."""

    @property
    def part(self) -> str:
        """The part of a measurement that this metric needs, such as spectra or law."""
        return PART_OF[self.takes]


DEFINED: dict[str, Metric] = {}
"""Every metric whose module has been imported, by name; `registry.METRICS` imports them all."""

_Function = TypeVar("_Function", bound=Callable[..., Any])


def metric(
    scope: Scope,
    formula: str,
    *,
    takes: Source,
    unit: str = "1",
    low: float = 0.0,
    high: float = math.inf,
    source: str = "",
    version: int = 1,
    per_layer: bool = True,
    adjacent: bool = False,
    bias: Bias | None = None,
    most: float | Literal["rank", "layers"] = math.inf,
    p_value: bool = False,
) -> Callable[[_Function], _Function]:
    """Return a decorator that registers a function as the metric of its name, and returns it unchanged."""

    def register(function: _Function) -> _Function:
        name = function.__name__
        removed = bias or ("replicates" if takes == "spectrum" else "halves")
        DEFINED[name] = Metric(
            name,
            scope,
            takes,
            formula,
            unit,
            low,
            high,
            source,
            version,
            per_layer,
            function,
            adjacent,
            removed,
            most,
            p_value,
        )
        return function

    return register
