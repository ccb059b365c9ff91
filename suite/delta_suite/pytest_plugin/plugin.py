"""pytest's front door: hypothesis files become items, one per (expectation, model); verdicts become outcomes.

Imported in every pytest run of the environment, so torch, pydantic and the rest of the suite come in only when a
hypothesis file or a model is there.
"""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from delta_suite.capture.calibration import DEFAULT_CALIBRATION, OPTION_HELP
from delta_suite.command_line import EMPTY_VALUE, empty_options
from delta_suite.errors import SuiteError
from delta_suite.pytest_plugin.baseline_items import (
    REGRESSION,
    BaselineItem,
    BaselineNode,
    Regression,
    add_options,
    status_of,
)

if TYPE_CHECKING:
    from delta_suite.claims.judge import Judgement, Observation, Quantity
    from delta_suite.claims.loader import Expectation, Hypothesis
    from delta_suite.measure import Outcome, Settings
    from delta_suite.models.registry import ModelSpec
    from delta_suite.publish.tables import Row
    from delta_suite.records.record import Measurement

FOLDER = "hypotheses"
"""TOML files in a folder of this name are hypothesis files, and those named on the command line."""

WORDS = ("--model", "--models-file", "--calibration", "--device", "--results-dir", "--baseline")
"""Options that take any word, but no empty one."""

STARTED = "delta_suite_started"
"""Key under which a worker is told when the run started."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("delta-suite", "depth structure of language models")
    add = group.addoption
    add(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="model to measure: a name from models.toml, name@revision, a directory, or a hub id; with @random-weights "
        "behind it, its architecture with freshly initialised weights (repeatable)",
    )
    add(
        "--all-models",
        action="store_true",
        help="every model of models.toml whose weights are on this machine",
    )
    add(
        "--models-file",
        metavar="PATH",
        help="models.toml to use (default: ./models.toml, else the suite's own)",
    )
    add(
        "--calibration",
        default=DEFAULT_CALIBRATION,
        metavar="NAME|PATH",
        help=f"{OPTION_HELP} (default: {DEFAULT_CALIBRATION})",
    )
    add(
        "--documents",
        type=int,
        metavar="N",
        help="only the first N documents of the calibration (default: all; of a hub dataset 128)",
    )
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, or sharded over all GPUs (default: auto)")
    add(
        "--dtype",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="dtype of the weights (default: the model's)",
    )
    add(
        "--results-dir",
        default="results",
        metavar="PATH",
        help="where records are written (default: results)",
    )
    add(
        "--variant",
        choices=["raw", "sink_free", "token_normalised", "centred"],
        help="judge every claim under this variant, and show it (default: as each claim says; tables show raw)",
    )
    add(
        "--no-control",
        action="store_true",
        help="do not measure the same architecture with random weights (then no claim is marked vacuous)",
    )
    add("--fresh", action="store_true", help="measure again, whatever the cache holds")
    add("--strict-verdicts", action="store_true", help="inconclusive and not measured fail, too")
    add_options(group)


def pytest_configure(config: pytest.Config) -> None:
    for option in empty_options(str(word) for word in config.invocation_params.args):
        if option in WORDS:
            raise pytest.UsageError(f"{option} {EMPTY_VALUE}")
    config.stash[SESSION] = session = Session(config)
    config.pluginmanager.register(session, "delta-suite-session")
    config.addinivalue_line("markers", "baseline: compares a model with its baseline (--baseline)")
    calls = {"outcome": session.outcome, "control": session.control, "reproduce": session.reproduce}
    if (regression := Regression.of(config, session.specs, **calls)) is not None:
        config.stash[REGRESSION] = regression
        config.pluginmanager.register(regression, "delta-suite-baselines")
        session.hypotheses = regression.hypotheses


@dataclass(frozen=True)
class Kept:
    """A model's record as it lies in the results folder at the end of the run."""

    path: Path
    measurement: Measurement | None
    """None where it cannot be read any more."""
    notes: tuple[str, ...]
    """What to say of it: that it cannot be read or written, or that a hypothesis file has changed."""


class Session:
    """The models of a run, and what became of each: measured once, however many items ask, failures kept too."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.hypotheses: dict[str, Path] = {}
        self.needs_model = False
        self._outcomes: dict[str, Outcome | Exception] = {}
        worker = getattr(config, "workerinput", None)
        self.started: float = worker[STARTED] if worker else time.time()
        self.specs: list[ModelSpec] = []
        self.phases: tuple[str, ...] = ()
        """The phases that any model has, of this run or not."""
        self.arguments: dict[str, str] = {}
        """What a model was called on the command line: a directory's name in tables is not its path."""
        self.left_out: list[str] = []
        self.judged: list[dict[str, Any]] = []
        """The rows of all verdicts, from the reports, which may come from workers."""
        self.kept: dict[str, Kept] = {}
        """By model, once the run is over."""
        self.notes: dict[str, None] = {}
        """What is told of how measurements came about, in order; from the reports, too."""
        if config.getoption("model") or config.getoption("all_models"):
            self._resolve()

    def _resolve(self) -> None:
        from delta_suite.models.registry import load_registry

        try:
            registry = load_registry(self._path("models_file"))
            self.phases = registry.phases
            specs = []
            for argument in self.config.getoption("model"):
                found = registry.resolve_all(argument)
                specs += found
                self.arguments |= {spec.name: argument if len(found) == 1 else spec.argument for spec in found}
        except SuiteError as error:
            raise pytest.UsageError(str(error)) from None
        if self.config.getoption("all_models"):
            from delta_suite.models.files import availability

            for spec in registry.specs.values():
                if availability(spec)[0]:
                    specs.append(spec)
                else:
                    self.left_out.append(spec.name)
            if not specs:
                raise pytest.UsageError(
                    f"--all-models: none of {registry.path} is on this machine; see delta-suite models"
                )
        self.specs = list({spec.name: spec for spec in specs}.values())

    def _path(self, option: str) -> Path | None:
        given = self.config.getoption(option)
        return Path(given) if given else None

    @property
    def settings(self) -> Settings:
        from delta_suite.measure import Settings

        option = self.config.getoption
        return Settings(
            calibration=option("calibration"),
            documents=option("documents"),
            device=option("device"),
            dtype=option("dtype"),
            results=Path(option("results_dir")),
            fresh_since=self.started if option("fresh") else None,
        )

    def outcome(self, spec: ModelSpec) -> Outcome:
        """The model's measurement. Raises the same error each time where it cannot be measured: it is tried once."""
        if spec.name not in self._outcomes:
            from delta_suite.measure import measure
            from delta_suite.progress import bars

            with self._terminal():
                try:
                    self._outcomes[spec.name] = outcome = measure(spec, self.settings, bars())
                    if outcome.note is not None:
                        self.notes[outcome.note] = None
                except Exception as error:  # kept for the other items of this model, and raised below
                    self._outcomes[spec.name] = error
        found = self._outcomes[spec.name]
        if isinstance(found, Exception):
            raise found
        return found

    def control(self, spec: ModelSpec) -> Measurement | None:
        """The same architecture with random weights, or None where it was left out or cannot be measured.

        What the model itself is judged on does not depend on it, so its failure is a warning, once.
        """
        if self.config.getoption("no_control") or spec.random_weights:
            return None
        control = spec.control()
        known = control.name in self._outcomes
        try:
            return self.outcome(control).measurement
        except Exception as error:  # whatever hinders initialising or measuring it
            if not known:
                warnings.warn(
                    f"{control.name} cannot be measured, so no claim is marked vacuous: {error}", stacklevel=2
                )
            return None

    def outcome_or_error(self, spec: ModelSpec) -> Outcome:
        """The same inside a test: without a measurement the test is an error with its message, and no traceback."""
        try:
            return self.outcome(spec)
        except SuiteError as error:
            message = f"{spec.name} cannot be measured: {error}"
        pytest.fail(message, pytrace=False)  # outside the handler, or the report would show both errors

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """Let progress through pytest's capture, on a line of its own."""
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        capture = self.config.pluginmanager.getplugin("capturemanager")
        if reporter is None or capture is None:  # an xdist worker has no terminal
            yield
            return
        with capture.global_and_fixture_disabled():
            yield

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.notes |= dict.fromkeys(getattr(report, "delta_suite_notes", ()))
        if (row := getattr(report, "delta_suite", None)) is not None:
            self.judged.append(row)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Leave in each record what judged it; a record that is gone or damaged by now must not pass for a success."""
        if not self.judged or hasattr(self.config, "workerinput"):
            return
        from delta_suite.publish.tables import Row

        whole = True
        for spec in self.specs:
            rows = [Row(**row) for row in self.judged if row["model"] == spec.name and row["record"]]
            if rows:
                self.kept[spec.name], written = self._keep(rows)
                whole = whole and written
        if not whole and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _keep(self, rows: Sequence[Row]) -> tuple[Kept, bool]:
        """The record that these rows were judged from, and whether it could be read and written."""
        from delta_suite.publish.tables import changed_lines, stamps_of
        from delta_suite.records.store import load, stamp

        path, stamps = Path(str(rows[0].record)), stamps_of(rows)
        measurement, notes = None, []
        try:
            measurement = load(path)
            notes = changed_lines(measurement.judged_by, stamps)
            stamp(path, stamps, self.settings.cache)
        except SuiteError as error:
            return Kept(path, measurement, (*notes, f"ERROR: {error}")), False
        return Kept(path, measurement, tuple(notes)), True

    def reproduce(self, nodeid: str, model: str) -> str:
        """The command that shows one verdict again."""
        words = ["pytest", nodeid, f"--model={self.arguments.get(model, model)}"]
        for option in ("calibration", "documents", "device", "dtype", "variant"):
            value, flag = self.config.getoption(option), f"--{option}"
            if value not in (None, "auto", DEFAULT_CALIBRATION):
                words.append(f"{flag}={value}")
        if (regression := self.config.stash.get(REGRESSION, None)) is not None and ".json::" in nodeid:
            words.append(f"--baseline={regression.paths[model]}")
            if regression.other_documents:
                words.append("--baseline-other-documents")
            if self.config.getoption("no_control"):
                words.append("--no-control")
        return shlex.join(words)


SESSION: pytest.StashKey[Session] = pytest.StashKey()


# --- collection ------------------------------------------------------------------------------------------------


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    regression = parent.config.stash.get(REGRESSION, None)
    if regression is not None and regression.file(file_path) is not None:
        return BaselineNode.from_parent(parent, path=file_path)
    if file_path.suffix != ".toml":
        return None
    named = {Path(str(argument).split("::")[0]).resolve() for argument in parent.config.args}
    if FOLDER in file_path.parts[:-1] or file_path.resolve() in named:
        return HypothesisFile.from_parent(parent, path=file_path)
    return None


class HypothesisFile(pytest.File):
    """One TOML file of expectations."""

    def collect(self) -> Iterable[pytest.Item]:
        from delta_suite.claims.loader import load_hypothesis, require_known_phases

        session = self.config.stash[SESSION]
        session.needs_model = True
        try:
            hypothesis = load_hypothesis(self.path)
            if session.specs:
                require_known_phases([hypothesis], session.phases)
        except SuiteError as error:
            raise self.CollectError(str(error)) from None
        first = session.hypotheses.setdefault(hypothesis.id, self.path)
        if first != self.path:
            raise self.CollectError(
                f"{self.path}: the id {hypothesis.id!r} is taken by {first}; give each file its own"
            )
        for tag in hypothesis.tags:
            self.config.addinivalue_line("markers", f"{tag}: tag of hypothesis {hypothesis.id}")
        for expectation in hypothesis.expect:
            for spec in session.specs:
                yield ExpectationItem.from_parent(
                    self,
                    name=f"{hypothesis.id}/{expectation.id}[{spec.name}]",
                    hypothesis=hypothesis,
                    expectation=expectation,
                    spec=spec,
                )


class ExpectationRefutedError(Exception):
    """Carries the judgement to the report."""

    def __init__(self, judgement: Judgement) -> None:
        super().__init__(judgement.expectation.claim())
        self.judgement = judgement


class ExpectationItem(pytest.Item):
    """One expectation for one model."""

    def __init__(self, *, hypothesis: Hypothesis, expectation: Expectation, spec: ModelSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hypothesis, self.expectation, self.spec = hypothesis, expectation, spec
        self.judgement: Judgement | None = None
        self.variants: dict[str, Judgement] = {}
        if variant := self.config.getoption("variant"):
            self.expectation = expectation.model_copy(update={"variant": variant})
        for tag in hypothesis.tags:
            self.add_marker(tag)
        for xfail in expectation.xfail:
            if any(fnmatchcase(spec.name, pattern) for pattern in xfail.models):
                self.add_marker(pytest.mark.xfail(reason=xfail.reason))

    def setup(self) -> None:
        self.config.stash[SESSION].outcome_or_error(self.spec)

    def runtest(self) -> None:
        from delta_suite.claims.judge import Verdict, across_variants, judge

        outcome = self.config.stash[SESSION].outcome(self.spec)
        control = self.config.stash[SESSION].control(self.spec)
        self.judgement = judgement = judge(self.hypothesis, self.expectation, outcome.measurement, control)
        self.variants = across_variants(self.hypothesis, self.expectation, outcome.measurement)
        shown = {
            "hypothesis": self.hypothesis.id,
            "hypothesis_sha256": self.hypothesis.sha256,
            "model": self.spec.name,
            "metric": self.expectation.metric,
            "scope": self.expectation.scope,
            "variant": self.expectation.variant,
            "verdict": judgement.verdict.value,
            "observed": judgement.observed,
            "threshold": judgement.required,
            "margin": judgement.margin,
            "interval": judgement.observation.interval,
            "p": judgement.p,
            "gates": ", ".join(gate.name for gate in judgement.gates) or None,
            "vacuous": judgement.vacuous or None,
        }
        self.user_properties += [(key, value) for key, value in shown.items() if value is not None]
        if judgement.verdict is Verdict.SUPPORTED:
            return
        if judgement.verdict is Verdict.REFUTED and self.expectation.severity == "fail":
            raise ExpectationRefutedError(judgement)
        if judgement.verdict is not Verdict.REFUTED and self.config.getoption("strict_verdicts"):
            raise ExpectationRefutedError(judgement)
        pytest.skip(f"{judgement.verdict.value.lower()}: {judgement.reason or self._explain(judgement)}")

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        if isinstance(excinfo.value, ExpectationRefutedError):
            return self._explain(excinfo.value.judgement)
        return super().repr_failure(excinfo, style)

    def _explain(self, judgement: Judgement) -> str:
        from delta_suite.publish.tables import explanation

        reproduce = self.config.stash[SESSION].reproduce(self.nodeid, self.spec.name)
        return explanation(judgement, self.variants, self.where, reproduce)

    @property
    def where(self) -> str:
        """file:line of the claim"""
        path = self.path
        if path.is_relative_to(self.config.rootpath):
            path = path.relative_to(self.config.rootpath)
        return f"{path}:{self.expectation.line}"

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, self.expectation.line - 1, self.name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "measurement" in metafunc.fixturenames:
        session = metafunc.config.stash[SESSION]
        session.needs_model = True
        names = [spec.name for spec in session.specs]
        metafunc.parametrize("measurement", session.specs, ids=names, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Items of one model stand together, so that it is measured, used and let go before the next."""
    session = config.stash[SESSION]
    if session.needs_model and not session.specs:
        from delta_suite.models.registry import load_registry

        try:
            known = ", ".join(load_registry(session._path("models_file")).specs)
        except SuiteError as error:
            raise pytest.UsageError(str(error)) from None
        raise pytest.UsageError(
            f"no model given. Name one with --model=NAME: a directory, a hub id (org/name), "
            f"or one of models.toml: {known}"
        )
    order = {spec.name: index for index, spec in enumerate(session.specs)}
    items.sort(key=lambda item: order.get(spec.name, -1) if (spec := _spec(item)) else -1)


def _spec(item: pytest.Item) -> ModelSpec | None:
    """The model that an item is about."""
    if isinstance(item, ExpectationItem | BaselineItem):
        return item.spec
    callspec = getattr(item, "callspec", None)
    found: ModelSpec | None = callspec.params.get("measurement") if callspec else None
    return found


# --- the measurement fixture -----------------------------------------------------------------------------------


class Measured:
    """What a plain test gets: `value()` for numbers that explain themselves when an assert on them fails."""

    def __init__(self, record: Measurement) -> None:
        self.record = record

    def value(self, metric: str, scope: str = "model", *, variant: str = "raw", over: str = "mean") -> Quantity:
        """One number: a metric over a phase, `layers:8-15`, `layer:3` or `model`.

        Without a number the test is reported as not measured, with the reason. Raises ValueError for a metric that
        does not exist.
        """
        from delta_suite.claims.judge import Quantity

        return Quantity(self.observe(metric, scope, variant=variant, over=over))

    def observe(self, metric: str, scope: str = "model", *, variant: str = "raw", over: str = "mean") -> Observation:
        """The same with the values of each layer, and the reason where there is no number."""
        from delta_suite.claims.judge import observe

        return observe(self.record, metric, scope, variant, over)

    def __repr__(self) -> str:
        return f"<measurement of {self.record.model.name}>"


@pytest.fixture(scope="session")
def measurement(request: pytest.FixtureRequest) -> Measured:
    """The measurement of each --model in turn, taken once per run."""
    return Measured(request.config.stash[SESSION].outcome_or_error(request.param).measurement)


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    from sys import modules

    judge = modules.get("delta_suite.claims.judge")  # not imported yet: then neither side is a Quantity
    if judge is None:
        return None
    from delta_suite.publish.tables import quantity_lines

    sides = [side for side in (left, right) if isinstance(side, judge.Quantity)]
    if not sides:
        return None
    lines = (
        [f"{float(left):.6g} {op} {float(right):.6g}"]
        if isinstance(left, float | int) and isinstance(right, float | int)
        else [f"{left!r} {op} {right!r}"]
    )
    for side in sides:
        lines += quantity_lines(side.observation, op if side is left else _MIRRORED.get(op, op))
    return lines


_MIRRORED = {">=": "<=", "<=": ">=", ">": "<", "<": ">"}


# --- reports ---------------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    spec = _spec(item)
    if spec is None or not (call.when == "call" or report.failed):
        return report
    session = item.config.stash[SESSION]
    report.delta_suite_notes = list(session.notes)  # type: ignore[attr-defined]
    if isinstance(item, BaselineItem):
        if item.row is not None:
            report.delta_suite_baseline = item.row  # type: ignore[attr-defined]
        return report
    from delta_suite.publish.tables import Row

    row = None
    if isinstance(item, ExpectationItem):
        if item.judgement is not None:
            row = Row.of(item.judgement, item.variants, item.where, str(session.outcome(spec).record))
            if report.skipped and not hasattr(report, "wasxfail"):
                report.longrepr = (str(item.path), item.expectation.line, row.reason or row.verdict.lower())
    elif call.when == "call":
        row = _function_row(item, call, report, spec, session)
    if row is not None:
        report.delta_suite = row.as_json()  # type: ignore[attr-defined]
    return report


def _function_row(
    item: pytest.Item,
    call: pytest.CallInfo[None],
    report: pytest.TestReport,
    spec: ModelSpec,
    session: Session,
) -> Any:
    """A plain test in the same grid; a number that does not exist makes it not measured, neither passed nor failed."""
    from delta_suite.claims.judge import NotMeasuredError, Verdict
    from delta_suite.publish.tables import Row

    path, line, _ = item.reportinfo()
    where = f"{item.nodeid.split('::')[0]}:{(line or 0) + 1}"
    reason = None
    verdict = Verdict.SUPPORTED if report.passed else Verdict.REFUTED
    if call.excinfo is not None and isinstance(call.excinfo.value, NotMeasuredError):
        verdict, reason = Verdict.NOT_MEASURED, str(call.excinfo.value)
        if not item.config.getoption("strict_verdicts"):
            report.outcome = "skipped"
            report.longrepr = (str(path), (line or 0) + 1, reason)
    elif report.skipped and not hasattr(report, "wasxfail"):
        return None  # the test's own pytest.skip
    name = getattr(item, "originalname", None) or item.name
    claim = (getattr(getattr(item, "function", None), "__doc__", None) or "").strip().split("\n")[0]
    return Row(
        Path(where).name.split(":")[0],
        name,
        claim,
        spec.name,
        verdict.value,
        reason=reason,
        where=where,
        record=str(session.outcome(spec).record),
    )


def pytest_report_teststatus(report: pytest.CollectReport | pytest.TestReport) -> Any:
    if not report.skipped or hasattr(report, "wasxfail"):
        return None
    if (compared := getattr(report, "delta_suite_baseline", None)) is not None:
        return status_of(compared)
    row = getattr(report, "delta_suite", None)
    if row is None:
        return None
    if row["verdict"] == "FAIL":
        return "warned", "w", ("WARN", {"yellow": True})
    if row["verdict"] == "INCONCLUSIVE":
        return "inconclusive", "?", ("INCONCLUSIVE", {"yellow": True})
    return "not measured", "-", ("NOT MEASURED", {"yellow": True})


def pytest_report_header(config: pytest.Config) -> list[str] | None:
    session = config.stash[SESSION]
    if not session.specs:
        return None
    import delta_suite
    from delta_suite.capture.calibration import headline

    settings = session.settings
    lines = [
        f"delta-suite {delta_suite.__version__}: {', '.join(spec.name for spec in session.specs)}",
        f"calibration: {headline(settings.calibration, settings.documents)}, device: {settings.device}, "
        f"dtype: {settings.dtype or 'as the model says'}, "
        f"results: {settings.results}, cache: {settings.cache.root}",
    ]
    if session.left_out:
        lines.append(f"not on this machine: {', '.join(session.left_out)} (delta-suite models says why)")
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    for note in session.notes:
        terminalreporter.write_line(f"delta-suite: {note}")
    if not session.judged:
        return
    from delta_suite.metrics.registry import METRICS
    from delta_suite.publish import tables, trajectory

    order = {spec.name: index for index, spec in enumerate(session.specs)}
    rows = sorted((tables.Row(**row) for row in session.judged), key=lambda row: (*row.place, order[row.model]))
    write = terminalreporter.write_line
    variant = config.getoption("variant") or "raw"
    for name, kept in session.kept.items():
        measured = kept.measurement
        terminalreporter.section(f"{name}: phases", sep="-")
        if measured is not None:
            write(tables.model_line(measured))
            write(f"record: {kept.path}")
        for note in kept.notes:
            write(note)
        if measured is None:
            continue
        write("")
        write(tables.phase_table(measured, variant))
        if config.get_verbosity() > 0:
            write("")
            write(tables.layer_table(measured, variant))
            write("")
            write(tables.boundary_table(measured, variant))
    terminalreporter.section("verdicts", sep="-")
    write(tables.verdict_grid(rows))
    if any(row.flips for row in rows):
        write(f"{tables.FLIPS.strip()} another variant gives another verdict")
    if any(row.vacuous for row in rows):
        write(f"{tables.VACUOUS.strip()} vacuous: random weights of the same architecture support the claim, too")
    if len(order) > 1 and (table := tables.in_several_models(rows)):
        terminalreporter.section("in how many models", sep="-")
        write(table)
    if any(row.flips for row in rows) or config.get_verbosity() > 0:
        terminalreporter.section("verdicts under every variant", sep="-")
        write(tables.variant_table(rows))
    found = {name: kept.measurement for name, kept in session.kept.items() if kept.measurement is not None}
    for name, steps in trajectory.series(session.specs).items():
        measured_at = {step: found[model] for step, model in steps.items() if model in found}
        terminalreporter.section(f"{name}: over training", sep="-")
        write(trajectory.verdict_table(rows, steps))
        for change in trajectory.verdict_changes(rows, steps):
            write(f"changed  {change}")
        write("")
        every = [*METRICS] if config.get_verbosity() > 0 else None
        write(trajectory.metric_table(measured_at, variant, every))
    if any(row.verdict == "FAIL" for row in rows):
        terminalreporter.section("refuted, furthest from the claim first", sep="-")
        write(tables.failure_table(rows))


# --- xdist: items of one model go to one worker ----------------------------------------------------------------


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    node.workerinput[STARTED] = node.config.stash[SESSION].started


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    names = sorted((spec.name for spec in config.stash[SESSION].specs), key=len, reverse=True)
    if not names or config.getoption("dist") != "load":
        return None
    from xdist.scheduler import LoadScopeScheduling

    class ByModel(LoadScopeScheduling):  # type: ignore[misc]
        """`--dist loadgroup` stops grouping on pytest 9.2; a scope per model does not."""

        def _split_scope(self, nodeid: str) -> str:
            bracket = nodeid.partition("[")[2]
            return next((name for name in names if name in bracket), nodeid.split("::", maxsplit=1)[0])

    return ByModel(config, log)
