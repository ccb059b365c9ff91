"""The first page: what the leaderboard is, and a matrix of models by claims for each table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from markupsafe import Markup

from delta_suite.publish.board import Board
from delta_suite.publish.board_tables import models_table
from delta_suite.publish.comparable import Group, Run
from delta_suite.publish.depth_profile import sparkline
from delta_suite.publish.entries import LARGEST, SIZES, Entry
from delta_suite.publish.pages import SITE, claim_anchor, hypothesis_link, page_link, run_link
from delta_suite.publish.rows import Row, margin_text, marks
from delta_suite.publish.site.head import Page
from delta_suite.publish.table import Cell
from delta_suite.publish.templates import escaped, template
from delta_suite.publish.trajectory import verdict_changes
from delta_suite.publish.wording import (
    ABOUT,
    CONSISTENT,
    MARKS,
    NEVER_MIXED,
    NO_SCORE,
    SHORT,
    SYMBOLS,
    interval_text,
    number,
)

DESCRIPTION = (
    "Which predictions about the depth structure of language models hold for which model: one mark for each, with its "
    "margin and interval, measured by delta-suite."
)

IN_RUNS = (
    "A training run is one row, with the marks of its last checkpoint; △ is beside a mark that changed on the way."
)
"""How to read the row of a training run."""

RECOMPUTED = "Somebody else measured these weights, too, and the figures agree"
"""The meaning of `recomputed` beside a model."""

TURNED = "△"
"""The sign beside the last mark of a training run that was another before."""


def index_page(board: Board) -> str:
    """Return the page of all models."""
    entries = [entry for group in board.groups for entry in group.entries]
    sizes = {entry.size for entry in entries}
    return template("index.html.j2").render(
        page=Page.of(board, "index.html", "delta-suite leaderboard", DESCRIPTION, note=CONSISTENT),
        about=ABOUT,
        families=sorted({entry.family for entry in entries}),
        sizes=[size for size in (*SIZES, LARGEST) if size in sizes],
        hypotheses=[hypothesis.id for hypothesis in board.hypotheses],
        words=list(SYMBOLS),
        calibrations=sorted({group.calibration.name for group in board.groups}),
        no_score=NO_SCORE,
        in_runs=IN_RUNS,
        signs=" ".join([*MARKS, TURNED]),
        never_mixed=NEVER_MIXED if len(board.groups) > 1 else "",
        groups=[_group(board, group) for group in board.largest_first],
        superseded=[
            (Cell(item.record, link=board.record_link(item.record, SITE)), item.by) for item in board.superseded
        ],
        broken=[item.why for item in board.broken],
    )


def _group(board: Board, group: Group) -> dict[str, Any]:
    rows = group.entries[0].rows
    titles = {hypothesis.id: hypothesis.title for hypothesis in board.hypotheses}
    hypotheses = [(name, len(list(claims))) for name, claims in groupby(rows, key=lambda row: row.hypothesis)]
    return {
        **{
            "id": group.id,
            "title": f"Calibration {group.calibration.name}, {group.precision}",
            "metrics": group.metrics,
        },
        **{"described": group.described, "changed": group.changed},
        "calibration": group.calibration.name,
        "apart": any(entry.profile and entry.profile.attention for entry in group.entries),
        "hypotheses": [
            {"id": name, "title": titles[name], "count": count, "link": hypothesis_link(name)}
            for name, count in hypotheses
        ],
        "claims": [
            {
                "name": row.expectation,
                "stated": f"{row.hypothesis}/{row.expectation}: {row.claim}",
                "link": board.claim_link(row.where, SITE),
                "first": first,
            }
            for row, first in zip(rows, _firsts(rows), strict=True)
        ],
        "body": Markup("".join(_bodies(group))),
        "table": models_table(board, group, SITE),
    }


def _firsts(rows: Sequence[Row]) -> list[bool]:
    """Return for each claim whether it is the first of its hypothesis."""
    before = [None, *(row.hypothesis for row in rows)]
    return [row.hypothesis != other for row, other in zip(rows, before, strict=False)]


# --- rows ------------------------------------------------------------------------------------------------------


def _bodies(group: Group) -> Iterator[str]:
    """Yield one body of the table for each model, and one for each training run with all of its checkpoints."""
    runs = {entry.record: run for run in group.runs for entry in run.entries.values()}
    shown: set[str] = set()
    for entry in group.entries:
        run = runs.get(entry.record)
        if run is None:
            yield _body(entry.model, entry, [_line(group, entry)])
        elif run.name not in shown:
            shown.add(run.name)
            steps = [_line(group, checkpoint, "step") for checkpoint in run.entries.values()]
            yield _body(run.name, run.last, [_run_line(group, run), *steps])


def _body(name: str, entry: Entry, lines: Sequence[str]) -> str:
    data = {"name": name, "family": entry.family, "size": entry.size}
    attributes = " ".join(f'data-{key}="{escaped(value)}"' for key, value in data.items())
    return f"<tbody {attributes}>\n{''.join(lines)}</tbody>\n"


def _line(group: Group, entry: Entry, css: str = "") -> str:
    model = entry.head.model
    seen = f'<small class="recomputed" title="{RECOMPUTED}">recomputed</small>'
    name = f'<a href="{escaped(page_link(entry.model))}#{group.id}">{_breakable(entry.model)}</a>'
    facts = f"<small>{escaped(entry.family)} · {model.layers} x {model.hidden}</small>"
    cells = _cells(group, entry, {})
    return _row(name + facts + (seen if entry.recomputed else ""), entry, cells, css)


def _run_line(group: Group, run: Run) -> str:
    """Return the row of a training run: the marks of its last checkpoint, and where they were others before."""
    last, model = run.last, run.last.head.model
    name = f'<a href="{escaped(run_link(run.name))}">{_breakable(run.name)}</a>'
    facts = f"<small>{escaped(last.family)} · {model.layers} x {model.hidden}</small>"
    button = f'<button type="button" class="unfold" aria-expanded="true">{len(run.entries)} checkpoints</button>'
    changes = dict(line.split(": ", 1) for line in verdict_changes(run.rows, run.steps))
    return _row(name + facts + button, last, _cells(group, last, changes), "run")


def _cells(group: Group, entry: Entry, changes: Mapping[str, str]) -> list[str]:
    return [
        _cell(group, entry, row, changes.get(f"{row.hypothesis}/{row.expectation}", ""), first=first)
        for row, first in zip(entry.rows, _firsts(entry.rows), strict=True)
    ]


def _row(heading: str, entry: Entry, cells: Sequence[str], css: str = "") -> str:
    drawn = sparkline(entry.profile) if entry.profile else ""  # the model's page says it in words
    kind = f' class="{css}"' if css else ""
    return f'<tr{kind}><th scope="row"><div class="who"><div>{heading}</div>{drawn}</div></th>{"".join(cells)}</tr>\n'


def _cell(group: Group, entry: Entry, row: Row, changed: str, *, first: bool) -> str:
    link = f"{page_link(entry.model)}#{claim_anchor(group.id, row.hypothesis, row.expectation)}"
    signs = marks(row).replace(" ", "") + (TURNED if changed else "")
    beside = f"<b>{signs}</b>" if signs else ""
    opening = '<td class="first">' if first else "<td>"
    detail = "\n".join(map(escaped, _detail(entry, row, changed)))
    return (
        f'{opening}<a class="mark {SHORT[row.word]}" href="{escaped(link)}" data-detail="{detail}">'
        f"{SYMBOLS[row.word]}<i>{SHORT[row.word]}</i>{beside}</a></td>"
    )


def _detail(entry: Entry, row: Row, changed: str) -> list[str]:
    """Return what a reader sees who rests on a mark: figures, and why the verdict is none."""
    parts = []
    if row.observed is not None:
        interval = "" if row.interval is None else f" {interval_text(row.interval)}"
        parts.append(f"observed {number(row.observed)}{interval}, required {number(row.required)}")
        errors = "" if row.standard_errors is None else f", {row.standard_errors:+.1f} standard errors"
        parts.append(f"margin {margin_text(row)}{errors}")
    parts += [*([row.reason] if row.reason else []), *row.notes, *([f"{entry.model}: {changed}"] if changed else [])]
    return parts


def _breakable(name: str) -> str:
    return escaped(name).replace("/", "/<wbr>").replace("--", "--<wbr>")
