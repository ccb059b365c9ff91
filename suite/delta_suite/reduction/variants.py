"""Variants: which rows enter the spectra, and whether they are centred. No torch here: hypothesis files name variants.

`raw` takes every token, and a few sinks (tokens of very large norm) may then hold most of the energy. `sink_free`
leaves them out. `centred` takes the rows of `sink_free` less their mean. It does not centre the raw rows, because that
keeps the sinks: they lie far from any mean, and on SmolLM2-135M they hold 63%, 35% and 100% of the raw energy of layers
9, 10 and 11. The figures of `sink_free` and `centred` therefore differ by the mean update alone.

Those two also exist of what attention and the MLP write alone, as `sink_free.attention`: the sinks are the same tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from delta_suite.capture.writes import SUBLAYERS, Write


@dataclass(frozen=True)
class Variant:
    """One choice of rows. All variants of a measurement come from the same forward pass."""

    name: str
    keeps_sinks: bool
    """True if sinks enter: position 0 of each sequence, and tokens whose state has a very large norm in any layer."""
    centre: bool
    """True if the rows are taken less their mean."""
    description: str
    """The rows in words, for tables and documentation."""
    version: int = 1
    """Number that is raised when the choice of rows changes. Figures of different versions are not compared."""
    write: Write = "block"
    """The part of each update that enters: all that the block writes, or what one of its sublayers does."""

    @property
    def rows(self) -> str:
        """Name of the variant of the whole block with the same rows."""
        return self.name.partition(".")[0]


BLOCK_VARIANTS: Mapping[str, Variant] = {
    variant.name: variant
    for variant in (
        Variant("raw", True, False, "every token that the calibration keeps"),
        Variant(
            "sink_free",
            False,
            False,
            "without position 0 of each sequence, and without tokens whose state exceeds 6 times the median norm of "
            "the first 64 documents",
            version=2,
        ),
        Variant("centred", False, True, "the rows of sink_free, less their mean", version=3),
    )
}
"""The variants of whole blocks by name. `sink_free` of version 1 took the median norm of all documents, or of each
shard of a stream that memory did not hold. `centred` of version 1 took all rows, sinks among them, less their mean;
that of version 2 the rows of `sink_free` of version 1."""


def of_write(variant: str, write: str) -> str:
    """Return the name of a variant of what one sublayer writes, or of the whole block.

    Example:
        >>> of_write("sink_free", "mlp"), of_write("sink_free", "block")
        ('sink_free.mlp', 'sink_free')
    """
    return variant if write == "block" else f"{variant}.{write}"


WRITE_VARIANTS: Mapping[str, Variant] = {
    of_write(variant.name, write): replace(variant, name=of_write(variant.name, write), version=1, write=write)
    for write in SUBLAYERS
    for variant in BLOCK_VARIANTS.values()
    if not variant.keeps_sinks
}
"""The variants of what attention and the MLP write, which are measured without sinks alone."""

VARIANTS: Mapping[str, Variant] = {**BLOCK_VARIANTS, **WRITE_VARIANTS}
"""Every variant by name."""


def drops_sinks(variants: Iterable[Variant]) -> bool:
    """Return True if any of the variants leaves out sinks.

    Example:
        >>> drops_sinks([VARIANTS["raw"]]), drops_sinks(VARIANTS.values())
        (False, True)
    """
    return not all(variant.keeps_sinks for variant in variants)


def has_averages(variant: Variant) -> bool:
    """Return True if averages over tokens stand under a variant.

    Those of a centred variant are those of the rows that it centres, and they are taken of whole updates alone.
    """
    return not variant.centre and variant.write == "block"
