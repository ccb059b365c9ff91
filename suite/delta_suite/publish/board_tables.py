"""Tables of what is published: models by hypotheses, claims by models, and the cells of one verdict.

The site, leaderboard.md and the model card render the same tables; `folder` says where in the results the reader is.
"""

from __future__ import annotations

from delta_suite.metrics.intervals import PERCENT
from delta_suite.publish.board import Board
from delta_suite.publish.comparable import Group
from delta_suite.publish.entries import Entry, Tally
from delta_suite.publish.pages import SITE, page_link
from delta_suite.publish.rows import Row, margin_text, marks, relative_margin
from delta_suite.publish.table import Cell, Line, Table
from delta_suite.publish.verdict_tables import verdict_cell
from delta_suite.publish.wording import NONE, SYMBOLS, interval_text, number

VERDICT_COLUMNS = ("verdict", "observed", f"{PERCENT} interval", "required", "margin")
"""The columns of `verdict_cells`."""


def models_table(board: Board, group: Group, folder: str) -> Table:
    """Return one line a model: its hypotheses, its worst margin and what it took to measure it."""
    hypotheses = [tally.hypothesis for tally in group.entries[0].tallies]
    lines = []
    for entry in group.entries:
        provenance, worst = entry.head.provenance, entry.worst
        cells = (
            _model(group, entry, folder),
            *map(tally_cell, entry.tallies),
            Cell(worst_text(entry), None if worst is None else worst.standard_errors),
            Cell(str(entry.vacuous), entry.vacuous),
            Cell(f"{entry.seconds:.1f}", entry.seconds),
            Cell(memory_text(entry), entry.host_bytes + entry.gpu_bytes),
            Cell(f"{entry.head.model.layers} x {entry.head.model.hidden}", entry.head.model.layers),
            Cell(f"{provenance.created[:10]}, {entry.dtype} on {provenance.device}", provenance.created),
            record_cell(board, entry, folder),
        )
        lines.append(Line(cells, tuple(tally.verdict for tally in entry.tallies if tally.verdict)))
    figures = (
        "worst refuted, in standard errors",
        "vacuous",
        "seconds",
        "peak memory",
        "layers x hidden",
        "measured",
        "record",
    )
    head = ("model", *hypotheses, *figures)
    return Table(head, tuple(lines), id=f"models-{group.id}", caption="Models and hypotheses")


def claims_by_model(board: Board, group: Group) -> Table:
    """Return one line a claim, with the verdict for each model beside each other."""
    lines = [
        [
            Cell(f"{rows[0].hypothesis}/{rows[0].expectation}", link=board.claim_link(rows[0].where, "")),
            Cell(rows[0].claim, code=True),
            *map(verdict_cell, rows),
        ]
        for rows in zip(*(entry.rows for entry in group.entries), strict=True)
    ]
    return Table.of(["claim", "stated", *(entry.model for entry in group.entries)], lines)


def verdict_cells(row: Row) -> tuple[Cell, ...]:
    """Return a verdict with its marks, the observed value, its interval, what was required, and the margin."""
    return (
        Cell(f"{row.word}{marks(row)}", row.word, verdict=row.word),
        Cell(number(row.observed), row.observed),
        Cell(interval_text(row.interval), None if row.interval is None else row.interval[0]),
        Cell(number(row.required), row.required),
        Cell(margin_text(row), None if row.margin is None else relative_margin(row)),
    )


def _model(group: Group, entry: Entry, folder: str) -> Cell:
    """Return the model's name with a link to its page, from the results folder or from the site's."""
    page = page_link(entry.model) if folder == SITE else f"{SITE}/{page_link(entry.model)}"
    return Cell(entry.model, entry.model, f"{page}#{group.id}")


def record_cell(board: Board, entry: Entry, folder: str) -> Cell:
    """Return a link to an entry's record, or its place where a reader of this folder has no such file."""
    link = board.record_link(entry.record, folder)
    return Cell("JSON" if link else entry.record, entry.record, link, title=entry.record)


# --- words -----------------------------------------------------------------------------------------------------


def tally_cell(tally: Tally) -> Cell:
    """Return `FAIL (1 supported, 4 refuted)`, without what is 0.

    It sorts by the verdict, and by the counts only within it: there is no score.
    """
    counts = {
        "supported": tally.supported,
        "refuted": tally.refuted,
        "inconclusive": tally.inconclusive,
        "not measured": tally.not_measured,
        "of the supported vacuous": tally.vacuous,
    }
    text = f"{tally.verdict or NONE} ({', '.join(f'{count} {word}' for word, count in counts.items() if count)})"
    rank = list(SYMBOLS).index(tally.verdict) if tally.verdict else len(SYMBOLS)
    return Cell(text, f"{rank} {text}", verdict=tally.verdict)


def worst_text(entry: Entry) -> str:
    """Return the worst margin in standard errors, and the claim that it belongs to."""
    worst = entry.worst
    return NONE if worst is None else f"{worst.standard_errors:+.1f} {worst.hypothesis}/{worst.expectation}"


def memory_text(entry: Entry) -> str:
    """Return the peak memory of the process, and of the GPUs where there were any."""
    gpu = f", {entry.gpu_bytes / 1e9:.1f} GB GPU" if entry.gpu_bytes else ""
    return f"{entry.host_bytes / 1e9:.1f} GB host{gpu}"
