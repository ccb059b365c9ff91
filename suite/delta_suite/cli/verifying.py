"""The command that checks stored records, and compares them with a second measurement."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delta_suite.cli.common import Device, ModelsFile, app
from delta_suite.cli.output import say, show
from delta_suite.command_line import DEFAULT_DEVICE, ExitCode
from delta_suite.errors import OptionError

if TYPE_CHECKING:
    from delta_suite.records.store import Verified


@app.command(epilog="Example: delta-suite verify results")
def verify(
    records: Annotated[list[Path], typer.Argument(help="Stored records, or results folders.")],
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Measure again here, too, and compare figure by figure.")
    ] = False,
    whole: Annotated[
        bool,
        typer.Option("--whole", help="Fail also where something cannot be checked, such as figures of older versions."),
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
    failed = not all(record.consistent and not (whole and record.unchecked) for record in checked)
    if recompute:
        failed |= not _recomputed(checked, model, calibration, device, models_file)
    if failed:
        raise typer.Exit(ExitCode.FAILED)


def _recomputed(
    checked: list[Verified], model: str | None, calibration: str | None, device: str, models_file: Path | None
) -> bool:
    """Measure consistent records again, show what differs in one table, and return True if all are confirmed."""
    from delta_suite.models.models_file import load_registry
    from delta_suite.pipeline import chosen_settings
    from delta_suite.progress import bars
    from delta_suite.recomputing import Choices, Recomputed, difference_table, recompute_all, require_one

    require_one([record.path for record in checked], model, calibration)
    choices = Choices(load_registry(models_file), chosen_settings(device=device, fresh=True), model, calibration)
    confirmed, compared = True, []
    for result in recompute_all((record.path for record in checked if record.consistent), choices, bars(), say):
        confirmed &= result.confirmed
        if isinstance(result, Recomputed):
            compared.append(result)
            show(result.line)
        else:
            say(result.line)
    if any(result.agreement.differences for result in compared):
        show(difference_table(compared))
    return confirmed
