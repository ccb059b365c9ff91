"""The items of a baseline: what a run selects, compares and accepts by name."""

from __future__ import annotations

from collections.abc import Iterable

from delta_suite.metrics.registry import METRICS, OF_LOSSES
from delta_suite.records.view import RecordView
from delta_suite.regression.baseline import VERDICT
from delta_suite.regression.comparison import LAYERS, MODEL, figures
from delta_suite.regression.turns import TURNS

RECORD = "record"
"""Name of the item that checks if the two records can be compared at all."""

TURN_ITEMS = tuple(f"{LAYERS}/{name}" for name in TURNS)
"""Names of the items that are computed from the file of directions."""


def item_names(view: RecordView, claims: Iterable[str]) -> list[str]:
    """Return the names of all items: the record, its figures, and claims as `hypothesis/expectation`."""
    return [RECORD, *_figures(view), *(f"{VERDICT}/{claim}" for claim in claims)]


def _figures(view: RecordView) -> list[str]:
    """Return the names of items: figures of the baseline, and every metric of this suite over the same scopes."""
    by_scope: dict[str, dict[str, None]] = {}
    for _, scope, metric in figures(view):
        by_scope.setdefault(scope, {})[metric] = None
    phases = [scope for scope in by_scope if not scope.startswith("layer:")]
    # Differences of losses are not compared with a baseline.
    compared = {name: metric for name, metric in METRICS.items() if metric.takes not in OF_LOSSES}
    by_layer = {name: None for name, metric in compared.items() if metric.scope in {"layer", "pair"}}
    by_layer |= {metric: None for scope in by_scope.keys() - set(phases) for metric in sorted(by_scope[scope])}
    names = [*(f"{LAYERS}/{metric}" for metric in by_layer), *TURN_ITEMS]
    by_phase = {name: None for name, metric in compared.items() if metric.scope in {"pair", "phase"}}
    for scope in phases:
        names += [f"{scope}/{metric}" for metric in ({} if scope == MODEL else by_phase) | by_scope[scope]]
    return names
