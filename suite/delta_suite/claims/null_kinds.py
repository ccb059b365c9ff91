"""Nulls: what a claim can be held against instead of a number or a figure of another scope.

Each null is one entry of NULLS: what a hypothesis file may say beside it, its words in the text of a claim, and the
bound that it sets. The schema, the texts and the verdict all read that entry: a new null is one function and one entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from delta_suite.claims.observe import Observation, layers_of, observe, over_layers
from delta_suite.errors import RecordError, SuiteError
from delta_suite.metrics import nulls
from delta_suite.metrics.drift import outside_fit
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import combine
from delta_suite.metrics.registry import METRICS
from delta_suite.models.phases import PhaseMap, phase_map
from delta_suite.records.view import RecordView

if TYPE_CHECKING:
    from delta_suite.claims.schema import Expectation, Than
    from delta_suite.models.spec import ModelSpec

NO_CONTROL = "the random-weights control was not measured (leave --no-control out, or measure it)"


@dataclass(frozen=True)
class Requirement:
    """The other side of a comparison."""

    estimate: Estimate
    reference: Observation | None = None
    """The figure of a scope that the estimate is formed from."""
    p: float | None = None
    """The p-value of the observed value's rank in a null."""
    undecidable: str | None = None
    """Why no value, however large, could show the claim."""
    opposite: Estimate | None = None
    """With a null by rank, the bound at its other end: only beyond that is the claim refuted."""


def _any_depth(layers: int, scope: range, quantile: float) -> None:
    """Return None: the null can decide in models of any depth."""


Control = RecordView | Callable[[], RecordView | None] | None
"""Record of the same architecture with random weights, or a function that measures it where it is needed; or None."""


def control_of(control: Control) -> RecordView | None:
    """Return the record of a control, which is measured now where it was not needed before."""
    return control() if callable(control) else control


@dataclass(frozen=True)
class Null:
    """One kind of comparison with what chance or the architecture alone would give."""

    name: str
    description: str
    """Its description in the JSON Schema of hypothesis files."""
    words: str
    """Its words in the text of a claim; {share} is the quantile in percent."""
    allows: frozenset[str]
    """The keys of `than` that go with it: scope, metric, write, times, plus, quantile."""
    bound: Callable[[Expectation, Than, RecordView, Control, Observation], Requirement]
    """Function of a claim, its `than`, the record, the record of the control and the observed side that returns the
    other side."""
    depth_problem: Callable[[int, range, float], str | None] = _any_depth
    """Function of a model's layers, those of the scope and the quantile that returns why no figure could decide."""

    @property
    def by_rank(self) -> bool:
        """True if the observed value is compared by its rank among many."""
        return "quantile" in self.allows


def requirement(expectation: Expectation, view: RecordView, control: Control, observed: Observation) -> Requirement:
    """Return what the observed side is compared with; its estimate says why where there is nothing.

    A threshold is always there. Everything else needs the arrays beside the record: replicates of both sides for the
    interval of a difference, directions for a null.

    control: it is measured for a claim whose null it is, and for no other.
    """
    than = expectation.than
    if than is None:
        return Requirement(Estimate(value=expectation.threshold))
    if problem := _arrays_problem(view):
        return Requirement(absent(problem))
    if than.null is None:
        return _scope(expectation, than, view)
    if observed.value is None or observed.layers is None:
        return Requirement(absent(observed.reason or "not measured"))
    if problem := undecidable_at(expectation, view.model.layers, view.phases):
        return Requirement(absent(problem), undecidable=problem)
    return NULLS[than.null].bound(expectation, than, view, control, observed)


def undecidable_at(expectation: Expectation, layers: int, phases: PhaseMap) -> str | None:
    """Return why no figure of a model of this depth and these phases could decide a claim; None where one could.

    It is known before anything is measured. A scope that the model does not have is no such reason.
    """
    if expectation.than is None or expectation.than.null is None:
        return None
    scope = layers_of(expectation.scope, layers, phases)
    if isinstance(scope, str):
        return None
    return NULLS[expectation.than.null].depth_problem(layers, scope, expectation.than.quantile)


def _arrays_problem(view: RecordView) -> str | None:
    """Return why the arrays beside the record cannot be read, or None if they can."""
    try:
        view.content()
    except RecordError as error:
        return str(error)
    return None


def _scope(expectation: Expectation, than: Than, view: RecordView) -> Requirement:
    """Return a figure over another scope, times a factor and plus a number."""
    metric, scope = than.metric or expectation.metric, than.scope or expectation.scope
    options = (expectation.other_figures, expectation.aggregate, expectation.with_metric)
    reference = observe(view, metric, scope, *options)
    return Requirement(combine(than.required, reference.estimate, arithmetic=True), reference)


def _random_weights(
    expectation: Expectation, than: Than, view: RecordView, control: Control, observed: Observation
) -> Requirement:
    """Return the figure of the same architecture with random weights."""
    measured = control_of(control)
    problem = NO_CONTROL if measured is None else _arrays_problem(measured)
    if measured is None or problem:
        return Requirement(absent(problem or NO_CONTROL))
    return _scope(expectation, than, measured)


def _layers(observed: Observation) -> range:
    assert observed.layers is not None
    return range(observed.layers[0], observed.layers[1] + 1)


def _window(
    expectation: Expectation, than: Than, view: RecordView, control: Control, observed: Observation
) -> Requirement:
    """Return the bound of a rank among all runs of as many layers."""
    layers = _layers(observed)
    assert observed.value is not None
    metric, variant = expectation.metric, expectation.figures
    if METRICS[metric].takes == "directions" and METRICS[metric].scope != "layer":
        try:  # a record may hold its phases' figures and no cosines, and phases alone are not all windows
            view.gram(variant)
        except RecordError as error:
            return Requirement(absent(str(error)))
    runs = [run for run in nulls.windows(view.model.layers, len(layers)) if run != layers]
    aggregate, other = expectation.aggregate, expectation.with_metric
    estimates = [over_layers(view, run, metric, variant, aggregate, other)[0] for run in runs]
    others = [estimate for estimate in estimates if estimate.value is not None]
    if not others:
        reasons = [estimate.reason for estimate in estimates if estimate.reason]
        return Requirement(absent(reasons[0] if reasons else f"no other window of {len(layers)} layers has a value"))
    allowed = nulls.allowed_above(len(others) + 1, than.quantile)
    values = [estimate.value for estimate in others if estimate.value is not None]
    p = nulls.rank_p(observed.value, values, high=expectation.rising)
    if allowed < 0:  # windows without a value leave too few
        problem = f"{len(others)} other windows of {len(layers)} layers have a value, too few for a rank"
        return Requirement(absent(problem), undecidable=problem)
    bound, opposite = (
        nulls.extreme(others, allowed, high=high) for high in (expectation.rising, not expectation.rising)
    )
    return Requirement(bound, p=p, opposite=opposite)


def _too_few_windows(layers: int, scope: range, quantile: float) -> str | None:
    """Return why no rank among windows of a model of this depth can be as rare as asked for; None where one can.

    Example:
        >>> _too_few_windows(30, range(5), 0.95) is None, _too_few_windows(20, range(5), 0.95)
        (True, 'this depth cannot decide: 20 layers have 16 windows of 5, and a rank with p <= 0.05 needs 24 layers')
    """
    length = len(scope)
    windows = layers - length + 1
    if nulls.allowed_above(windows, quantile) >= 0:
        return None
    needed = math.ceil(1 / (1 - quantile) - 1e-9) + length - 1
    return (
        f"this depth cannot decide: {layers} layers have {max(0, windows)} windows of {length}, and a rank with "
        f"p <= {1 - quantile:.3g} needs {needed} layers"
    )


def _drift(
    expectation: Expectation, than: Than, view: RecordView, control: Control, observed: Observation
) -> Requirement:
    """Return the figure at which the phase would stand out among smooth drifts."""
    contrast = view.edge_contrast(_layers(observed), expectation.metric, expectation.figures, than.quantile)
    if isinstance(contrast, str):
        return Requirement(absent(contrast), undecidable=contrast)
    return Requirement(contrast.high, p=contrast.p, opposite=contrast.low)


def _lag(
    expectation: Expectation, than: Than, view: RecordView, control: Control, observed: Observation
) -> Requirement:
    """Return the figure of pairs outside the phase, at the distances of those inside."""
    layers = _layers(observed)
    outside = view.lag_matched(layers, expectation.metric, expectation.figures)
    return Requirement(combine(than.required, outside, arithmetic=True))


def _random(
    expectation: Expectation, than: Than, view: RecordView, control: Control, observed: Observation
) -> Requirement:
    """Return the quantile of the figure with each direction drawn at random."""
    layers = _layers(observed)
    assert observed.value is not None
    drawn = view.random_directions(layers, expectation.metric, expectation.figures)
    if isinstance(drawn, str):
        return Requirement(absent(drawn))
    ends = (
        float(np.quantile(drawn, than.quantile if high else 1.0 - than.quantile, method="higher" if high else "lower"))
        for high in (expectation.rising, not expectation.rising)
    )
    bound, opposite = (Estimate(value=end) for end in ends)
    p = nulls.rank_p(observed.value, drawn, high=expectation.rising)
    return Requirement(bound, p=p, opposite=opposite)


_SCALED, _BY_RANK = frozenset({"times", "plus"}), frozenset({"quantile"})

NULLS: Mapping[str, Null] = {
    null.name: null
    for null in (
        Null(
            "window",
            "the rank among all windows of as many layers",
            "{share} of windows of as many layers",
            _BY_RANK,
            _window,
            _too_few_windows,
        ),
        Null(
            "drift",
            "smooth drifts over depth, fitted to the layers outside the phase; for claims that a phase shares more",
            "{share} of smooth drifts",
            _BY_RANK,
            _drift,
            lambda layers, scope, _: outside_fit(layers, scope),
        ),
        Null("lag", "pairs outside at the same distances", "pairs outside at the same distances", _SCALED, _lag),
        Null(
            "random",
            "random directions with the covariance of the updates",
            "{share} of random directions",
            _BY_RANK,
            _random,
        ),
        Null(
            "random-weights",
            "the same architecture with random weights",
            "random weights",
            _SCALED | {"scope", "metric", "write"},
            _random_weights,
        ),
    )
}
"""Every null by the name that a hypothesis file gives it."""


def undecidable_lines(spec: ModelSpec, claims: Iterable[tuple[str, Expectation]]) -> list[str]:
    """Return which of the named claims no measurement of this model could decide, and why, one line a reason.

    The list is empty where the model's depth is not known yet.
    """
    from delta_suite.models.depth import stated_depth

    by_reason: dict[str, list[str]] = {}
    compared = [(name, claim) for name, claim in claims if claim.than is not None and claim.than.null is not None]
    layers = stated_depth(spec) if compared else None
    if layers is None:
        return []
    try:
        phases = phase_map(layers, spec.phases)
    except SuiteError:  # said when it is measured
        return []
    for name, claim in compared:
        if problem := undecidable_at(claim, layers, phases):
            by_reason.setdefault(problem, []).append(name)
    return [f"{spec.name}: {', '.join(names)} would not be measured: {why}" for why, names in by_reason.items()]
