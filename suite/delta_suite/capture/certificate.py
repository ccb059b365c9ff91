"""The identities that prove the tap right for one model, checked on every run and kept with the record."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from delta_suite.capture.tolerances import WRITES, tolerances
from delta_suite.errors import CertificateError

if TYPE_CHECKING:
    from delta_suite.capture.stream import ResidualStream


@dataclass(frozen=True)
class FinalNorm:
    """Modules between the last block and the end, and the largest error of applying them to the stored h_N."""

    modules: list[str] | None
    """Names of the modules; None where no chain of modules leads from the last block's output to last_hidden_state."""
    error: float
    """Error relative to the largest entry of last_hidden_state; infinity for unequal shapes, NaN where one is not
    finite."""
    damaged: tuple[str, ...] = ()
    """Parameters of those modules that hold NaN or infinity, sought where the error is NaN."""


@dataclass(frozen=True)
class Witnesses:
    """Updates of a few tokens as the hooks saw them, block by block, independent of the states that were stored."""

    rows: Tensor
    """Rows of these tokens in the stream."""
    updates: Tensor
    """Output minus input of each block, (blocks, witnesses, hidden), float32, on the device of block 0."""


@dataclass
class Observations:
    """Observations of the hooks over all forward passes so far."""

    firings: list[int]
    """How often the forward hook of each block fired."""
    passes: int = 0
    """Number of forward passes."""
    final: FinalNorm | None = None
    """The final norm of the pass with the largest error."""
    gaps: dict[int, Tensor] = field(default_factory=dict)
    """Largest difference between the input of a layer and the output of the block before, where they are not one
    tensor."""
    factors: dict[int, float] = field(default_factory=dict)
    """Power of two by which the input of a layer is the output of the block before; factors of 1 are omitted."""
    writes: dict[int, Tensor] = field(default_factory=dict)
    """Largest difference between what follows the state between a block's sublayers and what its MLP gave out, relative
    to the norm of the block's output."""
    not_apart: str | None = None
    """Why attention and MLP are not told apart in a pass, where the hooks saw it."""
    witnesses: list[Witnesses] = field(default_factory=list)
    """The witnesses of each forward pass."""
    causality: float | None = None
    """How far the states of a sequence's first tokens move when they run alone; None where this was not tried."""

    @classmethod
    def of(cls, blocks: int) -> Observations:
        """Return empty observations of this many blocks."""
        return cls([0] * blocks)

    def copy(self) -> Observations:
        """Return a copy that later observations do not change."""
        return replace(
            self,
            firings=list(self.firings),
            gaps=dict(self.gaps),
            factors=dict(self.factors),
            writes=dict(self.writes),
            witnesses=list(self.witnesses),
        )

    def continuity(self, layer: int, gap: Tensor) -> None:
        """Record the largest gap before a layer, on its device: reading it now would make the forward pass wait."""
        self.gaps[layer] = torch.maximum(self.gaps[layer], gap) if layer in self.gaps else gap

    def wrote(self, layer: int, error: Tensor) -> None:
        """Record the error of the sublayers of a block, on its device."""
        self.writes[layer] = torch.maximum(self.writes[layer], error) if layer in self.writes else error

    def passed(self, final: FinalNorm, witnesses: Witnesses) -> None:
        """Count one forward pass."""
        self.passes += 1
        self.witnesses.append(witnesses)
        if self.final is None or not (math.isnan(self.final.error) or final.error <= self.final.error):
            self.final = final


@dataclass(frozen=True)
class Identity:
    """One checked identity: holds when error <= tolerance. A NaN error never holds."""

    name: str
    says: str
    """The identity in words."""
    error: float
    tolerance: float


@dataclass(frozen=True)
class Certificate:
    """Every identity that was checked. All of them hold: `certify` raises an error otherwise."""

    blocks: int
    forward_passes: int
    identities: tuple[Identity, ...]
    final_norm: tuple[str, ...]
    """Modules that run after the last block; empty where none does, and last_hidden_state is h_N itself."""


def certify(observed: Observations, stream: ResidualStream) -> Certificate:
    """Check every identity of the stream and return the certificate; that of the writes is `check_writes`.

    Raises CertificateError naming the first identity that fails, and the layer.
    """
    require_fired_once(observed.firings, observed.passes)
    identities = [
        Identity("fire_count", "each block's hook fires once in each forward pass", 0.0, 0.0),
        _shapes(observed, stream),
        _continuity(observed),
        _telescoping(observed, stream),
        _final_norm(observed, stream),
    ]
    if observed.causality is not None:
        identities.append(_causality(observed.causality, stream))
    assert observed.final is not None
    return Certificate(len(observed.firings), observed.passes, tuple(identities), tuple(observed.final.modules or ()))


def require_fired_once(firings: Sequence[int], passes: int) -> None:
    """Raise CertificateError for the first block whose hook did not fire once in each forward pass."""
    for layer, fired in enumerate(firings):
        if fired != passes:
            raise CertificateError(
                f"capture certificate: fire count fails at block {layer}: its hook fired {fired} times in {passes} "
                f"forward passes. The block is passed over, or runs in a way that ignores hooks, as compiled code and "
                f"direct calls of forward() do. Measure the plain, eager model."
            )


def _shapes(observed: Observations, stream: ResidualStream) -> Identity:
    blocks, states = len(observed.firings), stream.states
    if len(states) != blocks + 1:
        raise CertificateError(f"capture certificate: shapes fail: {len(states)} states for {blocks} blocks")
    for layer, state in enumerate(states):
        if state.shape != states[0].shape:
            raise CertificateError(
                f"capture certificate: shapes fail at h_{layer}: {tuple(state.shape)}, but h_0 is "
                f"{tuple(states[0].shape)}"
            )
    return Identity("shapes", "h_0 .. h_N have one shape, (tokens, hidden)", 0.0, 0.0)


def _continuity(observed: Observations) -> Identity:
    for layer, difference in sorted(observed.gaps.items()):
        gap = float(difference)
        if not gap <= 0.0:
            raise CertificateError(
                f"capture certificate: continuity fails at layer {layer}: the input of block {layer} differs from the "
                f"output of block {layer - 1} by up to {gap:g}. Something acts on the stream between the blocks, so "
                f"h_{layer} is not one state; this architecture is not supported."
            )
    says = "the output of block L is the input of block L+1"
    if observed.factors:
        factors = ", ".join(f"{factor:g} before block {layer}" for layer, factor in sorted(observed.factors.items()))
        says += f", times an exact factor that is divided out ({factors})"
    return Identity("continuity", says, 0.0, 0.0)


def _telescoping(observed: Observations, stream: ResidualStream) -> Identity:
    """Check that h_0 plus the updates up to L is h_L for every L, in float64, relative to the largest norm up to there.

    The updates are those that the hooks saw. Updates formed from the stored states would cancel any damage to them.
    """
    stored = stream.take(torch.cat([witnesses.rows for witnesses in observed.witnesses]))
    first = stored.states[0]
    home = first.device if first.device.type != "mps" else torch.device("cpu")  # which has no float64

    # All layers at once and on the device: one by one on the host this took as long as half a forward pass. In place,
    # because in float64 this is the largest tensor beside the stream.
    updates = torch.cat([witnesses.updates.to(home) for witnesses in observed.witnesses], dim=1)
    sums = torch.empty(len(stored.states), *first.shape, dtype=torch.float64, device=home)
    sums[0], sums[1:] = first, updates
    del updates
    sums.cumsum_(dim=0)
    largest = sums.norm(dim=2).cummax(dim=0).values.clamp_min(1e-30)
    sums -= torch.stack([state.to(home) for state in stored.states])
    errors = (sums.norm(dim=2) / largest).cpu()
    tolerance = _tolerance("telescoping", stream)
    wrong = ~(errors.max(dim=1).values <= tolerance)
    if wrong.any():
        layer = int(wrong.nonzero()[0])
        witness = int(errors[layer].nan_to_num(torch.inf).argmax())
        raise CertificateError(
            f"capture certificate: telescoping sum fails at h_{layer}: h_0 plus the updates of blocks 0 to "
            f"{layer - 1}, as seen when they ran, differs from the stored h_{layer} by "
            f"{float(errors[layer, witness]):.3g} of the stream's norm, more than {tolerance:.1g} (document "
            f"{int(stored.document[witness])}, token {int(stored.position[witness])}). What was stored is not what "
            f"went through the model."
        )
    says = "h_0 plus the updates seen in blocks 0 .. L-1 is the stored h_L"
    return Identity("telescoping", says, float(errors.max()), tolerance)


def _final_norm(observed: Observations, stream: ResidualStream) -> Identity:
    final, blocks = observed.final, len(observed.firings)
    assert final is not None
    tolerance = _tolerance("final_norm", stream)
    if final.modules is None:
        raise CertificateError(
            f"capture certificate: final norm fails at h_{blocks}: no module leads from the output of block "
            f"{blocks - 1} to the model's last_hidden_state. Either the list of blocks is not the whole decoder, or "
            f"the model does not end with its stream; then this architecture is not supported."
        )
    after = " -> ".join(final.modules)
    if math.isnan(final.error):
        dtype = stream.states[-1].dtype
        cure = f"It may overflow in {dtype}" + ("." if dtype == torch.float32 else ": try --dtype float32.")
        if final.damaged:
            cure = f"{', '.join(final.damaged)} holds NaN or infinity: copy or download the weights again."
        raise CertificateError(
            f"capture certificate: final norm fails at h_{blocks}: the last state is finite, and what {after} makes of "
            f"it is not. {cure}"
        )
    if not final.error <= tolerance:
        raise CertificateError(
            f"capture certificate: final norm fails at h_{blocks}: the last stored state"
            f"{f', sent through {after},' if after else ''} differs from the model's last_hidden_state by "
            f"{final.error:.3g} of its largest entry, more than {tolerance:.1g}."
        )
    if after:
        says = f"what follows the last block ({after}), applied to the stored h_N, gives last_hidden_state"
    else:
        says = "nothing follows the last block: last_hidden_state is the stored h_N itself"
    return Identity("final_norm", says, final.error, tolerance)


def check_writes(observed: Observations, layers: int, dtype: torch.dtype) -> Identity | str:
    """Return the identity of attention's and the MLP's writes; or why it does not hold: then the two are not apart.

    It is no error, because the whole updates of the blocks are right without it.
    """
    if observed.not_apart is not None:
        return observed.not_apart
    tolerance = tolerances(layers, torch.finfo(dtype).eps)[WRITES]
    errors = {layer: float(error) for layer, error in observed.writes.items()}
    for layer, error in sorted(errors.items()):
        if not error <= tolerance:
            return (
                f"what block {layer} adds behind the state between its sublayers differs from what its MLP gave out by "
                f"{error:.3g} of the stream's norm, more than {tolerance:.1g}"
            )
    says = "attention's and the MLP's writes add up to the block's, and the MLP's is its module's output"
    if len(errors) < layers:
        says += f" (compared in {len(errors)} of {layers} blocks)"
    return Identity(WRITES, says, max(errors.values(), default=0.0), tolerance)


def _causality(error: float, stream: ResidualStream) -> Identity:
    tolerance = _tolerance("causality", stream)
    if not error <= tolerance:
        raise CertificateError(
            f"capture certificate: causality fails: the first tokens of a sequence, run alone, end in states that "
            f"differ by {error:.3g} of their norm from those in the whole sequence, more than {tolerance:.1g}. "
            f"They see what follows them, tokens or padding. delta-suite measures causal decoders. (bitsandbytes in 8 "
            f"bits rounds a token by what else is in its batch, unless llm_int8_threshold is 0; in 4 bits it does not.)"
        )
    return Identity("causality", "a token's state is the same without all that follows it", error, tolerance)


def _tolerance(identity: str, stream: ResidualStream) -> float:
    return tolerances(stream.layers, torch.finfo(stream.states[-1].dtype).eps)[identity]
