"""Sinks: tokens of very large norm, which the variant `sink_free` leaves out; chosen once for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from delta_suite.capture.plan import REFERENCE_DOCUMENTS
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


def reference_norms(stream: ResidualStream) -> list[Float[Tensor, " tokens"]]:
    """Return the norms, in each state, of the tokens of the first documents over which medians are taken."""
    within = stream.kept & (stream.position > 0) & (stream.document < REFERENCE_DOCUMENTS)
    return [stream.row_norms(layer)[within] for layer in range(len(stream.states))]


def find_sinks(stream: ResidualStream, reference: Sequence[Float[Tensor, " tokens"]] | None = None) -> Sinks:
    """Return position 0 of each sequence, and the tokens of very large norm in any layer.

    The median of each state is taken over its norms in `reference`, those of the first documents of the calibration
    (plan.REFERENCE_DOCUMENTS), without position 0 and dropped tokens: the same ones, however many documents follow, and
    in however many shards the stream comes. By default they are those that this stream holds.
    """
    ordinary = stream.kept & (stream.position > 0)
    within = ordinary & (stream.document < REFERENCE_DOCUMENTS)
    ratio = torch.zeros(len(stream.kept))
    layer_of = torch.zeros(len(stream.kept), dtype=torch.int64)
    for layer in range(len(stream.states)):
        norms = stream.row_norms(layer)
        usual = norms[within] if reference is None else reference[layer]
        multiples = norms / usual.median().clamp_min(1e-30) if len(usual) else torch.ones_like(norms)
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
