"""The application that all commands are of, their common options, and how errors are shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer
from typer.core import TyperGroup

import delta_suite
from delta_suite.cli.output import flush, prepare_streams, say, show
from delta_suite.command_line import (
    DEFAULT_CALIBRATION,
    DEFAULT_DEVICE,
    DEFAULT_PARTS,
    DEFAULT_RESULTS,
    EMPTY_VALUE,
    EXIT_CODES,
    HELP,
    PARTS,
    ExitCode,
    empty_options,
)
from delta_suite.errors import OptionError, OutputError, SuiteError, explain, why_not_measured
from delta_suite.interruption import keep, measured_so_far
from delta_suite.paths import bundled
from delta_suite.process_group import refuse_processes, wait_for_first
from delta_suite.writing import discard_output, require_writable

if TYPE_CHECKING:
    from delta_suite.engine.dispatch import Workers
    from delta_suite.engine.work import Item
    from delta_suite.pipeline import Outcome, Settings
    from delta_suite.publish.rows import Row


class _Commands(TyperGroup):
    """The commands. None takes an empty word, and each ends with a code of `ExitCode`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Refuse empty options and arguments before any command sees them."""
        for option in empty_options(args):
            raise OptionError(f"{option or 'an argument'} {EMPTY_VALUE}")
        return super().parse_args(ctx, args)

    def main(self, *arguments: Any, **options: Any) -> NoReturn:
        """Run a command and exit with its code; what ends it early is one message on stderr."""
        prepare_streams()
        try:
            code = super().main(*arguments, **{**options, "standalone_mode": False})
            flush()
        except Exception as error:
            code = _end(error)
        sys.exit(code)


def _end(error: Exception) -> int:
    """Show why a command ended, and return the exit code."""
    wait_for_first()
    if isinstance(error, OutputError):
        discard_output(sys.stdout)
    if hasattr(error, "format_message"):  # the usage errors of click, which typer keeps a copy of
        if type(error).__name__ == "NoArgsIsHelpError":
            show(error.format_message())
        else:
            command = context.command_path if (context := getattr(error, "ctx", None)) else "delta-suite"
            problem = error.format_message().removesuffix(".")
            say(f"{problem}{'' if problem.endswith('?') else '.'} See `{command} --help`.")
        return ExitCode.USAGE
    say(explain(error, "running the command"))
    if isinstance(error, SuiteError | OSError | MemoryError):
        return ExitCode.USAGE if isinstance(error, OptionError) else ExitCode.FAILED
    return ExitCode.INTERNAL


app = typer.Typer(
    cls=_Commands,
    help="pytest specs for the depth structure of language models. Verdicts in CI: pytest hypotheses/ --model=NAME",
    epilog="\b\nExit codes:\n" + "\n".join(f"{code:>5}  {meaning}" for code, meaning in EXIT_CODES.items()),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        show(f"delta-suite {delta_suite.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """pytest specs for the depth structure of language models. Verdicts in CI: pytest hypotheses/ --model=NAME"""
    if context.invoked_subcommand != "measure":
        refuse_processes(f"`{context.invoked_subcommand}`")


def sentence(text: str) -> str:
    """Return a help text with a capital letter and a full stop."""
    return f"{text[0].upper()}{text[1:]}."


ModelsFile = Annotated[Path | None, typer.Option("--models-file", help=sentence(HELP["models-file"]))]
CalibrationOption = Annotated[str, typer.Option("--calibration", help=sentence(HELP["calibration"]))]
Documents = Annotated[int | None, typer.Option("--documents", help=sentence(HELP["documents"]))]
ChatTemplate = Annotated[bool, typer.Option("--chat-template", help=sentence(HELP["chat-template"]))]
Device = Annotated[str, typer.Option("--device", help=sentence(HELP["device"]))]
Dtype = Annotated[str | None, typer.Option("--dtype", help=sentence(HELP["dtype"]))]
ResultsDir = Annotated[Path, typer.Option("--results-dir", help=sentence(HELP["results-dir"]))]
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
RESULTS = Path(DEFAULT_RESULTS)
"""The default of `--results-dir`."""


_SETTINGS: dict[str, tuple[Any, Any]] = {
    "calibration": (CalibrationOption, DEFAULT_CALIBRATION),
    "documents": (Documents, None),
    "chat_template": (ChatTemplate, False),
    "device": (Device, DEFAULT_DEVICE),
    "dtype": (Dtype, None),
    "results": (ResultsDir, RESULTS),
    "fresh": (Annotated[bool, typer.Option("--fresh", help=sentence(HELP["fresh"]))], False),
    "parts": (
        Annotated[
            str,
            typer.Option("--parts", help=f"What to measure, with commas: {', '.join(PARTS)}; or all."),
        ],
        ",".join(DEFAULT_PARTS),
    ),
}
"""The options that become the settings of a measurement, by parameter of `chosen_settings`: type and default."""

_EXTRA = ("fresh", "parts")
"""Options that only some commands have."""


def takes_settings(*extra: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of a measurement, which it takes together as its argument `settings`.

    extra: options that not every command has.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        taken = signature(command).parameters  # what a command has as its own argument, it sets itself
        names = [name for name in _SETTINGS if name not in taken and (name not in _EXTRA or name in extra)]
        hints = get_type_hints(command, localns={"Settings": object}, include_extras=True)
        parameters = []
        for parameter in taken.values():
            if parameter.name == "settings":
                options = {name: _SETTINGS[name] for name in names}
            else:
                options = {parameter.name: (hints[parameter.name], parameter.default)}
            parameters += [
                Parameter(name, Parameter.KEYWORD_ONLY, annotation=kind, default=default)
                for name, (kind, default) in options.items()
            ]

        @wraps(command)
        def with_settings(**given: Any) -> None:
            from delta_suite.pipeline import chosen_settings

            settings = chosen_settings(**{name: given.pop(name) for name in names})
            command(settings=settings, **given)

        with_settings.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        with_settings.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return with_settings

    return decorate


def fail(message: str) -> NoReturn:
    """Show a message on stderr and exit with 1."""
    say(message)
    raise typer.Exit(ExitCode.FAILED)


def measured(
    work: Iterable[Item], settings: Settings, workers: Workers | None = None
) -> Iterator[tuple[Item, Outcome | None]]:
    """Measure with progress shown; yield None for an item that cannot be measured, after saying why, and go on.

    workers: where the items are measured; None for this process. Raises RecordError, before anything is measured,
        where the results folder cannot be written.
    """
    from delta_suite.pipeline import measure_all
    from delta_suite.progress import bars
    from delta_suite.records.store import RUNS
    from delta_suite.remote import measure_on
    from delta_suite.split import measure_split

    work, measured_count = list(work), 0
    if work:
        require_writable(settings.results / RUNS)
    keep(measured_so_far(0, len(work), settings.results / RUNS))
    bar = bars()
    if workers is None:
        outcomes = measure_all(work, settings, bar)
    else:
        outcomes = (measure_split if settings.split_calibration else measure_on)(workers, work, settings, bar)
    for item, outcome in outcomes:
        if isinstance(outcome, Exception):
            say(why_not_measured(item.spec.name, outcome))
            yield item, None
            continue
        measured_count += 1
        keep(measured_so_far(measured_count, len(work), settings.results / RUNS))
        for note in outcome.notes:
            say(note)
        yield item, outcome


def default_hypotheses() -> Path:
    """Return ./hypotheses, else the folder that ships with delta-suite."""
    here, shipped = Path("hypotheses"), bundled("hypotheses")
    return here if here.is_dir() or not shipped.is_dir() else shipped


def keep_stamps(path: Path, rows: Sequence[Row]) -> None:
    """Say which hypothesis files have changed since they last judged this record, and keep that they did now.

    Where that cannot be kept, the record can still be judged.
    """
    from delta_suite.paths import cache_root
    from delta_suite.publish.rows import changed_lines, stamps_of
    from delta_suite.records.cache import Cache
    from delta_suite.records.store import stamp, stamps

    judged_by = stamps_of(rows)
    changed = []
    try:
        changed = changed_lines(stamps(path), judged_by)
        stamp(path, judged_by, Cache(cache_root()))
    except SuiteError as error:
        say(f"what judged the record is not kept: {error}")
    for line in changed:
        show(f"{path}: {line}")
