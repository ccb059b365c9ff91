"""Nulls: what a claim can be held against instead of a number or a figure of another scope.

Each null is one entry of NULLS: what a hypothesis file may say beside it, its words in the text of a claim, and the
bound that it sets. The schema, the texts and the verdict all read that entry: a new null is one function and one entry.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from delta_suite.claims.observe import Observation, observe, over_layers
from delta_suite.errors import RecordError
from delta_suite.metrics import nulls
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.intervals import combine
from delta_suite.records.view import RecordView

if TYPE_CHECKING:
    from delta_suite.claims.schema import Expectation, Than

NO_CONTROL = "the random-weights control was not measured (leave --no-control out, or measure it)"


@dataclass(frozen=True)
class Requirement:
    """The other side of a comparison."""

    estimate: Estimate
    reference: Observation | None = None
    """The figure of a scope that the estimate is formed from."""
    p: float | None = None
    """The p of a null's rank."""
    undecidable: str | None = None
    """Why no value, however large, could show the claim."""


@dataclass(frozen=True)
class Null:
    """One kind of comparison with what chance or the architecture alone would give."""

    name: str
    allows: frozenset[str]
    """The keys of `than` that go with it: scope, metric, times, plus, quantile."""
    words: str
    """Its words in the text of a claim; {share} is the quantile in percent."""
    bound: Callable[[Expectation, Than, RecordView, RecordView | None, Observation], Requirement]
    """Returns the other side for a claim, its `than`, the record, the record of the control, and the observed side."""

    @property
    def by_rank(self) -> bool:
        """True if the observed value is compared by its rank among many."""
        return "quantile" in self.allows


def requirement(
    expectation: Expectation, view: RecordView, control: RecordView | None, observed: Observation
) -> Requirement:
    """Return what the observed side is compared with; its estimate says why where there is nothing.

    control: the same architecture with random weights, or None where it was not measured.
    """
    than = expectation.than
    if than is None:
        return Requirement(Estimate(value=expectation.threshold))
    if than.null is None:
        return _scope(expectation, than, view)
    if observed.value is None or observed.layers is None:
        return Requirement(absent(observed.reason or "not measured"))
    return NULLS[than.null].bound(expectation, than, view, control, observed)


def _scope(expectation: Expectation, than: Than, view: RecordView) -> Requirement:
    """Return a figure over another scope, times a factor and plus a number."""
    over = "mean" if expectation.over == "each" else expectation.over
    metric, scope = than.metric or expectation.metric, than.scope or expectation.scope
    reference = observe(view, metric, scope, expectation.variant, over)
    if reference.interval is not None and reference.estimate.replicates is None:
        try:
            view.content()
        except RecordError as error:  # a difference needs the replicates of both sides
            return Requirement(absent(str(error)), reference)
    return Requirement(combine(than.required, reference.estimate), reference)


def _random_weights(
    expectation: Expectation, than: Than, view: RecordView, control: RecordView | None, observed: Observation
) -> Requirement:
    """Return the figure of the same architecture with random weights."""
    return Requirement(absent(NO_CONTROL)) if control is None else _scope(expectation, than, control)


def _layers(observed: Observation) -> range:
    assert observed.layers is not None
    return range(observed.layers[0], observed.layers[1] + 1)


def _window(
    expectation: Expectation, than: Than, view: RecordView, control: RecordView | None, observed: Observation
) -> Requirement:
    """Return the bound of a rank among all runs of as many layers."""
    layers = _layers(observed)
    assert observed.value is not None
    over = "mean" if expectation.over == "each" else expectation.over
    runs = [run for run in nulls.windows(view.model.layers, len(layers)) if run != layers]
    estimates = [over_layers(view, run, expectation.metric, expectation.variant, over)[0] for run in runs]
    others = [estimate for estimate in estimates if estimate.value is not None]
    if not others:
        reasons = [estimate.reason for estimate in estimates if estimate.reason]
        return Requirement(absent(reasons[0] if reasons else f"no other window of {len(layers)} layers has a value"))
    allowed = nulls.allowed_above(len(others) + 1, than.quantile)
    values = [estimate.value for estimate in others if estimate.value is not None]
    p = nulls.rank_p(observed.value, values, high=expectation.rising)
    undecidable = None
    if allowed < 0:
        undecidable = (
            f"a model of {view.model.layers} layers has {len(others) + 1} windows of {len(layers)}, so no rank among "
            f"them has a p below {1 / (len(others) + 1):.3f}, and {1 - than.quantile:.3g} is asked for"
        )
    bound = nulls.extreme(others, max(0, allowed), high=expectation.rising)
    return Requirement(bound, p=p, undecidable=undecidable)


def _lag(
    expectation: Expectation, than: Than, view: RecordView, control: RecordView | None, observed: Observation
) -> Requirement:
    """Return the figure of pairs outside the phase, at the distances of those inside."""
    layers = _layers(observed)
    return Requirement(combine(than.required, view.lag_matched(layers, expectation.metric, expectation.variant)))


def _random(
    expectation: Expectation, than: Than, view: RecordView, control: RecordView | None, observed: Observation
) -> Requirement:
    """Return the quantile of the figure with each direction drawn at random."""
    layers = _layers(observed)
    assert observed.value is not None
    drawn = view.random_directions(layers, expectation.metric, expectation.variant)
    if isinstance(drawn, str):
        return Requirement(absent(drawn))
    quantile = than.quantile if expectation.rising else 1.0 - than.quantile
    bound = float(np.quantile(drawn, quantile, method="higher" if expectation.rising else "lower"))
    p = nulls.rank_p(observed.value, drawn, high=expectation.rising)
    return Requirement(Estimate(value=bound), p=p)


_SCALED = frozenset({"times", "plus"})

NULLS: Mapping[str, Null] = {
    null.name: null
    for null in (
        Null("window", frozenset({"quantile"}), "{share} of windows of as many layers", _window),
        Null("lag", _SCALED, "pairs outside at the same distances", _lag),
        Null("random", frozenset({"quantile"}), "{share} of random directions", _random),
        Null("random-weights", _SCALED | {"scope", "metric"}, "random weights", _random_weights),
    )
}
"""Every null by the name that a hypothesis file gives it."""
