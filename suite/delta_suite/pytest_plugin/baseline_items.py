"""Items of a baseline: one for each figure or verdict, and each model that is compared.

The baseline file itself is collected, so `results/baselines/big.json::C/intra_cosine[big]` is an ordinary node id.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from delta_suite.errors import SuiteError
from delta_suite.escaping import terminal, terminal_lines
from delta_suite.pytest_plugin.baseline_session import REGRESSION, Regression
from delta_suite.pytest_plugin.printing import failure_text, outcome_or_fail, verdict_status

if TYPE_CHECKING:
    from delta_suite.claims.schema import Expectation, Hypothesis
    from delta_suite.models.spec import ModelSpec
    from delta_suite.records.view import RecordView
    from delta_suite.regression.baseline import BaselineFile
    from delta_suite.regression.comparison import Comparison, Status


class BaselineNode(pytest.File):
    """A baseline file as a node of the collection."""

    def collect(self) -> Iterable[pytest.Item]:
        """Yield an item for each pair of a figure or verdict and a model."""
        regression = self.config.stash[REGRESSION]
        baseline = regression.file(self.path)
        assert baseline is not None
        try:
            hypotheses = regression.known_hypotheses(baseline.content.verdicts.values())
        except SuiteError as error:
            raise self.CollectError(terminal_lines(str(error))) from None
        names = regression.item_names(baseline, hypotheses)
        for line in baseline.idle_patterns(names):
            warnings.warn(terminal_lines(line), stacklevel=2)
        for spec in regression.models(baseline):
            for name in names:
                title = terminal(f"{name}[{spec.name}]")
                yield BaselineItem.from_parent(
                    self, name=title, item=name, spec=spec, baseline=baseline, hypotheses=hypotheses
                )


class ChangedError(Exception):
    """Failure of an item; its text is the report."""


class BaselineItem(pytest.Item):
    """One metric over one scope, or one verdict, of one model, compared with its baseline."""

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
        """Measure the model, unless this run or the cache already has it."""
        outcome_or_fail(self.config.stash[REGRESSION].outcome, self.spec)

    @property
    def verdict(self) -> str | None:
        """Id of the claim whose verdict is compared, as hypothesis/claim; None for a figure."""
        from delta_suite.regression.baseline import VERDICT

        kind, _, claim = self.item.partition("/")
        return claim if kind == VERDICT else None

    @property
    def expectation(self) -> Expectation | None:
        """The claim itself; None for a figure, and for a claim that no file states any more."""
        hypothesis, _, claim = (self.verdict or "").partition("/")
        stated = self.hypotheses[hypothesis].expect if hypothesis in self.hypotheses else ()
        return next((expectation for expectation in stated if expectation.id == claim), None)

    def runtest(self) -> None:
        """Compare, and fail, skip or pass according to the status."""
        from delta_suite.publish.baseline_tables import BaselineRow, item_text
        from delta_suite.regression.comparison import Status, worst

        regression = self.config.stash[REGRESSION]
        outcome = regression.outcome(self.spec)
        items = regression.compared(self.spec, self.baseline)
        comparisons = self._comparisons(regression, outcome.view, items)
        self.status = status = worst(comparisons)
        record = str(outcome.path)
        row = BaselineRow.of(self.spec.name, str(self.baseline.path), self.item, status, comparisons, record)
        self.row = asdict(row)
        properties = ("baseline", "item", "model", "status", "where", "old", "new", "difference", "tolerance")
        self.user_properties += [(key, value) for key in properties if (value := self.row[key]) is not None]
        reproduce = regression.reproduce(self.nodeid, self.spec.name)
        if row.fails and regression.update == "all":
            pytest.skip(f"accepted: {status.value}")
        if row.fails:
            text = item_text(self.item, status, comparisons, self.baseline, outcome.view, reproduce, regression.width)
            raise ChangedError(text)
        if status in {Status.NEW, Status.NOT_MEASURED}:
            pytest.skip(terminal(f"{status.value}: {row.reason}"))

    def _comparisons(
        self, regression: Regression, now: RecordView, items: Mapping[str, list[Comparison]]
    ) -> list[Comparison]:
        """Return the comparisons of this item."""
        from delta_suite.regression.comparison import Comparison, Status, obstacle
        from delta_suite.regression.items import RECORD

        if self.item == RECORD:
            other = self.baseline.content.other_documents or regression.other_documents
            refusal = obstacle(self.baseline.view, now, other_documents=other)
            if refusal is None and self.baseline.view.phases != now.phases:
                refusal = f"the phase map was {_map(self.baseline.view)} and is {_map(now)}"
            status = Status.SAME if refusal is None else Status.NOT_COMPARABLE
            return [Comparison(RECORD, RECORD, "", status, reason=refusal)]
        if self.verdict is not None:
            name, _, claim = self.verdict.partition("/")
            hypothesis = self.hypotheses.get(name)
            entry = regression.verdict(hypothesis, claim, self.spec) if hypothesis else None
            return [self.baseline.compare_verdict(self.verdict, entry, now, other_documents=regression.other_documents)]
        scope, _, metric = self.item.rpartition("/")
        absent = Comparison(scope, metric, "", Status.NOT_MEASURED, reason="on neither side")
        return items.get(self.item) or [absent]

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the text of a change, or of another error, instead of a traceback."""
        if isinstance(excinfo.value, ChangedError):
            return terminal_lines(str(excinfo.value))
        return failure_text(excinfo.value, self.name) or super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return the file and name of the item; a baseline has no line for it."""
        return self.path, None, self.name


def _map(view: RecordView) -> str:
    return ", ".join(f"{name} {first}-{last}" for name, (first, last) in view.phases.items())


def status_of(row: Mapping[str, Any]) -> tuple[str, str, Any]:
    """Return the category, letter and word for an item that neither passed nor failed."""
    if row["fails"]:
        return "accepted", "a", ("ACCEPTED", {"yellow": True})
    if row["status"] == "new":
        return "new", "n", ("NEW", {"yellow": True})
    return verdict_status("NOT MEASURED")
