"""Commands that bring records to others and from them: submit, push, pull."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from delta_suite.cli.common import RESULTS, ResultsDir, app
from delta_suite.cli.output import say, show
from delta_suite.command_line import ExitCode

Repo = Annotated[str, typer.Option("--repo", help="The dataset on the Hugging Face hub: ORG/NAME.")]


@app.command(epilog="Example: delta-suite submit results/runs/NAME/....json --handle ada --note 'two runs'")
def submit(
    records: Annotated[list[Path], typer.Argument(help="Stored records that are yours.")],
    handle: Annotated[str, typer.Option("--handle", help="Who you are, as on GitHub or the Hugging Face hub.")],
    hardware: Annotated[
        str | None, typer.Option("--hardware", help="What it ran on, where the record's own words say too little.")
    ] = None,
    note: Annotated[str | None, typer.Option("--note", help="A line about the measurement.")] = None,
    results: ResultsDir = RESULTS,
) -> None:
    """Verify records, and write copies with your name into the place where a pull request wants them.

    The records themselves stay as they are. Where one of them is refused, nothing is written.
    """
    from delta_suite.records.store import load
    from delta_suite.sharing import submitting

    written = submitting.submit(records, results, submitting.submitter(handle, hardware, note))
    for path in written:
        show(f"submitted: {path}")
    if not written:
        show("everything that was named is submitted already")
        return
    for path in written[::2]:
        if place := submitting.private_place(load(path).record):
            say(f"note: {path} names the folder of the weights, {place}, for everyone to read")
    show(
        "\nNext, on a branch of the repository that the results folder is in:\n"
        f"  git add {' '.join(shlex.quote(str(path)) for path in written)}\n"
        "  git commit && git push, and a pull request that adds nothing else"
    )


@app.command(epilog="Example: delta-suite push --repo ada/depth-results --create-pr")
def push(
    repo: Repo,
    records: Annotated[
        list[Path] | None,
        typer.Argument(metavar="[RECORDS]...", help="Stored records, or results folders (default: results)."),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request there, for a dataset of somebody else.")
    ] = False,
    private: Annotated[bool, typer.Option("--private", help="Where the dataset is made: show it to nobody.")] = False,
) -> None:
    """Add records to a results dataset on the Hugging Face hub, which is made where there is none.

    Every record is verified first. Nothing there is overwritten: where a file of the same name has another content,
    nothing is pushed.
    """
    from delta_suite.records.store import named_records
    from delta_suite.sharing.hub_results import push as pushed
    from delta_suite.sharing.hub_results import require_repository

    require_repository(repo)
    paths, bars = named_records(records or [RESULTS]), sys.stderr.isatty()
    result = pushed(repo, paths, create_pr=create_pr, private=private, bars=bars)
    for name in result.added:
        show(f"pushed: {name}")
    show(f"files: {len(result.added)} pushed, {result.known} there already")
    if result.url is not None:
        show(f"{'pull request' if create_pr else 'commit'}: {result.url}")


@app.command(epilog="Example: delta-suite pull --repo ada/depth-results")
def pull(
    repo: Repo,
    revision: Annotated[
        str | None, typer.Option("--revision", help="A branch, tag or commit, or refs/pr/1 (default: main).")
    ] = None,
    results: ResultsDir = RESULTS,
) -> None:
    """Bring the records of a results dataset of the Hugging Face hub into the results folder.

    Every record is verified before it is put into its place, and none replaces a different one that is here. Exits with
    1 where a record is left out; the others are there.
    """
    from delta_suite.paths import cache_root
    from delta_suite.progress import bars
    from delta_suite.records.cache import Cache
    from delta_suite.sharing.hub_results import pull as pulled
    from delta_suite.sharing.hub_results import require_repository

    require_repository(repo)
    result = pulled(repo, results, Cache(cache_root()), revision=revision, progress=bars())
    for path in result.written:
        show(f"pulled: {path}")
    for line in result.refused:
        say(f"left out: {line}")
    show(f"records: {len(result.written)} pulled, {result.known} here already, {len(result.refused)} left out")
    if result.refused:
        raise typer.Exit(ExitCode.FAILED)
