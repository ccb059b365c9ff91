"""Items of a baseline: one per scope and metric, one per verdict, for every model that is compared.

The baseline file itself is collected, so `results/baselines/big.json::C/intra_cosine[big]` is an ordinary node.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from delta_suite.errors import BaselineError, SuiteError

if TYPE_CHECKING:
    from delta_suite.claims.schema import Hypothesis
    from delta_suite.models.spec import ModelSpec
    from delta_suite.pipeline import Outcome
    from delta_suite.records.view import RecordView
    from delta_suite.regression.baseline import BaselineFile, VerdictEntry
    from delta_suite.regression.comparison import Comparison, Status

RECORD = "record"
"""The name of the item that asks if the two can be compared at all."""


@dataclass
class Regression:
    """The baselines of a run: where they are, what was compared, and what is written at the end."""

    config: pytest.Config
    specs: Sequence[ModelSpec]
    outcome: Callable[[ModelSpec], Outcome]
    """Raises the SuiteError of a model that cannot be measured."""
    control: Callable[[ModelSpec], RecordView | None]
    """Returns the same architecture with random weights, where it is measured."""
    reproduce: Callable[[str, str], str]
    paths: dict[str, Path] = field(default_factory=dict)
    """The baseline of each model."""
    files: dict[Path, BaselineFile] = field(default_factory=dict)
    """The baselines that exist."""
    hypotheses: dict[str, Path] = field(default_factory=dict)
    """The hypothesis files collected so far, by id."""
    measured: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    """Models that an item could, or could not, be measured for."""
    messages: list[str] = field(default_factory=list)
    """A line on what was written at the end of the run, or why not."""
    _compared: dict[str, dict[str, list[Comparison]]] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        config: pytest.Config,
        specs: Sequence[ModelSpec],
        outcome: Callable[[ModelSpec], Outcome],
        control: Callable[[ModelSpec], RecordView | None],
        reproduce: Callable[[str, str], str],
    ) -> Regression | None:
        """Return the baselines of a run, or None where no option asks for one.

        Raises UsageError for options that do not go together, and for baselines that are missing or damaged.
        """
        option = config.getoption
        if option("baseline") is None and option("baseline_update") is None:
            if option("baseline_reason"):
                raise pytest.UsageError("--baseline-reason is for --baseline-update=all")
            return None
        regression = cls(config, specs, outcome, control, reproduce)
        regression._resolve()
        return regression

    @property
    def parts(self) -> set[str]:
        """The parts of a measurement that the baselines hold, or will hold once they are written."""
        from delta_suite.metrics.registry import PARTS

        held = {part for file in self.files.values() for part in file.content.record.parts}
        return held | (set(PARTS) if self.update else set())

    @property
    def update(self) -> str | None:
        """`new` or `all` where baselines are written, else None."""
        mode: str | None = self.config.getoption("baseline_update")
        return mode

    @property
    def other_documents(self) -> bool:
        """True if other calibrations are samples of the same source."""
        return bool(self.config.getoption("baseline_other_documents"))

    def _resolve(self) -> None:
        from delta_suite.regression.baseline import (
            baseline_path,
            load_baseline,
            read_baseline_json,
            refuse_shared,
            unknown_keys,
        )

        option = self.config.getoption
        if not self.specs:
            raise pytest.UsageError("--baseline compares models: name one with --model=NAME")
        if self.update == "all" and not option("baseline_reason").strip():
            raise pytest.UsageError(
                '--baseline-update=all overwrites what was agreed on: say why with --baseline-reason "..."; '
                "it is kept in the file"
            )
        given = Path(option("baseline")) if option("baseline") else None
        if given is not None and given.suffix != ".json" and _holds_tests(given):
            raise pytest.UsageError(
                f"--baseline {given}: that folder holds tests, not baselines. Write --baseline=PATH, "
                f"or --baseline after the folder of tests."
            )
        results = Path(option("results_dir"))
        try:
            for spec in self.specs:
                path = self.paths[spec.name] = baseline_path(given, results, spec.name)
                if path in self.files or (self.update and not path.exists()):
                    continue
                if self.update == "all" and read_baseline_json(path).get("schema") == 1:
                    continue  # it is renewed, and holds nothing to compare with
                self.files[path] = load_baseline(path)
                if wrong := unknown_keys(self.files[path]):
                    raise BaselineError(f"{path}: tolerances for what does not exist: {', '.join(wrong)}")
            if self.update:
                refuse_shared(self.paths)
        except SuiteError as error:
            raise pytest.UsageError(str(error)) from None
        named = {Path(str(argument).split("::")[0]).resolve() for argument in self.config.args}
        self.config.args.extend(str(path) for path in self.files if path.resolve() not in named)

    def file(self, path: Path) -> BaselineFile | None:
        """Return the baseline that a collected file is, or None."""
        return next((file for file in self.files.values() if file.path.resolve() == path.resolve()), None)

    def models(self, baseline: BaselineFile) -> list[ModelSpec]:
        """Return the models that are compared with a baseline."""
        return [spec for spec in self.specs if self.paths[spec.name] == baseline.path]

    def compared(self, spec: ModelSpec, baseline: BaselineFile) -> dict[str, list[Comparison]]:
        """Return all comparisons of a model by item. Compared once, however many items ask."""
        from delta_suite.regression.comparison import by_item
        from delta_suite.regression.turns import direction_figures

        if spec.name not in self._compared:
            view = self.outcome(spec).view
            comparisons = baseline.compare(view, direction_figures(view), other_documents=self.other_documents)
            self._compared[spec.name] = by_item(comparisons)
        return self._compared[spec.name]

    def known_hypotheses(self, verdicts: Iterable[VerdictEntry]) -> dict[str, Hypothesis]:
        """Return hypotheses by id: those collected, and those that a baseline names and that are still there."""
        from delta_suite.claims.loader import load_hypothesis

        root = self.config.rootpath
        paths = dict.fromkeys(self.hypotheses.values())
        paths |= dict.fromkeys(root / entry.file for entry in verdicts if (root / entry.file).is_file())
        loaded = [load_hypothesis(path) for path in paths]
        return {hypothesis.id: hypothesis for hypothesis in loaded}

    def verdict(self, hypothesis: Hypothesis, expectation: str, spec: ModelSpec) -> VerdictEntry | None:
        """Return the verdict as the file states the claim, whatever --variant shows; None where it states none."""
        from delta_suite.claims.judge import judge
        from delta_suite.regression.baseline import VerdictEntry

        stated = next((claim for claim in hypothesis.expect if claim.id == expectation), None)
        if stated is None:
            return None
        judged = judge(hypothesis, stated, self.outcome(spec).view, self.control(spec))
        claim = f"{stated.claim()}, {stated.variant}"
        return VerdictEntry(
            verdict=judged.verdict.value, observed=judged.observed, claim=claim, file=self._relative(hypothesis.path)
        )

    def _relative(self, path: Path) -> str:
        path, root = path.resolve(), self.config.rootpath.resolve()
        return (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()

    # --- writing at the end, in the process that has the terminal

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Gather from the reports, which may come from workers, which models were measured and where claims stand."""
        for row in (getattr(report, name, None) for name in ("delta_suite", "delta_suite_baseline")):
            if row is None:
                continue
            self.measured.add(row["model"])
            where = self.config.rootpath / str(row.get("where", "")).rpartition(":")[0]
            if where.suffix == ".toml" and row.get("hypothesis"):
                self.hypotheses.setdefault(row["hypothesis"], where)
        if report.failed and report.when == "setup":
            self.failed |= {spec.name for spec in self.specs if f"[{spec.name}]" in report.nodeid}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the baselines, in the process that has the terminal."""
        if self.update is None or hasattr(self.config, "workerinput") or self.config.option.collectonly:
            return
        finished = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED}
        if exitstatus not in finished:
            self.messages.append("the run did not end as it should: no baseline was written")
        elif not self._write():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Show the table of the run, what changed, and what was written."""
        from delta_suite.publish.baseline_tables import BaselineRow, changes_table, run_table

        reports = [report for group in terminalreporter.stats.values() for report in group]
        items = [report.delta_suite_baseline for report in reports if hasattr(report, "delta_suite_baseline")]
        order = [spec.name for spec in self.specs]  # workers report as they finish
        rows = sorted((BaselineRow(**row) for row in items), key=lambda row: order.index(row.model))
        if rows or self.messages:
            terminalreporter.section("baselines", sep="-")
        if rows:
            terminalreporter.write_line(run_table(rows))
        if any(row.fails for row in rows):
            terminalreporter.write_line("")
            terminalreporter.write_line(changes_table(rows))
        for line in self.messages:
            terminalreporter.write_line(line)

    def _write(self) -> bool:
        """Update the baselines of the models that were measured, and return True if all could be."""
        from delta_suite.regression.update import update_baseline

        whole = True
        for spec in self.specs:
            path = self.paths[spec.name]
            if spec.name in self.failed - self.measured:
                self.messages.append(f"{path}: not written, {spec.name} could not be measured")
                whole = False
                continue
            try:
                self.messages.append(
                    update_baseline(
                        path,
                        self.outcome(spec).view,
                        self._verdicts(spec),
                        overwrite=self.update == "all",
                        reason=self.config.getoption("baseline_reason"),
                    )
                )
            except SuiteError as error:
                self.messages.append(f"not written: {error}")
                whole = False
        return whole

    def _verdicts(self, spec: ModelSpec) -> dict[str, VerdictEntry]:
        old = self.files.get(self.paths[spec.name])
        entries = {}
        for hypothesis in self.known_hypotheses(old.content.verdicts.values() if old else ()).values():
            for expectation in hypothesis.expect:
                entry = self.verdict(hypothesis, expectation.id, spec)
                if entry is not None:
                    entries[f"{hypothesis.id}/{expectation.id}"] = entry
        return entries


def _holds_tests(folder: Path) -> bool:
    return folder.is_dir() and any(any(folder.glob(pattern)) for pattern in ("test_*.py", "*.toml"))


REGRESSION: pytest.StashKey[Regression] = pytest.StashKey()


class BaselineNode(pytest.File):
    """A baseline file of the run."""

    def collect(self) -> Iterable[pytest.Item]:
        """Yield an item for each figure and verdict, and for each model."""
        regression = self.config.stash[REGRESSION]
        baseline = regression.file(self.path)
        assert baseline is not None
        try:
            hypotheses = regression.known_hypotheses(baseline.content.verdicts.values())
        except SuiteError as error:
            raise self.CollectError(str(error)) from None
        stated = [f"{name}/{claim.id}" for name, hypothesis in hypotheses.items() for claim in hypothesis.expect]
        names = [RECORD, *_figures(baseline.view), *_verdict_items([*stated, *baseline.content.verdicts])]
        for spec in regression.models(baseline):
            for name in names:
                yield BaselineItem.from_parent(
                    self, name=f"{name}[{spec.name}]", item=name, spec=spec, baseline=baseline, hypotheses=hypotheses
                )


def _figures(view: RecordView) -> list[str]:
    """Return names of items: the figures of the baseline, and what this suite measures over the same phases."""
    from delta_suite.metrics.registry import METRICS
    from delta_suite.regression.comparison import LAYERS, figures
    from delta_suite.regression.turns import TURNS

    by_scope: dict[str, dict[str, None]] = {}
    for _, scope, metric in figures(view):
        by_scope.setdefault(scope, {})[metric] = None
    wide = [scope for scope in by_scope if not scope.startswith("layer:")]
    by_layer = {name: None for name, metric in METRICS.items() if metric.scope in {"layer", "pair"}}
    by_layer |= {metric: None for scope in by_scope.keys() - set(wide) for metric in sorted(by_scope[scope])}
    names = [f"{LAYERS}/{metric}" for metric in (*by_layer, *TURNS)]
    known = {name: None for name, metric in METRICS.items() if metric.scope in {"pair", "phase"}}
    for scope in wide:
        names += [f"{scope}/{metric}" for metric in ({} if scope == "model" else known) | by_scope[scope]]
    return names


def _verdict_items(names: Iterable[str]) -> list[str]:
    from delta_suite.regression.baseline import VERDICT

    return [f"{VERDICT}/{name}" for name in dict.fromkeys(names)]


class ChangedError(Exception):
    """The failure of an item; it carries the text to the report."""


class BaselineItem(pytest.Item):
    """One metric over one scope, or one verdict, of one model against its baseline."""

    def __init__(
        self, *, item: str, spec: ModelSpec, baseline: BaselineFile, hypotheses: Mapping[str, Hypothesis], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.item, self.spec, self.baseline, self.hypotheses = item, spec, baseline, hypotheses
        self.row: dict[str, Any] | None = None
        self.status: Status | None = None
        self.add_marker("baseline")
        if reason := baseline.expected_failure(item):
            self.add_marker(pytest.mark.xfail(reason=reason))

    def setup(self) -> None:
        """Measure the model, or take it from the cache."""
        try:
            self.config.stash[REGRESSION].outcome(self.spec)
        except SuiteError as error:
            message = f"{self.spec.name} cannot be measured: {error}"
        else:
            return
        pytest.fail(message, pytrace=False)  # outside the handler, or the report would show both errors

    def runtest(self) -> None:
        """Compare, and fail, skip or pass by the status."""
        from delta_suite.publish.baseline_tables import BaselineRow, item_text
        from delta_suite.regression.comparison import Status, worst

        regression = self.config.stash[REGRESSION]
        outcome = regression.outcome(self.spec)
        items = regression.compared(self.spec, self.baseline)
        comparisons = self._comparisons(regression, outcome.view, items)
        self.status = status = worst(comparisons)
        record = str(outcome.path)
        row = BaselineRow.of(self.spec.name, str(self.baseline.path), self.item, status, comparisons, record)
        self.row = row.as_json()
        shown = ("baseline", "item", "model", "status", "where", "old", "new", "difference", "tolerance")
        self.user_properties += [(key, value) for key in shown if (value := self.row[key]) is not None]
        reproduce = regression.reproduce(self.nodeid, self.spec.name)
        if row.fails and regression.update == "all":
            pytest.skip(f"accepted: {status.value}")
        if row.fails:
            raise ChangedError(item_text(self.item, status, comparisons, self.baseline, outcome.view, reproduce))
        if status in {Status.NEW, Status.NOT_MEASURED}:
            pytest.skip(f"{status.value}: {row.reason}")

    def _comparisons(
        self, regression: Regression, now: RecordView, items: Mapping[str, list[Comparison]]
    ) -> list[Comparison]:
        """Return the comparisons of this item."""
        from delta_suite.regression.baseline import VERDICT
        from delta_suite.regression.comparison import Comparison, Status, obstacle

        if self.item == RECORD:
            other = self.baseline.content.other_documents or regression.other_documents
            refusal = obstacle(self.baseline.view, now, other_documents=other)
            if refusal is None and self.baseline.view.phases != now.phases:
                refusal = f"the phase map was {_map(self.baseline.view)} and is {_map(now)}"
            status = Status.SAME if refusal is None else Status.NOT_COMPARABLE
            return [Comparison(RECORD, RECORD, "", status, reason=refusal)]
        if self.item.startswith(f"{VERDICT}/"):
            name = self.item.removeprefix(f"{VERDICT}/")
            hypothesis = self.hypotheses.get(name.split("/")[0])
            entry = regression.verdict(hypothesis, name.split("/")[1], self.spec) if hypothesis else None
            return [self.baseline.compare_verdict(name, entry, now, other_documents=regression.other_documents)]
        scope, _, metric = self.item.rpartition("/")
        absent = Comparison(scope, metric, "", Status.NOT_MEASURED, reason="on neither side")
        return items.get(self.item) or [absent]

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the text of a change in place of a traceback."""
        if isinstance(excinfo.value, ChangedError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return file and name for the report."""
        return self.path, None, self.name


def _map(view: RecordView) -> str:
    return ", ".join(f"{name} {first}-{last}" for name, (first, last) in view.phases.items())


def status_of(row: Mapping[str, Any]) -> tuple[str, str, Any]:
    """Return category, letter and word of an item that was skipped: neither passed nor failed."""
    if row["fails"]:
        return "accepted", "a", ("ACCEPTED", {"yellow": True})
    if row["status"] == "new":
        return "new", "n", ("NEW", {"yellow": True})
    return "not measured", "-", ("NOT MEASURED", {"yellow": True})
