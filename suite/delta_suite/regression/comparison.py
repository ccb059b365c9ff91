"""Two records side by side: what is the same, what drifted, and what cannot be compared.

A difference is told from noise by its interval, over the units of the calibration. On the same units the two sides are
paired: the delete-a-group replicates are subtracted group by group, and the noise that they share goes away. On other
documents of the same source the variances add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from delta_suite.errors import OptionError
from delta_suite.metrics.directions import NEEDS_PRODUCTS
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import CONFIDENCE, standard_error, t_quantile
from delta_suite.metrics.registry import METRICS
from delta_suite.records.record import CalibrationRecord, ResamplingRecord
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import VARIANTS

COMPARED_VARIANTS = ("raw", "sink_free")
"""The variants that are compared: a centred variant has the same rows, and would double the claims."""

FALSE_ALARMS = 0.05
"""Share of runs on other documents in which anything of an unchanged model may look changed: half of it is for the
figures, half for the turning of directions, and each is shared out evenly (Bonferroni)."""

ROUNDING = 1e-5
"""Differences up to this share of the value (of 1 for a bounded metric) are rounding: batches differ by less."""

LAYERS = "layers"
"""The scope of items that hold a metric's comparisons of all layers."""

MODEL = "model"
"""The scope of a figure over all layers."""

_NOT_COMPARED = ("device", "processes", "dtype", "variants", "layers_path", "blocks_path", "blocks_left_out")
"""Settings that name where and how a model ran, or are compared by themselves; the others decide the numbers."""


class Status(Enum):
    """The outcome for one number or verdict."""

    SAME = "same"
    DRIFT = "drift"
    FLIP = "flip"
    NEW = "new"
    GONE = "gone"
    NOT_COMPARABLE = "not comparable"
    NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Comparison:
    """One number, before and now."""

    scope: str
    """`layer:3`, a phase, or `model`"""
    metric: str
    variant: str
    status: Status
    old: float | None = None
    new: float | None = None
    difference: float | None = None
    interval_alone: tuple[float, float] | None = None
    """Interval of this difference alone, at the suite's confidence."""
    tolerance: float | None = None
    """A larger difference fails: the half width at which all intervals of a comparison hold together, or as stated."""
    stated: bool = False
    """True if the tolerance was stated, and is not taken from the interval."""
    reason: str | None = None

    @property
    def item(self) -> str:
        """The item that this belongs to: all layers of a metric share one."""
        return item_of((self.variant, self.scope, self.metric))

    @property
    def layer(self) -> int | None:
        """The layer, or None for a comparison over a phase or the model."""
        return int(self.scope.removeprefix("layer:")) if self.scope.startswith("layer:") else None

    @property
    def fails(self) -> bool:
        """True if gone or not comparable, or a drift beyond its tolerance."""
        if self.status is Status.DRIFT:
            return self.difference is not None and not abs(self.difference) <= (self.tolerance or 0.0)
        return self.status in {Status.FLIP, Status.GONE, Status.NOT_COMPARABLE}

    @property
    def excess(self) -> float:
        """The difference in tolerances, to sort by."""
        if self.difference is None:
            return math.inf if self.fails else 0.0
        return abs(self.difference) / self.tolerance if self.tolerance else math.inf


def item_of(place: Place) -> str:
    """Return the name of the item that a figure belongs to.

    Example:
        >>> item_of(("raw", "layer:3", "gamma")), item_of(("raw", "C", "intra_cosine"))
        ('layers/gamma', 'C/intra_cosine')
    """
    _, scope, metric = place
    return f"{LAYERS if scope.startswith('layer:') else scope}/{metric}"


class UnknownVariantError(OptionError):
    """The variant asked for is not compared, or a record does not have it."""


def require_compared(variant: str) -> None:
    """Raise UnknownVariantError for a variant that is not compared."""
    if variant not in COMPARED_VARIANTS:
        kind = "is not compared" if variant in VARIANTS else "is unknown"
        raise UnknownVariantError(f"variant {variant!r} {kind}: use one of {', '.join(COMPARED_VARIANTS)}")


# --- the figures of a record -----------------------------------------------------------------------------------

Place = tuple[str, str, str]
"""(variant, scope, metric)"""


def figures(view: RecordView) -> list[Place]:
    """Return the place of every figure of a record that is compared: layers, then phases, then the model.

    The model's figures are boundaries, and what the stored cosines give over all layers where no phase spans them.
    """
    listed: list[Place] = []
    for variant in COMPARED_VARIANTS:
        if variant not in view.record.variants:
            continue
        for layer in view.layers:
            listed += [(variant, f"layer:{layer.layer}", metric) for metric in layer.metrics[variant]]
        for name, scope in view.record.scopes.items():
            listed += [(variant, name, metric) for metric in scope.metrics[variant]]
        listed += [(variant, MODEL, metric) for metric in METRICS if _is_of_model(view, variant, metric)]
    return listed


def _is_of_model(view: RecordView, variant: str, metric: str) -> bool:
    definition = METRICS[metric]
    if definition.takes == "boundaries":
        return definition.part in view.record.parts and metric in view.boundaries(variant).metrics
    of_cosines = definition.takes == "directions" and definition.scope != "layer" and metric not in NEEDS_PRODUCTS
    return of_cosines and (0, view.model.layers - 1) not in view.phases.values()


def estimate_at(view: RecordView, place: Place) -> Estimate:
    """Return the figure at a place of a record, with its replicates."""
    variant, scope, metric = place
    if scope.startswith("layer:"):
        return view.layer(int(scope.removeprefix("layer:")), metric, variant)
    if scope == MODEL:
        return view.over(range(view.model.layers), metric, variant)
    recorded = view.record.scopes[scope]
    if metric not in METRICS:  # a baseline may be older than the removal of a metric
        return recorded.metrics[variant][metric]
    return view.over(range(recorded.layers[0], recorded.layers[1] + 1), metric, variant)


# --- the comparison --------------------------------------------------------------------------------------------


def compare_figures(
    old: RecordView,
    new: RecordView,
    *,
    tolerances: Mapping[str, float] | None = None,
    other_documents: bool = False,
) -> list[Comparison]:
    """Compare every figure of either side, in the order of layers, then phases, then the model, by metric and variant.

    tolerances: by `metric`, `scope/metric`, or `layers/metric`: the difference allowed, instead of the interval's.
    other_documents: the calibrations may differ, being samples of one source; the comparison is then unpaired.
    """
    refusal = obstacle(old, new, other_documents=other_documents)
    sides = [{place: estimate_at(view, place) for place in figures(view)} for view in (old, new)]
    places = {place: (not place[1].startswith("layer:"), place[2]) for side in reversed(sides) for place in side}
    pairs = [
        _pair(old, new, place, (sides[0].get(place), sides[1].get(place)), refusal)
        for place in sorted(places, key=places.__getitem__)
    ]
    family = sum(pair.noise is not None for pair in pairs)
    return [_decided(pair, family, tolerances or {}) for pair in pairs]


def obstacle(old: RecordView, new: RecordView, *, other_documents: bool = False) -> str | None:
    """Return why nothing of the two can be compared, or None."""
    a, b = old.record.calibration, new.record.calibration
    if not other_documents:
        if a.sha256 != b.sha256:
            return (
                f"the calibration is another: {a.name} ({a.documents} documents, {a.sha256[:8]}) there, "
                f"{b.name} ({b.documents} documents, {b.sha256[:8]}) here"
            )
        if (a.tokens, a.dropped) != (b.tokens, b.dropped):
            return f"the same documents are {a.tokens} tokens there and {b.tokens} here: the tokenizer is another"
    if other_tokens := special_tokens_differ(a, b):
        return other_tokens
    if other_units := _units_differ(old.record.resampling, new.record.resampling, paired=a.sha256 == b.sha256):
        return other_units
    if (old.model.layers, old.model.hidden) != (new.model.layers, new.model.hidden):
        return (
            f"the model has {old.model.layers} layers x {old.model.hidden} there, "
            f"{new.model.layers} x {new.model.hidden} here"
        )
    before, after = old.record.provenance, new.record.provenance
    if before.dtype != after.dtype:
        return f"the weights were {before.dtype} there and are {after.dtype} here"
    for key in sorted((before.settings.keys() & after.settings.keys()) - set(_NOT_COMPARED)):
        if before.settings[key] != after.settings[key]:
            return f"the setting {key} was {before.settings[key]} there and is {after.settings[key]} here"
    return None


def _units_differ(old: ResamplingRecord, new: ResamplingRecord, *, paired: bool) -> str | None:
    """Return how the units of resampling differ, or None. Older records do not hold their assignment."""
    if old.unit != new.unit:
        return f"intervals are over {old.unit}s there and over {new.unit}s here"
    if not paired or (old.groups, old.assignment or new.assignment) == (new.groups, new.assignment or old.assignment):
        return None
    return f"the {old.units} {old.unit}s there and the {new.units} here are left out in other groups"


def special_tokens_differ(old: CalibrationRecord, new: CalibrationRecord) -> str | None:
    """Return how the special tokens before the documents differ, or None; older records do not hold them."""
    if None in (old.begins_with, new.begins_with) or old.begins_with == new.begins_with:
        return None
    there, here = (" ".join(token for token, _ in side.begins_with or ()) or "no special token" for side in (old, new))
    return f"the documents begin with {there} there and with {here} here"


@dataclass(frozen=True)
class _Pair:
    """A comparison that has not been decided yet, and the noise of its difference."""

    comparison: Comparison
    noise: tuple[float, int] | None = None
    """Standard error and degrees of freedom."""


def _pair(
    old: RecordView,
    new: RecordView,
    place: Place,
    estimates: tuple[Estimate | None, Estimate | None],
    refusal: str | None,
) -> _Pair:
    """Return the two values at a place, with the noise of their difference or the reason why there is none."""
    (variant, scope, metric), (a, b) = place, estimates
    values = [estimate.value if estimate else None for estimate in estimates]
    comparison = Comparison(scope, metric, variant, Status.SAME, values[0], values[1])

    def undecided(status: Status, reason: str) -> _Pair:
        return _Pair(replace(comparison, status=status, reason=reason))

    if refusal is not None:
        return undecided(Status.NOT_COMPARABLE, refusal)
    if mismatch := _mismatch(old, new, place):
        return undecided(Status.NOT_COMPARABLE, mismatch)
    part = METRICS[metric].part if metric in METRICS else "spectra"
    if a is None or b is None:
        if part not in new.record.parts:
            return undecided(Status.NOT_MEASURED, f"the part {part} was not measured: --parts {part}")
        return undecided(
            *((Status.NEW, "not in the baseline") if a is None else (Status.GONE, "not measured any more"))
        )
    if a.value is None or b.value is None:
        if a.value is None and b.value is None:
            return undecided(Status.SAME, f"no value on either side: {b.reason}")
        if a.value is None:
            return undecided(Status.NEW, f"had no value: {a.reason}")
        # A figure behind a gate (reliability above 0.6) comes and goes with the documents that are drawn.
        paired = old.record.calibration.sha256 == new.record.calibration.sha256
        return undecided(Status.GONE if paired else Status.NOT_MEASURED, f"no value any more: {b.reason}")
    return _noisy(comparison, a, b, paired=old.record.calibration.sha256 == new.record.calibration.sha256)


def _mismatch(old: RecordView, new: RecordView, place: Place) -> str | None:
    """Return why the two sides do not mean the same at a place, or None."""
    variant, scope, metric = place
    if scope in old.phases.keys() | new.phases.keys() and old.phases.get(scope) != new.phases.get(scope):
        spans = [_span(view.phases.get(scope)) for view in (old, new)]
        return f"phase {scope} was {spans[0]} there and is {spans[1]} here"
    versions = [view.record.variants.get(variant) for view in (old, new)]
    return metric_mismatch(old, new, metric) or _version_mismatch(f"variant {variant}", *versions)


def metric_mismatch(old: RecordView, new: RecordView, metric: str) -> str | None:
    """Return that two records hold different versions of a metric, or None where they do not."""
    return _version_mismatch(metric, *(view.record.provenance.metric_versions.get(metric) for view in (old, new)))


def _version_mismatch(what: str, before: int | None, after: int | None) -> str | None:
    if before is None or after is None or before == after:
        return None
    return f"{what} was version {before} there and is version {after} here"


def _span(layers: tuple[int, int] | None) -> str:
    return "absent" if layers is None else f"layers {layers[0]}-{layers[1]}"


def _noisy(comparison: Comparison, a: Estimate, b: Estimate, *, paired: bool) -> _Pair:
    """Return the difference of two numbers, with its noise."""
    if a.value is None or b.value is None:
        raise ValueError(f"{comparison.metric} over {comparison.scope} has no value on one side")
    noise = _paired_noise(a, b) if paired else _unpaired_noise(a, b)
    difference = b.value - a.value
    if not paired and noise is not None and a.corrected is not None and b.corrected is not None:
        difference = b.corrected - a.corrected  # other documents, perhaps another number of them: another bias
    if not paired and noise is None:
        reason = "no interval on one of the sides, and the documents are others"
        return _Pair(replace(comparison, status=Status.NOT_MEASURED, reason=reason))
    return _Pair(replace(comparison, difference=difference), noise)


def compare_pairs(
    estimates: Sequence[tuple[str, str, tuple[Estimate, Estimate]]], variant: str, *, paired: bool
) -> list[Comparison]:
    """Compare (scope, metric, both sides), where both sides have a value. Raises UnknownVariantError."""
    require_compared(variant)
    pairs = [
        _noisy(Comparison(scope, metric, variant, Status.SAME, a.value, b.value), a, b, paired=paired)
        for scope, metric, (a, b) in estimates
    ]
    family = sum(pair.noise is not None for pair in pairs)
    return [_decided(pair, family, {}) for pair in pairs]


def _paired_noise(a: Estimate, b: Estimate) -> tuple[float, int] | None:
    """Return the delete-a-group jackknife over the difference of replicates (Kott 2001, eq. 3)."""
    if a.replicates is None or b.replicates is None or len(a.replicates) != len(b.replicates):
        return None
    return _jackknife([y - x for x, y in zip(a.replicates, b.replicates, strict=True)])


def _unpaired_noise(a: Estimate, b: Estimate) -> tuple[float, int] | None:
    """Return the noise of independent sides: variances add. The degrees of freedom are those of one side: Welch's are
    up to twice as many, and too many for figures that jump with the documents, such as principal angles."""
    first, second = (None if side.replicates is None else _jackknife(side.replicates) for side in (a, b))
    if first is None or second is None:
        return None
    return math.hypot(first[0], second[0]), min(first[1], second[1])


def _jackknife(replicates: Sequence[float]) -> tuple[float, int]:
    """Return standard error and degrees of freedom."""
    return standard_error(replicates), len(replicates) - 1


def _decided(pair: _Pair, family: int, tolerances: Mapping[str, float]) -> Comparison:
    """Return a comparison with its status, its tolerance shared out over the family of all comparisons."""
    comparison = pair.comparison
    if comparison.difference is None:
        return comparison
    width, alone = _rounding(comparison), None
    if pair.noise is not None:
        error, freedom = pair.noise
        width = max(width, error * t_quantile(1 - FALSE_ALARMS / 4 / family, freedom))
        half = error * t_quantile((1 + CONFIDENCE) / 2, freedom)
        alone = (comparison.difference - half, comparison.difference + half)
    stated = stated_tolerance(comparison, tolerances)
    tolerance = width if stated is None else stated
    same = abs(comparison.difference) <= min(width, tolerance)
    return replace(
        comparison,
        status=Status.SAME if same else Status.DRIFT,
        interval_alone=alone,
        tolerance=tolerance,
        stated=stated is not None,
    )


def _rounding(comparison: Comparison) -> float:
    scale = max(abs(comparison.old or 0.0), abs(comparison.new or 0.0))
    if comparison.metric in METRICS and math.isfinite(METRICS[comparison.metric].high):
        scale = max(scale, 1.0)
    return ROUNDING * scale


def stated_tolerance(comparison: Comparison, tolerances: Mapping[str, float]) -> float | None:
    """Return the tolerance stated for a comparison's item or metric, or None."""
    return next((tolerances[key] for key in (comparison.item, comparison.metric) if key in tolerances), None)


# --- many comparisons ------------------------------------------------------------------------------------------


def by_item(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """Return the comparisons of each item."""
    items: dict[str, list[Comparison]] = {}
    for comparison in comparisons:
        items.setdefault(comparison.item, []).append(comparison)
    return items


_WORST_FIRST = (
    Status.NOT_COMPARABLE,
    Status.FLIP,
    Status.GONE,
    Status.DRIFT,
    Status.NEW,
    Status.NOT_MEASURED,
    Status.SAME,
)


def worst(comparisons: Sequence[Comparison]) -> Status:
    """Return the status of an item: that of its worst comparison."""
    failing = [comparison.status for comparison in comparisons if comparison.fails]
    return min(failing or [comparison.status for comparison in comparisons], key=_WORST_FIRST.index)


def first_changed_layer(comparisons: Iterable[Comparison]) -> int | None:
    """Return the first layer where anything drifted: those before it are the same, as far as can be told."""
    changed = (comparison.layer for comparison in comparisons if comparison.fails and comparison.layer is not None)
    return min(changed, default=None)
