"""The command that holds stored records against themselves, and against a second measurement."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delta_suite.cli.common import Device, ModelsFile, app
from delta_suite.cli.output import say, show
from delta_suite.command_line import DEFAULT_DEVICE, ExitCode
from delta_suite.errors import OptionError, explain

if TYPE_CHECKING:
    from delta_suite.sharing.recomputing import Choices, Recomputed


@app.command(epilog="Example: delta-suite verify results")
def verify(
    records: Annotated[list[Path], typer.Argument(help="Stored records, or results folders.")],
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Measure again here, too, and compare figure by figure.")
    ] = False,
    model: Annotated[
        str | None,
        typer.Option("--model", help="With --recompute: the model, where the record's source is not here."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", help="With --recompute: the texts, where they are a file."),
    ] = None,
    device: Device = DEFAULT_DEVICE,
    models_file: ModelsFile = None,
) -> None:
    """Check that the numbers of records follow from each other. Exits with 1 where something contradicts something.

    Every command that reads a record makes the same checks: completeness, ranges, values against spectra, cosines and
    replicates, certificate, counts, dates and place. They prove consistency, not origin: whoever computes all numbers
    anew makes a record that passes. With --recompute, the model is measured again with the record's settings, and
    every figure must be the record's: within 1e-5 for equal device and dtype, else within the intervals.
    """
    from delta_suite.records.store import verified_total
    from delta_suite.records.store import verify as verified

    if not recompute and (model, calibration) != (None, None):
        raise OptionError("--model and --calibration are for --recompute: without it nothing is measured.")
    checked = []
    for record in verified(records):
        checked.append(record)
        for line in record.lines():
            show(line)
    show(verified_total(checked))
    failed = not all(record.consistent for record in checked)
    if recompute:
        from delta_suite.models.models_file import load_registry
        from delta_suite.pipeline import chosen_settings
        from delta_suite.sharing.recomputing import Choices, require_one

        require_one([record.path for record in checked], model, calibration)
        settings = chosen_settings(device=device, fresh=True)
        choices = Choices(load_registry(models_file), settings, model, calibration)
        failed |= not _recomputed((record.path for record in checked if record.consistent), choices)
    if failed:
        raise typer.Exit(ExitCode.FAILED)


def _recomputed(paths: Iterable[Path], choices: Choices) -> bool:
    """Measure records again, show what differs in one table, and return True if all are confirmed."""
    from delta_suite.progress import bars
    from delta_suite.records.store import load
    from delta_suite.sharing import recomputing

    results: list[Recomputed] = []
    confirmed = True
    for path in paths:
        try:
            record = load(path)
            say(recomputing.announced(path, record))
            result = recomputing.recompute(path, record, choices, bars())
        except Exception as error:  # one model must not hinder the next, as when they are measured
            say(f"{path} is not confirmed: {explain(error, f'measuring the model of {path} again')}")
            confirmed = False
            continue
        show(result.line)
        results.append(result)
        confirmed &= result.agreement.agrees
    if any(result.agreement.differences for result in results):
        show(recomputing.difference_table(results))
    return confirmed
