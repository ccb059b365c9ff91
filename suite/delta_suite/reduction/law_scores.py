"""What fitting the update law leaves: held-out scores of every map and layer. No torch: `law_fit` does the fitting."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from delta_suite.models.phases import PhaseMap

RUNGS = ("scaled", "shared", "rank_one", "own")
"""The ladder above the training mean: c_L h; c_L T^(-L) h; that and v_L w^T h; the layer's own T_L h."""


@dataclass(frozen=True)
class Law:
    """R^2 and shares, held out, of every layer. The first axis is (all documents, then without group 0 .. 9)."""

    phases: PhaseMap
    """The phases whose layers share a map: the shared rungs hold for these and no others."""
    form: str
    tokens: int
    """That enter: those of `sink_free`."""
    documents: int
    hidden: int
    components: int
    """k: dimensions of x and delta that the maps act in; `hidden` where nothing is left out."""
    ridge: tuple[float, float]
    """mu of the maps trained on even and on odd documents, relative to the mean eigenvalue of A."""
    r2: Mapping[str, Float64[np.ndarray, "cases layers"]]
    """By rung; NaN where a phase of one layer has no shared map, and of a layer whose update does not vary."""
    share: Float64[np.ndarray, "cases layers"]
    """Held-out energy of the residual after the shared map along v_L, over all its energy."""
    transfer: Float64[np.ndarray, "cases layers layers"]
    """R^2 on layer L (first) of layer M's map with its best gain; own R^2 on the diagonal."""
    gains: Float64[np.ndarray, " layers"]
    """c_L, the mean of the two folds."""
    captured: Float64[np.ndarray, " layers"]
    """Share of delta's held-out energy inside its k dimensions."""
    directions: Float64[np.ndarray, "folds layers hidden"]
    """v_L of the residual, from even and from odd documents."""
    reason: str | None = None
    """Why nothing was measured; the arrays are then empty."""

    @classmethod
    def absent(
        cls, reason: str, phases: PhaseMap, *, form: str = "normalised", tokens: int, documents: int, hidden: int
    ) -> Law:
        """A law that was not measured, and why."""
        empty = np.zeros((0, 0))
        return cls(
            dict(phases), form, tokens, documents, hidden, 0, (0.0, 0.0), dict.fromkeys(RUNGS, empty), empty,
            np.zeros((0, 0, 0)), np.zeros(0), np.zeros(0), np.zeros((0, 0, 0)), reason,
        )  # fmt: skip
