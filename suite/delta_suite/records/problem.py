"""Contradictions of a record, and the figures that they are looked for in, many at a time.

Tolerances are derived, not tuned. A number in a record has 9 significant digits, so it is off by at most 5e-9 of its
size; a number in an array of float32 is off by at most half of SINGLE. What a check compares is bounded from these two.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Float64

from delta_suite.metrics.definition import Metric
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.intervals import critical_t, standard_errors
from delta_suite.metrics.registry import METRICS

WRITTEN = 1e-8
"""Relative difference of two numbers that are each written with 9 significant digits."""

SINGLE = float(np.finfo(np.float32).eps)
"""Relative spacing of float32: 2^-23."""

Numbers = Float64[np.ndarray, " figures"]


@dataclass(frozen=True)
class Problem:
    """One contradiction: where it stands, and what contradicts what, with both numbers."""

    where: str
    says: str

    def __str__(self) -> str:
        """Return one line."""
        return f"{self.where}: {self.says}"


def quoted(value: object) -> str:
    """Return a number, or a quoted word, for a message.

    Example:
        >>> quoted(0.5), quoted(float("nan")), quoted("x\\x1b")
        ('0.5', 'absent', "'x\\\\x1b'")
    """
    if isinstance(value, float | np.floating):
        return "absent" if np.isnan(value) else f"{value:.9g}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."


def equal_numbers(stated: object, expected: object) -> bool:
    """Return True if two numbers are equal but for how they are written, or two other values are the same.

    Example:
        >>> equal_numbers(0.333333333, 1 / 3), equal_numbers([1, 2], [1, 3])
        (True, False)
    """
    if isinstance(stated, int | float) and isinstance(expected, int | float):
        return abs(stated - expected) <= WRITTEN * (abs(stated) + abs(expected))
    return stated == expected


@dataclass(frozen=True)
class Figures:
    """Estimates in order, their numbers as arrays; NaN for what an estimate does not have."""

    metrics: Sequence[Metric]
    """The metric of each figure."""
    places: Sequence[str]
    """The words for the layer or phase of each figure."""
    value: Numbers
    sd: Numbers
    corrected: Numbers
    low: Numbers
    """The lower end of the interval."""
    high: Numbers
    """The upper end of the interval."""
    low_documents: Numbers
    """The ends of the interval over documents, where the unit is the domain."""
    high_documents: Numbers

    @classmethod
    def of(cls, rows: Sequence[tuple[Metric, str, Estimate]]) -> Figures:
        """Return the figures of these metrics, places and estimates."""
        nan = (None, None)
        numbers = np.array(
            [
                (item.value, item.sd, item.corrected, *(item.interval or nan), *(item.interval_documents or nan))
                for _, _, item in rows
            ],
            dtype=np.float64,
        )
        return cls([row[0] for row in rows], [row[1] for row in rows], *numbers.reshape(-1, 7).T)

    def __len__(self) -> int:
        """Return the number of figures."""
        return len(self.metrics)

    def take(self, chosen: slice) -> Figures:
        """Return some of the figures."""
        return Figures(self.metrics[chosen], self.places[chosen], *(array[chosen] for array in self._numbers))

    @property
    def _numbers(self) -> tuple[Numbers, ...]:
        ends = (self.low, self.high, self.low_documents, self.high_documents)
        return self.value, self.sd, self.corrected, *ends

    def over_documents(self) -> Figures:
        """Return the figures with their intervals over documents in place of those over domains."""
        return replace(self, low=self.low_documents, high=self.high_documents)

    def joined(self, spans: Sequence[slice]) -> Figures:
        """Return the figures of several spans, one after the other."""
        chosen = [index for span in spans for index in range(span.start, span.stop)]
        places = np.array(chosen, dtype=np.int64)
        return Figures(
            [self.metrics[index] for index in chosen],
            [self.places[index] for index in chosen],
            *(array[places] for array in self._numbers),
        )

    @classmethod
    def together(cls, parts: Sequence[Figures]) -> Figures:
        """Return all figures of several, one after the other."""
        numbers = [part._numbers for part in parts]
        return cls(
            [metric for part in parts for metric in part.metrics],
            [place for part in parts for place in part.places],
            *(np.concatenate(arrays) for arrays in zip(*numbers, strict=True)),
        )

    def bounds(self) -> tuple[Numbers, Numbers]:
        """Return the lower and the upper end of the range of each figure."""
        return np.array([metric.low for metric in self.metrics]), np.array([metric.high for metric in self.metrics])

    @property
    def of_law(self) -> Bool[np.ndarray, " figures"]:
        """True for figures of the law, whose bias is removed layer by layer."""
        return np.array([metric.takes == "law" for metric in self.metrics])

    def corrected_bounds(self) -> tuple[Numbers, Numbers]:
        """Return the ends that corrected values and intervals are cut to: those of the range; of the law none."""
        low, high = self.bounds()
        return np.where(self.of_law, -np.inf, low), np.where(self.of_law, np.inf, high)

    def where(self, index: int) -> str:
        """Return the words for the place of a figure."""
        return f"{self.places[index]}, {self.metrics[index].name}"

    def differing(
        self, what: str, stated: Numbers, expected: Numbers, tolerance: Numbers | float, source: str
    ) -> Iterator[Problem]:
        """Yield a problem for each stated number that is not the expected one; NaN is expected to be absent."""
        equal = np.abs(stated - expected) <= tolerance
        if equal.all():
            return
        equal |= np.isnan(stated) & np.isnan(expected)
        for index in np.flatnonzero(~equal):
            yield Problem(
                self.where(int(index)),
                f"{what} is {quoted(stated[index])}, and {source} gives {quoted(expected[index])}",
            )

    def outside(
        self, what: str, stated: Numbers, low: Numbers | float, high: Numbers | float, of: str = ""
    ) -> Iterator[Problem]:
        """Yield a problem for each stated number outside a range by more than it is rounded."""
        slack = WRITTEN * np.abs(stated)
        wrong = (stated < low - slack) | (stated > high + slack)
        for index in np.flatnonzero(wrong):
            lowest, highest = (float(np.broadcast_to(bound, stated.shape)[index]) for bound in (low, high))
            yield Problem(
                self.where(int(index)),
                f"{what} is {quoted(stated[index])}, outside {quoted(lowest)} to {quoted(highest)}{of}",
            )


def figures_by_metric(
    rows: Sequence[Mapping[str, Estimate]], places: Sequence[str]
) -> tuple[Figures, dict[str, slice]]:
    """Return the figures of layers or phases, metric by metric, and where those of each metric stand.

    Metrics that some rows lack are among the figures, and have no place in the second result.
    """
    triples: list[tuple[Metric, str, Estimate]] = []
    spans: dict[str, slice] = {}
    for name, metric in METRICS.items():
        first = len(triples)
        triples += [(metric, place, row[name]) for row, place in zip(rows, places, strict=True) if name in row]
        if rows and len(triples) - first == len(rows):
            spans[name] = slice(first, len(triples))
    return Figures.of(triples), spans


def most_of(metric: Metric, rank: int, layers: int) -> float:
    """Return the largest value of a metric.

    rank: the smaller of the number of tokens and the width of the stream. layers: the number of layers of the phase.

    Example:
        >>> most_of(METRICS["effective_rank"], rank=576, layers=30), most_of(METRICS["top1_energy"], 576, 30)
        (576.0, 1.0)
    """
    if metric.most == "rank":
        return float(rank)
    return float(layers) if metric.most == "layers" else min(metric.high, metric.most)


def range_problems(figures: Figures, most: Numbers) -> Iterator[Problem]:
    """Yield figures that cannot be: values out of range, intervals upside down or beside their centre.

    The corrected value is 2 x whole - mean of halves, cut to the metric's range; so it may exceed the largest value of
    a metric that has no upper end of its own, up to 2 x largest - lowest. Those of the law, whose bias is removed layer
    by layer, are not cut.
    """
    if not len(figures):
        return
    low, high = figures.bounds()
    yield from figures.outside("the value", figures.value, low, most)
    # No standard deviation exceeds half of the range (Popoviciu 1935).
    yield from figures.outside("the sd", figures.sd, 0.0, (high - low) / 2)
    low, high = figures.corrected_bounds()
    yield from figures.outside("the corrected value", figures.corrected, low, np.minimum(high, 2.0 * most - low))
    yield from figures.outside("the lower end of the interval", figures.low, low, figures.high)
    yield from figures.outside("the upper end of the interval", figures.high, figures.low, high)
    yield from figures.outside("the corrected value", figures.corrected, figures.low, figures.high, ", its interval")
    for over in (figures, figures.over_documents()):
        # Neither end was cut: then the interval reaches as far to either side.
        whole = (over.low > low) & (over.high < high)
        centre = np.where(whole, (over.low + over.high) / 2, np.nan)
        tolerance = WRITTEN * (np.abs(over.low) + np.abs(over.high) + np.abs(over.corrected))
        stated = np.where(whole, over.corrected, np.nan)
        yield from over.differing("the corrected value", stated, centre, tolerance, "the middle of its interval")
    averages = np.array([metric.takes == "tokens" for metric in figures.metrics])
    for index in np.flatnonzero(averages & np.isnan(figures.sd) & ~np.isnan(figures.value)):
        yield Problem(figures.where(int(index)), "its sd is missing")
    for index in np.flatnonzero(np.isnan(figures.corrected) != np.isnan(figures.low)):
        yield Problem(figures.where(int(index)), "it has one of corrected value and interval without the other")
    for index in np.flatnonzero(np.isnan(figures.value) & ~np.isnan(figures.corrected)):
        yield Problem(figures.where(int(index)), "it has an interval and no value")


Part = tuple[np.ndarray | None, np.ndarray | None, np.ndarray | float]
"""Replicates, halves and error of the figures of one metric."""


@dataclass(frozen=True)
class Resamples:
    """Replicates and halves, from which corrected values and intervals follow: a column for each figure."""

    replicates: Float64[np.ndarray, "groups figures"]
    halves: Float64[np.ndarray, "halves figures"]
    """Each half of the documents; NaN where a bias is not read from them."""
    error: Numbers
    """Bound of the error of replicates that are formed from float32; 0 for those stored as float64; infinite where the
    arrays do not tell, so that nothing is checked."""
    absent: Bool[np.ndarray, " figures"]
    """True where the arrays have no replicates of the metric."""

    @classmethod
    def join(
        cls,
        parts: Sequence[Part],
        rows: int,
        groups: int,
    ) -> Resamples:
        """Return the resamples of several metrics of `rows` layers or phases: replicates, halves and error of each."""
        none = np.full((groups, rows), np.nan)
        return cls(
            np.concatenate([none if r is None else r.astype(np.float64) for r, _, _ in parts], axis=1),
            np.concatenate([none[:1].repeat(2, 0) if halves is None else halves for _, halves, _ in parts], axis=1),
            np.concatenate([np.broadcast_to(error, rows) for _, _, error in parts]),
            np.repeat([replicates is None for replicates, _, _ in parts], rows),
        )


class Resampled:
    """Figures and what they were resampled to, from several checks: those of as many groups are checked at once.

    For models of few layers a check of ten figures takes as long as one of a hundred.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[int, bool, bool], list[tuple[Figures, Resamples]]] = {}

    def add(self, figures: Figures, resamples: Resamples, *, centred: bool = True, narrower: bool = False) -> None:
        """Take figures. centred, narrower: as for `resampling_problems`."""
        key = (len(resamples.replicates), centred, narrower)
        self._parts.setdefault(key, []).append((figures, resamples))

    def problems(self) -> Iterator[Problem]:
        """Yield where corrected values and intervals do not follow from the replicates and halves."""
        for (_, centred, narrower), parts in self._parts.items():
            figures = Figures.together([figures for figures, _ in parts])
            resamples = Resamples(
                np.concatenate([each.replicates for _, each in parts], axis=1),
                np.concatenate([each.halves for _, each in parts], axis=1),
                np.concatenate([each.error for _, each in parts]),
                np.concatenate([each.absent for _, each in parts]),
            )
            yield from resampling_problems(figures, resamples, centred=centred, narrower=narrower)


def resampling_problems(
    figures: Figures, resamples: Resamples, *, centred: bool = True, narrower: bool = False, quantile: float = 0.0
) -> Iterator[Problem]:
    """Yield where corrected values and intervals do not follow from the replicates and halves.

    centred: false where the corrected values cannot be formed anew, and only the intervals around them are. narrower:
    true for intervals over documents, which are around the corrected values of those over domains. quantile: the
    relative error of the quantile of t that was used.
    """
    replicates, value = resamples.replicates, figures.value
    for index in np.flatnonzero(resamples.absent & ~np.isnan(figures.low)):
        yield Problem(figures.where(int(index)), "it has an interval, and the arrays have no replicates of it")
    for index in np.flatnonzero(np.isinf(replicates).any(axis=0) | np.isinf(resamples.halves).any(axis=0)):
        yield Problem(figures.where(int(index)), "a replicate or half of it is infinite")
    groups = len(replicates)
    if groups < 2:
        return
    (low, high), law = figures.corrected_bounds(), figures.of_law
    errors = standard_errors(replicates)
    # The error of a replicate that is NaN is NaN. It gives no interval, so one that is stated contradicts it.
    error = np.where(np.isnan(resamples.error), 0.0, resamples.error)
    known = ~resamples.absent & np.isfinite(error)
    bias = np.array([metric.bias for metric in figures.metrics])
    means = resamples.halves.mean(axis=0)
    by_halves = (bias == "halves") & ~law & centred
    sides = [replicates[half::2] for half in (0, 1)]
    changes = sum((len(side) - 1) * (side.mean(axis=0) - value) for side in sides)
    corrected = np.where(by_halves, 2 * value - means, np.where(bias == "groups", value - changes, value))
    of_mean = value - (groups - 1) * (replicates.mean(axis=0) - value)
    corrected = np.where(bias == "replicates", of_mean, corrected)
    size = 2 * np.abs(value) + np.where(by_halves, np.abs(means), 0.0)
    times = np.where(np.isin(bias, ["groups", "replicates"]), 2 * groups, 0)
    allowance = np.where(times > 0, times * (error + WRITTEN * np.abs(value)), 0.0)
    # The bias of the law is removed from figures that are not kept.
    allowance = np.where(law, np.inf, allowance) if centred else np.full(len(value), np.inf)
    if not centred:
        known &= ~np.isnan(figures.corrected)
    corrected = np.where(np.isnan(errors) | ~known, np.nan, np.minimum(high, np.maximum(low, corrected)))
    stated = np.where(known, figures.corrected, np.nan)
    tolerance = allowance + WRITTEN * (size + np.abs(corrected))
    if not narrower:
        yield from figures.differing(
            "the corrected value", stated, corrected, tolerance, "its value, less the bias of halves or replicates,"
        )
    reach = critical_t(groups) * errors
    # An error of every deviation moves their norm by 2 e sqrt(G) at most, and the standard error by less than that.
    tolerance = WRITTEN * (np.abs(stated) + size) + (WRITTEN + quantile) * reach
    tolerance += critical_t(groups) * 2 * error * math.sqrt(groups)
    for what, end, sign in (("lower", figures.low, -1), ("upper", figures.high, 1)):
        expected = np.minimum(high, np.maximum(low, stated + sign * reach))
        stated_end = np.where(known, end, np.nan)
        yield from figures.differing(
            f"the {what} end of the interval{' over documents' if narrower else ''}",
            stated_end,
            expected,
            tolerance,
            "the spread of its replicates",
        )
