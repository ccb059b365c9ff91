"""Statistics of one state h_L, enough for every metric of the part `stream`. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

LINEAR, TOKENWISE = "linear", "tokenwise"
"""The maps that are fitted from a state to the update: see reduction/states.py."""


@dataclass(frozen=True)
class StateStatistics:
    """Figures of one state in one variant: of all units, or without one group of them."""

    eigenvalues: Float64[np.ndarray, " rank"]
    """Squared singular values of the states, descending."""
    norms: tuple[float, float] | None = None
    """The mean norm at position 0, and the median norm of the other tokens; None where a side has no token."""
    angle: tuple[float, float] | None = None
    """Mean and standard deviation of the angle between successive steps of a document; None where no three tokens
    follow each other."""
    unexplained: Mapping[str, float] = field(default_factory=dict)
    """Summed squares of what a fitted map leaves of the update, held out, by the name of the map."""
    energy: tuple[float, float] = (0.0, 0.0)
    """Summed squares of the update and of the state after the block, about their mean in the other half."""
    not_fitted: str | None = None
    """Why no map is fitted."""


@dataclass(frozen=True)
class StateLayer:
    """One state in one variant: of all units, without each group of them, and without each group of documents."""

    whole: StateStatistics
    replicates: tuple[StateStatistics, ...] = ()
    documents: tuple[StateStatistics, ...] = ()
