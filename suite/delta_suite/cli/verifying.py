"""The command that holds stored records against themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delta_suite.cli.common import app
from delta_suite.cli.output import show
from delta_suite.command_line import ExitCode


@app.command(epilog="Example: delta-suite verify results")
def verify(
    records: Annotated[list[Path], typer.Argument(help="Stored records, or results folders.")],
) -> None:
    """Check that the numbers of records follow from each other. Exits with 1 where something contradicts itself.

    Every command that reads a record makes the same checks: completeness, ranges, values against spectra, cosines and
    replicates, certificate, counts, dates and place. They prove consistency, not origin: whoever computes all numbers
    anew makes a record that passes.
    """
    from delta_suite.records.store import verified_total
    from delta_suite.records.store import verify as verified

    checked = []
    for record in verified(records):
        checked.append(record)
        for line in record.lines():
            show(line)
    show(verified_total(checked))
    if not all(record.consistent for record in checked):
        raise typer.Exit(ExitCode.FAILED)
