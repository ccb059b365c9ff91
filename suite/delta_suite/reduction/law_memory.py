"""Plan of the law's memory: where its sums lie, and which layers are summed at once. It decides time, and no figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from delta_suite.capture.stream import Memory, Storage, gib
from delta_suite.errors import DeviceError
from delta_suite.models.phases import PhaseMap
from delta_suite.reduction.lanes import rows_at_once
from delta_suite.reduction.law_sums import SETS, Home, Maps

LAW_SHARE = 0.75
"""Share of what is free, beside the stream, that the law may take."""

MATRICES = 3 * SETS + len(Maps.KINDS)
"""Matrices of k x k for each layer: three sums for each set of documents, and six maps of one fit."""

WORKSPACE_MATRICES = 24
"""Most matrices of k x k for each layer that one step holds beside those, on the device."""

WORKSPACE_BYTES = 1 << 30
"""Most bytes of them where a step takes several layers; more layers in a step gave no speed-up."""

ROW_COPIES = 10
"""Copies of a block of rows in float64 while it is added to the sums."""

FEWEST_ROWS = 256
"""Smallest block of rows."""

BASIS_MATRICES = 12
"""Matrices of d x d while principal components are sought: the pool, those of one layer, and one eigenproblem."""

FEWEST_LAYERS = 4
"""Smallest number of layers to be summed at once: the ridge is chosen on as many, and transfer needs pairs."""


@dataclass(frozen=True)
class Portion:
    """Layers that are summed together, and what is fitted from their sums."""

    layers: list[int]
    phases: PhaseMap
    """The phases among them whose shared maps are fitted here."""
    fits: bool = True
    """True if maps are fitted; False where the sums serve the choice of the ridge alone."""
    chooses_ridge: bool = False

    @property
    def inside(self) -> PhaseMap:
        """The phases, as places among these layers."""
        place = self.layers.index
        return {name: (place(first), place(last)) for name, (first, last) in self.phases.items()}


@dataclass(frozen=True)
class Plan:
    """How the law is fitted in the memory at hand."""

    layers: int
    phases: PhaseMap
    folds: Sequence[Sequence[int]]
    """The folds whose sums are formed in one pass over the stream."""
    home: Home
    """Place of the sums and maps."""
    layers_at_once: int
    """Number of layers whose sums the place holds."""
    layers_a_step: int
    """Number of layers of a step of the algebra."""
    rows: int
    """Number of rows that are added to the sums at a time."""
    holds: bool
    """True if the sums of a fit about its training means stay on the device, in which they are needed three times."""
    basis_layers: int
    """Number of layers whose products are held while principal components of several shards are sought."""

    def portions(self, ridge_layers: Sequence[int]) -> Iterator[Portion]:
        """Yield the portions of the model: all of it where its sums fit; else phases, then pairs of parts."""
        if self.layers_at_once >= self.layers:
            yield Portion(list(range(self.layers)), self.phases, chooses_ridge=True)
            return
        yield Portion(list(ridge_layers), {}, fits=False, chooses_ridge=True)
        for name, (first, last) in self.phases.items():
            if last > first:
                yield Portion(list(range(first, last + 1)), {name: (first, last)})
        half = self.layers_at_once // 2
        parts = [list(range(start, min(start + half, self.layers))) for start in range(0, self.layers, half)]
        for one, other in combinations(parts, 2):
            yield Portion(one + other, {})


def law_bytes(layers: int, k: int, bases: int) -> tuple[int, int]:
    """Return the bytes of the sums and maps of all layers at once, and of the algebra of a step beside them."""
    step = WORKSPACE_MATRICES * 8 * k**2
    return bases * MATRICES * 8 * k**2 * layers, step * max(1, min(layers, WORKSPACE_BYTES // step))


def plan_law(
    layers: int, hidden: int, k: int, tokens: int, phases: PhaseMap, device: torch.device, memory: Memory | None
) -> Plan:
    """Return the plan of a law over `tokens` rows in k dimensions.

    Raises DeviceError where the device has no room for the algebra of one layer, or no place for the sums of a phase.
    """
    memory = memory or Memory.free(device, LAW_SHARE)
    step, sums, square = WORKSPACE_MATRICES * 8 * k**2, MATRICES * 8 * k**2, 8 * hidden**2
    row = ROW_COPIES * 8 * hidden
    rows = min(tokens, rows_at_once(hidden), max(FEWEST_ROWS, memory.device // 4 // row))
    least = max(step, BASIS_MATRICES * square if k < hidden else 0) + rows * row
    if least > memory.device:
        raise DeviceError(
            f"the law needs {gib(least)} on {device} for one layer of {hidden} dimensions. May be taken: {memory}. "
            f"Use a device with more memory, or leave out the claims about the law."
        )
    basis_layers = 1 + (memory.device - least) // (4 * square)

    def plan(place: Storage, steps: int, *, apart: bool) -> Plan:
        room = dict(memory.places)[place] - (steps * step + rows * row if place == "device" else 0)
        home = Home(device if place == "device" else torch.device("cpu"), place)
        folds = ((0,), (1,)) if apart else ((0, 1),)
        bases = 1 if apart or k == hidden else 2
        holds = steps >= layers or (place == "device" and room >= layers * (bases * sums + 3 * 8 * k**2))
        return Plan(layers, phases, folds, home, room // (bases * sums), steps, rows, holds, basis_layers)

    steps = max(1, min(layers, WORKSPACE_BYTES // step, memory.device // 2 // step))
    for place, _ in memory.places:
        for apart in (False, True) if k < hidden else (False,):
            whole = plan(place, steps, apart=apart)
            if whole.layers_at_once >= layers:
                return whole
    by_phase = max((plan(place, 1, apart=k < hidden) for place, _ in memory.places), key=lambda p: p.layers_at_once)
    largest = max([last - first + 1 for first, last in phases.values()] + [min(FEWEST_LAYERS, layers)])
    if by_phase.layers_at_once < largest:
        raise DeviceError(
            f"the law needs {gib(largest * sums)} for the sums over documents of {largest} layers (the largest phase) "
            f"in {k} dimensions, and {gib(step + rows * row)} on {device} beside them. May be taken: {memory}. Set "
            f"TMPDIR to a folder of a larger disk, use a machine with more memory, or leave out the claims about the "
            f"law."
        )
    return by_phase
