"""The session: the models of a run, each measured once however many items ask, and the verdicts on them."""

from __future__ import annotations

import shlex
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from delta_suite.command_line import DEFAULT_CALIBRATION, EMPTY_VALUE, check_settings, empty_options
from delta_suite.engine.work import Item, Shard, work_list
from delta_suite.errors import CalibrationError, SuiteError, explain
from delta_suite.escaping import terminal_lines
from delta_suite.paths import cache_root
from delta_suite.pytest_plugin.baseline_session import REGRESSION, Regression
from delta_suite.pytest_plugin.options import NOT_EMPTY
from delta_suite.pytest_plugin.printing import usage_error

if TYPE_CHECKING:
    from delta_suite.models.spec import ModelSpec
    from delta_suite.pipeline import Outcome, Settings
    from delta_suite.publish.rows import Row
    from delta_suite.records.view import RecordView

STARTED, WIDTH = "delta_suite_started", "delta_suite_width"
"""Keys of an xdist worker's input: the time at which the run started, and the columns of its terminal."""


def pytest_configure(config: pytest.Config) -> None:
    """Resolve the models of the run, and its baselines."""
    for option in empty_options(str(word) for word in config.invocation_params.args):
        if option in NOT_EMPTY:
            raise pytest.UsageError(f"{option} {EMPTY_VALUE}")
    variant = config.getoption("variant")
    if variant is not None:
        from delta_suite.reduction.variants import BLOCK_VARIANTS

        if variant not in BLOCK_VARIANTS:
            raise usage_error(f"--variant {variant}: no such variant; use one of {', '.join(BLOCK_VARIANTS)}")
    config.stash[SESSION] = session = Session(config)
    config.pluginmanager.register(session, "delta-suite-session")
    config.addinivalue_line("markers", "baseline: compares a model with its baseline (--baseline)")
    regression = Regression.create(
        config, session.specs, session.outcome, session.control, session.reproduce, session.width
    )
    if regression is not None:
        config.stash[REGRESSION] = regression
        config.pluginmanager.register(regression, "delta-suite-baselines")
        session.hypotheses = regression.hypotheses


@dataclass(frozen=True)
class KeptRecord:
    """The record of a model in the results folder, read again at the end of the run."""

    path: Path
    view: RecordView | None
    """None if the record cannot be read any more."""
    notes: tuple[str, ...]
    """Lines to print: that it cannot be read or written, or that a hypothesis file has changed."""


class Session:
    """The models of a run, the outcome of measuring each, and the rows of all verdicts."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.hypotheses: dict[str, Path] = {}
        """Hypothesis files that were collected, by id."""
        self.parts: set[str] = {"spectra"}
        """Parts of a measurement that the items of the run need."""
        self.needs_model = False
        """True once an item was collected that needs a model, whichever models are named."""
        self._outcomes: dict[tuple[str, bool], Outcome | Exception] = {}
        """By name, and whether it is a control: a folder may be named like the control of another."""
        worker = getattr(config, "workerinput", None)
        self.started: float = worker[STARTED] if worker else time.time()
        self.width: int = worker[WIDTH] if worker else _terminal_width()
        self.specs: list[ModelSpec] = []
        self.phases: tuple[str, ...] = ()
        """Names of the phases of all models of the models file, measured in this run or not."""
        self.arguments: dict[str, str] = {}
        """Word of the command line that named each model; tables show a folder's name, which is not its path."""
        self.names_alone: dict[str, str] = {}
        """Name that each model has in a run of its own; beside another one of that name it is longer."""
        self.shard: Shard | None = None
        """Share of the work list that this run measures; None for all of it."""
        self.work: list[Item] = []
        """Measurements of the command line, in this shard or another."""
        self._shard_keys: set[tuple[str, bool, str]] = set()
        self.unavailable: list[str] = []
        """Names of the models of --all-models whose weights are not on this machine."""
        self.judged: list[dict[str, Any]] = []
        """Rows of all verdicts, taken from the reports, which may come from xdist workers."""
        self.kept: dict[str, KeptRecord] = {}
        """Records of the models that were judged, filled at the end of the run."""
        self.notes: dict[str, None] = {}
        """Messages to print about how measurements were obtained, in order and each once."""
        if (given := config.getoption("shard")) is not None:
            self.shard = _shard(config, given)
        if config.getoption("model") or config.getoption("all_models"):
            self._resolve()

    def _resolve(self) -> None:
        from delta_suite.models.models_file import load_registry
        from delta_suite.records.store import RUNS
        from delta_suite.writing import require_writable

        try:
            # A wrong option, cache or results folder is told here, not by every item.
            check_settings(*map(self.config.getoption, ("device", "dtype", "documents")))
            cache_root()
            if not self.config.option.collectonly:
                require_writable(Path(self.config.getoption("results_dir")) / RUNS)
            registry = load_registry(self.models_file)
            self.phases = registry.phases
            words, specs = [], []
            for argument in self.config.getoption("model"):
                matches = registry.resolve_all(argument)
                specs += matches
                words += [argument] if len(matches) == 1 else [spec.argument for spec in matches]
            absent = set()
            if self.config.getoption("all_models"):
                from delta_suite.models.sources import availability

                absent = {spec.name for spec in registry.specs.values() if not availability(spec)[0]}
                self.unavailable = [name for name in registry.specs if name in absent]
                absent -= {spec.name for spec in specs}  # named by itself, it is an error
                # Shards divide all of the file: which weights are here differs between machines.
                more = [spec for spec in registry.specs.values() if self.shard or spec.name not in absent]
                specs += more
                words += [spec.name for spec in more]
            named = registry.told_apart(specs)
        except SuiteError as error:
            raise usage_error(error) from None
        self.specs = list({spec.name: spec for spec in named if spec.name not in absent}.values())
        if not self.specs:
            where = f"none of {registry.path} is on this machine" if registry.path else "there is no models file"
            raise usage_error(f"--all-models: {where}; see delta-suite models")
        self.arguments = {spec.name: word for spec, word in zip(named, words, strict=True)}
        self.names_alone = {spec.name: before.name for spec, before in zip(named, specs, strict=True)}
        calibrations, controls = [self.config.getoption("calibration")], not self.config.getoption("no_control")
        self.work = work_list(named, calibrations, controls=controls)
        self._shard_keys = {item.key for item in (self.shard or Shard(0, 1)).of(self.work)}

    def measures(self, spec: ModelSpec) -> bool:
        """Return True unless another shard measures this model or control."""
        return self.shard is None or Item(spec, self.config.getoption("calibration")).key in self._shard_keys

    @property
    def measured_specs(self) -> list[ModelSpec]:
        """The models of the run that no other shard measures."""
        return [spec for spec in self.specs if self.measures(spec)]

    @property
    def models_file(self) -> Path | None:
        """Path of --models-file, or None."""
        given = self.config.getoption("models_file")
        return Path(given) if given else None

    @property
    def settings(self) -> Settings:
        """Settings with which the models of the run are measured."""
        from delta_suite.pipeline import Settings

        option = self.config.getoption
        regression = self.config.stash.get(REGRESSION, None)
        return Settings(
            calibration=option("calibration"),
            documents=option("documents"),
            chat_template=option("chat_template"),
            device=option("device"),
            dtype=option("dtype"),
            parts=frozenset(self.parts | (regression.parts if regression is not None else set())),
            results=Path(option("results_dir")),
            fresh_since=self.started if option("fresh") else None,
        )

    def outcome(self, spec: ModelSpec) -> Outcome:
        """Measure a model once, and return the outcome on every call.

        Raises:
            Exception: the model cannot be measured; every call raises the error of the first one.
        """
        key = (spec.name, spec.random_weights)
        if key not in self._outcomes:
            from delta_suite.pipeline import measure_all
            from delta_suite.progress import bars

            with self._terminal():
                settings = self.settings
                measured: Outcome | Exception
                try:
                    ((_, measured),) = measure_all([Item(spec, settings.calibration)], settings, bars())
                except CalibrationError as error:
                    measured = error
            self._outcomes[key] = measured
            if not isinstance(measured, Exception):
                self.notes |= dict.fromkeys(measured.notes)
        outcome = self._outcomes[key]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def control(self, spec: ModelSpec) -> RecordView | None:
        """Return the record of the same architecture with random weights, or None without one.

        There is none with --no-control, for a control, if another shard measures it, and if it cannot be measured. The
        verdicts on the model do not depend on it, so that is one warning and no error.
        """
        if self.config.getoption("no_control") or spec.random_weights:
            return None
        control = spec.control()
        if not self.measures(control):
            self.notes[
                f"{spec.name}: claims that are compared with {control.name}, and the marks `vacuous` and `no better`, "
                f"need its record, which another shard measures. When all are done, "
                f"{shlex.join(['delta-suite', 'judge', str(self.settings.results)])} gives every verdict."
            ] = None
            return None
        tried_before = (control.name, True) in self._outcomes
        try:
            return self.outcome(control).view
        except Exception as error:  # whatever hinders initialising or measuring it
            if not tried_before:
                told = explain(error, f"measuring {control.name}")
                message = f"{control.name} cannot be measured, so no claim is marked vacuous: {told}"
                warnings.warn(terminal_lines(message), stacklevel=2)
            return None

    @contextmanager
    def _terminal(self) -> Iterator[None]:
        """Suspend pytest's capture, so that progress reaches the terminal."""
        reporter = self.config.pluginmanager.getplugin("terminalreporter")
        capture = self.config.pluginmanager.getplugin("capturemanager")
        if reporter is None or capture is None:  # an xdist worker has no terminal
            yield
            return
        with capture.global_and_fixture_disabled():
            yield

    def reproduce(self, nodeid: str, model: str) -> str:
        """Return the command that runs one item for one model again."""
        place, separator, item = nodeid.rpartition("::")
        alone = place + separator + item.replace(model, self.names_alone.get(model, model))
        words = ["pytest", alone, f"--model={self.arguments.get(model, model)}"]
        for option in ("calibration", "documents", "device", "dtype", "variant"):
            value, flag = self.config.getoption(option), f"--{option}"
            if value not in (None, "auto", DEFAULT_CALIBRATION):
                words.append(f"{flag}={value}")
        if self.config.getoption("chat_template"):
            words.append("--chat-template")
        if (regression := self.config.stash.get(REGRESSION, None)) is not None and ".json::" in nodeid:
            words.append(f"--baseline={regression.paths[model]}")
            if regression.other_documents:
                words.append("--baseline-other-documents")
            if self.config.getoption("no_control"):
                words.append("--no-control")
        return shlex.join(words)

    @property
    def rows(self) -> list[Row]:
        """The verdicts in the order of the files, their lines, and the models of the command line."""
        from delta_suite.publish.rows import Row

        order = {spec.name: index for index, spec in enumerate(self.specs)}
        rows = (Row(**row) for row in self.judged)
        return sorted(rows, key=lambda row: (*row.place, order[row.model]))

    # --- reports, which may come from xdist workers

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather notes and verdicts from the reports."""
        self.notes |= dict.fromkeys(getattr(report, "delta_suite_notes", ()))
        if (row := getattr(report, "delta_suite", None)) is not None:
            self.judged.append(row)

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        """Note what is kept of a run that is interrupted."""
        if excinfo.errisinstance(pytest.Session.Interrupted):  # pytest's word for an error at collection
            return
        if self.specs and not hasattr(self.config, "workerinput"):
            from delta_suite.interruption import measured_so_far
            from delta_suite.records.store import RUNS

            measured = {name for name, outcome in self._outcomes.items() if not isinstance(outcome, Exception)}
            names = {spec.name for spec in self.measured_specs}
            kept = names & (measured | {row["model"] for row in self.judged if row["record"]})
            line = measured_so_far(len(kept), len(names), Path(self.config.getoption("results_dir")) / RUNS)
            self.notes[f"interrupted: {line}"] = None

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write which hypothesis files judged each record; a record that is gone or damaged fails the run.

        A shard that no item belongs to is no failure: there are more jobs than items.
        """
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self.shard and not self.shard.of(self.work):
            session.exitstatus = pytest.ExitCode.OK
        if not self.judged or hasattr(self.config, "workerinput"):
            return
        from delta_suite.publish.rows import Row

        complete = True
        for spec in self.specs:
            rows = [Row(**row) for row in self.judged if row["model"] == spec.name and row["record"]]
            if rows:
                self.kept[spec.name], written = self._keep(rows)
                complete = complete and written
        if not complete and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _keep(self, rows: Sequence[Row]) -> tuple[KeptRecord, bool]:
        """Read the record of these rows and stamp it; return it, and True if both succeeded."""
        from delta_suite.publish.rows import changed_lines, stamps_of
        from delta_suite.records.store import load, stamp, stamps

        path, judged_by = Path(str(rows[0].record)), stamps_of(rows)
        view, notes = None, []
        try:
            view = load(path, self.settings.cache)
            notes = changed_lines(stamps(path), judged_by)
            stamp(path, judged_by, self.settings.cache)
        except SuiteError as error:
            return KeptRecord(path, view, (*notes, f"ERROR: {error}")), False
        return KeptRecord(path, view, tuple(notes)), True


def _shard(config: pytest.Config, text: str) -> Shard:
    """Return the shard of --shard. Raises UsageError where there is none, or baselines are compared."""
    if config.getoption("baseline") is not None or config.getoption("baseline_update") is not None:
        raise pytest.UsageError(
            "--shard does not go with baselines, which hold verdicts that need the controls of other shards. Measure "
            "the shards first; then compare without --shard: what the cache has is not measured again."
        )
    try:
        return Shard.parse(text)
    except SuiteError as error:
        raise usage_error(error) from None


def _terminal_width() -> int:
    """Return the columns of the terminal, as they are before pytest captures the output."""
    from delta_suite.publish.screen import columns

    return columns()


SESSION: pytest.StashKey[Session] = pytest.StashKey()
"""Key of the session in the stash of the config."""
