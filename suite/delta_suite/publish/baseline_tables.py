"""What the terminal shows of a comparison: the text of a failure, the table of a run, two models side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from tabulate import tabulate

from delta_suite.metrics.registry import METRICS
from delta_suite.publish.tables import NONE, number
from delta_suite.publish.trajectory import phase_estimate
from delta_suite.records.record import Measurement
from delta_suite.regression.baseline import BaselineFile
from delta_suite.regression.comparison import (
    TURNS,
    Comparison,
    Snapshot,
    Status,
    compare,
    directions_of,
    first_changed_layer,
    of_pair,
    snapshot,
)

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
        worst = max(comparisons, key=lambda own: (own.fails, own.status is status, own.excess))
        layer = None if worst.layer is None else f"layer {worst.layer}"
        return cls(
            model,
            baseline,
            item,
            status.value,
            any(own.fails for own in comparisons),
            ", ".join(part for part in (layer, worst.variant) if part),
            worst.old,
            worst.new,
            worst.difference,
            worst.tolerance,
            worst.reason,
            first_changed_layer(comparisons),
            record,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def item_text(
    item: str, status: Status, comparisons: Sequence[Comparison], baseline: BaselineFile, now: Snapshot, reproduce: str
) -> str:
    """Why an item of a baseline fails: every figure that changed, by how much, and what was allowed."""
    before = baseline.content.figures
    lines = [
        f"{item} of {now.model.name}: {status.value}",
        f"  baseline   {baseline.path}, {before.model.name} of {before.created}",
    ]
    shown = [own for own in comparisons if own.fails and own.status is status]
    shown.sort(key=lambda own: (own.layer if own.layer is not None else -1, own.variant))
    reasons = list(dict.fromkeys(own.reason for own in shown if own.reason))
    lines += [f"  reason     {reason}" for reason in reasons[:3]]
    figures = [own for own in shown if own.difference is not None]
    if figures:
        table = difference_table(figures[:MOST_LINES])
        lines += ["", *(f"  {line}" for line in table.splitlines())]
        if len(figures) > MOST_LINES:
            lines.append(f"  and {len(figures) - MOST_LINES} more")
        lines.append("")
    layer = first_changed_layer(comparisons)
    if layer is not None:
        lines.append(f"  first at   layer {layer}{': the layers before it are the same' if layer else ''}")
    if figures:
        lines.append(f"  tolerance  {_tolerance(figures[0], before, now)}")
        if before.hardware != now.hardware:
            lines.append(f"  note       the baseline was measured on {before.hardware}, this on {now.hardware}")
    return "\n".join([*lines, f"  reproduce  {reproduce}"])


def _tolerance(own: Comparison, before: Snapshot, now: Snapshot) -> str:
    if own.stated:
        return "stated in the baseline"
    if own.metric in TURNS:
        return "how far the directions of two halves of the documents are apart"
    if own.interval_95 is None:
        return "rounding: there is no interval, as the calibration is one document"
    paired = before.calibration.sha256 == now.calibration.sha256
    how = "paired by document" if paired else "on other documents"
    return f"the interval of the difference, {how}, wide enough for all comparisons of the run to hold at once (95%)"


def difference_table(comparisons: Sequence[Comparison]) -> str:
    """One line per figure."""
    lines = [
        [
            own.scope.replace(":", " "),
            own.metric,
            own.variant,
            number(own.old),
            number(own.new),
            _signed(own.difference),
            _interval(own),
            number(own.tolerance, 3),
        ]
        for own in comparisons
    ]
    headers = ["scope", "metric", "variant", "before", "now", "difference", "95% interval", "tolerance"]
    align = ("left", "left", "left", "right", "right", "right", "right", "right")
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=align)


def _signed(value: float | None) -> str:
    return NONE if value is None else ("+" if value > 0 else "") + number(value)


def _interval(own: Comparison) -> str:
    return NONE if own.interval_95 is None else f"{_signed(own.interval_95[0])} .. {_signed(own.interval_95[1])}"


def run_table(rows: Sequence[BaselineRow]) -> str:
    """For each model the number of items by status, and the first layer that drifted."""
    words = [status.value for status in Status if any(row.status == status.value for row in rows)]
    lines = []
    for model in dict.fromkeys(row.model for row in rows):
        own = [row for row in rows if row.model == model]
        first = min((row.first_layer for row in own if row.first_layer is not None), default=None)
        counts = [str(sum(row.status == word for row in own)) for word in words]
        lines.append([model, own[0].baseline, *counts, NONE if first is None else str(first)])
    headers = ["model", "baseline", *words, "first layer"]
    align = ("left", "left", *["right"] * len(words), "right")
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=align)


def changes_table(rows: Sequence[BaselineRow], limit: int = 20) -> str:
    """What failed, furthest beyond its tolerance first; the same reason for many items is one line."""
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
        for row in drifted[:limit]
    ]
    headers = ["model", "item", "status", "before", "now", "difference", "tolerance", "mostly"]
    table = tabulate(
        lines,
        headers=headers,
        disable_numparse=True,
        colalign=("left", "left", "left", "right", "right", "right", "right", "left"),
    )
    return table + (f"\nand {len(drifted) - limit} more" if len(drifted) > limit else "")


# --- two models side by side -----------------------------------------------------------------------------------


def side_by_side(
    before: Measurement, now: Measurement, variant: str = "raw", *, layers: bool = False, other_documents: bool = False
) -> str:
    """Every metric over every phase that both have, and how far directions turned where the shapes agree.

    Layer metrics are means over the phase. `*` marks a difference whose interval leaves out 0 when all of them are to
    hold at once.
    """
    paired = before.calibration.sha256 == now.calibration.sha256
    if not paired and not other_documents:
        return (
            f"not comparable: the calibrations are {before.calibration.name} ({before.calibration.sha256[:8]}) and "
            f"{now.calibration.name} ({now.calibration.sha256[:8]}). Measure both on one, or say --other-documents "
            f"where they are samples of the same source."
        )
    phases = [phase for phase in now.phases if phase in before.phases]
    pairs = [
        (phase, metric, (a, b))
        for phase in phases
        for metric in METRICS
        if (a := phase_estimate(before, metric, phase, variant)) is not None
        and (b := phase_estimate(now, metric, phase, variant)) is not None
        and a.value is not None
        and b.value is not None
    ]
    compared = of_pair(pairs, variant, paired=paired)
    parts = [_marked_table(compared, "phase")]
    same_shape = (before.model.layers, before.model.hidden) == (now.model.layers, now.model.hidden)
    if same_shape:
        by_layer = [
            own
            for own in compare(
                snapshot(before),
                snapshot(now),
                directions=(directions_of(before), directions_of(now)),
                other_documents=True,
            )
            if own.layer is not None and own.variant == variant and own.status is not Status.NOT_COMPARABLE
        ]
        turned = [own for own in by_layer if own.metric in TURNS]
        parts.append(turn_table(turned) if turned else "the directions are not at hand, so their turning is not shown")
        if layers:
            parts.append(_marked_table([own for own in by_layer if own.metric not in TURNS], "layer"))
    elif layers:
        parts.append("the models differ in shape, so their layers are not compared")
    how = "paired by document" if paired else "unpaired: other documents"
    return "\n\n".join([*parts, f"intervals: 95%, {how}; * all of them considered at once"])


def _marked_table(compared: Sequence[Comparison], scope: str) -> str:
    lines = [
        [
            own.scope.removeprefix("layer:"),
            own.metric,
            number(own.old),
            number(own.new),
            _signed(own.difference),
            _interval(own),
            "*" if own.fails else "",
        ]
        for own in compared
        if own.difference is not None
    ]
    headers = [scope, "metric", "A", "B", "difference", "95% interval", ""]
    align = ("left", "left", "right", "right", "right", "right", "left")
    return tabulate(lines, headers=headers, disable_numparse=True, colalign=align if lines else None)


def turn_table(turned: Sequence[Comparison]) -> str:
    """Degrees that v_L and the top-8 subspace of each layer turned, beside those between halves of the documents."""
    by_layer: dict[int, dict[str, Comparison]] = {}
    for own in turned:
        if own.layer is not None:
            by_layer.setdefault(own.layer, {})[own.metric] = own
    lines = [
        [
            str(layer),
            *(text for metric in TURNS for text in (number(own[metric].new, 3), number(own[metric].tolerance, 3))),
        ]
        for layer, own in by_layer.items()
    ]
    headers = ["layer", "v_L turned", "(halves)", "top 8 turned", "(halves)"]
    return "degrees\n" + tabulate(lines, headers=headers, disable_numparse=True, colalign=("right",) * 5)
