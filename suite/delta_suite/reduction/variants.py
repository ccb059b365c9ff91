"""Which rows enter the spectra, and how. No torch here: hypothesis files name variants."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Variant:
    """One choice of rows. All variants of a measurement come from the same forward pass."""

    name: str
    keeps_sinks: bool
    """Whether sinks enter: position 0 of each sequence, and tokens whose state has a very large norm in some layer."""
    centre: bool
    """Whether the rows are taken less their mean."""
    description: str
    version: int = 1
    """Raised when the choice of rows changes. Figures of different versions are not compared."""


VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("raw", True, False, "every token that the calibration keeps"),
        Variant(
            "sink_free",
            False,
            False,
            "without position 0 of each sequence, and without tokens whose state exceeds 6 times the median norm",
        ),
        Variant("centred", False, True, "the rows of sink_free, less their mean", version=2),
    )
}
"""Every variant by name. `centred` of version 1 took all rows, sinks among them, less their mean."""
