"""Commands that publish: leaderboard and card."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delta_suite.cli.common import (
    RESULTS,
    Hypotheses,
    Repository,
    ResultsDir,
    app,
    default_hypotheses,
    fail,
)
from delta_suite.cli.output import say, show
from delta_suite.command_line import ExitCode


@app.command(epilog="Example: delta-suite leaderboard --check")
def leaderboard(
    results: ResultsDir = RESULTS,
    hypotheses: Hypotheses = None,
    repository: Repository = None,
    with_records: Annotated[
        bool, typer.Option("--with-records", help="Put a copy of the records into the site, and link to it.")
    ] = False,
    url: Annotated[
        str | None, typer.Option("--url", help="Where the site will be, for the picture that others show of a link.")
    ] = None,
    processes: Annotated[
        int | None, typer.Option("--processes", min=1, help="Work in so many processes (default: one a processor).")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 where a file is stale.")] = False,
) -> None:
    """Build leaderboard.md, .csv, .json and the site from the records. Exits with 1 where a record cannot be read."""
    from delta_suite.claims.loader import load_hypotheses
    from delta_suite.pool import Pool, usable_processors
    from delta_suite.publish.board import build
    from delta_suite.publish.leaderboard import files, stale, write

    claims = load_hypotheses(hypotheses or [default_hypotheses()])
    with Pool(processes or usable_processors()) as pool:
        board = build(results, claims, repository, with_records=with_records, url=url, pool=pool)
        content = files(board, pool)
        changed = dict.fromkeys(stale(results, content), "stale") if check else write(results, content)
    for item in board.broken:
        say(f"omitted: {item.why}")
    show(
        f"records: {sum(len(group.entries) for group in board.groups)} shown, tables: {len(board.groups)}, "
        f"superseded: {len(board.superseded)}, cannot be read: {len(board.broken)}"
    )
    for name, change in changed.items():
        show(f"{change}: {results / name}")
    if check and changed:
        fail(f"{len(changed)} files are stale. Build them anew: delta-suite leaderboard")
    if not changed:
        show("every file is up to date")
    if board.broken:
        raise typer.Exit(ExitCode.FAILED)


@app.command(epilog="Example: delta-suite card --model smollm2-135m-q4 --out ./my-model")
def card(
    model: Annotated[
        str | None, typer.Option("--model", help="A model with a record; its newest one is taken.")
    ] = None,
    record: Annotated[Path | None, typer.Option("--record", help="This record, wherever it lies.")] = None,
    results: ResultsDir = RESULTS,
    hypotheses: Hypotheses = None,
    repository: Repository = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of README.md and plots (default: cards/<model> in the results folder)."),
    ] = None,
) -> None:
    """Write a Hugging Face model card: metadata, a section with the verdicts, two plots. An author's text stays."""
    from delta_suite.claims.loader import load_hypotheses
    from delta_suite.publish.board import build
    from delta_suite.publish.card import newest, write_card
    from delta_suite.records.store import folder_name

    if model is None and record is None:
        fail("name the model: --model NAME, or a record of it: --record results/runs/NAME/....json")
    claims = load_hypotheses(hypotheses or [default_hypotheses()])
    board = build(results, claims, repository, None if record is None else [record])
    for item in board.broken if record is not None else ():
        fail(item.why)
    group, entry = newest(board, model or next(iter(board.models)))
    written = write_card(out or results / "cards" / folder_name(entry.model), board, group, entry)
    show(f"from {entry.record}: {group.title}")
    for path in written:
        show(f"written: {path}")
