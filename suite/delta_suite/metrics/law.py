"""Metrics of the update law over a phase, from the held-out scores that `reduction.law_fit` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float64

from delta_suite.metrics.definition import DEFINED, metric
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import PERCENT, critical_t, interval, standard_errors
from delta_suite.reduction.law_scores import Law

ONE_LAYER = "one layer has no others to share a map with"
"""The reason why a phase of one layer has no shared map."""

NOTHING_TO_PREDICT = (
    "the update of layer {} is zero, or the same on all tokens, in at least half of the units, so there is nothing "
    "to predict"
)
"""The reason why a layer has no R^2, with its number."""


def phase_law(law: Law, name: str) -> PhaseLaw:
    """Return the law over the layers of one phase.

    Raises KeyError for a phase that the law was not fitted over.
    """
    first, last = law.phases[name]
    layers = slice(first, last + 1)
    return PhaseLaw(
        tuple(range(first, last + 1)),
        {rung: values[:, layers] for rung, values in law.r2.items()},
        law.share[:, layers],
        law.transfer[:, layers, layers],
        {
            "tokens": law.tokens,
            "documents": law.documents,
            "hidden": law.hidden,
            "components": law.components,
            "ridge": list(law.ridge),
            "form": "normalised",
        },
    )


def law_estimates(law: Law, phase: str) -> dict[str, Estimate]:
    """Return every metric of the law over one phase by name: medians over its layers, with the value of each layer.

    Where the law was not measured, every metric is absent with the reason.
    """
    metrics = [definition for definition in DEFINED.values() if definition.takes == "law"]
    if law.reason is not None:
        return {definition.name: absent(f"the update law was not measured: {law.reason}") for definition in metrics}
    over = phase_law(law, phase)
    return {definition.name: definition.compute(over) for definition in metrics}


@dataclass(frozen=True)
class PhaseLaw:
    """The law over the layers of one phase; the axis `cases` is that of `Law`."""

    layers: Sequence[int]
    r2: Mapping[str, Float64[np.ndarray, "cases layers"]]
    """Held-out R^2 by rung; that of constants is over an update of zero."""
    share: Float64[np.ndarray, "cases layers"]
    """Share of the residual's energy along its leading direction."""
    transfer: Float64[np.ndarray, "cases layers layers"]
    """R^2 on one layer (second axis) of the map of another (third axis)."""
    detail: Mapping[str, object] = field(default_factory=dict)
    """Settings of the fit, which stand beside every estimate."""

    @property
    def reason(self) -> str | None:
        """The reason why maps of these layers have no R^2; None where they have one."""
        without = np.isnan(self.r2["own"]).any(axis=0)
        return NOTHING_TO_PREDICT.format(self.layers[int(without.argmax())]) if without.any() else None

    def median(self, values: Float64[np.ndarray, "cases layers"]) -> Estimate:
        """Return the median over layers of a figure that each layer has; absent where a layer has none."""
        if np.isnan(values).any():
            return absent(self.reason or ONE_LAYER)
        per_layer = dict(zip(self.layers, values[0].tolist(), strict=True))
        return self._estimate(values[0], jackknife(values)[0], values[1:], per_layer, {})

    def rung(self, name: str) -> Estimate:
        """Return the median over layers of a rung's R^2. Raises KeyError for an unknown rung."""
        return self.median(self.r2[name])

    def transferred(self) -> Estimate:
        """Return the median over L of the mean over M != L of the R^2 of T_M on layer L."""
        count = len(self.layers)
        if count == 1:
            return absent("one layer has no others to take a map from")
        others = self.transfer.sum(axis=2) - np.diagonal(self.transfer, axis1=1, axis2=2)
        return self.median(others / (count - 1))

    def ratio(self, upper: str, lower: str) -> Estimate:
        """Return the median over layers of [R^2(upper) - R^2(lower)] / [R^2(own) - R^2(lower)].

        A layer whose denominator is not clearly above 0 has no ratio; where most have none, the phase has none.
        """
        if np.isnan(self.r2["shared"]).any():
            return absent(self.reason or ONE_LAYER)
        room = self.r2["own"] - self.r2[lower]
        return self._share(self.r2[upper] - self.r2[lower], room, f"R^2(own map) - R^2({_WORDS[lower]})")

    def mean_ratio(self) -> Estimate:
        """Return the median over layers of R^2(shared mean) / R^2(own mean), as `ratio` does."""
        if np.isnan(self.r2["shared_mean"]).any():
            return absent(self.reason or ONE_LAYER)
        return self._share(self.r2["shared_mean"], self.r2["own_mean"], "R^2(own mean)")

    def _share(
        self, part: Float64[np.ndarray, "cases layers"], room: Float64[np.ndarray, "cases layers"], what: str
    ) -> Estimate:
        """Return the median over layers of part / room, of those layers where room, called `what`, is above 0."""
        _, low, _ = jackknife(room)
        defined = (low > 0) & (room > 0).all(axis=0)
        if defined.sum() * 2 < len(self.layers) or not defined.any():
            missing = len(self.layers) - int(defined.sum())
            return absent(f"the {PERCENT} interval of {what} holds 0 in {missing} of {len(self.layers)} layers")
        part, room = part[:, defined], room[:, defined]
        ratios = part[0] / room[0]
        # Maps of single layers fit some noise. Where the denominator is small they take much of it away, and the bias
        # of the ratio is of a higher order than the jackknife corrects. The bias of numerator and denominator is not,
        # so these are corrected one by one, and the delta method gives the replicates of their ratio.
        best_part, best_room = jackknife(part)[0], jackknife(room)[0]
        corrected = best_part / best_room
        part_changes, room_changes = (values[1:] - values[1:].mean(axis=0) for values in (part, room))
        replicates = corrected + (part_changes - corrected * room_changes) / best_room
        per_layer: dict[int, float | None] = dict.fromkeys(self.layers)
        per_layer |= dict(zip(np.array(self.layers)[defined].tolist(), ratios.tolist(), strict=True))
        return self._estimate(ratios, corrected, replicates, per_layer, {"layers_without": int((~defined).sum())})

    def _estimate(
        self,
        values: Float64[np.ndarray, " layers"],
        corrected: Float64[np.ndarray, " layers"],
        replicates: Float64[np.ndarray, "groups layers"],
        per_layer: Mapping[int, float | None],
        more: Mapping[str, object],
    ) -> Estimate:
        """Return the estimate of the median over layers, its interval taken from the median's replicates."""
        value, best = float(np.median(values)), float(np.median(corrected))
        medians = (value + median_deviations(corrected, replicates)).tolist()
        return Estimate(
            value=value,
            corrected=best,
            interval=interval(best, medians),
            replicates=tuple(medians),
            per_layer=dict(per_layer),
            detail=dict(self.detail) | dict(more),
        )


_WORDS = {"scaled": "c_L h", "shared": "shared map"}
"""Rungs as a reason names them."""


def jackknife(values: Float64[np.ndarray, "cases ..."]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return bias-corrected values and the lower and upper ends of their intervals, by the delete-a-group jackknife.

    values[0] is measured on all documents, values[1 + g] without group g of the G groups. Deleting a group shrinks the
    training set of the fold that it belongs to, and the test set of the other fold. A bias of b/n for n training tokens
    stays b/n in one fold and becomes (b/n) (G/2) / (G/2 - 1) in the other, so on average the replicates have
    1 / (G - 2) more bias than the whole.
    """
    whole, replicates = values[0], values[1:]
    groups = len(replicates)
    corrected = np.asarray(whole + (groups - 2) * (whole - replicates.mean(axis=0)))
    reach = critical_t(groups) * standard_errors(replicates)
    return corrected, np.asarray(corrected - reach), np.asarray(corrected + reach)


CEILING_FROM = ("residual_rank_one_share", "shared_r2", "own_r2")
"""The metrics that `closure_ceiling` is formed from."""


def closure_ceiling(share: Estimate, shared: Estimate, single: Estimate) -> float | None:
    """Return the most of the way from the shared to the own map that gamma v f(...) can close, median over layers.

    The residual after the shared map has the energy 1 - R2(shared), and the direction v holds `share` of it. No
    function f along v takes away more, so rank_one_closure is at most share (1 - R2(shared)) / (R2(own) - R2(shared)),
    whatever f. None where the figures of no layer give one.

    Example:
        >>> share, shared, single = (Estimate(value=x, per_layer={3: x}) for x in (0.05, 0.2, 0.4))
        >>> round(closure_ceiling(share, shared, single), 6)
        0.2
    """
    layers = [each.per_layer or {} for each in (share, shared, single)]
    ceilings = []
    for layer, part in layers[0].items():
        below, above = layers[1].get(layer), layers[2].get(layer)
        if part is not None and below is not None and above is not None and above > below:
            ceilings.append(part * (1.0 - below) / (above - below))
    return float(np.median(ceilings)) if ceilings else None


MEDIAN_DRAWS = 1000
"""Draws of the layers' errors; each is used together with its negative."""


def median_deviations(
    values: Float64[np.ndarray, " layers"], replicates: Float64[np.ndarray, "groups layers"]
) -> Float64[np.ndarray, " groups"]:
    """Return how deleting each group moves the median over layers, scaled to the median's standard error.

    Taking the median of each replicate fails: where layers tie, it jumps between layers and spreads too little. Taking
    the replicates of the one middle layer fails, too: they spread up to twice as much as the median of many layers.

    So errors e with the jackknife's covariance are drawn. The share of draws of values + e in which a layer is in the
    middle is the derivative of the mean median by that layer's value (Efron 2014, "Estimation and accuracy after model
    selection", section 4); these shares weigh the layers' deviations. The result is stretched to the spread of the
    drawn medians, because the median is rougher than its mean.
    """
    groups, layers = replicates.shape
    deviations = replicates - replicates.mean(axis=0)
    draws = np.random.default_rng(0).standard_normal((MEDIAN_DRAWS, groups))
    errors = math.sqrt((groups - 1) / groups) * draws @ deviations
    drawn = values + np.concatenate([errors, -errors])
    middle = np.argsort(drawn, axis=1, kind="stable")[:, (layers - 1) // 2 : layers // 2 + 1]
    weights = np.bincount(middle.ravel(), minlength=layers) / middle.size
    out = deviations @ weights
    spread = float(standard_errors(out))
    return np.asarray(out * (np.median(drawn, axis=1).std() / spread if spread else 1.0))


# --- the metrics ------------------------------------------------------------------------------------------------

_LAW = "the update law, held out over documents: see reduction/law_fit.py"


@metric(
    "phase",
    "median over L of [R2(c T^(-L)) - R2(c h)] / [R2(T_L) - R2(c h)]: shared map, fitted without L, against L's own",
    takes="law",
    low=-math.inf,
    version=3,
    source=_LAW,
)
def sharing_index(law: PhaseLaw) -> Estimate:
    """Return the share of the gain of a layer's map over the scaled state that a shared map reaches."""
    return law.ratio("shared", "scaled")


@metric(
    "phase",
    "median over L of R2 of c_L T^(-L), the map of the phase's other layers",
    takes="law",
    low=-math.inf,
    high=1.0,
    version=3,
    source=_LAW,
)
def shared_r2(law: PhaseLaw) -> Estimate:
    """Return the held-out R^2 of the map fitted on the phase's other layers."""
    return law.rung("shared")


@metric(
    "phase",
    "median over L of R2 of T_L, the layer's own map",
    takes="law",
    low=-math.inf,
    high=1.0,
    version=3,
    source=_LAW,
)
def own_r2(law: PhaseLaw) -> Estimate:
    """Return the held-out R^2 of the map fitted on the layer itself."""
    return law.rung("own")


@metric(
    "phase",
    "median over L of v^T R_L v / tr R_L, R_L the residual after the shared map, v its top eigenvector in training",
    takes="law",
    high=1.0,
    version=3,
    source=_LAW,
)
def residual_rank_one_share(law: PhaseLaw) -> Estimate:
    """Return the share of the residual's held-out energy that lies along its leading direction."""
    return law.median(law.share)


@metric(
    "phase",
    "median over L of [R2(c T^(-L) + v w^T) - R2(c T^(-L))] / [R2(T_L) - R2(c T^(-L))]",
    takes="law",
    low=-math.inf,
    version=3,
    source=_LAW,
)
def rank_one_closure(law: PhaseLaw) -> Estimate:
    """Return the share of the gap between the shared map and the layer's map that one direction closes."""
    return law.ratio("rank_one", "shared")


@metric(
    "phase",
    "median over L of the mean over M != L in the phase of R2 of c T_M on layer L",
    takes="law",
    low=-math.inf,
    high=1.0,
    version=3,
    source=_LAW,
)
def transfer_r2(law: PhaseLaw) -> Estimate:
    """Return the held-out R^2 of maps taken from single other layers, averaged over those layers."""
    return law.transferred()


@metric(
    "phase",
    "median over L of R2 of c m^(-L) over an update of zero, m^(-L) the mean update of the phase's other layers",
    takes="law",
    low=-math.inf,
    high=1.0,
    source=_LAW,
)
def shared_mean_r2(law: PhaseLaw) -> Estimate:
    """Return the held-out share of the updates' energy that the mean update of the phase's other layers explains."""
    return law.rung("shared_mean")


@metric(
    "phase",
    "median over L of R2(c m^(-L)) / R2(mu_L), both over an update of zero: shared mean against L's own, mu_L",
    takes="law",
    low=-math.inf,
    source=_LAW,
)
def mean_sharing(law: PhaseLaw) -> Estimate:
    """Return the share of what a layer's mean update explains that the mean of the phase's other layers explains.

    With much text it is the squared cosine of the two means.
    """
    return law.mean_ratio()
