"""A model's card for the Hugging Face hub: `model-index` metadata, a section with the verdicts, and two plots."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import RecordError
from delta_suite.escaping import markdown, markdown_code, markdown_link, terminal
from delta_suite.metrics.intervals import PERCENT
from delta_suite.publish.board import Board
from delta_suite.publish.board_tables import VERDICT_COLUMNS, memory_text, tally_cell, verdict_cells
from delta_suite.publish.card_plots import ALTERNATIVES, card_plots
from delta_suite.publish.comparable import Group
from delta_suite.publish.entries import Entry
from delta_suite.publish.plots import why_no_arrays
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.wording import LEGEND
from delta_suite.reading import UnreadableFileError, read_text
from delta_suite.writing import write_together

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

START, END = "<!-- delta-suite: start -->", "<!-- delta-suite: end -->"
"""The two lines around the suite's section, which is replaced; the rest of a card is its author's, and stays."""

_SECTION = re.compile(rf"^{START}$.*?^{END}$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(rf"^({START}|{END})$", re.MULTILINE)

INTERVAL = f"interval_{PERCENT.removesuffix('%')}"
"""The key of an interval in the `args` of a result."""

DATASET = "delta-suite-"
"""Before the calibration's name, as the type of the data set in `model-index`: how the suite knows its own results."""


def newest(board: Board, model: str) -> tuple[Group, Entry]:
    """Return the newest record of this model that counts. Raises RecordError where there is none."""
    entries = board.models.get(model)
    if not entries:
        known = ", ".join(board.models) or "none"
        raise RecordError(
            f"{board.results / 'runs'} has no record of {model!r}; it has records of: {known}. "
            f"`delta-suite measure {model}` writes one."
        )
    return max(entries, key=lambda item: (item[1].head.provenance.created, item[1].record))


def write_card(folder: Path, board: Board, group: Group, entry: Entry) -> list[Path]:
    """Write README.md and the plots into this folder; of a card that is there, only the suite's parts are replaced.

    Raises RecordError where the folder cannot be written, or its README.md has metadata that cannot be read.
    """
    readme = folder / "README.md"
    drawn = card_plots(entry.view)
    try:
        old = read_text(readme).replace("\r\n", "\n") if os.path.lexists(readme) else None
    except UnreadableFileError as error:
        raise RecordError(f"{error} Mend it, or name another folder with --out.") from None
    content = {"README.md": card_text(board, group, entry, list(drawn), old, str(readme)), **drawn}
    write_together([(folder / name, text.encode()) for name, text in reversed(content.items())])
    return [folder / name for name in content]


def card_text(board: Board, group: Group, entry: Entry, images: list[str], old: str | None, where: str) -> str:
    """Return the whole card. `old` is the card that was there; `where` names it in an error."""
    from huggingface_hub import ModelCard, ModelCardData

    data: Any
    if old is None:
        data, body = ModelCardData(model_name=terminal(entry.model)), f"\n# {markdown(entry.model)}\n"
    else:
        try:
            card = ModelCard(old)
        except Exception as error:  # what is no YAML, or no metadata, raises errors of many kinds
            why = str(error) or type(error).__name__
            raise RecordError(f"the metadata of {where} cannot be read: {why}. Mend it, or choose --out.") from None
        data, body = card.data, card.text
    others = [result for result in data.eval_results or [] if not result.dataset_type.startswith(DATASET)]
    data.eval_results = [*others, *eval_results(group, entry)] or None
    data.model_name = data.model_name or terminal(entry.model)
    tags = [data.tags] if isinstance(data.tags, str) else data.tags or []
    data.tags = list(dict.fromkeys([*tags, "delta-suite"]))
    section = f"{START}\n{section_text(board, group, entry, images)}\n{END}"
    around = _SECTION.split(body, maxsplit=1)
    if any(_MARKER.search(part) for part in around):
        raise RecordError(
            f"{where} has {START} without {END} after it, or more than once. Remove the lines that are too many."
        )
    body = section.join(around) if len(around) > 1 else f"{body.rstrip()}\n\n{section}\n"
    return f"---\n{data.to_yaml().rstrip()}\n---\n{body}"


def eval_results(group: Group, entry: Entry) -> list[EvalResult]:
    """Return one result a claim whose number exists. The verdict and what was required stand in the metric's `args`."""
    from huggingface_hub import EvalResult

    results = []
    for row in entry.rows:
        if row.observed is None:
            continue
        calibration = terminal(group.calibration.name)
        arguments: dict[str, Any] = {"verdict": row.word, "required": row.required, "margin": row.margin}
        if row.interval is not None:
            arguments[INTERVAL] = list(row.interval)
        if row.vacuous:
            arguments["vacuous"] = True
        if row.gates:
            arguments["gates"] = list(row.gates)
        results.append(
            EvalResult(
                task_type="other",
                task_name="Depth structure",
                dataset_type=f"{DATASET}{calibration}",
                dataset_name=f"delta-suite calibration {calibration}",
                dataset_revision=group.calibration.sha256,
                metric_type=f"{row.hypothesis}/{row.expectation}",
                metric_name=row.claim,
                metric_value=row.observed,
                metric_config=f"metric set {group.metrics}",
                metric_args=arguments,
            )
        )
    return results


def section_text(board: Board, group: Group, entry: Entry, images: list[str]) -> str:
    """Return the Markdown section: what was measured, the verdicts, the plots."""
    record = entry.head
    provenance = record.provenance
    lines = []
    for row in entry.rows:
        link = board.claim_link(row.where, "") if board.repository else None
        lines.append(
            [Cell(f"{row.hypothesis}/{row.expectation}", link=link), Cell(row.claim, code=True), *verdict_cells(row)]
        )
    published = board.repository is not None and entry.record.startswith("runs/")
    link = board.record_link(entry.record, "") if published else None
    written = markdown_link(entry.record, link) if link else markdown_code(entry.record)
    hypotheses = "\n".join(f"- {tally.hypothesis}: {markdown(tally_cell(tally).shown)}" for tally in entry.tallies)
    return "\n\n".join(
        [
            "## Depth structure, measured by delta-suite",
            markdown(
                f"{record.model.layers} layers, hidden size {record.model.hidden}; {group.title} "
                f"({record.calibration.tokens} tokens: {group.described.rstrip('.')}); {provenance.dtype} on "
                f"{provenance.device}, {entry.seconds:.1f} s, {memory_text(entry)}; measured {provenance.created}; "
                "weights SHA-256 "
            )
            + f"{markdown_code(record.model.fingerprint[:12])}; record {written}.",
            hypotheses,
            Table.of(["claim", "stated", *VERDICT_COLUMNS], lines).markdown(),
            markdown(LEGEND),
            *(_image(entry, name, images) for name in ALTERNATIVES),
        ]
    )


def _image(entry: Entry, name: str, images: list[str]) -> str:
    """Return the Markdown of a plot, or why it is not drawn."""
    if name in images:
        return f"![{ALTERNATIVES[name]}]({name})"
    return markdown(f"{ALTERNATIVES[name]}: not drawn, {why_no_arrays(entry.view, 'cosines')}.")
