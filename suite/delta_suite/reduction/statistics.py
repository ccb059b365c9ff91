"""What the reduction leaves of one layer: its spectrum, and averages over tokens. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

TOP_K = 8
"""Directions kept per layer, the reference's `top_k`."""


@dataclass(frozen=True)
class LayerStatistics:
    """What the core keeps of one layer's update: enough for every layer metric."""

    tokens: int
    hidden: int
    eigenvalues: Float64[np.ndarray, " rank"]
    """Squared singular values of delta, descending, min(tokens, hidden) of them; rounded-away ones are 0. Without a
    group of documents: what is left of each, in the same order."""
    averages: Mapping[str, tuple[float, float]]
    """Mean and standard deviation over tokens: see `moments.TOKEN_QUANTITIES`."""
    mean_energy: float
    """Share of the energy that lies in the mean update."""
    epsilon: float
    """Machine epsilon of the dtype that the stream was computed in."""
    between: tuple[float, float] | None = None
    """Sums over all pairs of different groups of documents, of tr G_a tr G_b and of tr G_a G_b, G_a the Gram matrix of
    the updates of group a; None where there is one group."""

    @property
    def energies(self) -> Float64[np.ndarray, " rank"]:
        """p_i, the share of each direction in the update's energy; sums to 1."""
        return np.asarray(self.eigenvalues / self.eigenvalues.sum())
