"""Collection: a hypothesis file becomes one item for each claim and model; a verdict becomes the outcome of an item."""

from __future__ import annotations

import os
from collections.abc import Iterable
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from delta_suite.errors import SuiteError
from delta_suite.escaping import terminal, terminal_lines
from delta_suite.paths import hypothesis_files, is_directory, not_a_file
from delta_suite.pytest_plugin.baseline_items import BaselineItem, BaselineNode
from delta_suite.pytest_plugin.baseline_session import REGRESSION
from delta_suite.pytest_plugin.printing import failure_text, outcome_or_fail, usage_error
from delta_suite.pytest_plugin.scope import holds_hypotheses
from delta_suite.pytest_plugin.session import SESSION, Session

if TYPE_CHECKING:
    from delta_suite.claims.judge import Judged
    from delta_suite.claims.schema import Expectation, Hypothesis
    from delta_suite.claims.verdict import Judgement
    from delta_suite.models.spec import ModelSpec


@pytest.hookimpl(tryfirst=True)
def pytest_collection(session: pytest.Session) -> None:
    """Raise UsageError for a .toml in a named folder that cannot be read as a file; pytest would ignore it silently."""
    for folder in _named_paths(session.config):
        if not is_directory(folder) or not holds_hypotheses(folder):
            continue
        for path in hypothesis_files(folder):
            if problem := not_a_file(path):
                raise usage_error(f"{path}: {problem}")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    """Collect the baselines of the run, and .toml files that are named or lie directly in a named folder."""
    regression = parent.config.stash.get(REGRESSION, None)
    if regression is not None and regression.file(file_path) is not None:
        return BaselineNode.from_parent(parent, path=file_path)
    if file_path.suffix != ".toml":
        return None
    named = _named_files(parent.config)
    if str(Path(_real(file_path.parent), file_path.name)) in named or _real(file_path) in named:
        return HypothesisFile.from_parent(parent, path=file_path)
    return None


_NAMED: pytest.StashKey[frozenset[str]] = pytest.StashKey()


def _named_files(config: pytest.Config) -> frozenset[str]:
    """Return the files that are named, and the hypothesis files directly in named folders, as real paths.

    They are looked up once in a run: a folder may hold hundreds.
    """
    if _NAMED not in config.stash:
        paths = _named_paths(config)
        folders = [path for path in paths if is_directory(path) and holds_hypotheses(path)]
        inside = (str(Path(_real(folder), file.name)) for folder in folders for file in hypothesis_files(folder))
        config.stash[_NAMED] = frozenset([*map(_real, paths), *inside])
    return config.stash[_NAMED]


def _named_paths(config: pytest.Config) -> list[Path]:
    """Return the files and folders that the run collects from, without node ids."""
    return [Path(argument.split("::")[0]) for argument in config.args]


def _real(path: Path) -> str:
    return os.path.realpath(path)  # Path.resolve raises for a link to itself


class HypothesisFile(pytest.File):
    """A hypothesis file as a node of the collection."""

    def collect(self) -> Iterable[pytest.Item]:
        """Yield one item for each pair of a claim and a model."""
        from delta_suite.claims.loader import load_hypothesis, require_known_phases

        session = self.config.stash[SESSION]
        session.needs_model = True
        try:
            hypothesis = load_hypothesis(self.path)
            if session.specs:
                require_known_phases([hypothesis], session.phases)
        except SuiteError as error:
            raise self.CollectError(terminal_lines(str(error))) from None
        first = session.hypotheses.setdefault(hypothesis.id, self.path)
        if first != self.path:
            raise self.CollectError(
                terminal(f"{self.path}: the id {hypothesis.id!r} is taken by {first}; give each file its own")
            )
        for tag in hypothesis.tags:
            self.config.addinivalue_line("markers", f"{tag}: tag of hypothesis {hypothesis.id}")
        for expectation in hypothesis.expect:
            for spec in session.specs:
                yield ExpectationItem.from_parent(
                    self,
                    name=terminal(f"{hypothesis.id}/{expectation.id}[{spec.name}]"),
                    hypothesis=hypothesis,
                    expectation=expectation,
                    spec=spec,
                )


class ExpectationRefutedError(Exception):
    """Failure of a claim; carries the judgement to the report."""

    def __init__(self, judged: Judged) -> None:
        super().__init__(judged.judgement.expectation.claim())
        self.judged = judged


class ExpectationItem(pytest.Item):
    """One claim on one model."""

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
        """Measure the model, unless this run or the cache already has it."""
        outcome_or_fail(self.config.stash[SESSION].outcome, self.spec)

    def runtest(self) -> None:
        """Judge the claim, and fail, skip or pass according to the verdict."""
        from delta_suite.claims.judge import judge_claim
        from delta_suite.claims.verdict import Verdict

        session = self.config.stash[SESSION]
        view = session.outcome(self.spec).view
        self.judged = judged = judge_claim(self.hypothesis, self.expectation, view, partial(session.control, self.spec))
        judgement = judged.judgement
        self.user_properties += [
            (key, value) for key, value in self._properties(judgement).items() if value is not None
        ]
        if judgement.verdict is Verdict.SUPPORTED:
            return
        if judgement.verdict is Verdict.REFUTED and self.expectation.severity == "fail":
            raise ExpectationRefutedError(judged)
        if judgement.verdict is not Verdict.REFUTED and self.config.getoption("strict_verdicts"):
            raise ExpectationRefutedError(judged)
        pytest.skip(terminal(f"{judgement.verdict.value.lower()}: {judgement.reason or judgement.expectation.claim()}"))

    def _properties(self, judgement: Judgement) -> dict[str, Any]:
        """Return the properties of the item in a JUnit report."""
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
        """Return the explanation of a refuted claim, or of an error, instead of a traceback."""
        if isinstance(excinfo.value, ExpectationRefutedError):
            return terminal_lines(self._explain(excinfo.value.judged))
        return failure_text(excinfo.value, self.name) or super().repr_failure(excinfo, style)

    def _explain(self, judged: Judged) -> str:
        """Return the text of a failure, as long as -v and --tb say."""
        from delta_suite.publish.explanation import explanation, headline

        session, style = self.config.stash[SESSION], self.config.getoption("tbstyle")
        if style == "line":
            return headline(judged, self.where)
        in_full = style == "long" or (style == "auto" and self.config.get_verbosity() > 0)
        reproduce = session.reproduce(self.nodeid, self.spec.name)
        return explanation(judged, self.where, reproduce, session.width, brief=not in_full)

    @property
    def where(self) -> str:
        """File and line of the claim, as `file:line`."""
        path = self.path
        if path.is_relative_to(self.config.rootpath):
            path = path.relative_to(self.config.rootpath)
        return f"{path}:{self.expectation.line}"

    def reportinfo(self) -> tuple[Path, int, str]:
        """Return the file, line and name of the item."""
        return self.path, self.expectation.line - 1, self.name


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the `measurement` fixture once for each model."""
    if "measurement" in metafunc.fixturenames:
        session = metafunc.config.stash[SESSION]
        session.needs_model = True
        names = [spec.name for spec in session.specs]
        metafunc.parametrize("measurement", session.specs, ids=names, indirect=True, scope="session")


class ControlItem(pytest.Item):
    """The measurement of a control that belongs to this shard, while its model may belong to another."""

    def __init__(self, *, spec: ModelSpec, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.spec = spec

    def setup(self) -> None:
        """Measure the control, unless this run or the cache already has it."""
        outcome_or_fail(self.config.stash[SESSION].outcome, self.spec)

    def runtest(self) -> None:
        """Ask nothing of it: it is there for the claims on its model."""

    def reportinfo(self) -> tuple[Path, None, str]:
        """Return the file and name of the item; no line is about it."""
        return self.path, None, self.name


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Sort items by model, so that each model is measured, used and released before the next one.

    Under --shard, the items of models of other shards are deselected, and controls of this one are items, too.
    """
    session = config.stash[SESSION]
    if session.needs_model and not session.specs:
        from delta_suite.models.models_file import load_registry

        try:
            names = ", ".join(load_registry(session.models_file).specs)
        except SuiteError as error:
            raise usage_error(error) from None
        raise pytest.UsageError(
            f"no model given. Name one with --model=NAME: a directory, a hub id (org/name), "
            f"or one of models.toml: {names}"
        )
    order = {spec.name: index for index, spec in enumerate(session.specs)}
    items.sort(key=lambda item: order.get(spec.name, -1) if (spec := spec_of(item)) else -1)
    _choose_parts(session, items)  # before items of other shards go: all shards measure the same
    if session.shard is not None:
        _keep_shard(config, items)


def _keep_shard(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Take out the items of models of other shards, and put in the controls of this one."""
    session = config.stash[SESSION]
    parents: dict[str, Any] = {}
    for item in items:
        if (spec := spec_of(item)) is not None:
            parents.setdefault(spec.control().name, item.parent)
    controls = [
        ControlItem.from_parent(parents[spec.name], name=terminal(f"control[{spec.name}]"), spec=spec)
        for spec in (item.spec for item in session.work)
        if spec.random_weights and spec not in session.specs and spec.name in parents and session.measures(spec)
    ]
    stays = [(spec := spec_of(item)) is None or session.measures(spec) for item in items]
    config.hook.pytest_deselected(items=[item for item, here in zip(items, stays, strict=True) if not here])
    items[:] = [*(item for item, here in zip(items, stays, strict=True) if here), *controls]


def _choose_parts(session: Session, items: list[pytest.Item]) -> None:
    """Choose the parts of a measurement that the items need which -k, -m and node ids selected.

    A plain test may ask for any metric of blocks, so a run with one measures every part that is measured by default.
    """
    with_model = [item for item in items if spec_of(item) is not None]
    if not with_model:
        return
    from delta_suite.claims.judge import parts_of_claims
    from delta_suite.command_line import DEFAULT_PARTS

    claims = [item.expectation for item in with_model if isinstance(item, ExpectationItem | BaselineItem)]
    parts = parts_of_claims(claim for claim in claims if claim is not None)
    session.parts.update(parts if len(claims) == len(with_model) else parts.union(DEFAULT_PARTS))


def pytest_report_collectionfinish(config: pytest.Config, items: list[pytest.Item]) -> list[str]:
    """Return which claims no measurement of a model could decide, before any model is measured."""
    from delta_suite.claims.null_kinds import undecidable_lines

    by_name: dict[str, list[ExpectationItem]] = {}
    for item in items:
        if isinstance(item, ExpectationItem):
            by_name.setdefault(item.spec.name, []).append(item)
    lines = []
    for spec in config.stash[SESSION].measured_specs:
        claims = [item for item in by_name.get(spec.name, ()) if item.spec == spec]
        named = [(f"{item.hypothesis.id}/{item.expectation.id}", item.expectation) for item in claims]
        lines += undecidable_lines(spec, named)
    return [terminal(line) for line in lines]


def spec_of(item: pytest.Item) -> ModelSpec | None:
    """Return the model of an item; None for an item without one."""
    if isinstance(item, ExpectationItem | BaselineItem | ControlItem):
        return item.spec
    callspec = getattr(item, "callspec", None)
    spec: ModelSpec | None = callspec.params.get("measurement") if callspec else None
    return spec
