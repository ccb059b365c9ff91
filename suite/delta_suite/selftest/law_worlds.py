"""Populations that obey the update law, or a part of it, and the true values of its metrics.

    delta_L = M_L x + gamma_L v_L tanh(w_L . x) + b_L + NOISE s_j (z + SPREAD m_jL),    x = h_L / rms(h_L)

Where the map is shared, M_L is a multiple of one matrix J; where it is not, each layer has a J to itself. With J^T = -J
and J J^T = 1, h + c J h is h rotated, and stretched equally in all directions. So with gamma = 0, x stays isotropic in
every layer, no residual has a direction, and M = c J has the R^2 c^2 / (c^2 + NOISE^2 (1 + SPREAD^2) E[s^2]). The v_L
and w_L of each layer are random unit vectors. The constants b_L are zero but where means are planted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64

from delta_suite.selftest.documents import Layers, Population, ValueOf, orthonormal, unit

LAW_TOKENS = 48
"""Number of tokens in a document. 1,880 enter the fit of one fold, 59 per dimension; the law needs 10."""

HIDDEN, DEPTH = 32, 12
"""Width of the stream, and number of layers."""

LAW_C, LAW_E = (1, 5), (6, 10)
"""The first and last layer of phases C and E."""

NOISE = 0.7
"""Standard deviation of the noise entries before documents' scale. Noise then has energy 22, a map of gain 1 has 32."""

AT_ONCE = 500
"""Number of documents drawn at a time for the true values."""


@dataclass(frozen=True)
class Lawful(Population):
    """A population whose updates are a map of the state, plus one direction, plus noise."""

    maps: Float64[np.ndarray, "layers hidden hidden"]
    """M_L."""
    gammas: Float64[np.ndarray, " layers"]
    directions: Float64[np.ndarray, "layers hidden"]
    """v_L."""
    readers: Float64[np.ndarray, "layers hidden"]
    """w_L."""
    constants: Float64[np.ndarray, "layers hidden"]
    """b_L."""
    tokens: int = LAW_TOKENS

    @property
    def layers(self) -> int:
        """The number of layers."""
        return len(self.maps)

    @property
    def hidden(self) -> int:
        """The number of hidden dimensions."""
        return int(self.maps.shape[1])

    def update(self, layer: int, state: np.ndarray, noise: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """Return the update of one layer."""
        x = normalised(state)
        along = self.gammas[layer] * np.tanh(x @ self.readers[layer])
        mapped = x @ self.maps[layer].T + along[:, None] * self.directions[layer]
        return np.asarray(mapped + self.constants[layer] + NOISE * scale * noise)

    def truth(self, draw: np.random.Generator, documents: int) -> ValueOf:
        """Return the function that gives true values."""
        return LawTruth(self, draw, documents)


def normalised(state: Float64[np.ndarray, "tokens hidden"]) -> Float64[np.ndarray, "tokens hidden"]:
    """Return h / rms(h) of every token."""
    return np.asarray(state / np.sqrt((state**2).mean(axis=1, keepdims=True)))


class LawTruth:
    """True values of the law's metrics, from their definitions and the covariances of x and delta.

    The covariances have no closed form because of tanh, so a large sample gives them. Maps have the ridge of a
    measurement, and v is the top eigenvector of the true residual.
    """

    def __init__(self, population: Lawful, draw: np.random.Generator, documents: int) -> None:
        """Compute the covariances from a draw of documents, in rounds of at most AT_ONCE."""
        layers, hidden = population.layers, population.hidden
        sums, squares = np.zeros((layers, 2 * hidden)), np.zeros((layers, 2 * hidden, 2 * hidden))
        rounds = -(-documents // AT_ONCE)
        drawn = min(documents, AT_ONCE)
        for _ in range(rounds):
            states = [state.astype(np.float64) for state in population.states(draw, drawn)]
            for layer in range(layers):
                both = np.hstack([normalised(states[layer]), states[layer + 1] - states[layer]])
                sums[layer] += both.sum(axis=0)
                squares[layer] += both.T @ both
        n = rounds * drawn * population.tokens
        covariance = squares / n - np.einsum("li,lj->lij", sums, sums) / n**2
        self._A = covariance[:, :hidden, :hidden]
        """Cov(x, x), (layers, hidden, hidden); B: Cov(delta, x), D: Cov(delta, delta)."""
        self._mean = sums[:, hidden:] / n
        self._energy = np.trace(squares[:, hidden:, hidden:], axis1=1, axis2=2) / n
        """The mean of delta, (layers, hidden), and that of ||delta||^2."""
        self._B = covariance[:, hidden:, :hidden]
        self._D = covariance[:, hidden:, hidden:]

    def __call__(self, metric: str, layers: Layers, ridges: tuple[float, ...]) -> float:
        """Return the median of a metric over layers; R^2 and shares are averaged over maps fitted with each ridge."""
        phase = range(layers[0], layers[1] + 1)
        figures = []
        for layer in phase:
            fits = [self._fitted(layer, phase, ridge) for ridge in ridges]
            figures.append(_figures({name: float(np.mean([fit[name] for fit in fits])) for name in fits[0]})[metric])
        return float(np.median(figures))

    def _fitted(self, layer: int, phase: range, ridge: float) -> dict[str, float]:
        """Return R^2 of every rung, the mean R^2 of other layers' maps, and the share of the residual along v."""
        A, B, D = self._A[layer], self._B[layer], self._D[layer]
        others = [other for other in phase if other != layer]

        def least_squares(B: np.ndarray, A: np.ndarray) -> np.ndarray:
            return np.asarray(B @ np.linalg.inv(A + ridge * np.trace(A) / len(A) * np.eye(len(A))))

        def with_best_gain(T: np.ndarray) -> np.ndarray:
            return np.asarray(np.trace(T @ B.T) / np.trace(T @ A @ T.T) * T)

        def r2(T: np.ndarray) -> float:
            return float((2 * np.trace(T @ B.T) - np.trace(T @ A @ T.T)) / np.trace(D))

        pooled = sum(self._B[other] / np.sqrt(np.trace(self._D[other])) for other in others)
        shared = with_best_gain(least_squares(np.asarray(pooled), self._A[others].sum(axis=0)))
        values, vectors = np.linalg.eigh(D - shared @ B.T - B @ shared.T + shared @ A @ shared.T)
        v = vectors[:, -1:]
        mean, energy = self._mean[layer], self._energy[layer]
        constant = sum(self._mean[other] / np.sqrt(self._energy[other]) for other in others)
        transferred = [with_best_gain(least_squares(self._B[other], self._A[other])) for other in others]
        return {
            "shared_mean": float((constant @ mean) ** 2 / (constant @ constant) / energy),
            "own_mean": float(mean @ mean / energy),
            "scaled": r2(with_best_gain(np.eye(len(A)))),
            "shared": r2(shared),
            "rank_one": r2(shared + v @ v.T @ least_squares(B - shared @ A, A)),
            "own": r2(least_squares(B, A)),
            "transferred": float(np.mean([r2(T) for T in transferred])),
            "share": float(values[-1] / values.sum()),
        }


def _figures(r2: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of one layer by name."""
    return {
        "shared_mean_r2": r2["shared_mean"],
        "mean_sharing": r2["shared_mean"] / r2["own_mean"],
        "own_r2": r2["own"],
        "shared_r2": r2["shared"],
        "transfer_r2": r2["transferred"],
        "residual_rank_one_share": r2["share"],
        "sharing_index": (r2["shared"] - r2["scaled"]) / (r2["own"] - r2["scaled"]),
        "rank_one_closure": (r2["rank_one"] - r2["shared"]) / (r2["own"] - r2["shared"]),
    }


# --- populations -----------------------------------------------------------------------------------------------

Gains = tuple[float, float]
"""Gains of the layers of C and of E. All other layers have separate maps of gain 1, so that one ridge suits all."""


def _planted(draw: np.random.Generator, shared: Gains, separate: Gains = (0, 0), gamma: Gains = (0, 0)) -> Lawful:
    """Return a population with these gains of the shared map, of separate maps, and of the directions."""

    def of_layers(gains: Gains, elsewhere: float = 0.0) -> np.ndarray:
        out = np.full(DEPTH, elsewhere)
        for (first, last), gain in zip((LAW_C, LAW_E), gains, strict=True):
            out[first : last + 1] = gain
        return out

    common, *others = (_turn(draw) for _ in range(1 + DEPTH))
    maps = np.multiply.outer(of_layers(shared), common) + of_layers(separate, 1.0)[:, None, None] * np.stack(others)
    directions, readers = (unit(draw.standard_normal((DEPTH, HIDDEN))) for _ in range(2))
    return Lawful(maps, of_layers(gamma), directions, readers, np.zeros_like(directions))


def _turn(draw: np.random.Generator) -> np.ndarray:
    """Return a random J."""
    basis = orthonormal(draw, HIDDEN)
    return np.asarray(basis.T @ np.kron(np.array([[0, -1], [1, 0]]), np.eye(HIDDEN // 2)) @ basis)


def law(draw: np.random.Generator) -> Lawful:
    """Return a population that obeys the law as claimed of C and E."""
    return _planted(draw, shared=(1.0, 0.4), gamma=(1.8, 5.5))


def law_without_direction(draw: np.random.Generator) -> Lawful:
    """Return a population with a shared map and no direction."""
    return _planted(draw, shared=(1.0, 0.4), separate=(0.0, 0.8))


def own_maps(draw: np.random.Generator) -> Lawful:
    """Return a population in which each layer has a separate map."""
    return _planted(draw, shared=(0.0, 0.0), separate=(1.0, 1.0))


def exchanged(draw: np.random.Generator) -> Lawful:
    """Return a population that obeys the law with C and E exchanged."""
    return _planted(draw, shared=(0.4, 1.0), gamma=(5.5, 1.8))


SHARED_MEAN, SEPARATE_MEAN = (3.0, 1.5), (1.5, 3.0)
"""Lengths of the constants of C and of E: of the one that the layers of a phase share, and of each layer's own."""


def means(draw: np.random.Generator) -> Lawful:
    """Return a population whose layers write constants and no map, in C mostly one and in E mostly each another."""
    population = _planted(draw, shared=(0.0, 0.0))
    constants = np.zeros_like(population.constants)
    for (first, last), shared, separate in zip((LAW_C, LAW_E), SHARED_MEAN, SEPARATE_MEAN, strict=True):
        common, *others = orthonormal(draw, HIDDEN, 2 + last - first)
        constants[first : last + 1] = shared * common + separate * np.stack(others)
    return replace(population, constants=constants)
