"""Populations of updates whose truth is known, the documents drawn from them, and what is claimed of each.

The update of token t of document j in layer L is

    delta = s_j (diag(sqrt(lambda_L)) (z_t + SPREAD m_jL) Q_L + mu_L),    z, m standard normal, s_j = exp(SCALE g_j)

so documents differ in scale (the same in all layers) and in mean, and tokens of one document are alike. Its second
moment, which a model's spectra and directions estimate, is

    S_L = E[s^2] ((1 + SPREAD^2) Q_L^T diag(lambda_L) Q_L + mu_L mu_L^T).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import chain
from typing import Any, Literal

import numpy as np
from jaxtyping import Float64, Int64

from delta_suite.claims.gates import MIN_TOKENS_PER_DIMENSION
from delta_suite.claims.loader import load_hypothesis
from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import phase_value
from delta_suite.metrics.registry import METRICS
from delta_suite.paths import bundled
from delta_suite.reduction.statistics import TOP_K, LayerStatistics
from delta_suite.selftest.documents import DOCUMENTS, SCALE, SPREAD, Layers, Population, ValueOf, orthonormal, unit
from delta_suite.selftest.law_worlds import LAW_C, LAW_E, exchanged, law, law_without_direction, own_maps

TOKENS = 12
"""Of a document whose updates are planted by their spectra."""

NO_POPULATION_VALUE = ("reliability",)
"""Metrics that are about the two halves at hand: with unlimited text reliability is 1, whatever is planted."""


@dataclass(frozen=True)
class Spectral(Population):
    """Updates that do not depend on the state."""

    spectra: Float64[np.ndarray, "layers hidden"]
    """lambda."""
    bases: Float64[np.ndarray, "layers hidden hidden"]
    """Q: orthonormal rows."""
    means: Float64[np.ndarray, "layers hidden"]
    """mu."""
    sink: Float64[np.ndarray, " hidden"] | None = None
    tokens: int = TOKENS

    @property
    def layers(self) -> int:
        return len(self.spectra)

    @property
    def hidden(self) -> int:
        return int(self.spectra.shape[1])

    def update(self, layer: int, state: np.ndarray, noise: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return np.asarray(scale * ((noise * np.sqrt(self.spectra[layer])) @ self.bases[layer] + self.means[layer]))

    def truth(self, draw: np.random.Generator, documents: int) -> ValueOf:
        return Truth(self, draw, documents)


class Truth:
    """What every figure would be with unlimited text: the metric, put to the population's own second moments."""

    def __init__(self, population: Spectral, draw: np.random.Generator, documents: int) -> None:
        """`documents` are drawn for averages over tokens, which have no closed form. No sinks may be planted."""
        assert population.sink is None
        tokens = DOCUMENTS * TOKENS
        averages = _averages(population, draw, documents)
        self._layers, directions = [], []
        of_scale, of_square = math.exp(SCALE**2 / 2), math.exp(2 * SCALE**2)
        for layer, (spectrum, basis, mean) in enumerate(
            zip(population.spectra, population.bases, population.means, strict=True)
        ):
            moment = of_square * ((1 + SPREAD**2) * (basis.T * spectrum) @ basis + np.outer(mean, mean))
            values, vectors = np.linalg.eigh(moment)
            energies = np.maximum(values[::-1], 0.0) * tokens
            self._layers.append(
                LayerStatistics(
                    tokens,
                    population.hidden,
                    energies,
                    averages[layer],
                    float(of_scale**2 * (mean @ mean) / values.sum()),
                    float(np.finfo(np.float32).eps),
                    (float(energies.sum() ** 2), float((energies**2).sum())),
                )
            )
            directions.append(vectors[:, ::-1][:, :TOP_K].T)
        both = np.stack(directions)
        self._gram = DirectionGram.of(both, (both, both))

    def __call__(self, metric: str, layers: Layers, ridges: tuple[float, ...] = ()) -> float:
        """Over layers as a claim takes it: the mean of a layer metric."""
        definition, scope = METRICS[metric], range(layers[0], layers[1] + 1)
        found = (
            [_value(definition.compute(self._layers[layer])) for layer in scope]
            if definition.scope == "layer"
            else [_value(phase_value(definition, self._gram, scope))]
        )
        return float(np.mean(found))


def _value(estimate: Estimate) -> float:
    assert estimate.value is not None, estimate.reason
    return estimate.value


def _averages(population: Spectral, draw: np.random.Generator, documents: int) -> list[dict[str, tuple[float, float]]]:
    import torch

    from delta_suite.reduction.moments import TOKEN_QUANTITIES, token_quantities

    sums = np.zeros((2, population.layers, len(TOKEN_QUANTITIES)))
    at_once = min(documents, 1000)
    rounds = -(-documents // at_once)
    for _ in range(rounds):
        states = [torch.from_numpy(state) for state in population.states(draw, at_once)]
        for layer in range(population.layers):
            own = token_quantities(states[layer], states[layer + 1] - states[layer]).numpy()
            sums[:, layer] += own.mean(axis=0), (own**2).mean(axis=0)
    mean, square = sums / rounds
    sd = np.sqrt(np.maximum(square - mean**2, 0.0))
    return [
        {name: (float(m), float(s)) for name, m, s in zip(TOKEN_QUANTITIES, *rows, strict=True)}
        for rows in zip(mean, sd, strict=True)
    ]


# --- populations -----------------------------------------------------------------------------------------------


def _around(draw: np.random.Generator, directions: Float64[np.ndarray, "layers hidden"]) -> np.ndarray:
    """One basis per layer: the given direction first, all others at random."""
    hidden = directions.shape[1]
    bases = []
    for direction in directions:
        others = np.column_stack([direction, draw.standard_normal((hidden, hidden - 1))])
        basis = np.linalg.qr(others)[0].T
        basis[0] = direction  # up to the sign that QR chooses
        bases.append(basis)
    return np.stack(bases)


def _spiked(layers: int, hidden: int, top: float = 4.0) -> np.ndarray:
    """top, 1/2, 1/3, 1/4, ...: sigma_1 / sigma_2 = 2.8, as clear as the gap of a layer that has a direction."""
    return np.tile(np.concatenate([[top], 1.0 / np.arange(2, hidden + 1)]), (layers, 1))


SHARED, SPECIAL, DEPTH = (6, 10), (14, 21), 24
"""C, E, and the number of layers. 24 layers have 20 windows of 5: with fewer no rank reaches p = 0.05."""

SHARED_COSINE = 0.8


def phased(draw: np.random.Generator) -> Spectral:
    """C: layers 6-10 share a direction, |cos| about 0.8; all others, those of E among them, have one of their own."""
    hidden = 32
    directions = unit(draw.standard_normal((DEPTH, hidden)))
    common, *own = orthonormal(draw, hidden, 1 + SHARED[1] - SHARED[0] + 1)
    for layer, other in zip(range(SHARED[0], SHARED[1] + 1), own, strict=True):
        directions[layer] = math.sqrt(SHARED_COSINE) * common + math.sqrt(1 - SHARED_COSINE) * other
    spectra = _spiked(DEPTH, hidden)
    bases = _around(draw, directions)
    means = np.einsum("ld,ldh->lh", 0.5 * np.sqrt(spectra) * draw.standard_normal((DEPTH, hidden)), bases)
    return Spectral(spectra, bases, means)


def wide(draw: np.random.Generator) -> Spectral:
    """Few tokens for many dimensions, n / d = 5, and a slowly falling spectrum, i^-1."""
    hidden = 192
    mean = 0.2 * draw.standard_normal(hidden) / math.sqrt(hidden)
    return Spectral(1.0 / np.arange(1, hidden + 1)[None], orthonormal(draw, hidden)[None], mean[None])


def noise(draw: np.random.Generator, sink: bool = False) -> Spectral:
    """Isotropic: no layer has a direction."""
    layers, hidden = 12, 32
    bases = np.stack([np.eye(hidden)] * layers)
    direction = unit(draw.standard_normal(hidden)) if sink else None
    return Spectral(np.ones((layers, hidden)), bases, np.zeros((layers, hidden)), direction)


def sinks(draw: np.random.Generator) -> Spectral:
    """Isotropic, and two tokens of each document whose states and updates are massive, along one direction."""
    return noise(draw, sink=True)


def equal(draw: np.random.Generator) -> Spectral:
    """The directions of all pairs of layers have one and the same cosine, 0.5: no phase differs from another."""
    hidden = 32
    common, *own = orthonormal(draw, hidden, DEPTH + 1)
    return _without_means(draw, math.sqrt(0.5) * common + math.sqrt(0.5) * np.stack(own))


def independent(draw: np.random.Generator) -> Spectral:
    """Every layer's direction is drawn on its own: some phase is more alike than another, by chance only."""
    return _without_means(draw, unit(draw.standard_normal((DEPTH, 32))))


def even_drift(draw: np.random.Generator) -> Spectral:
    """Directions turn steadily over depth: the cosine of two layers depends on their distance alone."""
    hidden, depth = 32, np.arange(DEPTH)[:, None]
    parts, speeds = np.sqrt([0.6, 0.25, 0.15]), np.array([0.06, 0.15, 0.35])
    path = np.hstack([parts * np.cos(speeds * depth), parts * np.sin(speeds * depth)])
    return _without_means(draw, path @ orthonormal(draw, hidden, 2 * len(parts)))


def _in_segments(draw: np.random.Generator, lengths: Int64[np.ndarray, " segments"]) -> Spectral:
    hidden = 32
    centres = np.repeat(draw.standard_normal((len(lengths), hidden, hidden)), lengths, axis=0)
    own = centres + 0.5 * draw.standard_normal(centres.shape)
    bases = np.swapaxes(np.linalg.qr(own)[0], 1, 2)
    return Spectral(_spiked(DEPTH, hidden), bases, np.zeros((DEPTH, hidden)))


SEGMENTS = np.diff([0, SHARED[0], SHARED[1] + 1, SPECIAL[0], SPECIAL[1] + 1, DEPTH])
"""Lengths of the declared phases, and of the runs of layers between them."""


def segments(draw: np.random.Generator) -> Spectral:
    """Layers of a declared phase have nearly the same directions; those of two phases have unrelated ones."""
    return _in_segments(draw, SEGMENTS)


def segments_elsewhere(draw: np.random.Generator) -> Spectral:
    """The same, but the phases come in an order drawn anew, so that the declared boundaries are any others."""
    return _in_segments(draw, draw.permutation(SEGMENTS))


def uneven_drift(draw: np.random.Generator) -> Spectral:
    """Directions turn smoothly, now faster and now slower: a Gaussian process over depth in six dimensions."""
    hidden, depth = 32, np.arange(DEPTH)
    kernel = np.exp(-((depth[:, None] - depth) ** 2) / (2 * 6.0**2))
    path = np.linalg.cholesky(kernel + 1e-9 * np.eye(DEPTH)) @ draw.standard_normal((DEPTH, 6))
    return _without_means(draw, unit(path) @ orthonormal(draw, hidden, 6))


def _without_means(draw: np.random.Generator, directions: np.ndarray) -> Spectral:
    return Spectral(_spiked(*directions.shape), _around(draw, directions), np.zeros_like(directions))


# --- what is claimed of them -----------------------------------------------------------------------------------

Kind = Literal["false positives", "power"]


@dataclass(frozen=True)
class Claim:
    """One expectation, and whether supporting it is an error or right."""

    kind: Kind
    said: Expectation | tuple[str, str]
    """Or the hypothesis file and the id of one that the suite itself states."""
    bounded: bool = True
    """Whether a rate of false positives fails the self-test; otherwise it is shown, and `note` says why."""
    note: str = ""

    @cached_property
    def expectation(self) -> Expectation:
        """Raises HypothesisFileError where the suite runs without its hypotheses/."""
        if isinstance(self.said, Expectation):
            return self.said
        file, name = self.said
        return next(own for own in _hypothesis(file).expect if own.id == name)


@cache
def _hypothesis(file: str) -> Hypothesis:
    return load_hypothesis(bundled("hypotheses") / file)


@dataclass(frozen=True)
class World:
    """A planted population, and what is looked at in it."""

    plant: Callable[[np.random.Generator], Population]
    claims: Sequence[Claim] = ()
    anew: bool = False
    """Whether each repeat draws a population of its own, where a claim is about chance over depth."""
    covered: Mapping[str, Sequence[str]] | None = None
    """Scope -> the metrics whose intervals are held against the truth."""
    degenerate: str = ""
    """Why its coverage is shown and not bounded, where the truth lies at the end of a figure's range."""
    shown: Mapping[tuple[str, str], str] = field(default_factory=dict)
    """The same for single figures, by scope and metric."""
    variants: Sequence[str] = ("raw",)
    phases: Mapping[str, Layers] | None = None

    @property
    def says(self) -> str:
        return " ".join((self.plant.__doc__ or "").split())

    @property
    def of_law(self) -> bool:
        """Whether the update law is asked for."""
        metrics = [*(claim.expectation.metric for claim in self.claims), *chain(*(self.covered or {}).values())]
        return any(METRICS[metric].takes == "law" for metric in metrics)

    @cached_property
    def scopes(self) -> Mapping[str, Layers]:
        return self.phases or {"C": SHARED, "E": SPECIAL}

    def layers(self, scope: str) -> Layers:
        if scope in self.scopes:
            return self.scopes[scope]
        layer = int(scope.removeprefix("layer:"))
        return layer, layer


def _claim(kind: Kind, metric: str, scope: str, op: str, bound: float | dict[str, Any], **more: Any) -> Claim:
    own = {key: more.pop(key) for key in ("bounded", "note") if key in more}
    other = {"than": bound} if isinstance(bound, dict) else {"threshold": bound}
    said = Expectation.model_validate(
        {"id": "planted", "metric": metric, "scope": scope, "op": op, "origin": "planted"} | other | more
    )
    return Claim(kind, said, **own)


def _stated(kind: Kind, file: str, *names: str, **more: Any) -> list[Claim]:
    """Claims of a hypothesis file of the suite."""
    return [Claim(kind, (file, name), **more) for name in names]


_LAW, _BOUNDARIES = "update_law.toml", "boundaries.toml"
_SHARED_MAP = ("c-shares-its-map", "e-shares-less-than-c")
_DIRECTION = ("e-residual-is-more-directed-than-c", "rank-one-closes-c", "rank-one-closes-e")
_NO_DIRECTION = "c-residual-has-no-direction"
_RANK, _NO_DRIFT = "declared-among-the-best", "no-smooth-drift"

_WINDOW, _LAG, _RANDOM = {"null": "window"}, {"null": "lag"}, {"null": "random"}

_OF_LAYERS = [name for name, own in METRICS.items() if own.scope == "layer" and name not in NO_POPULATION_VALUE]
_OF_PAIRS = [name for name, own in METRICS.items() if own.scope in ("pair", "phase") and own.takes == "directions"]
_OF_LAW = [name for name, own in METRICS.items() if own.takes == "law"]
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
"""What the self-test runs, by name."""


def gated(metric: str, population: Population) -> bool:
    """Whether a claim on the metric would be inconclusive for want of tokens."""
    needed = MIN_TOKENS_PER_DIMENSION.get(metric, 0.0) * population.hidden
    return needed > DOCUMENTS * population.tokens
