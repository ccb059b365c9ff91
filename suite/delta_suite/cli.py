"""The shell's front door: `delta-suite`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup

from delta_suite.capture.calibration import DEFAULT_CALIBRATION, OPTION_HELP
from delta_suite.command_line import EMPTY_VALUE, empty_options
from delta_suite.errors import SuiteError
from delta_suite.paths import bundled

if TYPE_CHECKING:
    from delta_suite.measure import Outcome, Settings
    from delta_suite.models.registry import ModelSpec
    from delta_suite.publish.tables import Row
    from delta_suite.records.record import Measurement


class _Words(TyperGroup):
    """The commands, none of which takes an empty word."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for option in empty_options(args):
            _fail(f"{option or 'an argument'} {EMPTY_VALUE}")
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Words,
    help="pytest specs for the depth structure of language models. Verdicts in CI: pytest hypotheses/ --model=NAME",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

MEASUREMENT_FAILED = 1
ModelsFile = Annotated[
    Path | None,
    typer.Option("--models-file", help="models.toml to use (default: ./models.toml, else the suite's own)."),
]


@contextmanager
def _errors_as_text() -> Iterator[None]:
    """An error meant for the user is one paragraph on stderr, without a traceback."""
    try:
        yield
    except SuiteError as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(f"delta-suite: {message}", err=True)
    raise typer.Exit(MEASUREMENT_FAILED)


def _measured(spec: ModelSpec, settings: Settings) -> Outcome:
    """Measure with progress shown, and say on stderr what there is to say of how the measurement came about."""
    from delta_suite.measure import measure as run
    from delta_suite.progress import bars

    outcome = run(spec, settings, bars())
    if outcome.note is not None:
        typer.echo(f"delta-suite: {outcome.note}", err=True)
    return outcome


def _measured_or_told(spec: ModelSpec, settings: Settings) -> Outcome | None:
    """One model's measurement; None where it cannot be had, which is told, so that the other models are measured."""
    import traceback

    try:
        return _measured(spec, settings)
    except SuiteError as error:
        typer.echo(f"delta-suite: {spec.name} cannot be measured: {error}", err=True)
    except Exception as error:  # not foreseen: its text alone would not tell where it comes from
        what = traceback.format_exception_only(error)[-1].strip()
        typer.echo(
            f"{traceback.format_exc()}\ndelta-suite: {spec.name} cannot be measured, by a fault of ours: {what}\n"
            "  Please report it, with the traceback above and what `delta-suite doctor` shows.",
            err=True,
        )
    return None


@app.command(epilog="Example: delta-suite measure smollm2-135m-q4")
def measure(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Names from models.toml, name@revision, directories, or hub ids; @random-weights behind one "
            "measures its architecture with freshly initialised weights."
        ),
    ],
    calibration: Annotated[str, typer.Option(help=f"{OPTION_HELP}.")] = DEFAULT_CALIBRATION,
    documents: Annotated[
        int | None, typer.Option(help="Only the first so many documents of the calibration (default: all).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps, or sharded over all GPUs.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="auto, float32, bfloat16, float16 (default: the model's).")] = None,
    results: Annotated[Path, typer.Option("--results-dir", help="Where the record is written.")] = Path("results"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again, whatever the cache holds.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show the table of layers, too.")] = False,
    models_file: ModelsFile = None,
) -> None:
    """Measure models and write one record each; a model measured before comes from the cache."""
    import time

    from delta_suite.measure import Settings
    from delta_suite.models.registry import load_registry
    from delta_suite.publish import tables

    started = time.time() if fresh else None
    settings = Settings(
        calibration=calibration,
        documents=documents,
        device=device,
        dtype=dtype,
        results=results,
        fresh_since=started,
    )
    failed = False
    with _errors_as_text():
        registry = load_registry(models_file)
        specs = [spec for name in models for spec in registry.resolve_all(name)]
    for spec in specs:
        outcome = _measured_or_told(spec, settings)
        if outcome is None:
            failed = True
            continue
        typer.echo(tables.model_line(outcome.measurement) + (" (from the cache)" if outcome.cached else ""))
        typer.echo(f"\n{tables.phase_table(outcome.measurement)}\n")
        if layers:
            typer.echo(f"{tables.layer_table(outcome.measurement)}\n")
            typer.echo(f"{tables.boundary_table(outcome.measurement)}\n")
        typer.echo(f"record: {outcome.record}")
    if failed:
        raise typer.Exit(MEASUREMENT_FAILED)


@app.command(epilog="Example: delta-suite compare runs/big/checkpoint-4000 runs/big/checkpoint-8000")
def compare(
    before: Annotated[str, typer.Argument(help="A model as `measure` takes it, or a record (.json).")],
    now: Annotated[str, typer.Argument(help="The other one.")],
    calibration: Annotated[str, typer.Option(help="As for measure.")] = DEFAULT_CALIBRATION,
    documents: Annotated[int | None, typer.Option(help="As for measure.")] = None,
    device: Annotated[str, typer.Option(help="As for measure.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    results: Annotated[Path, typer.Option("--results-dir", help="Where records are written.")] = Path("results"),
    variant: Annotated[str, typer.Option(help="raw or sink_free.")] = "raw",
    layers: Annotated[bool, typer.Option("--layers", help="Layer by layer, too.")] = False,
    other_documents: Annotated[
        bool, typer.Option("--other-documents", help="The records' calibrations are samples of one source.")
    ] = False,
    models_file: ModelsFile = None,
) -> None:
    """Two models or checkpoints side by side, with the interval of each difference.

    Models of one calibration are paired by document. Of models of another depth the phases of one name are compared.
    """
    from delta_suite.measure import Settings
    from delta_suite.publish import tables
    from delta_suite.publish.baseline_tables import side_by_side

    settings = Settings(calibration=calibration, documents=documents, device=device, dtype=dtype, results=results)
    with _errors_as_text():
        pair = [_measured_or_stored(name, settings, models_file) for name in (before, now)]
        for measurement in pair:
            typer.echo(tables.model_line(measurement))
        typer.echo("\n" + side_by_side(pair[0], pair[1], variant, layers=layers, other_documents=other_documents))


def _measured_or_stored(name: str, settings: Settings, models_file: Path | None) -> Measurement:
    """A record as it is, with its arrays where the cache has them; a model measured, or from the cache."""
    from delta_suite.models.registry import load_registry
    from delta_suite.records.store import load

    if name.endswith(".json"):
        record = load(Path(name))
        return record.with_arrays(settings.cache.arrays(record.provenance.cache_key))
    return _measured(load_registry(models_file).resolve(name), settings).measurement


@app.command(epilog="Example: delta-suite trajectory 'runs/big/checkpoint-*' --out big.html")
def trajectory(
    pattern: Annotated[str, typer.Argument(help="name@step*, or a quoted pattern of directories.")],
    out: Annotated[Path | None, typer.Option(help="The page (default: <results>/trajectories/<run>.html).")] = None,
    calibration: Annotated[str, typer.Option(help="As for measure.")] = DEFAULT_CALIBRATION,
    documents: Annotated[int | None, typer.Option(help="As for measure.")] = None,
    device: Annotated[str, typer.Option(help="As for measure.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="As for measure.")] = None,
    results: Annotated[Path, typer.Option("--results-dir", help="Where records are written.")] = Path("results"),
    variant: Annotated[str, typer.Option(help="The variant that is shown.")] = "raw",
    hypotheses: Annotated[
        list[Path] | None, typer.Option("--hypotheses", help="Hypothesis files or folders (default: hypotheses/).")
    ] = None,
    models_file: ModelsFile = None,
) -> None:
    """Measure every checkpoint of a run, in the order of the steps; show and plot metrics and verdicts against them.

    Exits with 1 where a checkpoint cannot be measured; the others are shown.
    """
    from delta_suite.claims.judge import across_variants
    from delta_suite.claims.judge import judge as verdict_on
    from delta_suite.claims.loader import load_hypotheses, require_known_phases
    from delta_suite.measure import Settings
    from delta_suite.models.registry import RANDOM_WEIGHTS, load_registry
    from delta_suite.publish import tables
    from delta_suite.publish import trajectory as publish
    from delta_suite.publish.board import Entry
    from delta_suite.publish.run_page import standalone
    from delta_suite.publish.site import RUNS, run_page_name
    from delta_suite.records.record import write_atomically
    from delta_suite.records.store import load, newest

    settings = Settings(calibration=calibration, documents=documents, device=device, dtype=dtype, results=results)
    with _errors_as_text():
        registry = load_registry(models_file)
        specs = registry.resolve_all(pattern)
        found = publish.series(specs)
        if len(found) != 1:
            _fail(
                f"{pattern} is {', '.join(spec.name for spec in specs)}: not several checkpoints of one run, whose "
                f"names end in their step (checkpoint-1000, name@step8000)."
            )
        ((name, steps),) = found.items()
        named = {spec.name: spec for spec in specs}
        loaded = load_hypotheses(hypotheses or [_default_hypotheses()])
        require_known_phases(loaded, registry.phases)
        outcomes = {}
        for step, model in steps.items():
            if (outcome := _measured_or_told(named[model], settings)) is not None:
                outcomes[step] = outcome
        if not outcomes:
            _fail(f"no checkpoint of {name} can be measured, so there is no page")
        measured = {step: outcome.measurement for step, outcome in outcomes.items()}
        controls = {
            step: newest(results, f"{own.model.name}@{RANDOM_WEIGHTS}", own.calibration.sha256)
            for step, own in measured.items()
        }
        rows = [
            tables.Row.of(
                verdict_on(hypothesis, expectation, outcome.measurement, controls[step]),
                across_variants(hypothesis, expectation, outcome.measurement),
                f"{hypothesis.path}:{expectation.line}",
                str(outcome.record),
            )
            for step, outcome in outcomes.items()
            for hypothesis in loaded
            for expectation in hypothesis.expect
        ]
        for step, outcome in outcomes.items():
            _keep_stamps(outcome.record, load(outcome.record), [row for row in rows if row.model == steps[step]])
        typer.echo(publish.verdict_table(rows, steps))
        for change in publish.verdict_changes(rows, steps):
            typer.echo(f"changed  {change}")
        typer.echo(f"\n{publish.metric_table(measured, variant)}\n")
        entries = {
            step: Entry(own, str(outcomes[step].record), tuple(row for row in rows if row.model == steps[step]))
            for step, own in measured.items()
        }
        page = out or results / RUNS / run_page_name(name)
        write_atomically(page, standalone(name, entries, variant))
    typer.echo(f"plot: {page}")
    if left_out := [model for step, model in steps.items() if step not in outcomes]:
        _fail(f"the page is without {', '.join(left_out)}, which cannot be measured (see above)")


@app.command(epilog="Example: delta-suite judge results/runs/smollm2-135m-q4/*.json")
def judge(
    records: Annotated[list[Path], typer.Argument(help="Stored records.")],
    hypotheses: Annotated[
        list[Path] | None,
        typer.Option("--hypotheses", help="Hypothesis files or folders (default: hypotheses/)."),
    ] = None,
    models_file: ModelsFile = None,
    explain: Annotated[bool, typer.Option("--explain", help="Explain each verdict.")] = False,
) -> None:
    """Judge stored records, without a model. Exits with 1 where an expectation is refuted.

    Each record keeps the version and SHA-256 of the hypothesis files that judged it last.
    """
    from delta_suite.claims.judge import Verdict, across_variants
    from delta_suite.claims.judge import judge as verdict_on
    from delta_suite.claims.loader import load_hypotheses, require_known_phases
    from delta_suite.models.registry import RANDOM_WEIGHTS, load_registry
    from delta_suite.publish import tables
    from delta_suite.records.cache import Cache, cache_root
    from delta_suite.records.store import load, newest

    with _errors_as_text():
        loaded = load_hypotheses(hypotheses or [_default_hypotheses()])
        registry = load_registry(models_file)
        measurements = [load(path) for path in records]
        require_known_phases(loaded, [*registry.phases, *(phase for own in measurements for phase in own.phases)])
        rows: list[tables.Row] = []
        texts: list[str] = []
        for path, record in zip(records, measurements, strict=True):
            measured = record.with_arrays(Cache(cache_root()).arrays(record.provenance.cache_key))
            spec = registry.specs.get(measured.model.name)
            if spec is not None and spec.phases is not None and dict(spec.phases) != measured.phases:
                typer.echo(f"{path}: judged under the phase map that {registry.path} declares now")
                measured = measured.under(spec.phases)
            typer.echo(tables.model_line(measured))
            typer.echo(f"\n{tables.phase_table(measured)}\n")
            control = newest(path.parents[2], f"{measured.model.name}@{RANDOM_WEIGHTS}", measured.calibration.sha256)
            for hypothesis in loaded:
                for expectation in hypothesis.expect:
                    judgement = verdict_on(hypothesis, expectation, measured, control)
                    variants = across_variants(hypothesis, expectation, measured)
                    where = f"{hypothesis.path}:{expectation.line}"
                    rows.append(tables.Row.of(judgement, variants, where, str(path)))
                    if judgement.verdict is not Verdict.SUPPORTED or explain:
                        texts.append(
                            tables.explanation(judgement, variants, where, f"delta-suite judge --explain {path}")
                        )
            _keep_stamps(path, measured, [row for row in rows if row.record == str(path)])
        typer.echo(tables.verdict_grid(rows))
        typer.echo(f"\n{tables.variant_table(rows)}")
        if explain:
            typer.echo("\n" + "\n\n".join(texts))
        failed = [row for row in rows if row.verdict == Verdict.REFUTED.value and row.severity == "fail"]
        if failed:
            typer.echo(f"\nrefuted, furthest from the claim first\n{tables.failure_table(failed)}")
            raise typer.Exit(1)


def _keep_stamps(path: Path, record: Measurement, rows: Sequence[Row]) -> None:
    """Say which hypothesis files have changed since they last judged this record, and leave in it that they did now.

    A record that cannot be written, such as another's, can still be judged.
    """
    from delta_suite.publish.tables import changed_lines, stamps_of
    from delta_suite.records.cache import Cache, cache_root
    from delta_suite.records.store import stamp

    stamps = stamps_of(rows)
    for line in changed_lines(record.judged_by, stamps):
        typer.echo(f"{path}: {line}")
    try:
        stamp(path, stamps, Cache(cache_root()))
    except SuiteError as error:
        typer.echo(f"delta-suite: the record does not say what judged it now: {error}", err=True)


def _default_hypotheses() -> Path:
    """./hypotheses, else the one beside the suite's own checkout."""

    here, own = Path("hypotheses"), bundled("hypotheses")
    return here if here.is_dir() or not own.is_dir() else own


@app.command(epilog="Example: delta-suite leaderboard --check")
def leaderboard(
    results: Annotated[Path, typer.Option("--results-dir", help="The results folder.")] = Path("results"),
    hypotheses: Annotated[
        list[Path] | None,
        typer.Option("--hypotheses", help="Hypothesis files or folders (default: hypotheses/)."),
    ] = None,
    repository: Annotated[
        str | None,
        typer.Option(
            help="Where the files are to be seen, such as https://github.com/me/it/blob/main (default: relative links)."
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing; exit with 1 where a file is stale.")] = False,
) -> None:
    """Build leaderboard.md, .csv, .json and the site from the records. Exits with 1 where a record cannot be read."""
    from delta_suite.claims.loader import load_hypotheses
    from delta_suite.publish.board import build
    from delta_suite.publish.leaderboard import files, stale, write

    with _errors_as_text():
        board = build(results, load_hypotheses(hypotheses or [_default_hypotheses()]), repository)
        content = files(board)
        changed = stale(results, content) if check else write(results, content)
    for item in board.broken:
        typer.echo(f"delta-suite: left out: {item.why}", err=True)
    typer.echo(
        f"records: {sum(len(group.entries) for group in board.groups)} shown, tables: {len(board.groups)}, "
        f"superseded: {len(board.superseded)}, cannot be read: {len(board.broken)}"
    )
    for name in changed:
        typer.echo(f"{'stale' if check else 'written' if name in content else 'removed'}: {results / name}")
    if check and changed:
        _fail(f"{len(changed)} of {len(content)} files are stale. Build them anew: delta-suite leaderboard")
    if not changed:
        typer.echo("every file is up to date")
    if board.broken:
        raise typer.Exit(MEASUREMENT_FAILED)


@app.command(epilog="Example: delta-suite card --model smollm2-135m-q4 --out ./my-model")
def card(
    model: Annotated[
        str | None, typer.Option("--model", help="A model with a record; its newest one is taken.")
    ] = None,
    record: Annotated[Path | None, typer.Option("--record", help="This record, wherever it lies.")] = None,
    results: Annotated[Path, typer.Option("--results-dir", help="The results folder.")] = Path("results"),
    hypotheses: Annotated[
        list[Path] | None,
        typer.Option("--hypotheses", help="Hypothesis files or folders (default: hypotheses/)."),
    ] = None,
    repository: Annotated[
        str | None, typer.Option(help="Where the files are to be seen; with it, claims and record become links.")
    ] = None,
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
        _fail("name the model: --model NAME, or a record of it: --record results/runs/NAME/....json")
    with _errors_as_text():
        loaded = load_hypotheses(hypotheses or [_default_hypotheses()])
        board = build(results, loaded, repository, None if record is None else [record])
        for item in board.broken if record is not None else ():
            _fail(item.why)
        group, entry = newest(board, model or next(iter(board.models)))
        written = write_card(out or results / "cards" / folder_name(entry.model), board, group, entry)
    typer.echo(f"from {entry.record}: {group.title}, {entry.dtype}")
    for path in written:
        typer.echo(f"written: {path}")


@app.command(epilog="Example: delta-suite models")
def models(models_file: ModelsFile = None) -> None:
    """The models that are known, which of them are on this machine, and why the others are not."""
    from tabulate import tabulate

    from delta_suite.models.files import availability
    from delta_suite.models.registry import load_registry

    with _errors_as_text():
        registry = load_registry(models_file)
        lines = []
        for name, spec in registry.specs.items():
            here, why = availability(spec)
            lines.append([name, "yes" if here else "no", spec.source, spec.dtype, why])
    typer.echo(tabulate(lines, headers=["model", "here", "source", "dtype", "note"], disable_numparse=True))
    typer.echo(
        f"\n{len(lines)} models in {registry.path}. A directory or a hub id (org/name) can be given to --model, too."
    )


@app.command(epilog="Example: delta-suite metrics")
def metrics(
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable.")] = False,
) -> None:
    """The reference table: every metric with formula, unit, range, scope, version and source."""
    from delta_suite.metrics.registry import METRICS
    from delta_suite.publish.tables import metric_table

    if not as_json:
        typer.echo(metric_table())
        return
    keys = ("name", "scope", "formula", "unit", "low", "high", "version", "source")
    listed = [{key: getattr(metric, key) for key in keys} for metric in METRICS.values()]
    for row in listed:
        row["high"] = None if row["high"] == float("inf") else row["high"]
    typer.echo(json.dumps(listed, indent=1, ensure_ascii=False))


@app.command(epilog="Example: delta-suite schema > hypotheses/hypothesis.schema.json")
def schema() -> None:
    """The JSON Schema of hypothesis files, for editors (`#:schema ./hypothesis.schema.json` at the top of a file)."""
    from delta_suite.claims.loader import json_schema

    typer.echo(json.dumps(json_schema(), indent=2, ensure_ascii=False))


@app.command(epilog="Example: delta-suite selftest --repeats 1000 --processes 16 --out results/selftest.md")
def selftest(
    repeats: Annotated[
        int, typer.Option(help="Draws of documents from each planted population: some hundreds tell a bound apart.")
    ] = 40,
    processes: Annotated[int, typer.Option(help="Repeats run in so many processes.")] = 1,
    only: Annotated[str | None, typer.Option(help="One planted population, by its name in the table.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the table, as Markdown, to this file, too.")] = None,
) -> None:
    """Hold intervals and verdicts against planted truth. Exits with 1 where a bound is violated."""
    import shlex

    from delta_suite.progress import bars
    from delta_suite.records.record import write_atomically
    from delta_suite.selftest import proof

    given = {"--repeats": repeats, "--processes": processes, "--only": only, "--out": out}
    words = [word for name, value in given.items() if value is not None for word in (name, str(value))]
    made = proof.made_by(shlex.join(["delta-suite", "selftest", *words]))
    with _errors_as_text():
        found = proof.selftest(repeats, processes=processes, only=only, progress=bars(), made=made)
        for heading, table in found.tables().items():
            typer.echo(f"{heading}\n\n{table}\n")
        typer.echo(f"{repeats} repeats of {len(found.worlds)} planted populations in {found.seconds:.0f} s")
        if out is not None:
            write_atomically(out, found.markdown())
            typer.echo(f"table: {out}")
    for line in found.violations:
        typer.echo(f"delta-suite: {line}", err=True)
    if found.violations:
        raise typer.Exit(1)


@app.command(epilog="Example: delta-suite doctor")
def doctor(models_file: ModelsFile = None) -> None:
    """Versions, devices, cache, and what is missing."""
    import platform

    import delta_suite
    from delta_suite.measure import LIBRARIES, library_version
    from delta_suite.models.device import describe_devices
    from delta_suite.models.files import availability
    from delta_suite.models.registry import load_registry
    from delta_suite.records.cache import cache_root

    lines = [("delta-suite", delta_suite.__version__), ("python", platform.python_version())]
    lines += [(name, library_version(name)) for name in (*LIBRARIES, "pytest", "pytest-benchmark", "pytest-xdist")]
    lines.append(("devices", describe_devices()))
    root = cache_root()
    entries = list((root / "measurements").glob("*/measurement.json"))
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file()) if root.exists() else 0
    lines.append(("cache", f"{root}: {len(entries)} measurements, {size / 1e6:.1f} MB"))
    with _errors_as_text():
        registry = load_registry(models_file)
        here = [name for name, spec in registry.specs.items() if availability(spec)[0]]
        lines.append(("models", f"{len(here)} of {len(registry.specs)} on this machine: {', '.join(here) or 'none'}"))
    for name, value in lines:
        typer.echo(f"{name:<18} {value}")
    missing = [name for name, value in lines if value == "not installed" and name != "pytest-xdist"]
    if missing:
        _fail(f"not installed: {', '.join(missing)}. pip install {' '.join(missing)}")
