"""Result of the reduction for one layer: its spectrum, and averages over tokens. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

TOP_K = 8
"""Number of directions kept per layer, the `top_k` of the reference script."""


@dataclass(frozen=True)
class LayerStatistics:
    """Statistics of one layer's updates, enough for every layer metric.

    Example:
        >>> averages = {"update_norm": (1.0, 0.0)}
        >>> layer = LayerStatistics(4, 2, np.array([3.0, 1.0]), averages, mean_energy=0.1, epsilon=1.2e-7)
        >>> layer.energies.tolist()
        [0.75, 0.25]
    """

    tokens: int
    """Number of tokens that enter."""
    hidden: int
    """Width of the stream."""
    eigenvalues: Float64[np.ndarray, " rank"]
    """Squared singular values of delta, descending, min(tokens, hidden) of them; those below rounding are 0. For all
    units but one group: the remaining energy along each direction, in the same order."""
    averages: Mapping[str, tuple[float, float]]
    """Mean and standard deviation over tokens of each of `moments.TOKEN_QUANTITIES`."""
    mean_energy: float
    """Share of the energy that lies in the mean update."""
    epsilon: float
    """Machine epsilon of the dtype in which the stream was computed."""
    between: tuple[float, float] | None = None
    """Sums of tr G_a tr G_b and of tr G_a G_b over all pairs of different groups of units, where G_a is the Gram
    matrix of the updates of group a; None where there is one group. Where the variant is centred, the estimates of
    (tr Sigma)^2 and tr Sigma^2 of `disjoint.centred_pairs`; None with fewer than four groups, and of a half."""

    @property
    def energies(self) -> Float64[np.ndarray, " rank"]:
        """p_i, the share of each direction in the energy of the updates; they sum to 1."""
        return np.asarray(self.eigenvalues / self.eigenvalues.sum())
