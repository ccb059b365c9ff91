"""Collection: hypothesis files become items, one per (expectation, model); verdicts become outcomes."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from delta_suite.errors import SuiteError
from delta_suite.paths import not_a_file
from delta_suite.pytest_plugin.baseline_items import BaselineItem, BaselineNode
from delta_suite.pytest_plugin.baseline_session import REGRESSION
from delta_suite.pytest_plugin.scope import holds_hypotheses
from delta_suite.pytest_plugin.session import SESSION

if TYPE_CHECKING:
    from delta_suite.claims.judge import Judged
    from delta_suite.claims.schema import Expectation, Hypothesis
    from delta_suite.claims.verdict import Judgement
    from delta_suite.models.spec import ModelSpec


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Refuse what is called .toml in a named folder and is no file: pytest itself would pass over it in silence."""
    for argument in session.config.args:
        folder = Path(str(argument).split("::")[0])
        if not holds_hypotheses(folder) or not folder.is_dir():
            continue
        for path in sorted(folder.glob("*.toml")):
            if problem := not_a_file(path):
                raise pytest.UsageError(f"{path}: {problem}")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect baselines of the run, and .toml files that are named or lie directly in a named folder."""
    regression = parent.config.stash.get(REGRESSION, None)
    if regression is not None and regression.file(file_path) is not None:
        return BaselineNode.from_parent(parent, path=file_path)
    if file_path.suffix != ".toml":
        return None
    named = {Path(str(argument).split("::")[0]).absolute() for argument in parent.config.args}
    if file_path.absolute() in named:
        return HypothesisFile.from_parent(parent, path=file_path)
    folder = file_path.absolute().parent
    return HypothesisFile.from_parent(parent, path=file_path) if folder in named and holds_hypotheses(folder) else None


class HypothesisFile(pytest.File):
    """One TOML file of expectations."""

    def collect(self) -> Iterable[pytest.Item]:
        """Yield one item for each expectation and model."""
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
        session.collected(hypothesis)
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
    """The failure of an expectation; it carries the judgement to the report."""

    def __init__(self, judged: Judged) -> None:
        super().__init__(judged.judgement.expectation.claim())
        self.judged = judged


class ExpectationItem(pytest.Item):
    """One expectation for one model."""

    def __init__(self, *, hypothesis: Hypothesis, expectation: Expectation, spec: ModelSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hypothesis, self.expectation, self.spec = hypothesis, expectation, spec
        self.judged: Judged | None = None
        if variant := self.config.getoption("variant"):
            self.expectation = expectation.model_copy(update={"variant": variant})
        for tag in hypothesis.tags:
            self.add_marker(tag)
        for xfail in expectation.xfail:
            if any(fnmatchcase(spec.name, pattern) for pattern in xfail.models):
                self.add_marker(pytest.mark.xfail(reason=xfail.reason))

    def setup(self) -> None:
        """Measure the model, or take it from the cache."""
        self.config.stash[SESSION].outcome_or_error(self.spec)

    def runtest(self) -> None:
        """Judge the claim, and fail, skip or pass by the verdict."""
        from delta_suite.claims.judge import judge_claim
        from delta_suite.claims.verdict import Verdict

        session = self.config.stash[SESSION]
        view = session.outcome(self.spec).view
        self.judged = judged = judge_claim(self.hypothesis, self.expectation, view, session.control(self.spec))
        judgement = judged.judgement
        self.user_properties += [(key, value) for key, value in self._shown(judgement).items() if value is not None]
        if judgement.verdict is Verdict.SUPPORTED:
            return
        if judgement.verdict is Verdict.REFUTED and self.expectation.severity == "fail":
            raise ExpectationRefutedError(judged)
        if judgement.verdict is not Verdict.REFUTED and self.config.getoption("strict_verdicts"):
            raise ExpectationRefutedError(judged)
        pytest.skip(f"{judgement.verdict.value.lower()}: {judgement.reason or self._explain(judged)}")

    def _shown(self, judgement: Judgement) -> dict[str, Any]:
        """Return what a JUnit report says of the verdict."""
        return {
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

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the explanation of a refuted claim in place of a traceback."""
        if isinstance(excinfo.value, ExpectationRefutedError):
            return self._explain(excinfo.value.judged)
        return super().repr_failure(excinfo, style)

    def _explain(self, judged: Judged) -> str:
        from delta_suite.publish.explanation import explanation

        return explanation(judged, self.where, self.config.stash[SESSION].reproduce(self.nodeid, self.spec.name))

    @property
    def where(self) -> str:
        """file:line of the claim"""
        path = self.path
        if path.is_relative_to(self.config.rootpath):
            path = path.relative_to(self.config.rootpath)
        return f"{path}:{self.expectation.line}"

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return file, line and name for the report."""
        return self.path, self.expectation.line - 1, self.name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a plain test that takes the `measurement` fixture once for each model."""
    if "measurement" in metafunc.fixturenames:
        session = metafunc.config.stash[SESSION]
        session.needs_model = True
        names = [spec.name for spec in session.specs]
        metafunc.parametrize("measurement", session.specs, ids=names, indirect=True, scope="session")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put items of one model together, so that it is measured, used and let go before the next."""
    session = config.stash[SESSION]
    if session.needs_model and not session.specs:
        from delta_suite.models.models_file import load_registry

        try:
            known = ", ".join(load_registry(session.models_file).specs)
        except SuiteError as error:
            raise pytest.UsageError(str(error)) from None
        raise pytest.UsageError(
            f"no model given. Name one with --model=NAME: a directory, a hub id (org/name), "
            f"or one of models.toml: {known}"
        )
    order = {spec.name: index for index, spec in enumerate(session.specs)}
    items.sort(key=lambda item: order.get(spec.name, -1) if (spec := spec_of(item)) else -1)


def spec_of(item: pytest.Item) -> ModelSpec | None:
    """Return the model that an item is about."""
    if isinstance(item, ExpectationItem | BaselineItem):
        return item.spec
    callspec = getattr(item, "callspec", None)
    spec: ModelSpec | None = callspec.params.get("measurement") if callspec else None
    return spec
