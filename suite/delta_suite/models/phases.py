"""Phase maps: named, contiguous, inclusive ranges of layers; declared per model, or by depth.

Phases never enter the measurement of layers, so a stored record can be judged again under another map.
"""

import re
from collections.abc import Mapping
from itertools import pairwise

from delta_suite.errors import ModelsFileError

PhaseMap = dict[str, tuple[int, int]]
"""Phase name -> (first layer, last layer), both inclusive, in the order of the layers."""

DEFAULT_64: PhaseMap = {
    "A": (0, 6),
    "B": (7, 9),
    "C": (10, 31),
    "D": (32, 46),
    "E": (47, 58),
    "tail": (59, 63),
}
"""The map of a model of 64 layers: the one published for Qwen3-32B (reference script)."""

DEFAULT_FRACTIONS: tuple[tuple[str, float], ...] = (
    ("A", 0.11),
    ("B", 0.15),
    ("C", 0.5),
    ("D", 0.75),
    ("E", 0.92),
)
"""Any other depth: layer L of N is in the first phase whose bound is above L / N, else in the last."""

LAST_PHASE = "tail"

UNDECLARED = "-"
"""What `phase_of` answers for a layer that a declared map leaves out; never the name of a phase."""


PHASE_NAME = r"[A-Za-z][A-Za-z0-9_-]*"
"""What models.toml may call a phase, so that the scope of a claim can name it."""


def declared_problems(declared: Mapping[str, tuple[int, int]]) -> list[str]:
    """What is wrong with a declared map, whatever the depth of its model; empty when nothing is."""
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


def phase_map(layers: int, declared: Mapping[str, tuple[int, int]] | None = None) -> PhaseMap:
    """The phases of a model with `layers` blocks, ordered by layer, empty phases absent.

    A declared map may leave layers out: they belong to no phase. Raises `ModelsFileError` where it
    overlaps itself or reaches past the last layer.
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
                "Correct `phases` of the model's entry in models.toml, or take it out to divide by depth."
            )
        return dict(sorted(declared.items(), key=lambda item: item[1]))
    if layers == 64:
        return dict(DEFAULT_64)
    phases: PhaseMap = {}
    for layer in range(layers):
        # A quotient and a decimal literal round alike: L / N on a bound (3 / 20 < 0.15) is in the next phase.
        name = next((name for name, bound in DEFAULT_FRACTIONS if layer / layers < bound), LAST_PHASE)
        phases[name] = (phases.get(name, (layer, layer))[0], layer)
    return phases


def phase_of(layer: int, phases: Mapping[str, tuple[int, int]]) -> str:
    """The phase that holds `layer`, or "-" (`UNDECLARED`) where a declared map leaves the layer out."""
    return next((name for name, (first, last) in phases.items() if first <= layer <= last), UNDECLARED)
