"""Tables of one measured model: its phases, layers and boundaries; and the reference table of metrics."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from delta_suite.capture.writes import SUBLAYERS
from delta_suite.claims.gates import MOST_UNKNOWN
from delta_suite.escaping import terminal
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.registry import METRICS
from delta_suite.metrics.segmentation import NEAR
from delta_suite.publish.screen import WITHOUT_TERMINAL, prose
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.wording import NONE, number
from delta_suite.records.record import BoundarySearch, CalibrationRecord, StreamRecord
from delta_suite.records.view import RecordView
from delta_suite.reduction.variants import of_write

PHASE_COLUMNS = {
    "intra_cosine": "intra",
    "cross_cosine": "cross",
    "block_effective_rank": "block rank",
    "capture_fraction": "capture",
}
"""The metrics of the table of phases, with their headings."""

LAYER_COLUMNS = {
    "stream_norm": "||h||",
    "update_norm": "||delta||",
    "relative_step": "step",
    "parallel_fraction": "parallel",
    "gamma": "gamma",
    "effective_rank": "eff. rank",
    "top1_energy": "top-1",
    "spectral_gap": "gap",
    "adjacent_cosine": "|cos| next",
    "block_influence": "influence",
}
"""The metrics of the table of layers that fit a terminal, with their headings; the record holds all of them."""

FIRST_TO_GO = ("block_influence", "parallel_fraction", "spectral_gap", "relative_step")
"""Metrics that a narrow terminal leaves out, the first to go first."""


def phase_table(view: RecordView, variant: str = "raw") -> Table:
    """Return N, intra, cross, block rank and capture of each phase."""
    lines = []
    for name, (first, last) in view.phases.items():
        count = last - first + 1
        cells = [Cell(name, name), Cell(f"{first}-{last}", first), Cell(str(count), count)]
        lines.append([*cells, *_phase_cells(view, first, last, variant)])
    return Table.of(["phase", "layers", "N", *PHASE_COLUMNS.values()], lines, align="lrrrrrr")


def phase_values(view: RecordView, first: int, last: int, variant: str) -> tuple[float | None, ...]:
    """Return the metrics of the table of phases for the phase of these layers, in its order."""
    layers = range(first, last + 1)
    return tuple(
        None if lacks_pairs(metric, layers) else view.over(layers, metric, variant, replicates=False).value
        for metric in PHASE_COLUMNS
    )


def _phase_cells(view: RecordView, first: int, last: int, variant: str) -> list[Cell]:
    values = phase_values(view, first, last, variant)
    return [Cell(NONE if value is None else f"{value:.4f}", value) for value in values]


def lacks_pairs(metric: str, layers: range) -> bool:
    """Return True for the mean over pairs of one layer, which the reference script sets to 1, and tables leave out.

    Example:
        >>> lacks_pairs("intra_cosine", range(4, 5)), lacks_pairs("cross_cosine", range(4, 5))
        (True, False)
    """
    return metric == "intra_cosine" and len(layers) == 1


def writes_table(view: RecordView) -> Table | str:
    """Return the table of phases of what blocks, attention and MLP write, without sinks; or why they are not apart."""
    if view.record.not_apart is not None:
        return f"attention and MLP are not measured apart: {view.record.not_apart}"
    lines = []
    for name, (first, last) in view.phases.items():
        for write in ("block", *SUBLAYERS):
            cells = _phase_cells(view, first, last, of_write("sink_free", write))
            lines.append([Cell(name, name), Cell(write, write), *cells])
    return Table.of(["phase", "write", *PHASE_COLUMNS.values()], lines, align="llrrrr")


def losses_tables(view: RecordView, parts: Collection[str]) -> list[Table | str]:
    """Return the tables of causes and of damage, those of these parts; or why a part has none."""
    tables: list[Table | str] = []
    if "causal" in parts and (causes := view.record.causes) is not None:
        names = [name for name, metric in METRICS.items() if metric.takes == "causes"]
        rows = [
            (phase, [view.over(range(first, last + 1), name, "") for name in names])
            for phase, (first, last) in causes.phases.items()
        ]
        none = f"causes were not measured: {causes.reason}"
        tables.append(none if causes.reason is not None else _intervals("phase", names, rows))
    if "damage" in parts and (damage := view.record.damage) is not None:
        names = [name for name, metric in METRICS.items() if metric.takes == "damage"]
        rows = [(str(each.layer), [view.layer(each.layer, name, "") for name in names]) for each in view.layers]
        none = f"damage was not measured: {damage.reason}"
        tables.append(none if damage.reason is not None else _intervals("layer", names, rows))
    return tables


def _intervals(first: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[Estimate]]]) -> Table:
    """Return a table of figures, each with its interval."""

    def cell(estimate: Estimate) -> Cell:
        value = estimate.best
        if value is None:
            return Cell(NONE, None)
        span = "" if estimate.interval is None else f" [{number(estimate.interval[0])}, {number(estimate.interval[1])}]"
        return Cell(number(value) + span, value)

    lines = [[Cell(place, place), *map(cell, estimates)] for place, estimates in rows]
    return Table.of([first, *names], lines, align="l" + "r" * len(names))


def layer_table(view: RecordView, variant: str = "raw") -> Table:
    """Return the metrics of each layer that fit a terminal."""
    lines = []
    for layer in view.layers:
        values = [view.layer(layer.layer, metric, variant, replicates=False).value for metric in LAYER_COLUMNS]
        cells = [Cell(str(layer.layer), layer.layer), Cell(layer.phase, layer.phase)]
        lines.append([*cells, *map(Cell, map(number, values), values)])
    align = "rl" + "r" * len(LAYER_COLUMNS)
    drop = dict.fromkeys((LAYER_COLUMNS[metric] for metric in FIRST_TO_GO), 0)
    return Table.of(["layer", "phase", *LAYER_COLUMNS.values()], lines, align=align, drop=drop)


def boundary_tables(view: RecordView, variant: str = "raw", width: int = WITHOUT_TERMINAL) -> list[Table | str]:
    """Return the boundaries detected in the layers' similarity beside the declared ones, and what both are worth."""
    boundaries = view.boundaries(variant)
    p, agreement, rank = (
        boundaries.metrics[name].value for name in ("boundary_p", "boundary_agreement", "boundary_cost_rank")
    )
    if p is None or agreement is None:
        return [prose(f"no boundaries: {boundaries.metrics['boundary_p'].reason}", width)]
    phases = {first: f" {name}" for name, (first, _) in view.phases.items()}
    recurrence = dict(zip(boundaries.detected, boundaries.recurrence or (), strict=False))
    missed = [first for first in boundaries.declared if all(abs(first - other) > NEAR for other in boundaries.detected)]
    lines = []
    for first in sorted({*boundaries.detected, *missed}):
        detected = first in boundaries.detected
        near = [other for other in boundaries.declared if abs(other - first) <= NEAR] if detected else [first]
        lines.append(
            [
                str(first) if detected else NONE,
                ", ".join(f"{other}{phases.get(other, '')}" for other in near) or NONE,
                f"{recurrence[first]:.0%}" if first in recurrence else NONE,
            ]
        )
    summary = [["met", f"{agreement:.0%} of the declared within {NEAR} layer"], ["p", f"{p:.3f} against smooth drift"]]
    if boundaries.search is not None:
        summary += _search_lines(boundaries.search, rank)
    table = Table.of(["detected at", "declared at", "detected again"], lines)
    return [table, "\n".join(prose(text, width, label) for label, text in summary)]


def _search_lines(search: BoundarySearch, rank: float | None) -> list[list[str]]:
    chosen = search.chosen
    return [
        [
            "by chance",
            f"{search.chance_agreement:.0%} would be met; of {search.draws} draws, p is never below "
            f"{1 / (search.draws + 1):.3f}",
        ],
        [
            "cost",
            f"declared {search.declared_cost:.3f}, detected {search.detected_cost:.3f}, "
            f"one segment {search.total_cost:.3f}",
        ],
        [
            "cost no more",
            f"{'(too few to rank)' if rank is None else f'{100 * rank:.3g}% of'} {search.orders} orders of the "
            f"declared lengths, {100 * search.cost_rank_any_lengths:.3g}% of {search.others} ways to cut as often",
        ],
        [
            "by penalty",
            "too few layers"
            if chosen is None
            else f"{len(chosen) + 1} segments, from {', '.join(map(str, chosen))}"
            if chosen
            else "1 segment",
        ],
    ]


def model_line(view: RecordView) -> str:
    """Return one line on what was measured and how long it took."""
    model, calibration, provenance = view.model, view.record.calibration, view.record.provenance
    seconds, stream = sum(provenance.seconds.values()), provenance.stream
    # Said where it explains a long run, or why something is absent; a page of the leaderboard always says it.
    place = "" if stream is None or stream.usual else f" (stream {stream_text(stream, provenance.device)})"
    return terminal(
        f"{model.name}: {model.architecture}, {model.layers} layers x {model.hidden}; {calibration_text(calibration)}; "
        f"{provenance.dtype} on {provenance.device}{place}; measured {provenance.created} in {seconds:.1f} s"
    )


def calibration_text(calibration: CalibrationRecord) -> str:
    """Return what ran, and what a reader must know of it before the figures."""
    documents = "1 document (so no interval)" if calibration.documents == 1 else f"{calibration.documents} documents"
    if calibration.domains is not None:
        documents += f" of {calibration.domains} domain{'' if calibration.domains == 1 else 's'}"
    if calibration.duplicates:
        documents += f" ({calibration.duplicates} more were repetitions, and left out)"
    if calibration.chat_template:
        documents += " in the model's chat template"
    share = calibration.unknown_tokens or 0.0
    unknown = f" ({share:.1%} of the text unknown to the tokenizer)" if share > MOST_UNKNOWN else ""
    return f"calibration {calibration.name}, {documents}, {calibration.tokens} tokens{unknown}"


def special_tokens_text(calibration: CalibrationRecord) -> str:
    """Return the special tokens at either end of the documents, or that they were not recorded."""
    if calibration.begins_with is None or calibration.ends_with is None:
        return "not recorded"
    first, last = (
        " ".join(f"{token} ({number})" for token, number in tokens) or "none"
        for tokens in (calibration.begins_with, calibration.ends_with)
    )
    return f"{first} before each document, {last} after it"


def stream_text(stream: StreamRecord, device: str) -> str:
    """Return where the stream was kept, and in how many shards."""
    place = {"device": f"in the memory of {device}", "host": "in host memory", "disk": "on disk"}
    shards = f", {stream.shards} shards, the largest" if stream.shards > 1 else ","
    return f"{place[stream.storage]}{shards} {stream.largest_bytes / 1e9:.3g} GB"


def metric_table() -> Table:
    """Return the reference table of every metric."""
    lines = [
        [
            metric.name,
            metric.scope,
            metric.formula,
            metric.unit,
            f"{metric.low:g} .. {'unbounded' if metric.high == float('inf') else f'{metric.high:.4g}'}",
            str(metric.version),
            metric.source,
        ]
        for metric in METRICS.values()
    ]
    head = ["metric", "scope", "formula", "unit", "range", "version", "source"]
    return Table.of(head, lines, drop={"source": 20, "version": 0, "unit": 6, "range": 0, "formula": 30})
