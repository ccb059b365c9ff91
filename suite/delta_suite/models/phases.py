"""Phase maps: named, contiguous, inclusive ranges of layers; declared per model, or by depth.

Phases never enter the measurement of layers, so a stored record can be judged again under another map.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import pairwise
from numbers import Integral

from delta_suite.errors import ModelsFileError

PhaseMap = Mapping[str, tuple[int, int]]
"""Phase name -> (first layer, last layer), both inclusive, in the order of the layers."""

DEFAULT_64: PhaseMap = {
    "A": (0, 6),
    "B": (7, 9),
    "C": (10, 31),
    "D": (32, 46),
    "E": (47, 58),
    "tail": (59, 63),
}
"""Map of a model of 64 layers: the one that the reference script states for Qwen3-32B; docs/phases.md."""

DEFAULT_FRACTIONS: tuple[tuple[str, float], ...] = (
    ("A", 0.11),
    ("B", 0.15),
    ("C", 0.5),
    ("D", 0.75),
    ("E", 0.92),
)
"""Upper bounds of the phases for any other depth: layer L of N is in the first phase whose bound is above L / N."""

LAST_PHASE = "tail"
"""Phase of the layers above every bound."""

UNDECLARED = "-"
"""Result of `phase_of` for a layer that a declared map omits; never the name of a phase."""

PHASE_NAME = r"[A-Za-z][A-Za-z0-9_-]*"
"""Pattern of the phase names that models.toml may declare, so that the scope of a claim can name each of them."""


def declared_problems(declared: PhaseMap) -> list[str]:
    """Return the problems of a declared map that any depth of the model would have; empty if there are none.

    Example:
        >>> declared_problems({"A": (0, 6), "B": (5, 9)})
        ['phases A = [0, 6] and B = [5, 9] overlap']
    """
    for name, ends in declared.items():
        pair = isinstance(ends, tuple | list) and len(ends) == 2 and all(isinstance(end, Integral) for end in ends)
        if not isinstance(name, str) or not pair:
            return [f"phase {name} = {ends!r} is no pair of layers: write the first and the last"]
    problems = []
    for name, (first, last) in declared.items():
        if not re.fullmatch(PHASE_NAME, name):
            problems.append(f"phase name {name!r} may hold letters, digits, - and _ alone, a letter first")
        if name == "model":
            problems.append("phase name 'model' is the scope of a claim on the whole model")
        if first < 0:
            problems.append(f"phase {name} = [{first}, {last}] starts below layer 0")
        if last < first:
            problems.append(f"phase {name} = [{first}, {last}] ends before it starts")
    ordered = sorted(declared.items(), key=lambda item: item[1])
    for (name, (first, last)), (other, (start, end)) in pairwise(ordered):
        if start <= last:
            problems.append(f"phases {name} = [{first}, {last}] and {other} = [{start}, {end}] overlap")
    return problems


def phase_map(layers: int, declared: PhaseMap | None = None) -> PhaseMap:
    """Return the phases of a model with `layers` blocks, ordered by layer, without empty phases.

    A declared map may omit layers: they belong to no phase.

    Raises:
        ModelsFileError: the declared map overlaps itself or reaches past the last layer.
        ValueError: `layers` is below 1.

    Example:
        >>> phase_map(12)
        {'A': (0, 1), 'C': (2, 5), 'D': (6, 8), 'E': (9, 11)}
    """
    if layers < 1:
        raise ValueError(f"a model has at least one layer, not {layers}")
    if declared is not None:
        problems = declared_problems(declared)
        problems += [
            f"phase {name} = [{first}, {last}] reaches past the last layer, {layers - 1} of {layers}"
            for name, (first, last) in declared.items()
            if last >= layers
        ]
        if problems:
            raise ModelsFileError(
                "the declared phase map does not fit the model: " + "; ".join(problems) + ". "
                "Correct `phases`, in models.toml or where it is given, or take it out to divide by depth."
            )
        return dict(sorted(declared.items(), key=lambda item: item[1]))
    if layers == 64:
        return dict(DEFAULT_64)
    phases: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        # A quotient and a decimal literal round alike: L / N on a bound (3 / 20 < 0.15) is in the next phase.
        name = next((name for name, bound in DEFAULT_FRACTIONS if layer / layers < bound), LAST_PHASE)
        phases[name] = (phases.get(name, (layer, layer))[0], layer)
    return phases


def phase_of(layer: int, phases: PhaseMap) -> str:
    """Return the phase that holds `layer`, or "-" (`UNDECLARED`) if the map omits the layer.

    Example:
        >>> phase_of(3, {"early": (0, 3)}), phase_of(4, {"early": (0, 3)})
        ('early', '-')
    """
    return next((name for name, (first, last) in phases.items() if first <= layer <= last), UNDECLARED)
