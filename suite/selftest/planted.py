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
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Float32, Float64

from suite.analysis.estimates import phase_metric
from suite.analysis.metrics import METRICS, TOP_K, DirectionGram, Estimate, LayerStatistics
from suite.claims.gates import MIN_TOKENS_PER_DIMENSION
from suite.claims.schema import Expectation

if TYPE_CHECKING:
    from suite.capture.stream import ResidualStream

DOCUMENTS, TOKENS = 80, 12
"""Of one repeat: documents, and tokens of each."""

SCALE, SPREAD = 0.3, 0.4
"""Documents differ in scale by 30%, and 14% of the variance inside a layer lies between documents."""

START = 3.0
"""Standard deviation of the entries of h_0, so that one update is a tenth to a fifth of the stream."""

SINK = 40.0
"""Length of a sink's update, in each layer, where ordinary ones have about 6."""

NO_POPULATION_VALUE = ("reliability",)
"""Metrics that are about the two halves at hand: with unlimited text reliability is 1, whatever is planted."""

Layers = tuple[int, int]
"""First and last."""


@dataclass(frozen=True)
class Population:
    """What documents are drawn from."""

    spectra: Float64[np.ndarray, "layers hidden"]
    """lambda."""
    bases: Float64[np.ndarray, "layers hidden hidden"]
    """Q: orthonormal rows."""
    means: Float64[np.ndarray, "layers hidden"]
    """mu."""
    sink: Float64[np.ndarray, " hidden"] | None = None
    """The direction in which the first token of each document, and one more, are pushed in every layer."""

    @property
    def layers(self) -> int:
        return len(self.spectra)

    @property
    def hidden(self) -> int:
        return int(self.spectra.shape[1])

    def states(
        self, draw: np.random.Generator, documents: int = DOCUMENTS
    ) -> list[Float32[np.ndarray, "tokens hidden"]]:
        """h_0 .. h_N of new documents."""
        document = np.arange(documents * TOKENS) // TOKENS
        shape = (len(document), self.hidden)
        scale = np.exp(SCALE * draw.standard_normal(documents))[document, None]
        sinks = np.arange(documents) * TOKENS
        sinks = np.concatenate([sinks, sinks + draw.integers(1, TOKENS, documents)])
        state = START * draw.standard_normal(shape)
        out = [state.astype(np.float32)]
        for spectrum, basis, mean in zip(self.spectra, self.bases, self.means, strict=True):
            own = draw.standard_normal(shape) + SPREAD * draw.standard_normal((documents, self.hidden))[document]
            update = scale * ((own * np.sqrt(spectrum)) @ basis + mean)
            if self.sink is not None:
                update[sinks] += SINK * self.sink
            state = state + update
            out.append(state.astype(np.float32))
        return out

    def stream(self, draw: np.random.Generator, documents: int = DOCUMENTS) -> ResidualStream:
        """The same as the tap would keep it."""
        import torch

        from suite.capture.stream import ResidualStream

        token = torch.arange(documents * TOKENS)
        return ResidualStream(
            [torch.from_numpy(state) for state in self.states(draw, documents)],
            token // TOKENS,
            token % TOKENS,
            torch.ones(len(token), dtype=torch.bool),
            "device",
        )


class Truth:
    """What every figure would be with unlimited text: the metric, put to the population's own second moments."""

    def __init__(self, population: Population, draw: np.random.Generator, documents: int) -> None:
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
            self._layers.append(
                LayerStatistics(
                    tokens,
                    population.hidden,
                    np.maximum(values[::-1], 0.0) * tokens,
                    averages[layer],
                    float(of_scale**2 * (mean @ mean) / values.sum()),
                    float(np.finfo(np.float32).eps),
                )
            )
            directions.append(vectors[:, ::-1][:, :TOP_K].T)
        both = np.stack(directions)
        self._gram = DirectionGram.of(both, (both, both))

    def __call__(self, metric: str, layers: Layers) -> float:
        """Over layers as a claim takes it: the mean of a layer metric."""
        definition, scope = METRICS[metric], range(layers[0], layers[1] + 1)
        found = (
            [_value(definition.compute(self._layers[layer])) for layer in scope]
            if definition.scope == "layer"
            else [_value(phase_metric(definition, self._gram, scope))]
        )
        return float(np.mean(found))


def _value(estimate: Estimate) -> float:
    assert estimate.value is not None, estimate.reason
    return estimate.value


def _averages(
    population: Population, draw: np.random.Generator, documents: int
) -> list[dict[str, tuple[float, float]]]:
    import torch

    from suite.analysis.moments import TOKEN_QUANTITIES, token_quantities

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


def _unit(vectors: np.ndarray) -> np.ndarray:
    return np.asarray(vectors / np.linalg.norm(vectors, axis=-1, keepdims=True))


def _orthonormal(draw: np.random.Generator, hidden: int, count: int | None = None) -> np.ndarray:
    """Random orthonormal rows."""
    return np.asarray(np.linalg.qr(draw.standard_normal((hidden, count or hidden)))[0].T)


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


def phased(draw: np.random.Generator) -> Population:
    """C: layers 6-10 share a direction, |cos| about 0.8; all others, those of E among them, have one of their own."""
    hidden = 32
    directions = _unit(draw.standard_normal((DEPTH, hidden)))
    common, *own = _orthonormal(draw, hidden, 1 + SHARED[1] - SHARED[0] + 1)
    for layer, other in zip(range(SHARED[0], SHARED[1] + 1), own, strict=True):
        directions[layer] = math.sqrt(SHARED_COSINE) * common + math.sqrt(1 - SHARED_COSINE) * other
    spectra = _spiked(DEPTH, hidden)
    bases = _around(draw, directions)
    means = np.einsum("ld,ldh->lh", 0.5 * np.sqrt(spectra) * draw.standard_normal((DEPTH, hidden)), bases)
    return Population(spectra, bases, means)


def wide(draw: np.random.Generator) -> Population:
    """Few tokens for many dimensions, n / d = 5, and a slowly falling spectrum, i^-1."""
    hidden = 192
    mean = 0.2 * draw.standard_normal(hidden) / math.sqrt(hidden)
    return Population(1.0 / np.arange(1, hidden + 1)[None], _orthonormal(draw, hidden)[None], mean[None])


def noise(draw: np.random.Generator, sink: bool = False) -> Population:
    """Isotropic: no layer has a direction."""
    layers, hidden = 12, 32
    bases = np.stack([np.eye(hidden)] * layers)
    direction = _unit(draw.standard_normal(hidden)) if sink else None
    return Population(np.ones((layers, hidden)), bases, np.zeros((layers, hidden)), direction)


def sinks(draw: np.random.Generator) -> Population:
    """Isotropic, and two tokens of each document whose states and updates are massive, along one direction."""
    return noise(draw, sink=True)


def equal(draw: np.random.Generator) -> Population:
    """The directions of all pairs of layers have one and the same cosine, 0.5: no phase differs from another."""
    hidden = 32
    common, *own = _orthonormal(draw, hidden, DEPTH + 1)
    return _without_means(draw, math.sqrt(0.5) * common + math.sqrt(0.5) * np.stack(own))


def independent(draw: np.random.Generator) -> Population:
    """Every layer's direction is drawn on its own: some phase is more alike than another, by chance only."""
    return _without_means(draw, _unit(draw.standard_normal((DEPTH, 32))))


def even_drift(draw: np.random.Generator) -> Population:
    """Directions turn steadily over depth: the cosine of two layers depends on their distance alone."""
    hidden, depth = 32, np.arange(DEPTH)[:, None]
    parts, speeds = np.sqrt([0.6, 0.25, 0.15]), np.array([0.06, 0.15, 0.35])
    path = np.hstack([parts * np.cos(speeds * depth), parts * np.sin(speeds * depth)])
    return _without_means(draw, path @ _orthonormal(draw, hidden, 2 * len(parts)))


def uneven_drift(draw: np.random.Generator) -> Population:
    """Directions turn smoothly, now faster and now slower: a Gaussian process over depth in six dimensions."""
    hidden, depth = 32, np.arange(DEPTH)
    kernel = np.exp(-((depth[:, None] - depth) ** 2) / (2 * 6.0**2))
    path = np.linalg.cholesky(kernel + 1e-9 * np.eye(DEPTH)) @ draw.standard_normal((DEPTH, 6))
    return _without_means(draw, _unit(path) @ _orthonormal(draw, hidden, 6))


def _without_means(draw: np.random.Generator, directions: np.ndarray) -> Population:
    return Population(_spiked(*directions.shape), _around(draw, directions), np.zeros_like(directions))


# --- what is claimed of them -----------------------------------------------------------------------------------

Kind = Literal["false positives", "power"]


@dataclass(frozen=True)
class Claim:
    """One expectation, and whether supporting it is an error or right."""

    kind: Kind
    expectation: Expectation
    bounded: bool = True
    """Whether a rate of false positives fails the self-test; otherwise it is shown, and `note` says why."""
    note: str = ""


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
    variants: Sequence[str] = ("raw",)
    phases: Mapping[str, Layers] | None = None

    @property
    def says(self) -> str:
        return " ".join((self.plant.__doc__ or "").split())

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


_WINDOW, _LAG, _RANDOM = {"null": "window"}, {"null": "lag"}, {"null": "random"}

_OF_LAYERS = [name for name, own in METRICS.items() if own.scope == "layer" and name not in NO_POPULATION_VALUE]
_OF_PAIRS = [name for name, own in METRICS.items() if own.scope in ("pair", "phase") and not own.from_law]
_OF_SPECTRA = ["effective_rank", "effective_rank_roy", "participation_ratio", "stable_rank", "top1_energy", "gamma"]

_REALISED = "true of the layers that were drawn, by chance over depth: documents cannot tell, only a rank can"

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
        ],
        covered={"layer:3": [*_OF_SPECTRA, "spectral_gap"]},
        degenerate="all eigenvalues are equal: the truth is the end of the figure's range",
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
        ],
    ),
    "uneven drift": World(
        uneven_drift,
        claims=[
            _claim("false positives", "intra_cosine", "C", ">=", _WINDOW),
            _claim("false positives", "intra_cosine", "C", ">", _LAG, bounded=False, note=_REALISED),
        ],
        anew=True,
    ),
    "equal layers": World(
        equal,
        claims=[
            _claim("false positives", "intra_cosine", "C", ">=", _WINDOW),
            _claim("false positives", "intra_cosine", "C", ">", _LAG),
            _claim("false positives", "intra_cosine", "C", ">", {"scope": "E"}),
        ],
    ),
    "independent layers": World(
        independent,
        claims=[
            _claim("false positives", "intra_cosine", "C", ">=", _WINDOW),
            _claim("false positives", "intra_cosine", "C", ">=", _RANDOM),
            _claim("false positives", "intra_cosine", "C", ">", _LAG, bounded=False, note=_REALISED),
            _claim("false positives", "intra_cosine", "C", ">", {"scope": "E"}, bounded=False, note=_REALISED),
        ],
        anew=True,
    ),
}
"""What the self-test runs, by name."""


def gated(metric: str, hidden: int) -> bool:
    """Whether a claim on the metric would be inconclusive for want of tokens."""
    return MIN_TOKENS_PER_DIMENSION.get(metric, 0.0) * hidden > DOCUMENTS * TOKENS
