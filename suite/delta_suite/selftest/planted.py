"""Populations with planted spectra and directions, and the true values of their metrics.

The update of token t of document j in layer L is

    delta = s_j (diag(sqrt(lambda_L)) (z_t + SPREAD m_jL) Q_L + mu_L),    z, m standard normal, s_j = exp(SCALE g_j)

so documents differ in scale (the same in all layers) and in mean, and tokens of one document are alike. Spectra and
directions estimate the second moment of delta,

    S_L = E[s^2] ((1 + SPREAD^2) Q_L^T diag(lambda_L) Q_L + mu_L mu_L^T).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float64, Int64

from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import phase_value
from delta_suite.metrics.registry import METRICS
from delta_suite.reduction.statistics import TOP_K, LayerStatistics
from delta_suite.selftest.documents import (
    DOCUMENTS,
    DOMAIN_SCALE,
    DOMAIN_SPREAD,
    SCALE,
    SPREAD,
    Layers,
    Population,
    ValueOf,
    orthonormal,
    unit,
)

if TYPE_CHECKING:
    from delta_suite.capture.stream import ResidualStream

TOKENS = 12
"""Number of tokens in a document of these populations."""

NO_POPULATION_VALUE = ("reliability",)
"""Metrics of the document halves themselves: with unlimited text reliability is 1, whatever is planted."""


@dataclass(frozen=True)
class Spectral(Population):
    """A population whose updates do not depend on the state."""

    spectra: Float64[np.ndarray, "layers hidden"]
    """lambda_L."""
    bases: Float64[np.ndarray, "layers hidden hidden"]
    """Q_L, with orthonormal rows."""
    means: Float64[np.ndarray, "layers hidden"]
    """mu_L."""
    sink: Float64[np.ndarray, " hidden"] | None = None
    tokens: int = TOKENS
    in_domain: int = 0
    tail: int | None = None
    copied: bool = False

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.spectra)

    @property
    def hidden(self) -> int:
        """The number of hidden dimensions."""
        return int(self.spectra.shape[1])

    def update(self, layer: int, state: np.ndarray, noise: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return the update of one layer."""
        return np.asarray(scale * ((noise * np.sqrt(self.spectra[layer])) @ self.bases[layer] + self.means[layer]))

    def truth(self, draw: np.random.Generator, documents: int) -> ValueOf:
        """Return the function that gives true values."""
        return Truth(self, draw, documents)


class Sublayers(Spectral):
    """A population of blocks with two sublayers: attention adds the updates of even number, the MLP those of odd."""

    def stream(self, draw: np.random.Generator, documents: int = DOCUMENTS) -> ResidualStream:
        """Return new documents as the residual stream that the tap would record, with the states between sublayers."""
        halves = super().stream(draw, documents)
        middles = halves.states[1::2]
        return replace(halves, states=halves.states[::2], middles=middles, parallel=[False] * len(middles))


class Truth:
    """True values of metrics: each metric computed from the second moments of the population."""

    def __init__(self, population: Spectral, draw: np.random.Generator, documents: int) -> None:
        """Compute the second moments, and draw `documents` for averages over tokens, which have no closed form."""
        assert population.sink is None, "the second moments leave out sinks"
        tokens = DOCUMENTS * TOKENS
        averages = _averages(population, draw, documents)
        self._layers, directions = [], []
        of_scale, of_square, spread = math.exp(SCALE**2 / 2), math.exp(2 * SCALE**2), 1 + SPREAD**2
        if population.in_domain:
            of_scale *= math.exp(DOMAIN_SCALE**2 / 2)
            of_square *= math.exp(2 * DOMAIN_SCALE**2)
            spread += DOMAIN_SPREAD**2
        for layer, (spectrum, basis, mean) in enumerate(
            zip(population.spectra, population.bases, population.means, strict=True)
        ):
            moment = of_square * (spread * (basis.T * spectrum) @ basis + np.outer(mean, mean))
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
        """Return a metric over layers as a claim takes it: a layer metric is averaged."""
        definition, scope = METRICS[metric], range(layers[0], layers[1] + 1)
        values = (
            [_value(definition.compute(self._layers[layer])) for layer in scope]
            if definition.scope == "layer"
            else [_value(phase_value(definition, self._gram, scope))]
        )
        return float(np.mean(values))


def _value(estimate: Estimate) -> float:
    """Return the value of an estimate, which exists for every planted population."""
    assert estimate.value is not None, estimate.reason
    return estimate.value


def _averages(population: Spectral, draw: np.random.Generator, documents: int) -> list[dict[str, tuple[float, float]]]:
    """Return for each layer the mean and standard deviation over tokens of every token quantity."""
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
    """Return one basis per layer, whose first row is the given direction and whose other rows are random."""
    hidden = directions.shape[1]
    bases = []
    for direction in directions:
        others = np.column_stack([direction, draw.standard_normal((hidden, hidden - 1))])
        basis = np.linalg.qr(others)[0].T
        basis[0] = direction  # QR may have changed its sign
        bases.append(basis)
    return np.stack(bases)


def _spiked(layers: int, hidden: int, top: float = 4.0) -> np.ndarray:
    """Return the spectra top, 1/2, 1/3, 1/4, ...; sigma_1 / sigma_2 is 2.8, as in layers with a clear direction."""
    return np.tile(np.concatenate([[top], 1.0 / np.arange(2, hidden + 1)]), (layers, 1))


SHARED, SPECIAL, DEPTH = (6, 10), (14, 21), 24
"""First and last layer of C and of E, and the number of layers: with fewer than 20 windows no rank reaches p = 0.05."""

SHARED_COSINE = 0.8
"""Cosine between the directions of two layers of C in `phased`."""


def phased(draw: np.random.Generator) -> Spectral:
    """Return a population in which the layers of C share a direction, and those of E do not."""
    hidden = 32
    directions = unit(draw.standard_normal((DEPTH, hidden)))
    common, *others = orthonormal(draw, hidden, 1 + SHARED[1] - SHARED[0] + 1)
    for layer, other in zip(range(SHARED[0], SHARED[1] + 1), others, strict=True):
        directions[layer] = math.sqrt(SHARED_COSINE) * common + math.sqrt(1 - SHARED_COSINE) * other
    spectra = _spiked(DEPTH, hidden)
    bases = _around(draw, directions)
    means = np.einsum("ld,ldh->lh", 0.5 * np.sqrt(spectra) * draw.standard_normal((DEPTH, hidden)), bases)
    return Spectral(spectra, bases, means)


DOMAIN_DOCUMENTS = 2
"""Number of documents of a domain in `domains`, as in `core`."""


def domains(draw: np.random.Generator) -> Spectral:
    """Return the population `phased`, whose documents come from domains that differ as much as documents do."""
    return replace(phased(draw), in_domain=DOMAIN_DOCUMENTS)


def wide(draw: np.random.Generator) -> Spectral:
    """Return a population of one layer with many dimensions for its tokens."""
    hidden = 192
    mean = 0.2 * draw.standard_normal(hidden) / math.sqrt(hidden)
    return Spectral(1.0 / np.arange(1, hidden + 1)[None], orthonormal(draw, hidden)[None], mean[None])


def noise(draw: np.random.Generator, sink: bool = False) -> Spectral:
    """Return an isotropic population, with sinks if `sink` is true."""
    layers, hidden = 12, 32
    bases = np.stack([np.eye(hidden)] * layers)
    direction = unit(draw.standard_normal(hidden)) if sink else None
    return Spectral(np.ones((layers, hidden)), bases, np.zeros((layers, hidden)), direction)


def sinks(draw: np.random.Generator) -> Spectral:
    """Return an isotropic population with sinks."""
    return noise(draw, sink=True)


def duplicates(draw: np.random.Generator) -> Spectral:
    """Return an isotropic population in which every document is there twice."""
    return replace(noise(draw), copied=True)


def heavy_tails(draw: np.random.Generator) -> Spectral:
    """Return the population `phased` with the tails of a Student's t of five degrees of freedom."""
    return replace(phased(draw), tail=5)


MASSIVE = 60.0
"""Mean of the massive dimension in every update; an ordinary update has a length of about 3."""


def massive_dimension(draw: np.random.Generator) -> Spectral:
    """Return the population `phased`, in which every update of a document adds as much to one dimension."""
    population = phased(draw)
    means = population.means.copy()
    means[:, 0] += MASSIVE
    return replace(population, means=means)


FAINT = 1e-8
"""Size of updates that float32 cannot hold beside a stream of about 3: half its spacing there is 1e-7."""


def near_zero(draw: np.random.Generator) -> Spectral:
    """Return the population `phased` whose layers of E write almost nothing, and the last layer nothing."""
    population = phased(draw)
    spectra, means = population.spectra.copy(), population.means.copy()
    faint = slice(SPECIAL[0], SPECIAL[1] + 1)
    spectra[faint] *= FAINT**2
    means[faint] *= FAINT
    spectra[-1], means[-1] = 0.0, 0.0
    return replace(population, spectra=spectra, means=means)


def equal_pair(draw: np.random.Generator) -> Spectral:
    """Return a population whose two largest singular values are equal; the layers of C have them in one plane."""
    hidden = 32
    spectra = _spiked(DEPTH, hidden)
    spectra[:, 1] = spectra[:, 0]
    planes = draw.standard_normal((DEPTH, hidden, 2))
    planes[SHARED[0] : SHARED[1] + 1] = planes[SHARED[0]]
    others = draw.standard_normal((DEPTH, hidden, hidden - 2))
    bases = np.swapaxes(np.linalg.qr(np.concatenate([planes, others], axis=2))[0], 1, 2)
    return Spectral(spectra, bases, np.zeros((DEPTH, hidden)))


def sublayers(draw: np.random.Generator) -> Sublayers:
    """Return a population whose MLPs write as `phased` does, and whose attention has unrelated directions."""
    attention, mlp = independent(draw), phased(draw)

    def in_turn(name: str) -> np.ndarray:
        both = np.stack([getattr(attention, name), getattr(mlp, name)], axis=1)
        return both.reshape(2 * DEPTH, *both.shape[2:])

    return Sublayers(in_turn("spectra"), in_turn("bases"), in_turn("means"))


def equal(draw: np.random.Generator) -> Spectral:
    """Return a population in which the directions of every two layers have the cosine 0.5."""
    hidden = 32
    common, *others = orthonormal(draw, hidden, DEPTH + 1)
    return _without_means(draw, math.sqrt(0.5) * common + math.sqrt(0.5) * np.stack(others))


def independent(draw: np.random.Generator) -> Spectral:
    """Return a population in which the directions of layers are independent."""
    return _without_means(draw, unit(draw.standard_normal((DEPTH, 32))))


def even_drift(draw: np.random.Generator) -> Spectral:
    """Return a population whose directions turn steadily over depth."""
    hidden, depth = 32, np.arange(DEPTH)[:, None]
    parts, speeds = np.sqrt([0.6, 0.25, 0.15]), np.array([0.06, 0.15, 0.35])
    path = np.hstack([parts * np.cos(speeds * depth), parts * np.sin(speeds * depth)])
    return _without_means(draw, path @ orthonormal(draw, hidden, 2 * len(parts)))


def _in_segments(draw: np.random.Generator, lengths: Int64[np.ndarray, " segments"]) -> Spectral:
    """Return a population whose layers scatter around one set of directions per segment."""
    hidden = 32
    centres = np.repeat(draw.standard_normal((len(lengths), hidden, hidden)), lengths, axis=0)
    factors = centres + 0.5 * draw.standard_normal(centres.shape)
    bases = np.swapaxes(np.linalg.qr(factors)[0], 1, 2)
    return Spectral(_spiked(DEPTH, hidden), bases, np.zeros((DEPTH, hidden)))


SEGMENTS = np.diff([0, SHARED[0], SHARED[1] + 1, SPECIAL[0], SPECIAL[1] + 1, DEPTH])
"""Lengths of the declared phases and of the runs of layers between them, in order."""


def segments(draw: np.random.Generator) -> Spectral:
    """Return a population with the declared phases."""
    return _in_segments(draw, SEGMENTS)


def segments_one_off(draw: np.random.Generator) -> Spectral:
    """Return a population with every boundary one layer later than declared."""
    return _in_segments(draw, SEGMENTS + np.array([1, 0, 0, 0, -1]))


def segments_elsewhere(draw: np.random.Generator) -> Spectral:
    """Return a population with the declared phases in random order."""
    return _in_segments(draw, draw.permutation(SEGMENTS))


def uneven_drift(draw: np.random.Generator) -> Spectral:
    """Return a population whose directions turn at a changing speed."""
    hidden, depth = 32, np.arange(DEPTH)
    kernel = np.exp(-((depth[:, None] - depth) ** 2) / (2 * 6.0**2))
    path = np.linalg.cholesky(kernel + 1e-9 * np.eye(DEPTH)) @ draw.standard_normal((DEPTH, 6))
    return _without_means(draw, unit(path) @ orthonormal(draw, hidden, 6))


def fast_ends(draw: np.random.Generator) -> Spectral:
    """Return a population whose directions turn fast at both ends of the depth, and slowly in the middle."""
    hidden, depth = 32, np.arange(DEPTH)
    time = np.cumsum(0.2 + 2 * np.abs((2 * depth + 1) / DEPTH - 1) ** 2)
    kernel = np.exp(-((time[:, None] - time) ** 2) / (2 * 3.0**2))
    path = np.linalg.cholesky(kernel + 1e-9 * np.eye(DEPTH)) @ draw.standard_normal((DEPTH, hidden))
    return _without_means(draw, unit(path))


def _without_means(draw: np.random.Generator, directions: np.ndarray) -> Spectral:
    """Return a population with these directions and updates of mean zero."""
    return Spectral(_spiked(*directions.shape), _around(draw, directions), np.zeros_like(directions))
