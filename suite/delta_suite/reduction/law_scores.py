"""Result of fitting the update law: held-out scores of every map and layer. No torch: `law_fit` does the fitting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from delta_suite.models.phases import PhaseMap

RUNGS = ("scaled", "shared", "rank_one", "own")
"""The ladder above the training mean: c_L h; c_L T^(-L) h; that plus v_L w^T h; T_L h, the map of the layer itself."""

CONSTANTS = ("shared_mean", "own_mean")
"""The rungs below, on which an update is the same for every token: c_L m^(-L), and the layer's own training mean."""


@dataclass(frozen=True)
class Law:
    """Held-out R^2 and shares of every layer. The axis `cases` is all units, then all without group 0 .. 9."""

    phases: PhaseMap
    """The phases whose layers share a map: the shared rungs hold for these and no others."""
    tokens: int
    """Number of tokens that enter: those of `sink_free`."""
    documents: int
    """Number of documents of which a token enters."""
    hidden: int
    """Width of the stream."""
    components: int
    """k, the number of dimensions of x and delta in which the maps act; `hidden` where they act in all."""
    ridge: tuple[float, float]
    """mu of the maps trained on half a and on half b, in multiples of the mean eigenvalue of A."""
    r2: Mapping[str, Float64[np.ndarray, "cases layers"]]
    """R^2 by rung: over the training mean, and that of CONSTANTS over an update of zero. NaN where a phase of one layer
    shares nothing, and where the update does not vary in a fold (where it is zero in one, for CONSTANTS)."""
    share: Float64[np.ndarray, "cases layers"]
    """Share along v_L in the held-out energy of the residual after the shared map."""
    transfer: Float64[np.ndarray, "cases layers layers"]
    """R^2 on layer L (second axis) of the map of layer M (third axis) with its best gain; diagonal: R^2 of T_L."""
    gains: Float64[np.ndarray, " layers"]
    """c_L, averaged over the two folds."""
    captured: Float64[np.ndarray, " layers"]
    """Share of the held-out energy of delta inside its k dimensions."""
    directions: Float64[np.ndarray, "folds layers hidden"]
    """v_L of the residual, as trained on half a and on half b."""
    reason: str | None = None
    """Reason why nothing was measured; the arrays are then empty."""

    @classmethod
    def absent(cls, reason: str, phases: PhaseMap, *, tokens: int, documents: int, hidden: int) -> Law:
        """Return a law that was not measured, with the reason."""
        empty = np.zeros((0, 0))
        rungs = dict.fromkeys((*CONSTANTS, *RUNGS), empty)
        return cls(
            dict(phases), tokens, documents, hidden, 0, (0.0, 0.0), rungs, empty,
            np.zeros((0, 0, 0)), np.zeros(0), np.zeros(0), np.zeros((0, 0, 0)), reason,
        )  # fmt: skip
