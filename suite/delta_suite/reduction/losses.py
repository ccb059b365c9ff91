"""Losses of interventions over groups of units: what the metrics of causes are formed from. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

from delta_suite.capture.units import Units
from delta_suite.models.phases import PhaseMap

UNDISTURBED = "undisturbed"
"""The name of the pass in which nothing is changed."""

CAUSAL_PHASES = ("C", "E")
"""The phases in which the causes of the loss are sought: those that the two predictions are about."""

CONDITIONS = ("zero", "kept", "shared", "matched", "random", "mean", "law")
"""Names of what is done to all blocks of a phase at once: see reduction/causal_fit.py."""

ONE_HALF = "needs two halves of documents, one to fit on and one to measure; the calibration is one document"
"""The reason why causes are not measured where there is one document."""


def causal_phases(phases: PhaseMap) -> PhaseMap:
    """Return those of the phases in which causes are measured.

    Example:
        >>> causal_phases({"A": (0, 1), "C": (2, 5)})
        {'C': (2, 5)}
    """
    return {name: phases[name] for name in CAUSAL_PHASES if name in phases}


@dataclass(frozen=True)
class Losses:
    """Sums of the loss by condition and group of units, and the number of tokens that they are over."""

    conditions: tuple[str, ...]
    """UNDISTURBED, and the names of the interventions."""
    nats: Float64[np.ndarray, "conditions groups"]
    """NaN throughout for an intervention with which the model does not run."""
    tokens: Float64[np.ndarray, " groups"]
    """Predicted tokens of each group; 0 for a group of which no document ran."""
    documents: Losses | None = None
    """Sums by group of documents, for the narrower question, where it is asked."""

    @classmethod
    def of_documents(
        cls,
        conditions: Sequence[str],
        nats: Float64[np.ndarray, "conditions documents"],
        tokens: Float64[np.ndarray, " documents"],
        units: Units,
    ) -> Losses:
        """Return the losses of documents, added up over the groups of their units."""

        def over(groups: Sequence[int], count: int) -> tuple[np.ndarray, np.ndarray]:
            member = np.equal.outer(np.array(groups), np.arange(count)).astype(np.float64)
            return nats @ member, tokens @ member

        names = tuple(conditions)
        narrower = None
        if units.documents:
            narrower = cls(names, *over(units.documents, units.document_group_count))
        return cls(names, *over(units.groups, units.group_count), narrower)

    def cases(self, condition: str) -> Float64[np.ndarray, " cases"]:
        """Return the loss in nats per token over all groups, then without each of them.

        A group of which nothing ran changes nothing when it is left out.

        Example:
            >>> Losses(("undisturbed",), np.array([[2.0, 4.0]]), np.array([1.0, 1.0])).cases("undisturbed")
            array([3., 4., 2.])
        """
        nats = self.nats[self.conditions.index(condition)]
        total, tokens = nats.sum(), self.tokens.sum()
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.concatenate([[total / tokens], (total - nats) / (tokens - self.tokens)])


@dataclass(frozen=True)
class Causes:
    """Losses with the updates of a phase replaced, for each phase that they were measured in."""

    phases: PhaseMap
    """The phases, of CAUSAL_PHASES."""
    losses: Losses | None
    """Their conditions are `C.zero` and so on; None where nothing was measured."""
    documents: int = 0
    """The number of documents that ran."""
    passes: float = 0.0
    """Passes through all blocks, as many as took the same time in blocks."""
    matched: Mapping[str, float] = field(default_factory=dict)
    """By phase, the energy that the control of equal energy takes away over that of the v_L; below 1 where all of the
    spectrum below the v_L holds less."""
    no_law: Mapping[str, str] = field(default_factory=dict)
    """By phase, the reason why the law was not put in place of the updates."""
    reason: str | None = None
    """Why nothing was measured."""


@dataclass(frozen=True)
class Damage:
    """Losses with a block left out, and with neighbouring blocks exchanged."""

    losses: Losses | None
    """Their conditions are `skip.L`, and `swap.L` for blocks L and L + 1; None where nothing was measured."""
    documents: int = 0
    passes: float = 0.0
    failed: Mapping[str, str] = field(default_factory=dict)
    """By condition, the reason why the model does not run with it."""
    reason: str | None = None


def chosen_documents(units: Units, most: int) -> list[int]:
    """Return the documents whose loss is measured: `most` of them, dealt from all groups of units in turn.

    Example:
        >>> chosen_documents(Units.of(4, ["a", "a", "b", "b"]), 3)
        [0, 1, 2]
    """
    seen: dict[int, int] = {}
    ranks = []
    for document, group in enumerate(units.groups):
        seen[group] = seen.get(group, 0) + 1
        ranks.append((seen[group], group, document))
    return sorted(document for _, _, document in sorted(ranks)[:most])
