"""The identities of the capture certificate, and how far each may be off. No torch: stored records are held to them."""

from __future__ import annotations

SINGLE_EPSILON = 2.0**-23
"""Machine epsilon of float32."""

EPSILON = {"float64": 2.0**-52, "float32": SINGLE_EPSILON, "float16": 2.0**-10, "bfloat16": 2.0**-7}
"""Machine epsilon of each dtype that a stream may have."""

ROUNDINGS = 16
"""Tolerance of an identity between floating-point results, in units of rounding of the dtype."""

CAUSALITY = "causality"
"""The identity that is checked only where a sequence has enough tokens."""

WRITES = "writes"
"""The identity that is checked where attention and MLP are measured apart."""

OPTIONAL = frozenset({CAUSALITY, WRITES})
"""The identities that a certificate may lack."""


def tolerances(layers: int, epsilon: float) -> dict[str, float]:
    """Return the tolerance of every identity, for a stream of a dtype with this machine epsilon.

    Example:
        >>> tolerances(2, 2.0**-23)["telescoping"] == 2 * 2.0**-23
        True
    """
    return {
        "fire_count": 0.0,
        "shapes": 0.0,
        "continuity": 0.0,
        "telescoping": layers * SINGLE_EPSILON,  # each subtraction rounds once
        "final_norm": ROUNDINGS * epsilon,
        WRITES: ROUNDINGS * epsilon,
        # A third of the digits: rounding grows through the blocks, and TF32 keeps ten bits; a leak changes the first.
        CAUSALITY: epsilon ** (1 / 3),
    }
