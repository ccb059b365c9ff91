"""Sections of a record that no metric needs, and plots do: so that a page can be built from records alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from delta_suite.metrics.registry import DirectionGram
from delta_suite.reduction.statistics import LayerStatistics

SHARES = 64
"""Energy shares kept per layer: what lies beyond is a tail that a plot does not show, and a record need not hold."""

COSINE_DECIMALS = 4
SHARE_DIGITS = 5
"""Significant. Both keep less than the metrics have: they are for the eye, and no verdict reads them."""

Triangle = tuple[tuple[float | None, ...], ...]
"""Row L holds the pairs (L, L + 1) to (L, N - 1), for L from 0 to N - 2."""

Shares = tuple[tuple[float, ...], ...]
"""One row a layer, p_1 first; an empty row where the update is zero."""


def cosine_triangle(gram: DirectionGram) -> Triangle:
    """|v_L . v_M| above the diagonal; null where a layer's update is zero, so that it has no direction."""
    cosines = np.minimum(np.abs(gram.cosines), 1.0)
    without = set(gram.without_direction(range(gram.layers)))
    return tuple(
        tuple(
            None if {first, second} & without else round(float(cosines[first, second]), COSINE_DECIMALS)
            for second in range(first + 1, gram.layers)
        )
        for first in range(gram.layers - 1)
    )


def energy_shares(layers: Sequence[LayerStatistics]) -> Shares:
    """The first p_i = sigma_i^2 / sum sigma^2 of each layer; those rounded away to 0 are left out."""
    return tuple(
        tuple(float(f"{share:.{SHARE_DIGITS}g}") for share in layer.energies[:SHARES] if share > 0)
        if layer.eigenvalues.sum() > 0
        else ()
        for layer in layers
    )


def plot_sections(
    grams: Mapping[str, DirectionGram], statistics: Mapping[str, Sequence[LayerStatistics]]
) -> dict[str, dict[str, Triangle] | dict[str, Shares]]:
    """The fields `cosines` and `spectra` of a record, by variant."""
    return {
        "cosines": {variant: cosine_triangle(gram) for variant, gram in grams.items()},
        "spectra": {variant: energy_shares(layers) for variant, layers in statistics.items()},
    }
