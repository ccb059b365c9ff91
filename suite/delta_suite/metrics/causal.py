"""Metrics of causes: how the loss of next tokens changes when updates are changed. reduction/causal_fit.py says how.

Losses are means over predicted tokens, in nats. An interval is over the units whose loss is measured; what is put in
place of the updates is fitted on the other half of the units, and is held fixed: an effect is that of these directions
on other text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np
from jaxtyping import Float64

from delta_suite.metrics.definition import DEFINED, Bias, metric
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import with_interval
from delta_suite.reduction.losses import UNDISTURBED, Causes, Damage, Losses

ONE_LAYER = "one layer has no others to share a map with, so there is no law to put in place of its updates"
"""The reason why the law is not put in place of the updates of a phase of one layer."""

ONE_BLOCK = "the model has one block, which has no neighbour"
"""The reason why a block cannot be exchanged."""


@dataclass(frozen=True)
class PhaseLosses:
    """The losses under the interventions of one phase."""

    losses: Losses
    phase: str
    detail: Mapping[str, object] = field(default_factory=dict)
    """Settings of the measurement, which stand beside every estimate."""
    no_law: str | None = None
    """Why the law was not put in place of the updates."""

    def cases(self, condition: str | None) -> list[Float64[np.ndarray, " cases"]]:
        """Return the mean loss under a condition, or undisturbed: over units, and over documents where these differ."""
        name = UNDISTURBED if condition is None else f"{self.phase}.{condition}"
        return [losses.cases(name) for losses in (self.losses, self.losses.documents) if losses is not None]

    def difference(self, upper: str, lower: str | None = None) -> Estimate:
        """Return the loss under one condition less that under another, or undisturbed, in nats per token."""
        return estimate([a - b for a, b in zip(self.cases(upper), self.cases(lower), strict=True)], self.detail, "none")

    def ratio(self, part: tuple[str, str | None], whole: tuple[str, str | None], words: str) -> Estimate:
        """Return a difference over another one, absent where the latter's interval does not lie above 0."""
        below = self.difference(*whole)
        if not _above_zero(below):
            return absent(f"{words} is not clearly above 0, and the share is of it")
        uppers, lowers = (
            [a - b for a, b in zip(self.cases(first), self.cases(second), strict=True)]
            for first, second in (part, whole)
        )
        return estimate([a / b for a, b in zip(uppers, lowers, strict=True)], self.detail, "replicates")


def estimate(cases: list[Float64[np.ndarray, " cases"]], detail: Mapping[str, object], bias: Bias) -> Estimate:
    """Return an estimate from its values over all units and without each group, and so for documents if given."""
    values = cases[0]
    if not np.isfinite(values[0]):
        return absent("no document has two tokens, so that no token is predicted")
    whole = Estimate(value=float(values[0]), detail=dict(detail) or None)
    if len(values) < 3 or not np.isfinite(values).all():
        return whole
    replicates = [Estimate(value=float(value)) for value in values[1:]]
    documents = [Estimate(value=float(value)) for value in (cases[1][1:] if len(cases) > 1 else ())]
    return with_interval(whole, (), replicates, bias=bias, documents=documents)


def _above_zero(figure: Estimate) -> bool:
    """Return True if a figure's interval lies above 0; without an interval, if its value does."""
    low = figure.value if figure.interval is None else figure.interval[0]
    return low is not None and low > 0.0


def cause_estimates(causes: Causes, phase: str) -> dict[str, Estimate]:
    """Return every metric of causes over one of the phases, by name; absent with the reason where not measured."""
    metrics = [definition for definition in DEFINED.values() if definition.takes == "causes"]
    if causes.losses is None:
        reason = f"causes were not measured: {causes.reason}"
        return {definition.name: absent(reason) for definition in metrics}
    first, last = causes.phases[phase]
    no_law = causes.no_law.get(phase)
    if no_law is not None and first == last:
        no_law = ONE_LAYER
    losses = PhaseLosses(causes.losses, phase, {"documents": causes.documents}, no_law)
    figures = {definition.name: definition.compute(losses) for definition in metrics}
    control = figures["causal_effect_matched"]
    detail = {**(control.detail or {}), "matched": causes.matched[phase]}
    return {**figures, "causal_effect_matched": control.model_copy(update={"detail": detail})}


# --- causes in a phase -----------------------------------------------------------------------------------------

_metric_of_causes = partial(
    metric,
    "phase",
    takes="causes",
    low=-math.inf,
    per_layer=False,
    source="interventions in all layers of the phase at once: see reduction/causal_fit.py",
)


@_metric_of_causes(
    "L(v_L v_L^T delta_L taken away in all layers of the phase) - L, v_L fitted on the other half of the units",
    unit="nats per token",
    bias="none",
)
def causal_effect(losses: PhaseLosses) -> Estimate:
    """Return how much the loss rises when no layer of a phase writes along its leading direction."""
    return losses.difference("zero")


@_metric_of_causes(
    "the same with directions after v_L in the spectrum, whose energy together is that of v_L",
    unit="nats per token",
    bias="none",
)
def causal_effect_matched(losses: PhaseLosses) -> Estimate:
    """Return how much the loss rises when as much energy is taken away from lower in the spectrum: the control."""
    return losses.difference("matched")


@_metric_of_causes("the same with a random direction in each layer", unit="nats per token", bias="none")
def causal_effect_random(losses: PhaseLosses) -> Estimate:
    """Return how much the loss rises when no layer of a phase writes along a random direction."""
    return losses.difference("random")


@_metric_of_causes(
    "[L(u taken away) - L] / [L(v_L taken away) - L], u the leading direction of the stacked v_L", bias="replicates"
)
def causal_sharing(losses: PhaseLosses) -> Estimate:
    """Return the share of the effect that the one direction shared by a phase has; absent without an effect."""
    return losses.ratio(("shared", None), ("zero", None), "the effect of taking the v_L away")


@_metric_of_causes("1 - [L(v_L taken away, v_L^T mu_L kept) - L] / [L(v_L taken away) - L]", bias="replicates")
def causal_constant(losses: PhaseLosses) -> Estimate:
    """Return the share of the effect that is the mean along v_L, the same on every token; absent without an effect."""
    return losses.ratio(("zero", "kept"), ("zero", None), "the effect of taking the v_L away")


@_metric_of_causes("[L(delta -> mu) - L(delta -> law)] / [L(delta -> mu) - L]", bias="replicates")
def law_recovered(losses: PhaseLosses) -> Estimate:
    """Return the share of the loss that the law saves, of what the updates save over their mean."""
    if losses.no_law is not None:
        return absent(losses.no_law)
    return losses.ratio(("mean", "law"), ("mean", None), "the loss with mean updates less the loss")


# --- damage ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerLosses:
    """The losses with one block left out, or exchanged with its neighbours."""

    damage: Damage
    layer: int
    layers: int
    """The number of blocks."""

    def over(self, conditions: list[str], none: str) -> Estimate:
        """Return the mean over conditions of the loss less the undisturbed loss; absent where one has failed."""
        if self.damage.losses is None:
            return absent(f"damage was not measured: {self.damage.reason}")
        if not conditions:
            return absent(none)
        for condition in conditions:
            if condition in self.damage.failed:
                return absent(self.damage.failed[condition])
        both = [losses for losses in (self.damage.losses, self.damage.losses.documents) if losses is not None]
        cases = [
            np.mean([losses.cases(condition) for condition in conditions], axis=0) - losses.cases(UNDISTURBED)
            for losses in both
        ]
        return estimate(cases, {}, "none")


def damage_estimates(damage: Damage, layers: int) -> list[dict[str, Estimate]]:
    """Return every metric of damage of each of so many layers, by name."""
    metrics = [definition for definition in DEFINED.values() if definition.takes == "damage"]
    return [
        {definition.name: definition.compute(LayerLosses(damage, layer, layers)) for definition in metrics}
        for layer in range(layers)
    ]


@metric(
    "layer",
    "L(block L left out) - L",
    takes="damage",
    unit="nats per token",
    low=-math.inf,
    bias="none",
    source="ShortGPT 2403.03853",
)
def layer_damage(losses: LayerLosses) -> Estimate:
    """Return how much the loss rises when a block is left out."""
    return losses.over([f"skip.{losses.layer}"], "")


@metric(
    "layer",
    "mean over the neighbours M of block L of L(blocks L and M exchanged) - L",
    takes="damage",
    unit="nats per token",
    low=-math.inf,
    bias="none",
    source="Sun et al. 2407.09298",
)
def exchange_damage(losses: LayerLosses) -> Estimate:
    """Return how much the loss rises when a block and a neighbour are exchanged, averaged over its neighbours."""
    swaps = [f"swap.{first}" for first in (losses.layer - 1, losses.layer) if 0 <= first < losses.layers - 1]
    return losses.over(swaps, ONE_BLOCK)
