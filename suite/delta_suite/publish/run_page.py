"""The page of a training run: every verdict and metric against the step. Part of the site, or one file by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from delta_suite.publish.board import Board, Entry, Group, Run
from delta_suite.publish.site import (
    RUNS,
    SITE,
    Cell,
    Line,
    Table,
    asset,
    figures_json,
    page_link,
    run_page_name,
    template,
)
from delta_suite.publish.tables import PHASE_COLUMNS, Row, number
from delta_suite.publish.trajectory import figures, phase_estimate, verdict_changes
from delta_suite.publish.wording import NEVER_MIXED, SYMBOLS, verdict_word

INLINED = {"style": "site.css", "plotly": "plotly-cartesian.min.js", "script": "site.js"}
"""Assets that stand in the page itself where it is one file."""


def run_files(board: Board) -> dict[str, bytes]:
    """Path relative to the results folder -> content, of the page of every training run."""
    return {
        f"{SITE}/{RUNS}/{run_page_name(name)}": _page(
            name, [_section(board, group, run) for group, run in found]
        ).encode()
        for name, found in board.runs.items()
    }


def standalone(name: str, entries: Mapping[int, Entry], shown: str = "raw") -> str:
    """The page of one training run, by step, as a file that needs no other.

    shown: the variant that the page begins with.
    """
    run = Run(name, next(iter(entries.values())).dtype, entries)
    inline = {kind: asset(file).decode() for kind, file in INLINED.items()}
    return _page(name, [_section(None, None, run)], shown, inline)


def _page(
    name: str, sections: Sequence[dict[str, Any]], shown: str = "raw", inline: Mapping[str, str] | None = None
) -> str:
    data = figures_json({own["id"]: own.pop("figures") for own in sections})
    return template("run.html.j2").render(
        name=name,
        sections=sections,
        shown=shown,
        inline=inline,
        never_mixed=NEVER_MIXED if len(sections) > 1 else "",
        data=data,
    )


def _section(board: Board | None, group: Group | None, run: Run) -> dict[str, Any]:
    first = next(iter(run.measurements.values()))
    variants = list(first.layers[0].metrics)
    drawn = {variant: figures(run.measurements, run.rows, variant) for variant in variants}
    identity = f"{group.id}-{run.dtype}" if group else "run"
    calibration = first.calibration
    return {
        "id": identity,
        "title": f"{group.title}, {run.dtype}" if group else f"Calibration {calibration.name}, {run.dtype}",
        "described": f"{len(run.entries)} checkpoints, {first.model.architecture}, {first.model.layers} layers, hidden "
        f"size {first.model.hidden}. " + (group.described if group else f"{calibration.documents} documents."),
        "verdicts": _verdicts(board, run, identity),
        "changes": verdict_changes(run.rows, run.steps),
        "variants": variants,
        "metrics": list(dict.fromkeys(metric for own in drawn.values() for metric in own)),
        "from_zero": 0 in run.entries,
        "phases": _phases(run, identity),
        "checkpoints": _checkpoints(board, run, identity),
        "figures": drawn,
    }


def _head(first: str, run: Run) -> tuple[str, ...]:
    return first, *(f"step {step}" for step in run.entries)


def _verdicts(board: Board | None, run: Run, identity: str) -> Table:
    lines = []
    for claims in zip(*(entry.rows for entry in run.entries.values()), strict=True):
        own: Row = claims[0]
        name = f"{own.hypothesis}/{own.expectation}"
        link = board.claim_link(own.where, f"{SITE}/{RUNS}") if board else None
        lines.append(Line((Cell(name, name, link, title=own.claim), *(_verdict(row) for row in claims))))
    return Table(f"verdicts-{identity}", "Verdicts over training", _head("claim", run), tuple(lines))


def _verdict(row: Row) -> Cell:
    word = verdict_word(row)
    value = "" if row.observed is None else f" {number(row.observed, 3)}"
    return Cell(f"{SYMBOLS[word]} {word}{value}{' °' if row.vacuous else ''}", f"{word} {value}", verdict=word)


def _phases(run: Run, identity: str) -> Table:
    lines = []
    measurements = run.measurements.values()
    for metric, title in PHASE_COLUMNS.items():
        for phase in dict.fromkeys(phase for own in measurements for phase in own.phases):
            found = [phase_estimate(own, metric, phase, "raw") for own in measurements]
            values = [None if estimate is None else estimate.value for estimate in found]
            if any(value is not None for value in values):
                name = f"{title}, {phase}"
                lines.append(Line((Cell(name, name), *(Cell(number(value), value) for value in values))))
    return Table(f"phases-{identity}", "Phases over training, variant raw", _head("metric, phase", run), tuple(lines))


def _checkpoints(board: Board | None, run: Run, identity: str) -> Table:
    lines = []
    for step, entry in run.entries.items():
        provenance = entry.measurement.provenance
        page = f"../{page_link(entry.model)}" if board else None
        record = board.record_link(entry.record, f"{SITE}/{RUNS}") if board else None
        lines.append(
            Line(
                (
                    Cell(str(step), step),
                    Cell(entry.model, step, page),
                    Cell(entry.measurement.model.fingerprint[:12]),
                    Cell(f"{provenance.created[:10]}, {entry.dtype} on {provenance.device}", provenance.created),
                    Cell("JSON" if record else entry.record, entry.record, record, title=entry.record),
                )
            )
        )
    head = ("step", "model", "SHA-256 of the weights", "measured", "record")
    return Table(f"checkpoints-{identity}", "Checkpoints", head, tuple(lines))
