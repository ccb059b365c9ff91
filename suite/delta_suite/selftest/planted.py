"""Populations of updates whose truth is known, the documents drawn from them, and what is claimed of each.

The update of token t of document j in layer L is

    delta = s_j (diag(sqrt(lambda_L)) (z_t + SPREAD m_jL) Q_L + mu_L),    z, m standard normal, s_j = exp(SCALE g_j)

so documents differ in scale (the same in all layers) and in mean, and tokens of one document are alike. Its second
moment, which a model's spectra and directions estimate, is

    S_L = E[s^2] ((1 + SPREAD^2) Q_L^T diag(lambda_L) Q_L + mu_L mu_L^T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import phase_value
from delta_suite.metrics.registry import METRICS
from delta_suite.reduction.statistics import TOP_K, LayerStatistics
from delta_suite.selftest.documents import DOCUMENTS, SCALE, SPREAD, Layers, Population, ValueOf, orthonormal, unit

TOKENS = 12
"""Tokens of a document whose updates are planted by their spectra."""

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
        """Return the number of layers."""
        return len(self.spectra)

    @property
    def hidden(self) -> int:
        """Return the number of hidden dimensions."""
        return int(self.spectra.shape[1])

    def update(self, layer: int, state: np.ndarray, noise: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return the update of one layer."""
        return np.asarray(scale * ((noise * np.sqrt(self.spectra[layer])) @ self.bases[layer] + self.means[layer]))

    def truth(self, draw: np.random.Generator, documents: int) -> ValueOf:
        """Return the function that gives the true figures."""
        return Truth(self, draw, documents)


class Truth:
    """The values of figures with unlimited text: each metric, put to the population's own second moments."""

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
        """Return the value over layers as a claim takes it: the mean of a layer metric."""
        definition, scope = METRICS[metric], range(layers[0], layers[1] + 1)
        values = (
            [_value(definition.compute(self._layers[layer])) for layer in scope]
            if definition.scope == "layer"
            else [_value(phase_value(definition, self._gram, scope))]
        )
        return float(np.mean(values))


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
            quantities = token_quantities(states[layer], states[layer + 1] - states[layer]).numpy()
            sums[:, layer] += quantities.mean(axis=0), (quantities**2).mean(axis=0)
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
    common, *others = orthonormal(draw, hidden, 1 + SHARED[1] - SHARED[0] + 1)
    for layer, other in zip(range(SHARED[0], SHARED[1] + 1), others, strict=True):
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
    common, *others = orthonormal(draw, hidden, DEPTH + 1)
    return _without_means(draw, math.sqrt(0.5) * common + math.sqrt(0.5) * np.stack(others))


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
    factors = centres + 0.5 * draw.standard_normal(centres.shape)
    bases = np.swapaxes(np.linalg.qr(factors)[0], 1, 2)
    return Spectral(_spiked(DEPTH, hidden), bases, np.zeros((DEPTH, hidden)))


SEGMENTS = np.diff([0, SHARED[0], SHARED[1] + 1, SPECIAL[0], SPECIAL[1] + 1, DEPTH])
"""Lengths of the declared phases, and of the runs of layers between them."""


def segments(draw: np.random.Generator) -> Spectral:
    """Layers of a declared phase have nearly the same directions; those of two phases have unrelated ones."""
    return _in_segments(draw, SEGMENTS)


def segments_elsewhere(draw: np.random.Generator) -> Spectral:
    """Segments in an order drawn anew, so that the declared boundaries are any others."""
    return _in_segments(draw, draw.permutation(SEGMENTS))


def uneven_drift(draw: np.random.Generator) -> Spectral:
    """Directions turn smoothly, now faster and now slower: a Gaussian process over depth in six dimensions."""
    hidden, depth = 32, np.arange(DEPTH)
    kernel = np.exp(-((depth[:, None] - depth) ** 2) / (2 * 6.0**2))
    path = np.linalg.cholesky(kernel + 1e-9 * np.eye(DEPTH)) @ draw.standard_normal((DEPTH, 6))
    return _without_means(draw, unit(path) @ orthonormal(draw, hidden, 6))


def _without_means(draw: np.random.Generator, directions: np.ndarray) -> Spectral:
    return Spectral(_spiked(*directions.shape), _around(draw, directions), np.zeros_like(directions))
