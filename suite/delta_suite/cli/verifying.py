"""The command that holds stored records against themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delta_suite.cli.common import app
from delta_suite.cli.output import show
from delta_suite.command_line import ExitCode
from delta_suite.errors import RecordError


@app.command(epilog="Example: delta-suite verify results")
def verify(
    records: Annotated[list[Path], typer.Argument(help="Stored records, or results folders.")],
) -> None:
    """Check that the numbers of records follow from each other. Exits with 1 where something contradicts itself.

    Every command that reads a record makes the same checks: completeness, ranges, values against spectra, cosines and
    replicates, certificate, counts, dates and place. They prove consistency, not origin: whoever computes all numbers
    anew makes a record that passes.
    """
    from delta_suite.paths import is_directory
    from delta_suite.records.store import examine, record_paths

    paths = [path for given in records for path in (record_paths(given) if is_directory(given) else [given])]
    if not paths:
        raise RecordError("there are no records: `delta-suite measure NAME` writes one into results/runs/<model>/.")
    wrong = 0
    for path in paths:
        try:
            examined = examine(path)
        except RecordError as error:
            show(f"{path}: cannot be read: {error}")
            wrong += 1
            continue
        count = len(examined.problems)
        show(f"{path}: {'ok' if not count else f'{count} contradiction' + 's' * (count > 1)}")
        for problem in examined.problems:
            show(f"  {problem}")
        for note in examined.unchecked:
            show(f"  not checked: {note}")
        wrong += bool(count)
    show(f"records: {len(paths)}, consistent: {len(paths) - wrong}, not: {wrong}")
    if wrong:
        raise typer.Exit(ExitCode.FAILED)
