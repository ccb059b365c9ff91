"""Commands that measure: measure, compare, trajectory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delta_suite.cli.common import (
    Hypotheses,
    ModelsFile,
    app,
    default_hypotheses,
    fail,
    keep_stamps,
    measured,
    sentence,
    takes_settings,
)
from delta_suite.cli.output import say, show
from delta_suite.command_line import DEFAULT_CALIBRATION, HELP, ExitCode
from delta_suite.errors import OptionError, why_not_measured

if TYPE_CHECKING:
    from delta_suite.engine.work import Item
    from delta_suite.models.spec import ModelSpec
    from delta_suite.pipeline import Outcome, Settings
    from delta_suite.records.view import RecordView


_SPLIT = "All workers measure one model after the other together, each some of its texts: spectra, boundaries and law."

_CALIBRATIONS = [DEFAULT_CALIBRATION]
"""The default of --calibration where it can be repeated."""


@app.command(epilog="Example: delta-suite measure smollm2-135m-q4")
@takes_settings("fresh", "parts")
def measure(
    models: Annotated[list[str], typer.Argument(help=f"For each model {HELP['model']}.")],
    settings: Settings,
    calibration: Annotated[
        list[str], typer.Option("--calibration", help=sentence(f"{HELP['calibration']} (repeatable)"))
    ] = _CALIBRATIONS,
    shard: Annotated[str | None, typer.Option("--shard", metavar="I/N", help=sentence(HELP["shard"]))] = None,
    engine: Annotated[str, typer.Option(help="Where models are measured: local, or on a Ray cluster: ray.")] = "local",
    workers: Annotated[
        int, typer.Option(min=1, help="How many models --engine local measures at a time, a process each.")
    ] = 1,
    threads: Annotated[
        int | None,
        typer.Option(min=1, help="Threads of each worker; on Ray its CPUs (default: 1; without workers, torch's own)."),
    ] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Head of the Ray cluster (default: the one here)."),
    ] = None,
    gpus_per_task: Annotated[
        float | None, typer.Option(min=0, help="GPUs that Ray gives each model; may be a fraction (default: 0).")
    ] = None,
    split_calibration: Annotated[bool, typer.Option("--split-calibration", help=_SPLIT)] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show the table of layers, too.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would run, what is cached, memory and time, and refusals.")
    ] = False,
    models_file: ModelsFile = None,
) -> None:
    """Measure models and write one record each; a model measured before comes from the cache."""
    from delta_suite.engine.choice import DEFAULT_THREADS, chosen_workers
    from delta_suite.engine.work import Shard, work_list
    from delta_suite.models.models_file import load_registry
    from delta_suite.models.parallel import processes_of
    from delta_suite.process_group import refuse_processes

    if split_calibration:
        settings, threads = _split(settings), threads or DEFAULT_THREADS
    chosen = chosen_workers(engine, workers, threads, ray_address, gpus_per_task, device=settings.device)
    if dry_run or chosen is not None:
        refuse_processes("--dry-run" if dry_run else "what measures on workers")
    registry = load_registry(models_file)
    named = registry.told_apart([spec for name in models for spec in registry.resolve_all(name)])
    work = work_list(named, calibration)
    if shard is not None:
        share = Shard.parse(shard)
        say(share.line(work))
        work = share.of(work)
    if dry_run:
        shown = [_show_forecast(item, settings) for item in work]
    else:
        with processes_of(settings.device):
            shown = [_show_outcome(outcome, settings, layers) for _, outcome in measured(work, settings, chosen)]
    if not all(shown):
        raise typer.Exit(ExitCode.FAILED)


def _split(settings: Settings) -> Settings:
    """Return the settings of a calibration that is split, and say which parts are not measured so."""
    from delta_suite.split import NOT_FROM_SUMS

    if left_out := sorted(settings.parts & NOT_FROM_SUMS):
        say(f"not measured with --split-calibration, whose workers bring sums of updates: {', '.join(left_out)}.")
    return replace(settings, split_calibration=True, parts=settings.parts - NOT_FROM_SUMS)


def _show_forecast(item: Item, settings: Settings) -> bool:
    """Show what measuring an item would do; return False where it would be refused."""
    from delta_suite.dry_run import forecast

    try:
        told = "\n".join(forecast(item.spec, replace(settings, calibration=item.calibration)).lines())
    except Exception as error:  # one model must not hinder the next, as when they are measured
        say(why_not_measured(item.spec.name, error))
        return False
    show(told)
    return True


def _show_outcome(outcome: Outcome | None, settings: Settings, layers: bool) -> bool:
    """Show what was measured; return False where nothing was."""
    from delta_suite.publish import model_tables
    from delta_suite.publish.screen import columns, prose

    if outcome is None:
        return False
    view, width = outcome.view, columns()
    told = prose(model_tables.model_line(view) + (" (from the cache)" if outcome.cached else ""), width)
    detailed = [model_tables.layer_table(view), *model_tables.boundary_tables(view, width=width)] if layers else []
    writes = [model_tables.writes_table(view)] if "writes" in settings.parts & set(view.record.parts) else []
    losses = model_tables.losses_tables(view, settings.parts)
    show(told, model_tables.phase_table(view), *writes, *losses, *detailed, f"record: {outcome.path}")
    return True


@app.command(epilog="Example: delta-suite compare runs/big/checkpoint-4000 runs/big/checkpoint-8000")
@takes_settings()
def compare(
    before: Annotated[str, typer.Argument(help="A model as `measure` takes it, or a record (.json).")],
    now: Annotated[str, typer.Argument(help="The other one.")],
    settings: Settings,
    variant: Annotated[str, typer.Option(help="raw or sink_free.")] = "raw",
    layers: Annotated[bool, typer.Option("--layers", help="Layer by layer, too.")] = False,
    other_documents: Annotated[
        bool, typer.Option("--other-documents", help="The records' calibrations are samples of one source.")
    ] = False,
    models_file: ModelsFile = None,
) -> None:
    """Show two models or checkpoints side by side, with the interval of each difference.

    Models of one calibration are paired by document. Of models of another depth the phases of one name are compared.
    """
    from delta_suite.publish.baseline_tables import side_by_side
    from delta_suite.publish.model_tables import model_line
    from delta_suite.publish.screen import columns, prose
    from delta_suite.regression.comparison import require_compared

    require_compared(variant)
    old, new = _measured_or_stored([before, now], settings, models_file)
    width = columns()
    show("\n".join(prose(model_line(view), width) for view in (old, new)))
    show()
    show(*side_by_side(old, new, variant, layers=layers, other_documents=other_documents, width=width))


def _measured_or_stored(names: Sequence[str], settings: Settings, models_file: Path | None) -> list[RecordView]:
    """Return stored records, and models measured or taken from the cache, in the order of the names."""
    from delta_suite.engine.work import work_list
    from delta_suite.models.models_file import load_registry
    from delta_suite.records.store import load

    arguments = [name for name in names if not name.endswith(".json")]
    registry = load_registry(models_file) if arguments else None
    specs = iter(registry.told_apart([registry.resolve(name) for name in arguments]) if registry else ())
    views = []
    for name in names:
        if name.endswith(".json"):
            views.append(load(Path(name), settings.cache))
            continue
        ((_, outcome),) = measured(work_list([next(specs)], [settings.calibration]), settings)
        if outcome is None:
            raise typer.Exit(ExitCode.FAILED)
        views.append(outcome.view)
    return views


@app.command(epilog="Example: delta-suite trajectory 'runs/big/checkpoint-*' --out big.html")
@takes_settings()
def trajectory(
    pattern: Annotated[str, typer.Argument(help="name@step*, or a quoted pattern of directories.")],
    settings: Settings,
    out: Annotated[Path | None, typer.Option(help="The page (default: <results>/trajectories/<run>.html).")] = None,
    variant: Annotated[str, typer.Option(help="The variant that is shown.")] = "raw",
    hypotheses: Hypotheses = None,
    models_file: ModelsFile = None,
) -> None:
    """Measure every checkpoint of a run, in the order of the steps; show and plot metrics and verdicts against them.

    Exits with 1 where a checkpoint cannot be measured; the others are shown.
    """
    from delta_suite.claims.loader import load_hypotheses, require_known_phases
    from delta_suite.engine.work import work_list
    from delta_suite.models.models_file import load_registry
    from delta_suite.publish.pages import RUNS, run_page_name
    from delta_suite.publish.trajectory import series
    from delta_suite.reduction.variants import BLOCK_VARIANTS
    from delta_suite.writing import require_writable_file

    if variant not in BLOCK_VARIANTS:
        raise OptionError(f"--variant {variant} is unknown: use one of {', '.join(BLOCK_VARIANTS)}.")
    registry = load_registry(models_file)
    specs = registry.told_apart(registry.resolve_all(pattern))
    runs = series(specs)
    if len(runs) != 1:
        fail(
            f"{pattern} names {', '.join(spec.name for spec in specs)}, and a trajectory is of several checkpoints of "
            f"one run, whose names end in their step (checkpoint-1000, name@step8000). Name them by a quoted pattern."
        )
    ((name, steps),) = runs.items()
    claims = load_hypotheses(hypotheses or [default_hypotheses()])
    require_known_phases(claims, registry.phases)
    page = out or settings.results / RUNS / run_page_name(name)
    require_writable_file(page)
    by_name: dict[str, ModelSpec] = {spec.name: spec for spec in specs}
    step_of = {model: step for step, model in steps.items()}
    work = work_list([by_name[model] for model in steps.values()], [settings.calibration])
    outcomes = {step_of[item.spec.name]: outcome for item, outcome in measured(work, settings) if outcome is not None}
    if not outcomes:
        fail(f"no checkpoint of {name} can be measured, so there is no page")
    _show_run(name, steps, outcomes, claims, settings.results, variant, page)
    show(f"plot: {page}")
    if missing := [model for step, model in steps.items() if step not in outcomes]:
        fail(f"the page is without {', '.join(missing)}, which cannot be measured (see above)")


def _show_run(
    name: str,
    steps: dict[int, str],
    outcomes: dict[int, Outcome],
    claims: list,  # type: ignore[type-arg]
    results: Path,
    variant: str,
    page: Path,
) -> None:
    """Judge the checkpoints of a run, show its tables, and write its page."""
    from delta_suite.claims.judge import judge_all
    from delta_suite.publish import trajectory as tables
    from delta_suite.publish.entries import Entry
    from delta_suite.publish.rows import Row
    from delta_suite.publish.site.run_page import standalone
    from delta_suite.records.store import newest_control
    from delta_suite.writing import write_atomically

    entries = {}
    for step, outcome in outcomes.items():
        view = outcome.view
        control = newest_control(results, view)
        rows = tuple(Row.of(judged, str(outcome.path)) for judged in judge_all(claims, [(view, control)]))
        keep_stamps(outcome.path, rows)
        entries[step] = Entry(view.record, str(outcome.path), rows, partial(getattr, outcome, "view"))
    rows_of_run = [row for entry in entries.values() for row in entry.rows]
    show(tables.verdict_table(rows_of_run, steps))
    for change in tables.verdict_changes(rows_of_run, steps):
        show(f"changed  {change}")
    views = {step: entry.view for step, entry in entries.items()}
    show()
    show(tables.metric_table(views, variant))
    show()
    write_atomically(page, standalone(name, entries, variant))
