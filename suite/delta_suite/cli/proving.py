"""The command that runs the self-test, against planted truth."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from delta_suite.cli.common import app
from delta_suite.cli.output import say, show
from delta_suite.command_line import ExitCode


@app.command(epilog="Example: delta-suite selftest --repeats 1000 --processes 16 --out results/selftest.md")
def selftest(
    repeats: Annotated[
        int,
        typer.Option(help="Draws of documents from each planted population, or a share of them where fewer decide."),
    ] = 40,
    processes: Annotated[int, typer.Option(help="Repeats run in so many processes.")] = 1,
    only: Annotated[str | None, typer.Option(help="One planted population, by its name in the table.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="Write the table, as Markdown, to this file, too, after each population.")
    ] = None,
) -> None:
    """Hold intervals and verdicts against planted truth. Exits with 1 where a bound is violated."""
    from delta_suite.progress import bars
    from delta_suite.selftest import proof
    from delta_suite.selftest.report import Proof
    from delta_suite.writing import require_writable_file, write_atomically

    if out is not None:
        require_writable_file(out)
    given = {"--repeats": repeats, "--processes": processes, "--only": only, "--out": out}
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    origin = proof.origin(shlex.join(["delta-suite", "selftest", *words]))

    def keep(so_far: Proof) -> None:
        """Tell what has ended, and keep it: the long form takes hours of CPU, and may be stopped."""
        ended, planned = len(so_far.worlds), len(so_far.worlds) + len(so_far.unfinished)
        say(f"{so_far.worlds[-1]}: ended after {so_far.seconds:.0f} s; {ended} of {planned} populations")
        if out is not None:
            write_atomically(out, so_far.markdown())

    outcome = proof.selftest(repeats, processes=processes, only=only, progress=bars(), origin=origin, ended=keep)
    for heading, table in outcome.tables().items():
        show(heading, table)
        show()
    show(f"{repeats} repeats of {len(outcome.worlds)} planted populations in {outcome.seconds:.0f} s")
    if out is not None:
        show(f"table: {out}")
    for line in outcome.violations:
        say(line)
    if outcome.violations:
        raise typer.Exit(ExitCode.FAILED)
