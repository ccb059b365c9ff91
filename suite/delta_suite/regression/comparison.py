"""Two measurements side by side: what is the same, what drifted, and what cannot be compared.

A difference is told from noise by its interval, with documents as the unit. On the same documents the two sides are
paired: the delete-a-group replicates are subtracted group by group, and the noise that they share goes away. On other
documents of the same source the variances add.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from delta_suite.errors import RecordError
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import standard_error, t_quantile
from delta_suite.metrics.registry import METRICS, DirectionGram
from delta_suite.records.record import CalibrationRecord, Measurement, ModelRecord, read_arrays

COMPARED_VARIANTS = ("raw", "sink_free")
"""The variants that are compared: the other two are transformations of the same rows, and would double the claims."""

FALSE_ALARMS = 0.05
"""Share of runs on other documents in which anything of an unchanged model may look changed: half of it is for the
figures, half for the turning of directions, and each is shared out evenly (Bonferroni)."""

ROUNDING = 1e-5
"""Differences up to this share of the value (of 1 for a bounded metric) are rounding: batches differ by less."""

TURN_ROUNDING = 0.1
"""Degrees. A direction kept in float16 is off by 0.02 degrees."""

TURNS = {
    "direction_turn": "angle between the two v_L",
    "subspace_turn": "mean of the principal angles between the two top-8 subspaces",
}
"""How far the directions turned between two checkpoints, in degrees; compared like metrics, layer by layer."""

LAYERS = "layers"
"""The scope of items that hold a metric's comparisons of all layers."""

_NOT_COMPARED = ("device", "dtype", "variants", "layers_path", "blocks_path", "blocks_left_out")
"""Settings that name where and how a model ran, or are compared by themselves; the others decide the numbers."""


class Status(Enum):
    """What became of one number or verdict."""

    SAME = "same"
    DRIFT = "drift"
    FLIP = "flip"
    NEW = "new"
    GONE = "gone"
    NOT_COMPARABLE = "not comparable"
    NOT_MEASURED = "not measured"


class Snapshot(BaseModel):
    """What a comparison needs of a measurement: figures, and what must agree for them to be comparable."""

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    model: ModelRecord
    calibration: CalibrationRecord
    created: str
    dtype: str
    hardware: str
    settings: dict[str, Any]
    metric_versions: dict[str, int]
    phases: dict[str, tuple[int, int]]
    estimates: dict[str, dict[str, dict[str, Estimate]]]
    """variant -> `layer:3`, phase or `model` -> metric -> value, replicates"""
    halves_turn: dict[str, dict[str, tuple[float | None, ...]]] = {}
    """variant -> `direction_turn`, `subspace_turn` -> degrees between the document halves, layer by layer"""


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
    interval: tuple[float, float] | None = None
    """Of the difference, so wide that all intervals of a comparison hold together 95 times in 100."""
    interval_95: tuple[float, float] | None = None
    """Of this difference alone."""
    tolerance: float | None = None
    """A larger difference fails."""
    stated: bool = False
    """Whether the tolerance was stated, and is not taken from the interval."""
    reason: str | None = None

    @property
    def item(self) -> str:
        """The item that this belongs to: all layers of a metric share one."""
        return f"{LAYERS if self.layer is not None else self.scope}/{self.metric}"

    @property
    def layer(self) -> int | None:
        return int(self.scope.removeprefix("layer:")) if self.scope.startswith("layer:") else None

    @property
    def fails(self) -> bool:
        """Gone and not comparable always do, a drift beyond its tolerance."""
        if self.status is Status.DRIFT:
            return self.difference is not None and not abs(self.difference) <= (self.tolerance or 0.0)
        return self.status in {Status.FLIP, Status.GONE, Status.NOT_COMPARABLE}

    @property
    def excess(self) -> float:
        """The difference in tolerances, to sort by."""
        if self.difference is None:
            return math.inf if self.fails else 0.0
        return abs(self.difference) / self.tolerance if self.tolerance else math.inf


def snapshot(measurement: Measurement) -> Snapshot:
    """The figures of a measurement that are compared. Needs its arrays for `model` and the turning of halves."""
    variants = [name for name in COMPARED_VARIANTS if name in measurement.layers[0].metrics]
    estimates: dict[str, dict[str, dict[str, Estimate]]] = {}
    everything = range(measurement.model.layers)
    for variant in variants:
        scopes = {f"layer:{layer.layer}": layer.metrics[variant] for layer in measurement.layers}
        scopes |= {name: scope.metrics[variant] for name, scope in measurement.scopes.items()}
        if (everything[0], everything[-1]) not in measurement.phases.values():
            scopes["model"] = {
                name: measurement.over(everything, name, variant)
                for name, metric in METRICS.items()
                if metric.scope != "layer"
            }
        estimates[variant] = {
            scope: {name: _bare(estimate) for name, estimate in metrics.items()} for scope, metrics in scopes.items()
        }
    provenance = measurement.provenance
    return Snapshot(
        model=measurement.model,
        calibration=measurement.calibration,
        created=provenance.created,
        dtype=provenance.dtype,
        hardware=provenance.hardware,
        settings={key: value for key, value in provenance.settings.items() if key not in _NOT_COMPARED},
        metric_versions=provenance.metric_versions,
        phases=measurement.phases,
        estimates=estimates,
        halves_turn={variant: turn for variant in variants if (turn := _halves_turn(measurement, variant))},
    )


def _bare(estimate: Estimate) -> Estimate:
    """Value and replicates, to 9 digits: an interval is formed anew from the replicates of both sides."""
    if estimate.value is None:
        return Estimate(value=None, reason=estimate.reason)
    corrected = None if estimate.corrected is None else _digits(estimate.corrected)
    replicates = None
    if estimate.replicates is not None:
        replicates = tuple(None if own is None else _digits(own) for own in estimate.replicates)
    return Estimate(value=_digits(estimate.value), corrected=corrected, replicates=replicates)


def _digits(value: float) -> float:
    return float(f"{value:.9g}")


# --- directions ------------------------------------------------------------------------------------------------


def directions_of(measurement: Measurement) -> dict[str, np.ndarray]:
    """`<variant>.directions` of the compared variants, (layers, k, hidden); empty where they are not at hand."""
    if measurement._arrays is None or not measurement._arrays.exists():
        return {}
    arrays = read_arrays(measurement._arrays)
    names = [f"{variant}.directions" for variant in COMPARED_VARIANTS]
    return {name: arrays[name] for name in names if name in arrays}


def _halves_turn(measurement: Measurement, variant: str) -> dict[str, tuple[float | None, ...]]:
    """How far the directions of one half of the documents are from those of the other."""
    try:
        gram: DirectionGram = measurement.gram(variant)
    except RecordError:
        return {}
    if gram.ab is None:
        return {}
    layers = range(gram.layers)
    return {
        "direction_turn": tuple(_degrees(np.abs(gram.ab[layer, :1, layer, :1])) for layer in layers),
        "subspace_turn": tuple(_degrees(np.linalg.svd(gram.ab[layer, :, layer, :])[1]) for layer in layers),
    }


def turns(old: np.ndarray, new: np.ndarray) -> dict[str, list[float | None]]:
    """Degrees that v_L and the top-k subspace of each layer turned, from directions (layers, k, hidden).

    The subspace's is the mean of its principal angles (Björck & Golub 1973). None where a layer has no direction, or
    another number of them than before.
    """
    out: dict[str, list[float | None]] = {name: [] for name in TURNS}
    for before, after in zip(old.astype(np.float64), new.astype(np.float64), strict=True):
        a, b = (rows[np.linalg.norm(rows, axis=1) > 0.5] for rows in (before, after))
        if len(a) == 0 or len(b) == 0:
            out["direction_turn"].append(None)
            out["subspace_turn"].append(None)
            continue
        cosine = abs(float(a[0] @ b[0])) / float(np.linalg.norm(a[0]) * np.linalg.norm(b[0]))
        out["direction_turn"].append(_degrees(np.array([cosine])))
        if len(a) != len(b):
            out["subspace_turn"].append(None)
            continue
        bases = [np.linalg.qr(rows.T)[0] for rows in (a, b)]  # float16 left them not quite orthonormal
        out["subspace_turn"].append(_degrees(np.linalg.svd(bases[0].T @ bases[1], compute_uv=False)))
    return out


def _degrees(cosines: np.ndarray) -> float:
    return float(np.degrees(np.arccos(np.clip(cosines, 0.0, 1.0))).mean())


# --- the comparison --------------------------------------------------------------------------------------------


def compare(
    old: Snapshot,
    new: Snapshot,
    *,
    directions: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]] = ({}, {}),
    tolerances: Mapping[str, float] | None = None,
    other_documents: bool = False,
) -> list[Comparison]:
    """Every figure of either side, in the order of layers, then phases, then the model, by metric and variant.

    directions: the arrays of both sides as `directions_of` gives them; without them the turning is not measured.
    tolerances: by `metric`, `scope/metric`, or `layers/metric`: the difference allowed, instead of the interval's.
    other_documents: the calibrations may differ, being samples of one source; the comparison is then unpaired.
    """
    refusal = obstacle(old, new, other_documents=other_documents)
    paired = old.calibration.sha256 == new.calibration.sha256
    found = [_pair(old, new, variant, scope, metric, refusal, paired) for variant, scope, metric in _places(old, new)]
    family = sum(own.noise is not None for own in found)
    compared = [_judged(own, family, tolerances or {}) for own in found]
    return compared + _turned(old, new, directions, refusal, tolerances or {})


def obstacle(old: Snapshot, new: Snapshot, *, other_documents: bool = False) -> str | None:
    """Why nothing of the two can be compared, or None."""
    a, b = old.calibration, new.calibration
    if not other_documents:
        if a.sha256 != b.sha256:
            return (
                f"the calibration is another: {a.name} ({a.documents} documents, {a.sha256[:8]}) there, "
                f"{b.name} ({b.documents} documents, {b.sha256[:8]}) here"
            )
        if (a.tokens, a.dropped) != (b.tokens, b.dropped):
            return f"the same documents are {a.tokens} tokens there and {b.tokens} here: the tokenizer is another"
    if (old.model.layers, old.model.hidden) != (new.model.layers, new.model.hidden):
        return (
            f"the model has {old.model.layers} layers x {old.model.hidden} there, "
            f"{new.model.layers} x {new.model.hidden} here"
        )
    if old.dtype != new.dtype:
        return f"the weights were {old.dtype} there and are {new.dtype} here"
    for key in sorted(old.settings.keys() & new.settings.keys()):
        if old.settings[key] != new.settings[key]:
            return f"the setting {key} was {old.settings[key]} there and is {new.settings[key]} here"
    return None


def _places(old: Snapshot, new: Snapshot) -> list[tuple[str, str, str]]:
    """(variant, scope, metric) of either side: layers first, then phases, each metric's together."""
    places: dict[tuple[str, str, str], tuple[bool, str]] = {}
    for side in (new, old):
        for variant, scopes in side.estimates.items():
            for scope, metrics in scopes.items():
                for metric in metrics:
                    places.setdefault((variant, scope, metric), (not scope.startswith("layer:"), metric))
    return sorted(places, key=lambda place: places[place])


@dataclass(frozen=True)
class _Pair:
    """A comparison that has not been judged yet, and the noise of its difference."""

    comparison: Comparison
    noise: tuple[float, int] | None = None
    """Standard error and degrees of freedom."""


def _pair(
    old: Snapshot, new: Snapshot, variant: str, scope: str, metric: str, refusal: str | None, paired: bool
) -> _Pair:
    a, b = (side.estimates.get(variant, {}).get(scope, {}).get(metric) for side in (old, new))
    values = [own.value if own else None for own in (a, b)]
    made = Comparison(scope, metric, variant, Status.SAME, values[0], values[1])

    def undecided(status: Status, reason: str) -> _Pair:
        return _Pair(replace(made, status=status, reason=reason))

    if refusal is not None:
        return undecided(Status.NOT_COMPARABLE, refusal)
    if scope in old.phases.keys() | new.phases.keys() and old.phases.get(scope) != new.phases.get(scope):
        spans = [_span(side.phases.get(scope)) for side in (old, new)]
        return undecided(Status.NOT_COMPARABLE, f"phase {scope} was {spans[0]} there and is {spans[1]} here")
    versions = [side.metric_versions.get(metric) for side in (old, new)]
    if None not in versions and versions[0] != versions[1]:
        return undecided(
            Status.NOT_COMPARABLE, f"{metric} was version {versions[0]} there and is version {versions[1]} here"
        )
    if a is None:
        return undecided(Status.NEW, "not in the baseline")
    if b is None:
        return undecided(Status.GONE, "not measured any more")
    if a.value is None or b.value is None:
        if a.value is None and b.value is None:
            return undecided(Status.SAME, f"no value on either side: {b.reason}")
        if a.value is None:
            return undecided(Status.NEW, f"had no value: {a.reason}")
        # A figure behind a gate (reliability above 0.6) comes and goes with the documents that are drawn.
        return undecided(Status.GONE if paired else Status.NOT_MEASURED, f"no value any more: {b.reason}")
    return _pair_of(made, a, b, paired)


def _pair_of(made: Comparison, a: Estimate, b: Estimate, paired: bool) -> _Pair:
    """Two numbers and the noise of their difference."""
    if a.value is None or b.value is None:
        raise ValueError(f"{made.metric} over {made.scope} has no value on one side")
    noise = _paired_noise(a, b) if paired else _unpaired_noise(a, b)
    difference = b.value - a.value
    if not paired and noise is not None and a.corrected is not None and b.corrected is not None:
        difference = b.corrected - a.corrected  # other documents, perhaps another number of them: another bias
    if not paired and noise is None:
        reason = "no interval on one of the sides, and the documents are others"
        return _Pair(replace(made, status=Status.NOT_MEASURED, reason=reason))
    return _Pair(replace(made, difference=difference), noise)


def of_pair(
    estimates: Sequence[tuple[str, str, tuple[Estimate, Estimate]]], variant: str, *, paired: bool
) -> list[Comparison]:
    """(scope, metric, both sides) compared, where both sides have a value."""
    found = [
        _pair_of(Comparison(scope, metric, variant, Status.SAME, a.value, b.value), a, b, paired)
        for scope, metric, (a, b) in estimates
    ]
    family = sum(own.noise is not None for own in found)
    return [_judged(own, family, {}) for own in found]


def _span(layers: tuple[int, int] | None) -> str:
    return "absent" if layers is None else f"layers {layers[0]}-{layers[1]}"


def _paired_noise(a: Estimate, b: Estimate) -> tuple[float, int] | None:
    """Delete-a-group jackknife over the difference of replicates (Kott 2001, eq. 3)."""
    if a.replicates is None or b.replicates is None or len(a.replicates) != len(b.replicates):
        return None
    return _jackknife([y - x for x, y in zip(a.replicates, b.replicates, strict=True)])


def _unpaired_noise(a: Estimate, b: Estimate) -> tuple[float, int] | None:
    """Variances add. The degrees of freedom are those of one side: Welch's are up to twice as many, and too many for
    figures that jump with the documents, such as principal angles."""
    sides = [None if own.replicates is None else _jackknife(own.replicates) for own in (a, b)]
    first, second = sides
    if first is None or second is None:
        return None
    return math.hypot(first[0], second[0]), min(first[1], second[1])


def _jackknife(replicates: Sequence[float]) -> tuple[float, int]:
    """Standard error and degrees of freedom."""
    return standard_error(replicates), len(replicates) - 1


def _judged(pair: _Pair, family: int, tolerances: Mapping[str, float]) -> Comparison:
    own = pair.comparison
    if own.difference is None:
        return own
    rounding = _rounding(own)
    width, half_95 = rounding, None
    if pair.noise is not None:
        error, freedom = pair.noise
        width = max(rounding, error * t_quantile(1 - FALSE_ALARMS / 4 / family, freedom))
        half_95 = error * t_quantile(0.975, freedom)
    stated = _stated(own, tolerances)
    tolerance = width if stated is None else stated
    same = abs(own.difference) <= min(width, tolerance)
    return replace(
        own,
        status=Status.SAME if same else Status.DRIFT,
        interval=(own.difference - width, own.difference + width),
        interval_95=None if half_95 is None else (own.difference - half_95, own.difference + half_95),
        tolerance=tolerance,
        stated=stated is not None,
    )


def _rounding(own: Comparison) -> float:
    scale = max(abs(own.old or 0.0), abs(own.new or 0.0))
    if own.metric in METRICS and math.isfinite(METRICS[own.metric].high):
        scale = max(scale, 1.0)
    return ROUNDING * scale


def _stated(own: Comparison, tolerances: Mapping[str, float]) -> float | None:
    return next((tolerances[key] for key in (own.item, own.metric) if key in tolerances), None)


def _turned(
    old: Snapshot,
    new: Snapshot,
    directions: tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]],
    refusal: str | None,
    tolerances: Mapping[str, float],
) -> list[Comparison]:
    """How far each layer's directions turned, against how far those of the two halves of documents are apart."""
    paired = old.calibration.sha256 == new.calibration.sha256
    variants = [name for name in COMPARED_VARIANTS if name in old.estimates or name in new.estimates]
    factor = 1.0 if paired else _turn_factor(len(TURNS) * len(variants) * old.model.layers)
    out = []
    for variant in variants:
        before, after = (side.get(f"{variant}.directions") for side in directions)
        found = {} if refusal is not None or before is None or after is None else turns(before, after)
        for metric in TURNS:
            made = Comparison(LAYERS, metric, variant, Status.NOT_MEASURED)
            if refusal is not None:
                out.append(replace(made, status=Status.NOT_COMPARABLE, reason=refusal))
            elif not found:
                where = "the baseline has none beside it" if before is None else "this measurement's are not at hand"
                out.append(replace(made, reason=f"the directions cannot be compared: {where}"))
            for layer, turn in enumerate(found.get(metric, [])):
                own = replace(made, scope=f"layer:{layer}", new=turn, difference=turn)
                apart = [_apart(side, variant, metric, layer) for side in (old, new)]
                out.append(_turn(own, apart, paired, factor, _stated(own, tolerances)))
    return out


def _turn(
    own: Comparison, apart: Sequence[float | None], paired: bool, factor: float, stated: float | None
) -> Comparison:
    known = [degrees for degrees in apart if degrees is not None]
    if own.difference is None:
        return replace(own, reason="the layer has no direction, or another number of them")
    if not paired and len(known) < len(apart) and stated is None:
        return replace(own, difference=None, reason="the documents are others, and a calibration has no halves")
    noise = max(known, default=0.0) if paired else math.sqrt(sum(degrees**2 for degrees in known) / 2)
    width = max(TURN_ROUNDING, factor * noise)
    tolerance = width if stated is None else stated
    status = Status.SAME if own.difference <= min(width, tolerance) else Status.DRIFT
    return replace(own, status=status, tolerance=tolerance, stated=stated is not None)


def _turn_factor(family: int) -> float:
    """Turns between two samples are this many times the rms turn between their halves at most, all layers at once.

    Two samples of n documents are apart by 1/sqrt(2) of what two halves of n / 2 are, in the mean. A turn has few
    degrees of freedom, as mostly it goes towards the next direction or two, so the ratio of squares is taken as
    F(2, 4), whose upper tail is (1 + F / 2)^-2.
    """
    tail = FALSE_ALARMS / 2 / family
    quantile = 2 * (tail**-0.5 - 1)
    return math.sqrt(quantile / 2)


def _apart(side: Snapshot, variant: str, metric: str, layer: int) -> float | None:
    degrees = side.halves_turn.get(variant, {}).get(metric, ())
    return degrees[layer] if layer < len(degrees) else None


# --- of many comparisons ---------------------------------------------------------------------------------------


def by_item(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    """The comparisons of each item."""
    items: dict[str, list[Comparison]] = {}
    for own in comparisons:
        items.setdefault(own.item, []).append(own)
    return items


def worst(comparisons: Sequence[Comparison]) -> Status:
    """The status of an item: that of its worst comparison."""
    order = (
        Status.NOT_COMPARABLE,
        Status.FLIP,
        Status.GONE,
        Status.DRIFT,
        Status.NEW,
        Status.NOT_MEASURED,
        Status.SAME,
    )
    failing = [own.status for own in comparisons if own.fails]
    return min(failing or [own.status for own in comparisons], key=order.index)


def first_changed_layer(comparisons: Iterable[Comparison]) -> int | None:
    """The first layer of which anything drifted: those before it are the same, as far as can be told."""
    return min((own.layer for own in comparisons if own.fails and own.layer is not None), default=None)
