"""The page of a training run: every verdict and metric against the step. Part of the site, or one file by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from delta_suite.escaping import script_json
from delta_suite.publish.board import Board
from delta_suite.publish.board_tables import record_cell
from delta_suite.publish.comparable import Group, Run, precision
from delta_suite.publish.entries import Entry
from delta_suite.publish.model_tables import PHASE_COLUMNS
from delta_suite.publish.pages import RUNS, SITE, page_link, run_page_name
from delta_suite.publish.site.head import Page
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.templates import asset, template
from delta_suite.publish.trajectory import PhaseFigures, figures, verdict_changes
from delta_suite.publish.verdict_tables import verdict_cell
from delta_suite.publish.wording import NEVER_MIXED, number

INLINED = {"style": "site.css", "plotly": "plotly-cartesian.min.js", "script": "site.js"}
"""Assets that stand in the page itself where it is one file."""


def run_files(board: Board) -> Iterator[tuple[str, bytes]]:
    """Yield path relative to the results folder and content, for the page of every training run."""
    for name, runs in board.runs.items():
        sections = [_section(board, group, run) for group, run in runs]
        yield f"{SITE}/{RUNS}/{run_page_name(name)}", _page(board, name, sections).encode()


def standalone(name: str, entries: Mapping[int, Entry], shown: str = "raw") -> str:
    """Return the page of one training run, by step, as a file that needs no other.

    shown: the variant that the page begins with.
    """
    run = Run(name, entries)
    inline = {kind: asset(file).decode() for kind, file in INLINED.items()}
    return _page(None, name, [_section(None, None, run)], shown, inline)


def _page(
    board: Board | None,
    name: str,
    sections: Sequence[dict[str, Any]],
    shown: str = "raw",
    inline: Mapping[str, str] | None = None,
) -> str:
    data = script_json({section["id"]: section.pop("figures") for section in sections})
    scripts = [inline[kind] for kind in ("plotly", "script")] if inline else []
    return template("run.html.j2").render(
        page=Page.of(
            board,
            f"{RUNS}/{run_page_name(name)}",
            f"{name} over training",
            "Every verdict and metric of a training run, checkpoint by checkpoint.",
            inline=scripts,
        ),
        plots=True,
        command="trajectory" if inline else "leaderboard",
        sections=sections,
        shown=shown,
        inline=inline,
        never_mixed=NEVER_MIXED if len(sections) > 1 else "",
        data=data,
    )


def _section(board: Board | None, group: Group | None, run: Run) -> dict[str, Any]:
    checkpoints = run.figures()
    first = next(iter(run.entries.values())).head
    variants = list(next(iter(checkpoints.values())).variants)
    drawn = {variant: figures(checkpoints, run.rows, variant) for variant in variants}
    identity = group.id if group else "run"
    calibration = first.calibration
    return {
        "id": identity,
        "title": group.title if group else f"Calibration {calibration.name}, {precision(first)}",
        "described": f"{len(run.entries)} checkpoints, {first.model.architecture}, {first.model.layers} layers, hidden "
        f"size {first.model.hidden}. " + (group.described if group else f"{calibration.documents} documents."),
        "verdicts": _verdicts(board, run, identity),
        "changes": verdict_changes(run.rows, run.steps),
        "variants": variants,
        "metrics": list(dict.fromkeys(metric for plots in drawn.values() for metric in plots)),
        "from_zero": 0 in run.entries,
        "phases": _phases(run, checkpoints, identity),
        "checkpoints": _checkpoints(board, run, identity),
        "figures": drawn,
    }


def _head(first: str, run: Run) -> list[str]:
    return [first, *(f"step {step}" for step in run.entries)]


def _verdicts(board: Board | None, run: Run, identity: str) -> Table:
    lines = []
    for claims in zip(*(entry.rows for entry in run.entries.values()), strict=True):
        first = claims[0]
        name = f"{first.hypothesis}/{first.expectation}"
        link = board.claim_link(first.where, f"{SITE}/{RUNS}") if board else None
        cells = [verdict_cell(row, interval=False) for row in claims]
        lines.append([Cell(name, name, link, title=first.claim), *cells])
    return Table.of(_head("claim", run), lines, id=f"verdicts-{identity}", caption="Verdicts over training")


def _phases(run: Run, checkpoints: Mapping[int, PhaseFigures], identity: str) -> Table:
    lines = []
    for metric, title in PHASE_COLUMNS.items():
        for phase in dict.fromkeys(phase for checkpoint in checkpoints.values() for phase in checkpoint.phases):
            estimates = [checkpoint.estimate(metric, phase, "raw") for checkpoint in checkpoints.values()]
            values = [None if estimate is None else estimate.value for estimate in estimates]
            if any(value is not None for value in values):
                name = f"{title}, {phase}"
                lines.append([Cell(name, name), *(Cell(number(value), value) for value in values)])
    head = _head("metric, phase", run)
    return Table.of(head, lines, id=f"phases-{identity}", caption="Phases over training, variant raw")


def _checkpoints(board: Board | None, run: Run, identity: str) -> Table:
    lines = []
    for step, entry in run.entries.items():
        provenance = entry.head.provenance
        page = f"../{page_link(entry.model)}" if board else None
        record = record_cell(board, entry, f"{SITE}/{RUNS}") if board else Cell(entry.record, entry.record)
        lines.append(
            [
                Cell(str(step), step),
                Cell(entry.model, step, page),
                Cell(entry.head.model.fingerprint[:12]),
                Cell(f"{provenance.created[:10]}, {entry.dtype} on {provenance.device}", provenance.created),
                record,
            ]
        )
    head = ["step", "model", "SHA-256 of the weights", "measured", "record"]
    return Table.of(head, lines, id=f"checkpoints-{identity}", caption="Checkpoints")
