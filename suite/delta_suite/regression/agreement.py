"""Two records of one model, measured twice: does the second one find the figures of the first?

Where the arithmetic is the same, every number agrees within `ROUNDING`. Elsewhere each corrected value lies inside the
other's interval, which is what a measurement on another device or in another dtype can be held to.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.registry import METRICS
from delta_suite.records.arrays import KINDS, Arrays
from delta_suite.records.record import Metrics, Provenance, Record
from delta_suite.regression.comparison import MODEL, ROUNDING, special_tokens_differ

DECIDING_SETTINGS = ("max_tokens", "top_k", "drop_first_token", "sink_reference_documents", "units")
"""Settings that decide the numbers wherever a model runs."""

OF_THE_DTYPE = frozenset({"rounding_share"})
"""Metrics that are about the dtype itself, and so another number in another dtype."""


@dataclass(frozen=True)
class Difference:
    """One figure that the second record does not find again."""

    scope: str
    """`layer:3`, a phase, or `model`"""
    metric: str
    variant: str
    number: str
    """The part of the figure that differs most: its value, corrected value, or an end of its interval."""
    stated: float | None
    again: float | None
    allowed: str
    """The numbers that the second one had to be among, in words."""
    excess: float
    """The difference in units of what is allowed, to sort by; infinite where one side has no number."""


@dataclass(frozen=True)
class Agreement:
    """How far two records of one model agree."""

    same_arithmetic: bool
    """True if the numbers had to be equal but for rounding; else they had to lie inside each other's intervals."""
    agreeing: int
    """The number of figures that agree."""
    differences: tuple[Difference, ...]
    """The figures that do not, the worst first."""
    undecided: int
    """The number of figures that cannot be compared: without an interval, of other versions, on one side alone, or
    about the dtype where that is another."""

    @property
    def agrees(self) -> bool:
        """True if nothing differs, and more figures agree than could not be compared."""
        return not self.differences and self.agreeing > self.undecided


def same_arithmetic(a: Provenance, b: Provenance) -> bool:
    """Return True if two runs add and multiply alike, so that their figures are equal but for the order of sums.

    These are equal device and dtype. Kernels of GPUs, and of 16 bits on any device, differ from one product to the
    next: there the hardware must be the same, too.
    """
    usual = a.device == "cpu" and a.dtype == "float32"
    return (a.device, a.dtype) == (b.device, b.dtype) and (usual or a.hardware == b.hardware)


def other_subject(stored: Record, again: Record) -> str | None:
    """Return why two records are not of one model on one calibration, or None where they are."""
    a, b = stored.model, again.model
    if a.fingerprint != b.fingerprint:
        return f"the files are others: their fingerprint is {b.fingerprint[:12]}, and the record's {a.fingerprint[:12]}"
    before, now = stored.calibration, again.calibration
    if before.sha256 != now.sha256:
        return f"the texts are others: their SHA-256 is {now.sha256[:12]}, and the record's {before.sha256[:12]}"
    if bool(before.chat_template) != bool(now.chat_template):
        return "one of them has the documents in the model's chat template, and the other has not"
    if (before.tokens, before.dropped) != (now.tokens, now.dropped):
        return f"the documents are {now.tokens} tokens, and {before.tokens} in the record"
    if special := special_tokens_differ(before, now):
        return special
    there, here = stored.provenance.settings, again.provenance.settings
    for key in DECIDING_SETTINGS:
        if key in there and key in here and there[key] != here[key]:
            return f"the setting {key} is {here[key]}, and {there[key]} in the record"
    return None


def agreement(stored: Record, again: Record) -> Agreement:
    """Compare two records of one model figure by figure; `other_subject` says whether they are that.

    Phases are compared where both records have them over the same layers.
    """
    exact = same_arithmetic(stored.provenance, again.provenance)
    incomparable = frozenset() if stored.provenance.dtype == again.provenance.dtype else OF_THE_DTYPE
    there, here = dict(_estimates(stored)), dict(_estimates(again))
    differences, agreeing, undecided = [], 0, 0
    for place in dict.fromkeys(chain(there, here)):
        scope, metric, variant = place
        a, b = there.get(place), here.get(place)
        same = metric not in incomparable and _versions(stored, metric, variant) == _versions(again, metric, variant)
        compared = None
        if a is not None and b is not None and same:
            compared = _exactly(metric, a, b) if exact else _by_intervals(metric, a, b)
        if compared is None:
            undecided += 1
        elif compared.excess <= 1:
            agreeing += 1
        else:
            differences.append(Difference(scope, metric, variant, **vars(compared)))
    differences.sort(key=lambda item: -item.excess)
    return Agreement(exact, agreeing, tuple(differences), undecided)


def of_other_groups(stored: Arrays, again: Arrays) -> list[str]:
    """Return the names of arrays of replicates whose groups are not those of a second measurement, one by one.

    Intervals are the same in any order of the groups; differences from another record, which are formed group by group,
    are not. With the same arithmetic a replicate is found again to a small part of what groups differ by: an array is
    of other groups where, in most of its columns, replicates differ by more from those of the same place than from each
    other.
    """
    out = []
    for name in sorted(stored.keys() & again.keys()):
        kinds = {part.removeprefix("scope_") for part in name.split(".")} & set(KINDS)
        if not kinds or stored[name].shape != again[name].shape or stored[name].ndim != 2:
            continue
        along = 1 if ".scope_" in name or name.startswith("law.") else 0
        there, here = (np.moveaxis(arrays[name].astype(np.float64), along, 0) for arrays in (stored, again))
        metric = METRICS.get(name.rpartition(".")[2])
        # Matrices, which are kept less the whole, and most metrics are of the size of 1, however small they are here.
        least = 1.0 if metric is None or math.isfinite(metric.high) else 0.0
        largest = np.maximum(np.abs(here).max(axis=0), least)
        there, here = there - there.mean(axis=0), here - here.mean(axis=0)
        spread, apart = np.linalg.norm(here, axis=0), np.linalg.norm(there - here, axis=0)
        told = spread > ROUNDING * largest * math.sqrt(len(here))  # else rounding is all that there is
        if told.any() and np.median(apart[told] / spread[told]) > 1:
            out.append(name)
    return out


def _versions(record: Record, metric: str, variant: str) -> tuple[int | None, int | None]:
    return record.provenance.metric_versions.get(metric), record.variants.get(variant)


def _estimates(record: Record) -> Iterator[tuple[tuple[str, str, str], Estimate]]:
    """Yield each figure of a record with its scope, metric and variant; a phase's scope tells its layers, too."""
    parts: list[tuple[str, Metrics]] = [(f"layer:{layer.layer}", layer.metrics) for layer in record.layers]
    parts += [
        (f"{name} (layers {scope.layers[0]}-{scope.layers[1]})", scope.metrics) for name, scope in record.scopes.items()
    ]
    parts.append((MODEL, {variant: boundary.metrics for variant, boundary in record.boundaries.items()}))
    for scope, metrics in parts:
        for variant, estimates in metrics.items():
            for metric, estimate in estimates.items():
                yield (scope, metric, variant), estimate


@dataclass(frozen=True)
class _Compared:
    """The number of a figure that differs most; fields as in `Difference`."""

    number: str
    stated: float | None
    again: float | None
    allowed: str
    excess: float


def _numbers(estimate: Estimate) -> dict[str, float]:
    """Return the numbers of a figure, by what they are called."""
    low, high = estimate.interval or (None, None)
    named = {"value": estimate.value, "sd": estimate.sd, "corrected value": estimate.corrected}
    named |= {"lower end": low, "upper end": high}
    return {name: number for name, number in named.items() if number is not None}


def _rounding(metric: str, *sides: Estimate) -> float:
    """Return the difference that is rounding: a share of the figure's largest number, or of 1 for a bounded metric."""
    largest = max((abs(number) for side in sides for number in _numbers(side).values()), default=0.0)
    bounded = metric in METRICS and math.isfinite(METRICS[metric].high)
    return ROUNDING * max(largest, 1.0 if bounded else 0.0)


def _exactly(metric: str, a: Estimate, b: Estimate) -> _Compared:
    width = _rounding(metric, a, b)
    there, here = _numbers(a), _numbers(b)
    if missing := sorted(there.keys() ^ here.keys()):
        stated, again = there.get(missing[0]), here.get(missing[0])
        return _Compared(missing[0], stated, again, _missing_words(again, a if again is not None else b), math.inf)
    compared = [
        _Compared(name, number, here[name], f"within {width:.2g}", _ratio(abs(number - here[name]), width))
        for name, number in there.items()
    ]
    return max(compared, key=lambda item: item.excess, default=_Compared("value", None, None, "absent", 0.0))


def _missing_words(again: float | None, without: Estimate) -> str:
    reason = f": {without.reason}" if without.reason else ""
    return f"absent, as in the record{reason}" if again is not None else f"there, as in the record{reason}"


def _by_intervals(metric: str, a: Estimate, b: Estimate) -> _Compared | None:
    """Return how a figure compares by the intervals of both sides; None where that cannot be told."""
    if a.value is None and b.value is None:
        return _Compared("value", None, None, "absent", 0.0)
    if a.best is None or b.best is None:
        return None  # a figure behind a gate comes and goes with rounding
    width = _rounding(metric, a, b)
    if abs(a.best - b.best) <= width:
        return _Compared("value", a.best, b.best, f"within {width:.2g}", 0.0)
    if a.interval is None or b.interval is None:
        return None
    there, here = _outside(a.interval, b.best), _outside(b.interval, a.best)
    allowed = f"in {_span(a.interval)}" if there >= here else f"such that {_span(b.interval)} has the record's"
    return _Compared("corrected value", a.best, b.best, allowed, _ratio(max(there, here), width))


def _outside(interval: tuple[float, float], value: float) -> float:
    """Return how far a value lies outside an interval; 0 where it is inside."""
    return max(interval[0] - value, value - interval[1], 0.0)


def _span(interval: tuple[float, float]) -> str:
    return f"{interval[0]:.6g} to {interval[1]:.6g}"


def _ratio(difference: float, width: float) -> float:
    return difference / width if width else (math.inf if difference else 0.0)
