"""The identities that prove the tap right for one model, checked on every run and kept with the record."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from suite.errors import CertificateError

if TYPE_CHECKING:
    from suite.capture.stream import ResidualStream

TELESCOPING_ROWS = 256
"""Tokens, spread evenly, on which the telescoping sum is checked."""

ROUNDINGS = 16
"""How many units of rounding of the dtype an identity between floating-point results may be off by."""


@dataclass(frozen=True)
class FinalNorm:
    """The modules between the last block and the end, and the largest error of applying them to the stored h_N."""

    modules: list[str]
    error: float
    """Relative to the largest entry of last_hidden_state; infinity where the shapes differ."""


@dataclass
class Observations:
    """What the hooks saw, over all forward passes so far."""

    firings: list[int]
    """Per block, how often its forward hook fired."""
    passes: int = 0
    final: FinalNorm | None = None
    gaps: dict[int, Tensor] = field(default_factory=dict)
    """By layer, largest difference between its input and the output of the block before, where not the same tensor."""

    @classmethod
    def of(cls, blocks: int) -> Observations:
        return cls([0] * blocks)

    def copy(self) -> Observations:
        return Observations(list(self.firings), self.passes, self.final, dict(self.gaps))

    def continuity(self, layer: int, gap: Tensor) -> None:
        """Keep the largest gap, on its device: reading it now would make the forward pass wait."""
        self.gaps[layer] = torch.maximum(self.gaps[layer], gap) if layer in self.gaps else gap

    def passed(self, final: FinalNorm) -> None:
        self.passes += 1
        if self.final is None or not final.error <= self.final.error:
            self.final = final


@dataclass(frozen=True)
class Identity:
    """One checked identity: holds when error <= tolerance. A NaN error never holds."""

    name: str
    says: str
    error: float
    tolerance: float


@dataclass(frozen=True)
class Certificate:
    """Every identity that was checked; all of them hold, or there would be no certificate."""

    blocks: int
    forward_passes: int
    identities: tuple[Identity, ...]
    final_norm: tuple[str, ...]
    """The modules applied after the last block; empty where the architecture has none."""

    def __add__(self, other: Certificate) -> Certificate:
        """Of both shards: the larger error of each identity."""
        by_name = {identity.name: identity for identity in self.identities}
        for identity in other.identities:
            if identity.name not in by_name or identity.error > by_name[identity.name].error:
                by_name[identity.name] = identity
        return Certificate(
            self.blocks, self.forward_passes + other.forward_passes, tuple(by_name.values()), self.final_norm
        )


def certify(observed: Observations, stream: ResidualStream) -> Certificate:
    """Check every identity. Raises CertificateError naming the first that fails, and the layer."""
    blocks, states = len(observed.firings), stream.states
    for layer, fired in enumerate(observed.firings):
        if fired != observed.passes:
            raise CertificateError(
                f"capture certificate: fire count fails at block {layer}: its hook fired {fired} times in "
                f"{observed.passes} forward passes. The block is skipped, run repeatedly, or the model was compiled; "
                f"measure the eager model."
            )
    if len(states) != blocks + 1:
        raise CertificateError(f"capture certificate: shapes fail: {len(states)} states for {blocks} blocks")
    for layer, state in enumerate(states):
        if state.shape != states[0].shape:
            raise CertificateError(
                f"capture certificate: shapes fail at h_{layer}: {tuple(state.shape)}, but h_0 is "
                f"{tuple(states[0].shape)}"
            )
    identities = [
        Identity("fire_count", "each block's hook fires once in each forward pass", 0.0, 0.0),
        Identity("shapes", "h_0 .. h_N have one shape, (tokens, hidden)", 0.0, 0.0),
    ]

    gap, layer = max(((float(gap), layer) for layer, gap in observed.gaps.items()), default=(0.0, 0))
    worst = [float(gap) for gap in observed.gaps.values() if not float(gap) <= 0.0]
    if worst:
        raise CertificateError(
            f"capture certificate: continuity fails at layer {layer}: the input of block {layer} differs from the "
            f"output of block {layer - 1} by up to {gap:g}. Something acts on the stream between the blocks, so "
            f"h_{layer} is not one state; this architecture is not supported."
        )
    identities.append(Identity("continuity", "the output of block L is the input of block L+1", gap, 0.0))

    identities.append(_telescoping(stream))

    final = observed.final
    assert final is not None
    tolerance = ROUNDINGS * torch.finfo(states[-1].dtype).eps
    if not final.error <= tolerance:
        after = " -> ".join(final.modules) or "nothing"
        raise CertificateError(
            f"capture certificate: final norm fails at h_{blocks}: the last raw state, sent through what follows the "
            f"last block ({after}), differs from the model's last_hidden_state by {final.error:.3g} of its largest "
            f"entry, more than {tolerance:.1g}. The list of blocks may not be the whole decoder."
        )
    says = "what follows the last block, applied to the stored h_N, gives last_hidden_state"
    identities.append(Identity("final_norm", says, final.error, tolerance))
    return Certificate(blocks, observed.passes, tuple(identities), tuple(final.modules))


def _telescoping(stream: ResidualStream) -> Identity:
    """h_0 + sum of delta_L = h_N, in float64, relative to the largest norm met on the way."""
    tokens = len(stream.states[0])
    sample = stream.take(torch.linspace(0, tokens - 1, min(TELESCOPING_ROWS, tokens)).round().long())
    total = sample.states[0].cpu().double()
    largest = total.norm(dim=1)
    for layer in range(stream.layers):
        total += sample.delta(layer).cpu().double()
        largest = torch.maximum(largest, total.norm(dim=1))
    last = sample.states[-1].cpu().double()
    error = float(((total - last).norm(dim=1) / largest.clamp_min(1e-30)).max())
    tolerance = stream.layers * torch.finfo(torch.float32).eps  # each subtraction rounds once
    if not error <= tolerance:
        raise CertificateError(
            f"capture certificate: telescoping sum fails: h_0 plus all {stream.layers} updates differs from "
            f"h_{stream.layers} by {error:.3g} of the stream's norm, more than {tolerance:.1g}. "
            f"The stored states are not consistent."
        )
    return Identity("telescoping", "h_0 plus the sum of all updates is h_N", error, tolerance)
