"""The cases of the self-test: what is claimed of each planted population, and which intervals are held against it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np

from delta_suite.claims.gates import MIN_TOKENS_PER_DIMENSION
from delta_suite.claims.loader import load_hypothesis
from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.metrics.registry import METRICS
from delta_suite.paths import bundled
from delta_suite.selftest.documents import DOCUMENTS, Layers, Population
from delta_suite.selftest.law_worlds import LAW_C, LAW_E, exchanged, law, law_without_direction, own_maps
from delta_suite.selftest.planted import (
    NO_POPULATION_VALUE,
    SHARED,
    SPECIAL,
    equal,
    even_drift,
    independent,
    noise,
    phased,
    segments,
    segments_elsewhere,
    sinks,
    uneven_drift,
    wide,
)

Kind = Literal["false positives", "power"]


@dataclass(frozen=True)
class Claim:
    """One expectation, and whether supporting it is an error or right."""

    kind: Kind
    said: Expectation | tuple[str, str]
    """Or the hypothesis file and the id of one that the suite itself states."""
    bounded: bool = True
    """True where a rate of false positives fails the self-test; otherwise it is shown, and `note` says why."""
    note: str = ""

    @cached_property
    def expectation(self) -> Expectation:
        """Return the claim; raises HypothesisFileError where the suite runs without its hypotheses."""
        if isinstance(self.said, Expectation):
            return self.said
        file, name = self.said
        return next(claim for claim in _hypothesis(file).expect if claim.id == name)


@cache
def _hypothesis(file: str) -> Hypothesis:
    return load_hypothesis(bundled("hypotheses") / file)


@dataclass(frozen=True)
class World:
    """A planted population, and what is looked at in it."""

    plant: Callable[[np.random.Generator], Population]
    claims: Sequence[Claim] = ()
    anew: bool = False
    """True where each repeat draws a population of its own, where a claim is about chance over depth."""
    covered: Mapping[str, Sequence[str]] | None = None
    """Scope -> the metrics whose intervals are held against the truth."""
    degenerate: str = ""
    """Why its coverage is shown and not bounded, where the truth lies at the end of a figure's range."""
    shown: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """Tolerances of single figures, by scope and metric."""
    variants: Sequence[str] = ("raw",)
    phases: Mapping[str, Layers] | None = None

    @property
    def says(self) -> str:
        """Return the description of the population."""
        return " ".join((self.plant.__doc__ or "").split())

    @property
    def of_law(self) -> bool:
        """Return True where the update law is asked for."""
        metrics = [*(claim.expectation.metric for claim in self.claims), *chain(*(self.covered or {}).values())]
        return any(METRICS[metric].takes == "law" for metric in metrics)

    @cached_property
    def scopes(self) -> Mapping[str, Layers]:
        """Return the phases by name."""
        return self.phases or {"C": SHARED, "E": SPECIAL}

    def layers(self, scope: str) -> Layers:
        """Return the first and last layer of a phase, or of `layer:N`."""
        if scope in self.scopes:
            return self.scopes[scope]
        layer = int(scope.removeprefix("layer:"))
        return layer, layer


def _claim(kind: Kind, metric: str, scope: str, op: str, bound: float | dict[str, Any], **more: Any) -> Claim:
    options = {key: more.pop(key) for key in ("bounded", "note") if key in more}
    other = {"than": bound} if isinstance(bound, dict) else {"threshold": bound}
    said = Expectation.model_validate(
        {"id": "planted", "metric": metric, "scope": scope, "op": op, "origin": "planted"} | other | more
    )
    return Claim(kind, said, **options)


def _stated(kind: Kind, file: str, *names: str, **more: Any) -> list[Claim]:
    """Return claims of a hypothesis file of the suite."""
    return [Claim(kind, (file, name), **more) for name in names]


_LAW, _BOUNDARIES = "update_law.toml", "boundaries.toml"
_SHARED_MAP = ("c-shares-its-map", "e-shares-less-than-c")
_DIRECTION = ("e-residual-is-more-directed-than-c", "rank-one-closes-c", "rank-one-closes-e")
_NO_DIRECTION = "c-residual-has-no-direction"
_RANK, _NO_DRIFT = "declared-among-the-best", "no-smooth-drift"

_WINDOW, _LAG, _RANDOM = {"null": "window"}, {"null": "lag"}, {"null": "random"}

_OF_LAYERS = [name for name, m in METRICS.items() if m.scope == "layer" and name not in NO_POPULATION_VALUE]
_OF_PAIRS = [
    name for name, metric in METRICS.items() if metric.scope in ("pair", "phase") and metric.takes == "directions"
]
_OF_LAW = [name for name, m in METRICS.items() if m.takes == "law"]
_OF_SPECTRA = [
    *("effective_rank", "effective_rank_roy", "participation_ratio", "participation_ratio_unbiased"),
    *("stable_rank", "top1_energy", "gamma"),
]

_REALISED = "true of the layers that were drawn, by chance over depth: documents cannot tell, only a rank can"

_OVERFIT = (
    "a layer's own map gains about as little on the shared one as it overfits, and deleting groups of documents "
    "overstates how far the overfit varies: the interval is too wide"
)
_FLAT = "the residual is alike in all directions: its largest eigenvalue lies at the end of its range, as in noise"
_UNSHARED = "nothing is shared: the truth is the end of the figure's range, 0, but for the chance likeness of the maps"

_E_LIKE = [("intra_cosine", "<=", 0.3), ("block_effective_rank_fraction", ">=", 0.8)]
_C_LIKE = [("intra_cosine", ">=", 0.5), ("intra_cosine_cross_fitted", ">=", 0.5), ("adjacent_cosine", ">=", 0.5)]

WORLDS: Mapping[str, World] = {
    "phases": World(
        phased,
        claims=[
            *(_claim("power", metric, "C", op, bound) for metric, op, bound in _C_LIKE),
            _claim("power", "intra_cosine", "C", ">=", {"scope": "E", "times": 2.0}),
            _claim("power", "intra_cosine", "C", ">=", _WINDOW),
            _claim("power", "intra_cosine", "C", ">", _LAG),
            _claim("power", "intra_cosine", "C", ">=", _RANDOM),
            *(_claim("power", metric, "E", op, bound) for metric, op, bound in _E_LIKE),
            *(_claim("false positives", metric, "E", op, bound) for metric, op, bound in _C_LIKE),
            *(_claim("false positives", metric, "C", op, bound) for metric, op, bound in _E_LIKE),
            _claim("false positives", "intra_cosine", "E", ">=", {"scope": "C"}),
            _claim("false positives", "intra_cosine", "E", ">=", _WINDOW),
        ],
        covered={"layer:8": _OF_LAYERS, "C": [*_OF_LAYERS, *_OF_PAIRS], "E": _OF_PAIRS},
    ),
    "wide": World(wide, covered={"layer:0": _OF_SPECTRA}),
    "noise": World(
        noise,
        claims=[
            *(_claim("false positives", metric, "E", op, bound) for metric, op, bound in _E_LIKE),
            _claim("false positives", "intra_cosine", "C", "<=", {"scope": "E"}),
            *(_claim("false positives", metric, "C", op, bound) for metric, op, bound in _C_LIKE),
            *_stated("false positives", _LAW, *_SHARED_MAP, *_DIRECTION),
        ],
        covered={"layer:3": [*_OF_SPECTRA, "spectral_gap"]},
        degenerate="all eigenvalues are equal: the truth is the end of the figure's range",
        variants=("raw", "sink_free"),
        phases={"C": (2, 5), "E": (6, 10)},
    ),
    "sinks": World(
        sinks,
        claims=[
            _claim("false positives", metric, "C", op, bound, variant=variant)
            for variant in ("raw", "sink_free")
            for metric, op, bound in _C_LIKE
        ],
        variants=("raw", "sink_free"),
        phases={"C": (2, 5), "E": (6, 10)},
    ),
    "even drift": World(
        even_drift,
        claims=[
            _claim("false positives", "intra_cosine", "C", ">=", _WINDOW),
            _claim("false positives", "intra_cosine", "C", ">", _LAG),
            _claim("false positives", "intra_cosine", "C", ">", {"scope": "layers:0-4"}),
            *_stated("false positives", _BOUNDARIES, _RANK, _NO_DRIFT),
        ],
        anew=True,
    ),
    "uneven drift": World(
        uneven_drift,
        claims=[
            _claim("false positives", "intra_cosine", "C", ">=", _WINDOW),
            _claim("false positives", "intra_cosine", "C", ">", _LAG, bounded=False, note=_REALISED),
            *_stated("false positives", _BOUNDARIES, _RANK, _NO_DRIFT),
        ],
        anew=True,
    ),
    "equal layers": World(
        equal,
        claims=[
            _claim("false positives", "intra_cosine", "C", ">=", _WINDOW),
            _claim("false positives", "intra_cosine", "C", ">", _LAG),
            _claim("false positives", "intra_cosine", "C", ">", {"scope": "E"}),
            *_stated("false positives", _BOUNDARIES, _RANK, _NO_DRIFT),
        ],
        anew=True,
    ),
    "independent layers": World(
        independent,
        claims=[
            _claim("false positives", "intra_cosine", "C", ">=", _WINDOW),
            _claim("false positives", "intra_cosine", "C", ">=", _RANDOM),
            _claim("false positives", "intra_cosine", "C", ">", _LAG, bounded=False, note=_REALISED),
            _claim("false positives", "intra_cosine", "C", ">", {"scope": "E"}, bounded=False, note=_REALISED),
            *_stated("false positives", _BOUNDARIES, _RANK, _NO_DRIFT),
        ],
        anew=True,
    ),
    "segments": World(segments, claims=_stated("power", _BOUNDARIES, _RANK, _NO_DRIFT), anew=True),
    "segments elsewhere": World(
        segments_elsewhere,
        claims=[*_stated("false positives", _BOUNDARIES, _RANK), *_stated("power", _BOUNDARIES, _NO_DRIFT)],
        anew=True,
    ),
    "law": World(
        law,
        claims=_stated("power", _LAW, *_SHARED_MAP, _NO_DIRECTION, *_DIRECTION),
        covered=dict.fromkeys("CE", _OF_LAW),
        shown=dict.fromkeys([("C", "sharing_index"), ("C", "rank_one_closure")], _OVERFIT),
        variants=("sink_free",),
        phases={"C": LAW_C, "E": LAW_E},
    ),
    "law without direction": World(
        law_without_direction,
        claims=[
            *_stated("power", _LAW, *_SHARED_MAP, _NO_DIRECTION),
            *_stated("false positives", _LAW, *_DIRECTION),
        ],
        # Own maps gain nothing on a map that all layers have, so that C has no closure.
        covered={"C": [name for name in _OF_LAW if name != "rank_one_closure"], "E": _OF_LAW},
        shown={("C", "sharing_index"): _OVERFIT, ("C", "residual_rank_one_share"): _FLAT},
        variants=("sink_free",),
        phases={"C": LAW_C, "E": LAW_E},
    ),
    "own maps": World(
        own_maps,
        claims=[
            *_stated("power", _LAW, _NO_DIRECTION),
            *_stated("false positives", _LAW, *_SHARED_MAP, *_DIRECTION),
        ],
        covered=dict.fromkeys("CE", _OF_LAW),
        shown={
            (scope, metric): why
            for why, metrics in (
                (_FLAT, ("residual_rank_one_share", "rank_one_closure")),
                (_UNSHARED, ("sharing_index", "shared_r2")),
            )
            for metric in metrics
            for scope in "CE"
        },
        variants=("sink_free",),
        phases={"C": LAW_C, "E": LAW_E},
    ),
    "law exchanged": World(
        exchanged,
        claims=_stated("false positives", _LAW, *_SHARED_MAP, _NO_DIRECTION, "e-residual-is-more-directed-than-c"),
        variants=("sink_free",),
        phases={"C": LAW_C, "E": LAW_E},
    ),
}
"""The cases that the self-test runs, by name."""


def gated(metric: str, population: Population) -> bool:
    """Return True where a claim on the metric would be inconclusive for want of tokens."""
    needed = MIN_TOKENS_PER_DIMENSION.get(metric, 0.0) * population.hidden
    return needed > DOCUMENTS * population.tokens
