"""Names of what adds to the residual stream: a block, or one of its sublayers. No torch, as claims name them."""

from __future__ import annotations

from typing import Literal

Write = Literal["block", "attention", "mlp"]
"""A whole block, or one of its two sublayers, which add to the stream."""

SUBLAYERS: tuple[Write, ...] = ("attention", "mlp")
"""The writes of a block, which add up to its update."""
