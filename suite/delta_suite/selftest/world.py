"""A planted population of the self-test, with the claims judged on it and the intervals compared with truth."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np

from delta_suite.capture.units import Units
from delta_suite.claims.loader import load_hypothesis
from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.metrics.registry import METRICS
from delta_suite.paths import bundled
from delta_suite.selftest.documents import DOCUMENTS, Layers, Population, domains_of
from delta_suite.selftest.planted import SHARED, SPECIAL

RATES_SHARE = 0.2
"""The share of a long form's repeats in populations of which rates alone are bounded: where 1,000 tell a coverage of
0.90 from 0.92, 200 tell a rate of 0.03 from 0.07, and one of 0.86 from 0.8."""

FEWEST = 40
"""Repeats that every population runs, where as many are asked for."""

Kind = Literal["false positives", "power"]
"""The rate that supported verdicts of a claim count towards: errors, or correct findings."""


@dataclass(frozen=True)
class Claim:
    """One expectation, and whether it is an error to support it."""

    kind: Kind
    statement: Expectation | tuple[str, str]
    """The expectation, or the hypothesis file and the id of one that comes with the suite."""
    bounded: bool = True
    """True where a rate beyond its bound fails the self-test; otherwise the rate is shown, for reason `note`."""
    note: str = ""
    """The reason why the rate is not bounded."""
    true_of: Callable[[Any, Expectation], bool] | None = None
    """Function of a drawn population and the expectation that returns True where it holds there; None where it holds in
    every draw, or in none, as `kind` says."""

    def holds_in(self, population: Population) -> bool:
        """Return True if the expectation is true of a drawn population."""
        return self.kind == "power" if self.true_of is None else self.true_of(population, self.expectation)

    @cached_property
    def expectation(self) -> Expectation:
        """The expectation. Raises HypothesisFileError where the suite's hypotheses are not installed."""
        if isinstance(self.statement, Expectation):
            return self.statement
        file, name = self.statement
        return next(claim for claim in _hypothesis(file).expect if claim.id == name)


@cache
def _hypothesis(file: str) -> Hypothesis:
    """Return a hypothesis of the suite by its file name."""
    return load_hypothesis(bundled("hypotheses") / file)


@dataclass(frozen=True)
class World:
    """A planted population, with the claims and intervals that are tested on it."""

    plant: Callable[[np.random.Generator], Population]
    """The function that draws the population."""
    description: str
    """The population in words, for the table."""
    claims: Sequence[Claim] = ()
    redrawn: bool = False
    """True where each repeat draws another population, because its claims are about chance over depth."""
    covered: Mapping[str, Sequence[str]] | None = None
    """The metrics whose intervals are compared with the truth, by scope."""
    degenerate: str = ""
    """The reason why no coverage is bounded here; empty where it is."""
    shown: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Single figures whose coverage is shown and not bounded, by scope and metric, with the reason."""
    variants: Sequence[str] = ("raw",)
    """The variants that are reduced; intervals are those of the first."""
    phases: Mapping[str, Layers] | None = None
    """The phase map, if not that of `scopes`."""
    in_domain: int = 0
    """The number of documents of each domain of the population; 0 where it has none."""
    share: float = 1.0
    """The share of a long form's repeats in which the coverage of its intervals is counted."""

    @property
    def units(self) -> Units:
        """The units of the documents of a repeat."""
        return Units.of(DOCUMENTS, domains_of(DOCUMENTS, self.in_domain))

    def repeats(self, asked: int) -> int:
        """Return the number of repeats that it runs, of so many that are asked for.

        Example:
            >>> World(lambda draw: None, "without intervals").repeats(1000)
            200
        """
        share = self.share if self.covered and not self.degenerate else RATES_SHARE
        return min(asked, max(FEWEST, math.ceil(asked * share)))

    @property
    def needs_law(self) -> bool:
        """True if a claim or an interval is about the update law."""
        metrics = [*(claim.expectation.metric for claim in self.claims), *chain(*(self.covered or {}).values())]
        return any(METRICS[metric].takes == "law" for metric in metrics)

    @cached_property
    def scopes(self) -> Mapping[str, Layers]:
        """The first and last layer of each phase by name."""
        return self.phases or {"C": SHARED, "E": SPECIAL}

    def layers(self, scope: str) -> Layers:
        """Return the first and last layer of a scope, which is a phase or `layer:N`."""
        if scope in self.scopes:
            return self.scopes[scope]
        layer = int(scope.removeprefix("layer:"))
        return layer, layer


def claim_of(kind: Kind, metric: str, scope: str, op: str, bound: float | dict[str, Any], **more: Any) -> Claim:
    """Return a claim that is stated here, against a threshold or something to compare with."""
    options = {key: more.pop(key) for key in ("bounded", "note") if key in more}
    other = {"than": bound} if isinstance(bound, dict) else {"threshold": bound}
    expectation = Expectation.model_validate(
        {"id": "planted", "metric": metric, "scope": scope, "op": op, "origin": "planted"} | other | more
    )
    return Claim(kind, expectation, **options)


def stated(kind: Kind, file: str, *names: str, **more: Any) -> list[Claim]:
    """Return claims of a hypothesis file of the suite."""
    return [Claim(kind, (file, name), **more) for name in names]
