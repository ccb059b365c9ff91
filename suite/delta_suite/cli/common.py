"""Hold what all commands share: the application, its options, and how errors are shown."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

import delta_suite
from delta_suite.command_line import (
    DEFAULT_CALIBRATION,
    DEFAULT_DEVICE,
    DEFAULT_RESULTS,
    EMPTY_VALUE,
    HELP,
    empty_options,
)
from delta_suite.errors import SuiteError
from delta_suite.paths import bundled

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec
    from delta_suite.pipeline import Outcome, Settings
    from delta_suite.publish.rows import Row
    from delta_suite.records.view import RecordView

FAILED = 1
"""The exit code where something could not be measured, read or written, or a claim is refuted."""


class _Commands(TyperGroup):
    """The commands, none of which takes an empty word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty options and arguments before any command sees them."""
        for option in empty_options(args):
            fail(f"{option or 'an argument'} {EMPTY_VALUE}")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Commands,
    help="pytest specs for the depth structure of language models. Verdicts in CI: pytest hypotheses/ --model=NAME",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"delta-suite {delta_suite.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """pytest specs for the depth structure of language models. Verdicts in CI: pytest hypotheses/ --model=NAME"""


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


ModelsFile = Annotated[Path | None, typer.Option("--models-file", help=_sentence(HELP["models-file"]))]
CalibrationOption = Annotated[str, typer.Option("--calibration", help=_sentence(HELP["calibration"]))]
Documents = Annotated[int | None, typer.Option("--documents", help=_sentence(HELP["documents"]))]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help=_sentence(HELP["chat-template"]))]
Device = Annotated[str, typer.Option("--device", help=_sentence(HELP["device"]))]
Dtype = Annotated[str | None, typer.Option("--dtype", help=_sentence(HELP["dtype"]))]
ResultsDir = Annotated[Path, typer.Option("--results-dir", help=_sentence(HELP["results-dir"]))]
Hypotheses = Annotated[
    list[Path] | None,
    typer.Option(
        "--hypotheses", help="Hypothesis files or folders (default: ./hypotheses, else those of delta-suite)."
    ),
]
Repository = Annotated[
    str | None,
    typer.Option(
        "--repository",
        help="Where the files are to be seen, such as https://github.com/me/it/blob/main (default: relative links).",
    ),
]
DEFAULTS = {"calibration": DEFAULT_CALIBRATION, "device": DEFAULT_DEVICE, "results": Path(DEFAULT_RESULTS)}
"""The defaults of the options above."""


@contextmanager
def errors_as_text() -> Iterator[None]:
    """Show an error meant for the user as one paragraph on stderr, without a traceback."""
    try:
        yield
    except SuiteError as error:
        fail(str(error))


def fail(message: str) -> NoReturn:
    """Show a message on stderr and exit with 1."""
    say(message)
    raise typer.Exit(FAILED)


def say(message: str) -> None:
    """Show a message on stderr."""
    typer.echo(f"delta-suite: {message}", err=True)


def measured(specs: Iterable[ModelSpec], settings: Settings) -> Iterator[tuple[ModelSpec, Outcome | None]]:
    """Measure models with progress shown; None for one that cannot be measured, which is told, so that others are."""
    from delta_suite.pipeline import measure_all
    from delta_suite.progress import bars

    for spec, outcome in measure_all(specs, settings, bars()):
        if isinstance(outcome, Exception):
            _tell(spec.name, outcome)
            yield spec, None
            continue
        for note in outcome.notes:
            say(note)
        yield spec, outcome


def _tell(name: str, error: Exception) -> None:
    """Show why a model cannot be measured; an error that was not foreseen with its traceback."""
    if isinstance(error, SuiteError):
        say(f"{name} cannot be measured: {error}")
        return
    what = traceback.format_exception_only(error)[-1].strip()
    trace = "".join(traceback.format_exception(error))
    typer.echo(
        f"{trace}\ndelta-suite: Internal error while measuring {name}: {what}\n"
        "  Please report it, with the traceback above and the output of `delta-suite doctor`.",
        err=True,
    )


def default_hypotheses() -> Path:
    """Return ./hypotheses, else the folder that ships with delta-suite."""
    here, shipped = Path("hypotheses"), bundled("hypotheses")
    return here if here.is_dir() or not shipped.is_dir() else shipped


def keep_stamps(path: Path, view: RecordView, rows: Sequence[Row]) -> None:
    """Say which hypothesis files have changed since they last judged this record, and keep that they did now.

    Where that cannot be kept, the record can still be judged.
    """
    from delta_suite.publish.rows import changed_lines, stamps_of
    from delta_suite.records.cache import Cache, cache_root
    from delta_suite.records.store import stamp, stamps

    judged_by = stamps_of(rows)
    try:
        for line in changed_lines(stamps(path), judged_by):
            typer.echo(f"{path}: {line}")
        stamp(path, judged_by, Cache(cache_root()))
    except SuiteError as error:
        say(f"what judged the record is not kept: {error}")
