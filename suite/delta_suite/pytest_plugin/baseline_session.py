"""The baselines of a run: located by the options, asked by the items, and written at the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from delta_suite.errors import BaselineError, SuiteError
from delta_suite.escaping import terminal
from delta_suite.paths import relative_to
from delta_suite.pytest_plugin.printing import Printer, usage_error

if TYPE_CHECKING:
    from delta_suite.claims.schema import Hypothesis
    from delta_suite.models.spec import ModelSpec
    from delta_suite.pipeline import Outcome
    from delta_suite.records.view import RecordView
    from delta_suite.regression.baseline import BaselineFile, VerdictEntry
    from delta_suite.regression.comparison import Comparison


@dataclass(eq=False)  # pytest before 9.2 puts its plugins into a set
class Regression:
    """The baselines of a run: read at its start, compared with during it, and updated at its end."""

    config: pytest.Config
    specs: Sequence[ModelSpec]
    outcome: Callable[[ModelSpec], Outcome]
    """Function that measures a model; raises its SuiteError if it cannot be measured."""
    control: Callable[[ModelSpec], RecordView | None]
    """Function that returns the record of the same architecture with random weights, or None."""
    reproduce: Callable[[str, str], str]
    """Function that returns the command that runs a node id for a model again."""
    width: int
    """Columns of the terminal."""
    paths: dict[str, Path] = field(default_factory=dict)
    """Path of the baseline of each model, by its name."""
    files: dict[Path, BaselineFile] = field(default_factory=dict)
    """Baselines that exist, by path."""
    hypotheses: dict[str, Path] = field(default_factory=dict)
    """Hypothesis files that were collected, by id."""
    selected: dict[str, set[str]] = field(default_factory=dict)
    """Names of the baseline's items that the run selected, by model; a claim that was judged selects its verdict."""
    failed: set[str] = field(default_factory=set)
    """Names of models that at least one item could not be measured for."""
    compared_rows: list[dict[str, Any]] = field(default_factory=list)
    """Rows of the items that were compared."""
    messages: list[str] = field(default_factory=list)
    """Lines to print about what was written at the end of the run."""
    _compared: dict[str, dict[str, list[Comparison]]] = field(default_factory=dict)

    @classmethod
    def create(
        cls,
        config: pytest.Config,
        specs: Sequence[ModelSpec],
        outcome: Callable[[ModelSpec], Outcome],
        control: Callable[[ModelSpec], RecordView | None],
        reproduce: Callable[[str, str], str],
        width: int,
    ) -> Regression | None:
        """Return the baselines of a run, or None if no option asks for one.

        Raises:
            pytest.UsageError: options do not go together, or a baseline is missing or damaged.
        """
        option = config.getoption
        if option("baseline_reason") and option("baseline_update") is None:
            raise pytest.UsageError("--baseline-reason is for --baseline-update=all")
        if option("baseline") is None and option("baseline_update") is None:
            return None
        regression = cls(config, specs, outcome, control, reproduce, width)
        regression._resolve()
        return regression

    @property
    def parts(self) -> set[str]:
        """Parts that are compared and that the baselines hold, or will hold once they are written."""
        from delta_suite.command_line import DEFAULT_PARTS

        held = {part for file in self.files.values() for part in file.content.record.parts}
        return (held & set(DEFAULT_PARTS)) | (set(DEFAULT_PARTS) if self.update else set())

    @property
    def update(self) -> str | None:
        """Value of --baseline-update: "new" or "all" if baselines are written, else None."""
        mode: str | None = self.config.getoption("baseline_update")
        return mode

    @property
    def other_documents(self) -> bool:
        """True if a calibration other than the baseline's counts as another sample of the same source."""
        return bool(self.config.getoption("baseline_other_documents"))

    def _resolve(self) -> None:
        from delta_suite.regression.baseline import (
            baseline_path,
            load_baseline,
            read_baseline_json,
            refuse_shared,
            unknown_keys,
        )
        from delta_suite.writing import require_writable_file

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
            raise usage_error(
                f"--baseline {given}: that folder holds tests, not baselines. Write --baseline=PATH, "
                f"or --baseline after the folder of tests."
            )
        results = Path(option("results_dir"))
        try:
            for spec in self.specs:
                path = self.paths[spec.name] = baseline_path(given, results, spec.name)
                if "[" in str(path):
                    raise BaselineError(f"--baseline {path}: pytest collects no path with a bracket. Name another one.")
                if path in self.files or (self.update and not path.exists()):
                    continue
                if self.update == "all" and read_baseline_json(path).get("schema") == 1:
                    continue  # it is renewed, and holds nothing to compare with
                self.files[path] = load_baseline(path)
                if wrong := unknown_keys(self.files[path]):
                    raise BaselineError(f"{path}: tolerances for what does not exist: {', '.join(wrong)}")
            if self.update:
                refuse_shared(self.paths)
                for path in self.paths.values():
                    require_writable_file(path)
        except SuiteError as error:
            raise usage_error(error) from None
        if self.update and any("::" in str(argument) for argument in self.config.args):
            return  # what is named is what is updated
        named = {os.path.realpath(str(argument).split("::")[0]) for argument in self.config.args}
        self.config.args.extend(str(path) for path in self.files if os.path.realpath(path) not in named)

    def file(self, path: Path) -> BaselineFile | None:
        """Return the baseline at a path, or None if no baseline of the run lies there."""
        return next(
            (file for file in self.files.values() if os.path.realpath(file.path) == os.path.realpath(path)), None
        )

    def models(self, baseline: BaselineFile) -> list[ModelSpec]:
        """Return the models that are compared with a baseline."""
        return [spec for spec in self.specs if self.paths[spec.name] == baseline.path]

    def compared(self, spec: ModelSpec, baseline: BaselineFile) -> dict[str, list[Comparison]]:
        """Return all comparisons of a model by the name of the item; they are computed once."""
        from delta_suite.regression.comparison import by_item
        from delta_suite.regression.turns import direction_figures

        if spec.name not in self._compared:
            view = self.outcome(spec).view
            comparisons = baseline.compare(view, direction_figures(view), other_documents=self.other_documents)
            self._compared[spec.name] = by_item(comparisons)
        return self._compared[spec.name]

    def known_hypotheses(self, verdicts: Iterable[VerdictEntry]) -> dict[str, Hypothesis]:
        """Return hypotheses by id: all collected ones, and those of files that a baseline names."""
        from delta_suite.claims.loader import load_hypothesis

        root = self.config.rootpath
        paths = dict.fromkeys(self.hypotheses.values())
        paths |= dict.fromkeys(root / entry.file for entry in verdicts if (root / entry.file).is_file())
        loaded = [load_hypothesis(path) for path in paths]
        return {hypothesis.id: hypothesis for hypothesis in loaded}

    def item_names(self, baseline: BaselineFile, hypotheses: Mapping[str, Hypothesis]) -> list[str]:
        """Return the names of all items of a baseline, of the claims that are stated and of those that were."""
        from delta_suite.regression.items import item_names

        stated = [f"{name}/{claim.id}" for name, hypothesis in hypotheses.items() for claim in hypothesis.expect]
        return item_names(baseline.view, dict.fromkeys([*stated, *baseline.content.verdicts]))

    def verdict(self, hypothesis: Hypothesis, expectation: str, spec: ModelSpec) -> VerdictEntry | None:
        """Judge a claim as its file states it, regardless of --variant; None if the file states no such claim."""
        from delta_suite.claims.judge import judge
        from delta_suite.regression.baseline import VerdictEntry

        stated = next((claim for claim in hypothesis.expect if claim.id == expectation), None)
        if stated is None:
            return None
        judged = judge(hypothesis, stated, self.outcome(spec).view, partial(self.control, spec))
        return VerdictEntry.of(judged, relative_to(self.config.rootpath, hypothesis.path).as_posix())

    # --- reports, which may come from xdist workers, and the end of the run

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note which items were selected, and in which files claims are stated."""
        if (row := getattr(report, "delta_suite_baseline", None)) is not None:
            self.selected.setdefault(row["model"], set()).add(row["item"])
            self.compared_rows.append(row)
        if (row := getattr(report, "delta_suite", None)) is not None:
            selected = self.selected.setdefault(row["model"], set())
            where = self.config.rootpath / str(row["where"]).rpartition(":")[0]
            if where.suffix == ".toml":
                selected.add(f"verdict/{row['hypothesis']}/{row['expectation']}")
                self.hypotheses.setdefault(row["hypothesis"], where)
        if report.failed and report.when == "setup":
            self.failed |= {spec.name for spec in self.specs if f"[{terminal(spec.name)}]" in report.nodeid}

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        """Write the baselines; xdist workers write none."""
        if self.update is None or hasattr(self.config, "workerinput") or self.config.option.collectonly:
            return
        finished = {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED}
        if exitstatus not in finished:
            self.messages.append("the run did not end as it should: no baseline was written")
        elif not self._write():
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    @pytest.hookimpl(trylast=True)
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print the table of baselines, the changes, and what was written."""
        from delta_suite.publish.baseline_tables import BaselineRow, changes_table, run_table

        order = [spec.name for spec in self.specs]  # workers report as they finish
        rows = sorted((BaselineRow(**row) for row in self.compared_rows), key=lambda row: order.index(row.model))
        show = Printer(terminalreporter, self.width)
        if rows or self.messages:
            show.section("baselines")
        if rows:
            show(run_table(rows))
        if any(row.fails for row in rows) and self.config.getoption("tbstyle") == "line":
            show()
            show(changes_table(rows))
        for line in self.messages:
            show.prose(line)

    def _write(self) -> bool:
        """Update the baselines of the models that were measured; return True if none failed."""
        complete = True
        for spec in self.specs:
            path = self.paths[spec.name]
            if spec.name in self.failed and spec.name not in self.selected:
                self.messages.append(f"{path}: not written, {spec.name} could not be measured")
                complete = False
                continue
            try:
                self.messages.append(self._updated(spec, path))
            except SuiteError as error:
                self.messages.append(f"not written: {error}")
                complete = False
        return complete

    def _updated(self, spec: ModelSpec, path: Path) -> str:
        """Write what the run selected of one model into its baseline; return a line that says what was written."""
        from delta_suite.regression.baseline import VERDICT
        from delta_suite.regression.update import update_baseline

        file, selected = self.files.get(path), self.selected.get(spec.name, set())
        hypotheses = self.known_hypotheses(file.content.verdicts.values() if file else ())
        if file is None:
            is_selection = self._selects()
            others = set()
        else:
            others = set(self.item_names(file, hypotheses)) - selected
            is_selection = bool(others)
        if is_selection and not selected:
            return f"{path}: nothing of {spec.name} was selected, so nothing was written"
        verdicts = {
            f"{name}/{claim.id}": entry
            for name, hypothesis in hypotheses.items()
            for claim in hypothesis.expect
            if (not is_selection or f"{VERDICT}/{name}/{claim.id}" in selected)
            and (entry := self.verdict(hypothesis, claim.id, spec)) is not None
        }
        line = update_baseline(
            path,
            self.outcome(spec).view,
            verdicts,
            overwrite=self.update == "all",
            reason=self.config.getoption("baseline_reason"),
            selected=selected if is_selection else None,
        )
        rest = f"{len(others)} other items" if others else "other verdicts"
        return f"{line}; {rest} were not selected, and stayed as they were" if is_selection else line

    def _selects(self) -> bool:
        """Return True if the command line selects some of what is collected."""
        options = ("keyword", "markexpr", "deselect", "lf", "stepwise")
        return any(self.config.getoption(name, None) for name in options) or any(
            "::" in str(argument) for argument in self.config.args
        )


def _holds_tests(folder: Path) -> bool:
    return folder.is_dir() and any(any(folder.glob(pattern)) for pattern in ("test_*.py", "*.toml"))


REGRESSION: pytest.StashKey[Regression] = pytest.StashKey()
"""Key of the baselines in the stash of the config; absent in a run without baselines."""
