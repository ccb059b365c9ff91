"""Passes under interventions: the causes of the loss in phases C and E, and the damage from each block's absence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from delta_suite.capture.intervene import Intervening, Intervention, NoLossError
from delta_suite.capture.residual import Capture
from delta_suite.capture.tokens import TokenSequences
from delta_suite.capture.units import Units
from delta_suite.models.blocks import Decoder
from delta_suite.models.phases import PhaseMap
from delta_suite.reduction.causal_fit import LawMap, LayerFit, fit_layers, interventions
from delta_suite.reduction.law_sums import Streams
from delta_suite.reduction.losses import (
    CAUSAL_PHASES,
    ONE_HALF,
    UNDISTURBED,
    Causes,
    Damage,
    Losses,
    causal_phases,
    chosen_documents,
)

CAUSAL_DOCUMENTS = 48
"""Documents on which the loss is measured under the interventions of phases. With the 112 of `core` fit and passes then
take about eight times the capture on a CPU: on 16 of 28 documents they took 10.4 times."""

DAMAGE_DOCUMENTS = 16
"""Documents on which the loss is measured without a block: two passes for each block are many."""


@dataclass(frozen=True)
class Runnable:
    """A model and the token sequences that it runs, as a capture has run them."""

    model: Any
    decoder: Decoder
    sequences: TokenSequences
    device: torch.device
    batch_tokens: int
    """Largest number of padded tokens of a batch."""
    scaled: bool = False
    """True if the model multiplies its stream by a factor between blocks."""

    @classmethod
    def of(cls, capture: Capture) -> Runnable:
        """Return what a capture has run."""
        return cls(
            capture.model, capture.decoder, capture.sequences, capture.device, capture.batch_tokens, capture.scaled
        )


@dataclass
class CausalFit:
    """Directions, means and maps for the interventions of the phases, fitted on each half."""

    phases: PhaseMap
    """The phases of CAUSAL_PHASES that the model has."""
    layers: dict[tuple[int, int], LayerFit] = field(default_factory=dict)
    laws: dict[tuple[int, int], LawMap] = field(default_factory=dict)
    no_law: str = ""
    """Why there are no maps, where there are none in phases of several layers."""
    dtype: torch.dtype = torch.float32
    """The dtype of the maps, which for 34 layers of 5,120 dimensions take 7 GB of host memory in float32."""

    @classmethod
    def of(cls, phases: PhaseMap, dtype: torch.dtype = torch.float32) -> CausalFit:
        """Return a fit in which nothing is fitted, for a model of this dtype."""
        return cls(causal_phases(phases), dtype=torch.float64 if dtype == torch.float64 else torch.float32)

    def collect(self, layer: int, fold: int, onto: Tensor, basis: Tensor | None) -> None:
        """Take the maps of a layer from the fit of the law, if the layer is of these phases."""
        if any(first <= layer <= last for first, last in self.phases.values()):
            self.laws[layer, fold] = onto.to(self.dtype).cpu(), None if basis is None else basis.to(self.dtype).cpu()

    def fit(
        self,
        streams: Streams,
        entering: Bool[Tensor, " tokens"],
        document: Tensor,
        units: Units,
        devices: Sequence[torch.device],
    ) -> None:
        """Fit the directions of every layer of the phases on each half."""
        half = torch.tensor(halves(units))[document]
        layers = [layer for first, last in self.phases.values() for layer in range(first, last + 1)]
        self.layers = fit_layers(streams, entering, half, layers, devices) if layers else {}


def halves(units: Units) -> list[int]:
    """Return the half of each document, 0 or 1."""
    return [group % 2 for group in units.groups]


def measure_causes(subject: Runnable, fit: CausalFit, units: Units, entering: Bool[Tensor, " tokens"]) -> Causes:
    """Return the losses with the updates of each phase replaced, in documents of the half that nothing was fitted on.

    entering: the tokens of `sink_free`, of all tokens in the order of the stream. Raises DeviceError where memory runs
    out.
    """
    if not fit.phases:
        return Causes({}, None, reason=f"the model has no phase {' or '.join(CAUSAL_PHASES)}")
    if units.group_count < 2:
        return Causes(fit.phases, None, reason=ONE_HALF)
    changes = list(interventions(fit.layers, fit.laws, fit.phases))
    try:
        losses, documents, passes, failed = _measured(subject, changes, units, CAUSAL_DOCUMENTS, entering)
    except NoLossError as error:
        return Causes(fit.phases, None, reason=str(error))
    if failed:
        return Causes(fit.phases, None, reason=next(iter(failed.values())))
    no_law = {phase: fit.no_law for phase in fit.phases if f"{phase}.law" not in losses.conditions}
    matched = {
        phase: min(fit.layers[layer, half].matched for layer in range(first, last + 1) for half in (0, 1))
        for phase, (first, last) in fit.phases.items()
    }
    return Causes(fit.phases, losses, documents, passes, matched, no_law)


def measure_damage(subject: Runnable, units: Units) -> Damage:
    """Return the losses with each block left out, and with neighbours exchanged. Raises as `measure_causes` does."""
    layers = len(subject.decoder.blocks)
    changes = [Intervention(f"skip.{layer}", runs={layer: None}) for layer in range(layers)]
    changes += [Intervention(f"swap.{layer}", runs={layer: layer + 1, layer + 1: layer}) for layer in range(layers - 1)]
    try:
        losses, documents, passes, failed = _measured(subject, changes, units, DAMAGE_DOCUMENTS)
    except NoLossError as error:
        return Damage(None, reason=str(error))
    return Damage(losses, documents, passes, failed)


def _measured(
    subject: Runnable,
    changes: Sequence[Intervention],
    units: Units,
    most: int,
    entering: Bool[Tensor, " tokens"] | None = None,
) -> tuple[Losses, int, float, Mapping[str, str]]:
    """Return the losses of interventions, the documents that ran, the passes, and why some interventions failed."""
    if subject.scaled:
        raise NoLossError("its stream is multiplied by a factor between blocks, to which interventions are not fitted")
    chosen = chosen_documents(units, most)
    run = Intervening(
        subject.model,
        subject.decoder,
        subject.sequences,
        changes,
        documents=chosen,
        halves=halves(units),
        entering=torch.zeros(subject.sequences.tokens, dtype=torch.bool) if entering is None else entering,
        device=subject.device,
        tokens_per_batch=subject.batch_tokens,
    )
    result = run.losses()
    names = [UNDISTURBED, *(each.name for each in changes)]
    losses = Losses.of_documents(names, result.nats, result.tokens, units)
    return losses, int((result.tokens > 0).sum()), result.blocks, result.failed
