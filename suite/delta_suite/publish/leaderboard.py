"""The leaderboard in its forms: leaderboard.md, .csv, .json and the site. Same records, same hypotheses: same bytes."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from delta_suite import escaping
from delta_suite.errors import RecordError
from delta_suite.pool import HERE, Pool
from delta_suite.publish.board import Board
from delta_suite.publish.board_tables import claims_by_model, models_table
from delta_suite.publish.comparable import quantisation
from delta_suite.publish.entries import Entry
from delta_suite.publish.pages import FOLDERS, SITE, run_link
from delta_suite.publish.rows import Row, relative_margin
from delta_suite.publish.site.index_page import index_page
from delta_suite.publish.site.whole_site import site_files
from delta_suite.publish.table import Cell
from delta_suite.publish.wording import CHANGED, LEGEND, NEVER_MIXED, NO_SCORE
from delta_suite.reading import UnreadableFileError, read_bytes
from delta_suite.writing import sweep, write_together


def files(board: Board, pool: Pool = HERE) -> Iterator[tuple[str, bytes]]:
    """Yield all that is published, one after the other: path relative to the results folder, and content.

    What links to other files comes after them.
    """
    yield from site_files(board, pool)
    for name, form in (("leaderboard.csv", as_csv), ("leaderboard.json", as_json)):
        content = form(board).encode()
        yield name, content
        yield f"{SITE}/{name}", content  # the site's folder alone has its downloads, too
    yield "leaderboard.md", markdown(board).encode()
    yield f"{SITE}/index.html", index_page(board).encode()


def write(results: Path, content: Iterable[tuple[str, bytes]]) -> dict[str, str]:
    """Write what differs, remove the pages of models and runs that are gone, and return what was done to which file.

    A run that is killed leaves each file as it was or as it shall be, and the next one completes it. Raises RecordError
    where a file cannot be written.
    """
    sweep(results)
    changed: dict[str, str] = {}
    write_together(((results / name, text) for name, text in _differing(results, content, changed)), results)
    for gone in (results / name for name, change in changed.items() if change == REMOVED):
        try:
            gone.unlink()
        except OSError as error:
            raise RecordError(f"{gone} cannot be removed: {error.strerror}.") from None
    return dict(sorted(changed.items()))


def stale(results: Path, content: Iterable[tuple[str, bytes]]) -> list[str]:
    """Return the published files that are missing, differ from `content`, or are pages that it no longer has."""
    changed: dict[str, str] = {}
    for _ in _differing(results, content, changed):
        pass
    return sorted(changed)


WRITTEN, REMOVED = "written", "removed"
"""The change to a published file that differs, and to the page of a model or run that is gone."""


def _differing(
    results: Path, content: Iterable[tuple[str, bytes]], changed: dict[str, str]
) -> Iterator[tuple[str, bytes]]:
    """Yield the files that are missing or differ, and fill `changed` by name."""
    names = set()
    for name, text in content:
        names.add(name)
        if _read(results / name, len(text)) != text:
            changed[name] = WRITTEN
            yield name, text
    for page in (page for folder in FOLDERS for page in (results / SITE / folder).rglob("*") if page.is_file()):
        if (name := page.relative_to(results).as_posix()) not in names:
            changed[name] = REMOVED


def _read(path: Path, limit: int) -> bytes | None:
    try:
        return read_bytes(path, limit)
    except UnreadableFileError:
        return None


# --- JSON and CSV ----------------------------------------------------------------------------------------------


def as_json(board: Board) -> str:
    """Return the whole leaderboard for programs, as JSON that differs in few lines where little has changed."""
    head = _indented(_head(board), "").split('"models": []')  # quotes in a text are escaped, so that this is the key
    parts = head[:1]
    for group, rest in zip(board.groups, head[1:], strict=True):  # one entry after the other: all would fill the memory
        entries = ",\n    ".join(_indented(_entry_json(board, entry), "    ") for entry in group.entries)
        parts += ['"models": [\n    ', entries, "\n   ]", rest]
    return "".join([*parts, "\n"])


def _indented(content: object, indent: str) -> str:
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False).replace("\n", f"\n{indent}")


def _head(board: Board) -> dict[str, Any]:
    """Return the leaderboard without its entries."""
    return {
        "schema": 2,
        "hypotheses": [
            {
                "id": hypothesis.id,
                "title": hypothesis.title,
                "version": hypothesis.version,
                "sha256": hypothesis.sha256,
                "file": board.claim_place(f"{hypothesis.path}:0").rpartition(":")[0],
            }
            for hypothesis in board.hypotheses
        ],
        "comparable": "only within one group",
        "groups": [
            {
                "id": group.id,
                "calibration": {
                    "name": group.calibration.name,
                    "sha256": group.calibration.sha256,
                    "documents": group.calibration.documents,
                },
                "precision": group.precision,
                "metric_versions": group.metric_versions,
                "settings": group.settings,
                "record_schema": group.schema,
                "models": [],
                "runs": [{"name": run.name, "steps": run.steps} for run in group.runs],
            }
            for group in board.groups
        ],
        "superseded": [asdict(item) for item in board.superseded],
        "broken": [asdict(item) for item in board.broken],
    }


def _entry_json(board: Board, entry: Entry) -> dict[str, Any]:
    record, worst = entry.head, entry.worst
    provenance = record.provenance
    return {
        "model": entry.model,
        "record": entry.record,
        "judged_by": {name: stamp.model_dump() for name, stamp in entry.judged_by.items()},
        "changed_since": sorted(entry.changed),
        "recomputed": entry.recomputed,
        "hypotheses": [asdict(tally) for tally in entry.tallies],
        "worst_margin": None
        if worst is None
        else {
            "claim": f"{worst.hypothesis}/{worst.expectation}",
            "margin": worst.margin,
            "standard_errors": worst.standard_errors,
        },
        "cost": {"seconds": provenance.seconds, "peak_memory_bytes": provenance.peak_memory_bytes},
        "provenance": {
            "source": entry.source,
            "revision": record.model.revision,
            "fingerprint": record.model.fingerprint,
            "architecture": record.model.architecture,
            "layers": record.model.layers,
            "hidden": record.model.hidden,
            "tokens": record.calibration.tokens,
            "dtype": provenance.dtype,
            "attention": provenance.attention,
            "device": provenance.device,
            "hardware": provenance.hardware,
            "created": provenance.created,
            "suite": provenance.suite,
            "git": provenance.git,
            "versions": provenance.versions,
        },
        **({} if record.submitter is None else {"submitter": record.submitter.model_dump()}),
        **({"recomputed_by": entry.recomputed_by} if entry.recomputed else {}),
        "phases": record.phases,
        "verdicts": [_row_json(board, row) for row in entry.rows],
    }


def _row_json(board: Board, row: Row) -> dict[str, Any]:
    content = vars(row) | {"where": board.claim_place(row.where), "flips": row.flips}
    del content["model"], content["record"], content["judged_by"]
    return content


COLUMNS = (
    *("calibration", "calibration_sha256", "metric_set", "model", "dtype", "device", "hypothesis", "expectation"),
    *("claim", "severity", "verdict", "observed", "interval_low", "interval_high", "required", "margin"),
    *("relative_margin", "standard_errors", "reason", "gates", "vacuous", "flips", "seconds", "peak_host_bytes"),
    *("peak_gpu_bytes", "created", "suite", "source", "revision", "fingerprint", "stated_at", "hypothesis_sha256"),
    *("changed", "record", "quantisation", "recomputed"),
)


def as_csv(board: Board) -> str:
    """Return one line a claim and model, as CSV.

    The calibration, `metric_set`, `dtype` and `quantisation` tell which may be compared.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for group in board.groups:
        for entry in group.entries:
            record = entry.head
            for row in entry.rows:
                low, high = row.interval or (None, None)
                values = (
                    *(group.calibration.name, group.calibration.sha256, group.metrics, entry.model, entry.dtype),
                    *(record.provenance.device, row.hypothesis, row.expectation, row.claim, row.severity),
                    *(row.verdict, row.observed, low, high, row.required, row.margin),
                    *(None if row.margin is None else relative_margin(row), row.standard_errors),
                    *(row.reason, "; ".join(row.gates), int(row.vacuous), int(row.flips), round(entry.seconds, 3)),
                    *(entry.host_bytes, entry.gpu_bytes, record.provenance.created),
                    *(record.provenance.suite, entry.source, record.model.revision),
                    *(record.model.fingerprint, board.claim_place(row.where)),
                    *(row.judged_by[1] if row.judged_by else None, int(row.hypothesis in entry.changed), entry.record),
                    *(quantisation(record.model), int(entry.recomputed)),
                )
                writer.writerow(dict(zip(COLUMNS, map(escaping.csv_cell, values), strict=True)))
    return out.getvalue()


# --- Markdown --------------------------------------------------------------------------------------------------


def markdown(board: Board) -> str:
    """Return the tables for a reader of the repository."""
    parts = [
        "# Leaderboard",
        f"Built by `delta-suite leaderboard` from the records in `runs/` alone. {NO_SCORE}",
        escaping.markdown(LEGEND),
    ]
    if len(board.groups) > 1:
        parts.append(f"**{NEVER_MIXED}**")
    if not board.groups:
        parts.append("No record can be shown yet: `delta-suite measure NAME` writes one.")
    for group in board.groups:
        parts += [f"## {escaping.markdown(group.title)}", escaping.markdown(group.described)]
        if group.changed:
            parts += [f"**{CHANGED}**", "\n".join(f"- {escaping.markdown(line)}" for line in group.changed)]
        parts.append(models_table(board, group, "").markdown())
        parts += [
            f"Over training: {Cell(run.name, link=f'{SITE}/{run_link(run.name)}').markdown}, "
            f"{len(run.entries)} checkpoints."
            for run in group.runs
        ]
        parts.append(claims_by_model(board, group).markdown())
    if board.superseded:
        lines = [f"- {_record(board, item.record)}, replaced by {_record(board, item.by)}" for item in board.superseded]
        parts += ["## Superseded records", "A newer record of the same model in the same table counts."]
        parts.append("\n".join(lines))
    if board.broken:
        parts += [
            "## Records that cannot be read",
            "\n".join(f"- {escaping.markdown(item.why)}" for item in board.broken),
        ]
    return "\n\n".join(parts) + "\n"


def _record(board: Board, record: str) -> str:
    return Cell(record, link=board.record_link(record, "")).markdown
