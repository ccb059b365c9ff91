"""The command that judges stored records."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delta_suite.cli.common import Hypotheses, ModelsFile, app, default_hypotheses, keep_stamps
from delta_suite.cli.output import show
from delta_suite.command_line import ExitCode

if TYPE_CHECKING:
    from delta_suite.models.models_file import Registry
    from delta_suite.publish.rows import Row
    from delta_suite.records.view import RecordView


@app.command(epilog="Example: delta-suite judge results/runs/smollm2-135m-q4/*.json")
def judge(
    records: Annotated[list[Path], typer.Argument(help="Stored records, or results folders for all of theirs.")],
    hypotheses: Hypotheses = None,
    models_file: ModelsFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Explain each verdict.")] = False,
) -> None:
    """Judge stored records, without a model. Exits with 1 where an expectation is refuted.

    Which hypothesis files judged a record last is kept in results/judged/.
    """
    from delta_suite.claims.judge import judge_all
    from delta_suite.claims.loader import load_hypotheses, require_known_phases
    from delta_suite.models.models_file import load_registry
    from delta_suite.paths import cache_root
    from delta_suite.publish.explanation import explanation
    from delta_suite.publish.model_tables import model_line, phase_table
    from delta_suite.publish.rows import Row, mark_lines
    from delta_suite.publish.screen import columns, prose
    from delta_suite.publish.verdict_tables import chance_text, variant_table, verdict_grid
    from delta_suite.records.cache import Cache
    from delta_suite.records.store import control_beside, load, named_records

    claims = load_hypotheses(hypotheses or [default_hypotheses()])
    registry = load_registry(models_file)
    records = named_records(records)
    views = [load(path, Cache(cache_root())) for path in records]
    require_known_phases(claims, [*registry.phases, *(phase for view in views for phase in view.phases)])
    width = columns()
    rows: list[Row] = []
    texts: list[str] = []
    names = [view.model.name for view in views]
    for path, stored in zip(records, views, strict=True):
        view = _under_declared_phases(path, stored, registry)
        show(prose(model_line(view), width), phase_table(view))
        show()
        judgements = list(judge_all(claims, [(view, control_beside(path, view))]))
        name = view.model.name
        label = name if names.count(name) == 1 else f"{name} ({path.stem})"  # each record has a column of its own
        rows_of_record = [replace(Row.of(judged, str(path)), model=label) for judged in judgements]
        keep_stamps(path, rows_of_record)
        rows += rows_of_record
        command = shlex.join(["delta-suite", "judge", "--explain", str(path)])
        texts += [
            explanation(judged, judged.where, command, width, brief=not explain)
            for judged, row in zip(judgements, rows_of_record, strict=True)
            if explain or _fails(row)
        ]
    show(verdict_grid(rows))
    for line in filter(None, [chance_text(rows), *mark_lines(rows)]):
        show(prose(line, width))
    show()
    show(variant_table(rows), *texts)
    if any(map(_fails, rows)):
        raise typer.Exit(ExitCode.FAILED)


def _fails(row: Row) -> bool:
    return row.word == "FAIL"


def _under_declared_phases(path: Path, view: RecordView, registry: Registry) -> RecordView:
    """Return the record under the phase map that models.toml declares for its model now, if it declares one."""
    spec = registry.specs.get(view.model.name)
    if spec is None or spec.phases is None or dict(spec.phases) == dict(view.phases):
        return view
    show(f"{path}: judged under the phase map that {registry.path} declares now")
    return view.under(spec.phases)
