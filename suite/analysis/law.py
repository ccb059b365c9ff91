"""What was measured of the update law, and the estimates taken from it. No torch: `update_law` does the fitting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

from suite.analysis.metrics import METRICS, Estimate, absent
from suite.analysis.uncertainty import T_975, standard_errors

PhaseMap = Mapping[str, tuple[int, int]]

RUNGS = ("scaled", "shared", "rank_one", "own")
"""The ladder above the training mean: c_L h; c_L T^(-L) h; that and v_L w^T h; the layer's own T_L h."""

ONE_LAYER = "one layer has no others to share a map with"
"""Why a phase of one layer has no shared map."""


@dataclass(frozen=True)
class Law:
    """R^2 and shares, held out, of every layer. The first axis is (all documents, then without group 0 .. 9)."""

    phases: PhaseMap
    """The phases whose layers share a map: the shared rungs hold for these and no others."""
    form: str
    tokens: int
    """That enter: those of `sink_free`."""
    documents: int
    hidden: int
    components: int
    """k: dimensions of x and delta that the maps act in; `hidden` where nothing is left out."""
    ridge: tuple[float, float]
    """mu of the maps trained on even and on odd documents, relative to the mean eigenvalue of A."""
    r2: Mapping[str, Float64[np.ndarray, "cases layers"]]
    """By rung; NaN where a phase of one layer has no shared map."""
    share: Float64[np.ndarray, "cases layers"]
    """Held-out energy of the residual after the shared map along v_L, over all its energy."""
    transfer: Float64[np.ndarray, "cases layers layers"]
    """R^2 on layer L (first) of layer M's map with its best gain; own R^2 on the diagonal."""
    gains: Float64[np.ndarray, " layers"]
    """c_L, the mean of the two folds."""
    captured: Float64[np.ndarray, " layers"]
    """Share of delta's held-out energy inside its k dimensions."""
    directions: Float64[np.ndarray, "folds layers hidden"]
    """v_L of the residual, from even and from odd documents."""
    reason: str | None = None
    """Why nothing was measured; the arrays are then empty."""

    @classmethod
    def absent(
        cls, reason: str, phases: PhaseMap, *, form: str = "normalised", tokens: int, documents: int, hidden: int
    ) -> Law:
        """A law that was not measured, and why."""
        empty = np.zeros((0, 0))
        return cls(
            dict(phases), form, tokens, documents, hidden, 0, (0.0, 0.0), dict.fromkeys(RUNGS, empty), empty,
            np.zeros((0, 0, 0)), np.zeros(0), np.zeros(0), np.zeros((0, 0, 0)), reason,
        )  # fmt: skip

    def phase(self, name: str) -> PhaseLaw:
        """The part of one phase. Raises KeyError for a phase that was not measured."""
        first, last = self.phases[name]
        own = slice(first, last + 1)
        return PhaseLaw(
            tuple(range(first, last + 1)),
            {rung: values[:, own] for rung, values in self.r2.items()},
            self.share[:, own],
            self.transfer[:, own, own],
            {
                "tokens": self.tokens,
                "documents": self.documents,
                "hidden": self.hidden,
                "components": self.components,
                "ridge": list(self.ridge),
                "form": self.form,
            },
        )

    def estimates(self, phase: str) -> dict[str, Estimate]:
        """Every metric of the law over one phase: the medians of its layers, with what each layer has."""
        law = [metric for metric in METRICS.values() if metric.from_law]
        if self.reason is not None:
            return {metric.name: absent(f"the update law was not measured: {self.reason}") for metric in law}
        own = self.phase(phase)
        return {metric.name: metric.compute(own) for metric in law}

    def transfer_intervals(self) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper ends of the 95% intervals of the transfer matrix, (layers, layers) each."""
        _, low, high = jackknife(self.transfer)
        return low, high


@dataclass(frozen=True)
class PhaseLaw:
    """The law over the layers of one phase; the first axis of arrays as in `Law`."""

    layers: Sequence[int]
    r2: Mapping[str, Float64[np.ndarray, "cases layers"]]
    share: Float64[np.ndarray, "cases layers"]
    transfer: Float64[np.ndarray, "cases layers layers"]
    detail: Mapping[str, object] = field(default_factory=dict)

    def median(self, values: Float64[np.ndarray, "cases layers"]) -> Estimate:
        """Median over layers of a figure that each layer has; absent where a phase of one layer has none."""
        if np.isnan(values).any():
            return absent(ONE_LAYER)
        return self._estimate(values, dict(zip(self.layers, values[0].tolist(), strict=True)), {})

    def rung(self, name: str) -> Estimate:
        """Median over layers of a rung's R^2."""
        return self.median(self.r2[name])

    def transferred(self) -> Estimate:
        """Median over L of the mean over M != L of R^2 of T_M on layer L."""
        count = len(self.layers)
        if count == 1:
            return absent("one layer has no others to take a map from")
        others = self.transfer.sum(axis=2) - np.diagonal(self.transfer, axis1=1, axis2=2)
        return self.median(others / (count - 1))

    def ratio(self, upper: str, lower: str) -> Estimate:
        """Median over layers of [R^2(upper) - R^2(lower)] / [R^2(own) - R^2(lower)].

        A layer whose denominator is not clearly above 0 has no ratio; where most have none, the phase has none.
        """
        if np.isnan(self.r2["shared"]).any():
            return absent(ONE_LAYER)
        room = self.r2["own"] - self.r2[lower]
        _, low, _ = jackknife(room)
        defined = (low > 0) & (room > 0).all(axis=0)
        what = f"R^2(own map) - R^2({_WORDS[lower]})"
        if defined.sum() * 2 < len(self.layers) or not defined.any():
            missing = len(self.layers) - int(defined.sum())
            return absent(f"the 95% interval of {what} holds 0 in {missing} of {len(self.layers)} layers")
        values = ((self.r2[upper] - self.r2[lower])[:, defined]) / room[:, defined]
        per_layer: dict[int, float | None] = dict.fromkeys(self.layers)
        per_layer |= dict(zip(np.array(self.layers)[defined].tolist(), values[0].tolist(), strict=True))
        return self._estimate(values, per_layer, {"layers_without": int((~defined).sum())})

    def _estimate(
        self, values: np.ndarray, per_layer: Mapping[int, float | None], more: Mapping[str, object]
    ) -> Estimate:
        # The replicates follow the layers that are in the middle with all documents: where layers tie, the median
        # without a group is that of another layer, and a jackknife of such jumps covers too little.
        middle = np.argsort(values[0], kind="stable")[(values.shape[1] - 1) // 2 : values.shape[1] // 2 + 1]
        medians = values[:, middle].mean(axis=1)
        corrected, low, high = jackknife(medians)
        return Estimate(
            value=float(medians[0]),
            corrected=float(corrected),
            interval=(float(low), float(high)),
            replicates=tuple(medians[1:].tolist()),
            per_layer=dict(per_layer),
            detail=dict(self.detail) | dict(more),
        )


_WORDS = {"scaled": "c_L h", "shared": "shared map"}


def jackknife(values: Float64[np.ndarray, "cases ..."]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Delete-a-group jackknife over groups of documents: bias-corrected value and the ends of its 95% interval.

    values[0] is of all documents, values[1 + g] without group g.
    """
    whole, replicates = values[0], values[1:]
    groups = len(replicates)
    corrected = np.asarray(groups * whole - (groups - 1) * replicates.mean(axis=0))
    reach = T_975[groups - 1] * standard_errors(replicates)
    return corrected, np.asarray(corrected - reach), np.asarray(corrected + reach)
