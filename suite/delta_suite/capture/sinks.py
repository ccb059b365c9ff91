"""Sinks: tokens of very large norm, which the variant `sink_free` leaves out; chosen once for all layers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from delta_suite.capture.stream import ResidualStream

SINK_RATIO = 6.0
"""A token whose ||h|| exceeds this many medians in any layer is a sink: massive activations, Sun et al. 2024,
arXiv:2402.17762."""


@dataclass(frozen=True)
class Sinks:
    """The kept tokens that `sink_free` leaves out, chosen once for all layers, and the reasons."""

    dropped: Bool[Tensor, " tokens"]
    """True for each sink."""
    first: int
    """Number of sinks at position 0 of their sequence."""
    large: int
    """Number of other sinks, whose state exceeds SINK_RATIO times the median norm."""
    largest: tuple[tuple[int, int, int, float], ...]
    """The ten largest sinks: (document, position, layer, norm over median)."""


def find_sinks(stream: ResidualStream) -> Sinks:
    """Return position 0 of each sequence, and the tokens of very large norm in any layer.

    The median of each layer is taken over the kept tokens of this stream without position 0.
    """
    ordinary = stream.kept & (stream.position > 0)
    ratio = torch.zeros(len(stream.kept))
    layer_of = torch.zeros(len(stream.kept), dtype=torch.int64)
    for layer, state in enumerate(stream.states):
        norms = torch.linalg.vector_norm(state, dim=1, dtype=torch.float32).cpu()
        multiples = (
            norms / norms[ordinary].median().clamp_min(1e-30) if bool(ordinary.any()) else torch.ones_like(norms)
        )
        layer_of[multiples > ratio] = layer
        ratio = torch.maximum(ratio, multiples)
    first = stream.kept & (stream.position == 0)
    large = ordinary & (ratio > SINK_RATIO)
    ranked = torch.where(first | large, ratio, torch.zeros_like(ratio)).argsort(descending=True)[:10].tolist()
    largest = tuple(
        (int(stream.document[row]), int(stream.position[row]), int(layer_of[row]), round(float(ratio[row]), 3))
        for row in ranked
        if bool(first[row] | large[row])
    )
    return Sinks(first | large, int(first.sum()), int(large.sum()), largest)
