"""Terminal tables of comparisons: the text of a failure, the table of a run, two models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from delta_suite.metrics.intervals import PERCENT
from delta_suite.metrics.registry import METRICS
from delta_suite.publish.screen import WITHOUT_TERMINAL, Screen, command, prose
from delta_suite.publish.table import Table
from delta_suite.publish.trajectory import phase_estimate
from delta_suite.publish.wording import DIFFERS, NONE, number
from delta_suite.records.view import RecordView
from delta_suite.regression.baseline import BaselineFile
from delta_suite.regression.comparison import (
    Comparison,
    Status,
    UnknownVariantError,
    compare_figures,
    compare_pairs,
    first_changed_layer,
    metric_mismatch,
    require_compared,
    special_tokens_differ,
)
from delta_suite.regression.turns import TURNS, compare_turns, direction_figures

MOST_LINES = 16
"""Comparisons shown of one item."""


@dataclass(frozen=True)
class BaselineRow:
    """One item as the tables need it; plain values, so that it passes between processes as JSON."""

    model: str
    baseline: str
    item: str
    status: str
    fails: bool
    where: str
    """The layer, variant or change that it is mainly about."""
    old: float | None
    new: float | None
    difference: float | None
    tolerance: float | None
    reason: str | None
    first_layer: int | None
    """The first layer that drifted, of items over layers."""
    record: str

    @classmethod
    def of(
        cls, model: str, baseline: str, item: str, status: Status, comparisons: Sequence[Comparison], record: str
    ) -> BaselineRow:
        """Return the row of an item, with the figures of the comparison that is furthest beyond its tolerance."""
        worst = max(comparisons, key=lambda each: (each.fails, each.status is status, each.excess))
        layer = None if worst.layer is None else f"layer {worst.layer}"
        return cls(
            model,
            baseline,
            item,
            status.value,
            any(comparison.fails for comparison in comparisons),
            ", ".join(part for part in (layer, worst.variant) if part),
            worst.old,
            worst.new,
            worst.difference,
            worst.tolerance,
            worst.reason,
            first_changed_layer(comparisons),
            record,
        )


def item_text(
    item: str,
    status: Status,
    comparisons: Sequence[Comparison],
    baseline: BaselineFile,
    now: RecordView,
    reproduce: str,
    width: int = WITHOUT_TERMINAL,
) -> str:
    """Return why an item of a baseline fails: every figure that changed, by how much, and what was allowed."""
    before, after = baseline.content.record, now.record
    lines = [
        prose(f"{item} of {now.model.name}: {status.value}", width),
        prose(f"{baseline.path}, {before.model.name} of {before.provenance.created}", width, "  baseline"),
    ]
    shown = [comparison for comparison in comparisons if comparison.fails and comparison.status is status]
    shown.sort(key=lambda each: (each.layer if each.layer is not None else -1, each.variant))
    reasons = list(dict.fromkeys(comparison.reason for comparison in shown if comparison.reason))
    lines += [prose(reason, width, "  reason") for reason in reasons[:3]]
    figures = [comparison for comparison in shown if comparison.difference is not None]
    if figures:
        table = difference_table(figures[:MOST_LINES]).text(Screen(width - 2))
        lines += ["", *(f"  {line}".rstrip() for line in table.splitlines())]
        if len(figures) > MOST_LINES:
            lines.append(f"  and {len(figures) - MOST_LINES} more")
        lines.append("")
    layer = first_changed_layer(comparisons)
    if layer is not None:
        lines.append(
            prose(f"layer {layer}{': the layers before it are the same' if layer else ''}", width, "  first at")
        )
    if figures:
        paired = before.calibration.sha256 == after.calibration.sha256
        lines.append(prose(_tolerance(figures[0], paired=paired), width, "  tolerance"))
        machines = before.provenance.hardware, after.provenance.hardware
        if machines[0] != machines[1]:
            lines.append(prose(f"the baseline was measured on {machines[0]}, this on {machines[1]}", width, "  note"))
    return "\n".join([*lines, command(reproduce, width, "  reproduce")])


def _tolerance(comparison: Comparison, *, paired: bool) -> str:
    if comparison.stated:
        return "stated in the baseline"
    if comparison.metric in TURNS:
        return "how far the directions of two halves of the units are apart"
    if comparison.interval_alone is None:
        return "rounding: there is no interval, as the calibration is one document"
    how = "paired by document" if paired else "on other documents"
    return (
        f"the interval of the difference, {how}, wide enough for all comparisons of the run to hold at once ({PERCENT})"
    )


def difference_table(comparisons: Sequence[Comparison]) -> Table:
    """Return one line per figure."""
    lines = [
        [
            comparison.scope.replace(":", " "),
            comparison.metric,
            comparison.variant,
            number(comparison.old),
            number(comparison.new),
            _signed(comparison.difference),
            _interval(comparison),
            number(comparison.tolerance, 3),
        ]
        for comparison in comparisons
    ]
    head = ["scope", "metric", "variant", "before", "now", "difference", f"{PERCENT} interval", "tolerance"]
    return Table.of(head, lines, align="lllrrrrr", drop={"tolerance": 0, "before": 0}, keys=3)


def _signed(value: float | None) -> str:
    return NONE if value is None else ("+" if value > 0 else "") + number(value)


def _interval(comparison: Comparison) -> str:
    ends = comparison.interval_alone
    return NONE if ends is None else f"{_signed(ends[0])} .. {_signed(ends[1])}"


def run_table(rows: Sequence[BaselineRow]) -> Table:
    """Return for each model the number of items by status, and the first layer that drifted."""
    words = [status.value for status in Status if any(row.status == status.value for row in rows)]
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        items = [row for row in rows if row.model == model]
        first = min((row.first_layer for row in items if row.first_layer is not None), default=None)
        counts = [str(sum(row.status == word for row in items)) for word in words]
        lines.append([model, items[0].baseline, *counts, NONE if first is None else str(first)])
    head = ["model", "baseline", *words, "first layer"]
    return Table.of(head, lines, align="ll" + "r" * (len(words) + 1))


def changes_table(rows: Sequence[BaselineRow]) -> Table:
    """Return what failed, furthest beyond its tolerance first; one reason for many items is one line."""
    failed = [row for row in rows if row.fails]
    lines: list[list[str]] = []
    reasons: dict[tuple[str, str, str], list[BaselineRow]] = {}
    for row in failed:
        if row.difference is None:
            reasons.setdefault((row.model, row.status, row.reason or ""), []).append(row)
    for (model, status, reason), group in reasons.items():
        name = group[0].item if len(group) == 1 else f"{len(group)} items"
        lines.append([model, name, status, "", "", "", "", reason])
    drifted = [row for row in failed if row.difference is not None]
    drifted.sort(key=lambda row: -abs(row.difference or 0) / (row.tolerance or 1e-300))
    lines += [
        [
            row.model,
            row.item,
            row.status,
            number(row.old),
            number(row.new),
            _signed(row.difference),
            number(row.tolerance, 3),
            row.where,
        ]
        for row in drifted
    ]
    head = ["model", "item", "status", "before", "now", "difference", "tolerance", "mostly"]
    return Table.of(head, lines, align="lllrrrrl", drop={"tolerance": 0, "before": 0}, keys=2)


# --- two models side by side -----------------------------------------------------------------------------------


def side_by_side(
    before: RecordView,
    now: RecordView,
    variant: str = "raw",
    *,
    layers: bool = False,
    other_documents: bool = False,
    width: int = WITHOUT_TERMINAL,
) -> list[Table | str]:
    """Return every metric over every phase that both have, and how far directions turned where the shapes agree.

    Layer metrics are means over the phase. `≠` marks a difference whose interval leaves out 0 when all of them are to
    hold at once. Metrics that the records hold in different versions are named, and not shown.

    Raises UnknownVariantError for a variant that is not compared, or that one of the records does not have.
    """
    require_compared(variant)
    for view in (before, now):
        if problem := view.variant_problem(variant):
            raise UnknownVariantError(f"{view.model.name}: {problem}")
    calibrations = before.record.calibration, now.record.calibration
    paired = calibrations[0].sha256 == calibrations[1].sha256
    if not paired and not other_documents:
        names = " and ".join(f"{calibration.name} ({calibration.sha256[:8]})" for calibration in calibrations)
        return [
            prose(
                f"not comparable: the calibrations are {names}. Measure both on one, or say --other-documents where "
                f"they are samples of the same source.",
                width,
            )
        ]
    mismatches = {metric: reason for metric in METRICS if (reason := metric_mismatch(before, now, metric))}
    pairs = [
        (phase, metric, (a, b))
        for phase in now.phases
        if phase in before.phases
        for metric in METRICS
        if metric not in mismatches
        and (a := phase_estimate(before, metric, phase, variant)) is not None
        and (b := phase_estimate(now, metric, phase, variant)) is not None
        and a.value is not None
        and b.value is not None
    ]
    of_phases = compare_pairs(pairs, variant, paired=paired)
    parts: list[Table | str] = [_marked_table(of_phases, "phase")]
    if (before.model.layers, before.model.hidden) == (now.model.layers, now.model.hidden):
        directions = direction_figures(before), direction_figures(now)
        turned = compare_turns(before, now, directions, other_documents=True)
        turned = [each for each in turned if each.layer is not None and each.variant == variant]
        parts.append(turn_table(turned) if turned else "the directions are not at hand, so their turning is not shown")
        if layers:
            figures = compare_figures(before, now, other_documents=True)
            by_layer = [each for each in figures if each.layer is not None and each.variant == variant]
            comparable = [each for each in by_layer if each.status is not Status.NOT_COMPARABLE]
            parts.append(_marked_table(comparable, "layer"))
    elif layers:
        parts.append("the models differ in shape, so their layers are not compared")
    if mismatches:
        parts.append("not comparable:\n" + "\n".join(prose(reason, width) for reason in mismatches.values()))
    if other_tokens := special_tokens_differ(*calibrations):
        parts.append(prose(f"careful: {other_tokens}, and what stands first is a sink in most models", width))
    if all(each.interval_alone is None for each in of_phases):
        return [*parts, prose("no intervals, so nothing tells a difference from what other texts would change", width)]
    how = "paired by document" if paired else "unpaired: other documents"
    meaning = f"{DIFFERS} a difference even if all of them are considered at once"
    return [*parts, prose(f"intervals: {PERCENT}, {how}. {meaning}", width)]


def _marked_table(comparisons: Sequence[Comparison], scope: str) -> Table:
    lines = [
        [
            comparison.scope.removeprefix("layer:"),
            comparison.metric,
            number(comparison.old),
            number(comparison.new),
            (f"{DIFFERS} " if comparison.fails and comparison.interval_alone is not None else "")
            + _signed(comparison.difference),
            _interval(comparison),
        ]
        for comparison in comparisons
        if comparison.difference is not None
    ]
    head = [scope, "metric", "A", "B", "difference", f"{PERCENT} interval"]
    return Table.of(head, lines, align="llrrrr", keys=2)


def turn_table(turned: Sequence[Comparison]) -> Table:
    """Return the degrees that v_L and the top-8 subspace of each layer turned, beside those between document halves."""
    by_layer: dict[int, dict[str, Comparison]] = {}
    for comparison in turned:
        if comparison.layer is not None:
            by_layer.setdefault(comparison.layer, {})[comparison.metric] = comparison
    lines = [
        [
            str(layer),
            *(
                text
                for metric in TURNS
                for text in (number(metrics[metric].new, 3), number(metrics[metric].tolerance, 3))
            ),
        ]
        for layer, metrics in by_layer.items()
    ]
    head = ["layer", "v_L turned by degrees", "halves of v_L", "top 8 turned by degrees", "halves of top 8"]
    return Table.of(head, lines, align="rrrrr")
