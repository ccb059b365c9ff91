"""Every metric of the suite: its name, formula, unit, range, scope and version, and the function that computes it.

No torch here: layer metrics read a spectrum and token averages that the core has reduced to numpy, pair and phase
metrics read inner products of directions. So a stored record is judged again, under any phase map, without a model.

Notation. delta is the update of one block, n tokens x d; sigma_i its singular values, p_i = sigma_i^2 / sum sigma^2,
v_L the top right singular vector of layer L; k = 8 directions are kept per layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from jaxtyping import Float32, Float64

from delta_suite.metrics.boundaries import Boundaries, layer_similarity
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.reduction.statistics import TOP_K, LayerStatistics

if TYPE_CHECKING:
    from delta_suite.metrics.law import PhaseLaw

DISATTENUATION_FLOOR = 0.6
"""A cosine is corrected for attenuation only where both reliabilities exceed this: below, the correction is noise."""

ENTROPY_FLOOR = 1e-12
"""Energy shares at or below this are left out of an entropy, as the reference does."""

Bias = Literal["halves", "groups", "none"]


@dataclass(frozen=True)
class DirectionGram:
    """Inner products of the top-k directions of all layers: enough for every pair and phase metric.

    `whole[L, i, M, j]` is (direction i of layer L) . (direction j of layer M). A layer of rank below k has zeros
    for the directions it lacks. `aa`, `ab`, `bb`: the same for directions fitted on document halves a and b.
    """

    hidden: int
    whole: Float64[np.ndarray, "layers k layers k"]
    aa: Float64[np.ndarray, "layers k layers k"] | None = None
    ab: Float64[np.ndarray, "layers k layers k"] | None = None
    bb: Float64[np.ndarray, "layers k layers k"] | None = None
    replicates: tuple[DirectionGram, ...] = ()
    """The same without each group of documents in turn."""
    random: Float32[np.ndarray, "draws layers layers"] | None = None
    """Cosines of directions drawn at random, each layer's with the covariance of its own updates."""

    @classmethod
    def of(
        cls,
        directions: np.ndarray,
        halves: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> DirectionGram:
        """From directions (layers, k, hidden), and those of the two document halves where there are any."""
        layers, k, hidden = directions.shape

        def rows(own: np.ndarray) -> np.ndarray:
            return own.reshape(layers * k, hidden).astype(np.float64)

        def inner(left: np.ndarray, right: np.ndarray) -> np.ndarray:
            return np.asarray((left @ right.T).reshape(layers, k, layers, k))

        own = rows(directions)
        whole = inner(own, own)
        if halves is None:
            return cls(hidden, whole)
        a, b = map(rows, halves)
        return cls(hidden, whole, inner(a, a), inner(a, b), inner(b, b))

    @property
    def layers(self) -> int:
        return int(self.whole.shape[0])

    @property
    def halves(self) -> tuple[DirectionGram, ...]:
        """Of directions fitted on half a, and of those fitted on half b."""
        return tuple(DirectionGram(self.hidden, own) for own in (self.aa, self.bb) if own is not None)

    @property
    def cosines(self) -> Float64[np.ndarray, "layers layers"]:
        """v_L . v_M, signed."""
        return self.whole[:, 0, :, 0]

    @property
    def similarity(self) -> Float64[np.ndarray, "layers layers"]:
        """||U_L U_M^T||_F^2 / k; between document halves where there are any, so that shared tokens make none."""
        return layer_similarity(self.whole if self.ab is None else self.ab)

    def without_direction(self, layers: Sequence[int]) -> list[int]:
        """The layers among these whose update is zero, so that v_L does not exist."""
        return _without(self.whole, layers)

    def without_half(self, layers: Sequence[int]) -> list[int]:
        """The layers among these of which one half of the documents gives no direction."""
        halves = [own for own in (self.aa, self.bb) if own is not None]
        return sorted({layer for own in halves for layer in _without(own, layers)})


def _without(products: np.ndarray, layers: Sequence[int]) -> list[int]:
    return [layer for layer in layers if products[layer, 0, layer, 0] < 0.5]  # 1 or 0, up to rounding


@dataclass(frozen=True)
class Metric:
    """One row of the reference table, and the function behind it."""

    name: str
    scope: Literal["layer", "pair", "phase", "model"]
    """What it is a number of; `model`: of the whole model under its phase map."""
    formula: str
    unit: str
    low: float
    high: float
    """The range that the formula allows; `d`- or `N`-dependent bounds are given as infinity."""
    source: str
    version: int
    per_layer: bool
    """Whether a phase's value comes with one number per layer (always so for layer and pair metrics)."""
    compute: Callable[..., Any] = field(repr=False)
    adjacent: bool = False
    """Pair metrics: over a phase, only neighbours count."""
    from_directions: bool = False
    """Layer metrics: computed from the layer's directions, not its statistics."""
    bias: Bias = "halves"
    """How it is estimated, and taken off: `uncertainty.with_interval` says what each is."""
    from_law: bool = False
    """Phase metrics: computed from the update law fitted over the phase, not from directions."""


_REGISTRY: dict[str, Metric] = {}
METRICS: Mapping[str, Metric] = _REGISTRY
"""Every metric by name, in the order of the reference table."""


_F = TypeVar("_F", bound=Callable[..., Any])


def _register(
    scope: Literal["layer", "pair", "phase", "model"],
    formula: str,
    *,
    unit: str = "1",
    low: float = 0.0,
    high: float = math.inf,
    source: str = "",
    version: int = 1,
    per_layer: bool = True,
    adjacent: bool = False,
    from_directions: bool = False,
    bias: Bias = "halves",
    from_law: bool = False,
) -> Callable[[_F], _F]:
    def add(function: _F) -> _F:
        name = function.__name__
        _REGISTRY[name] = Metric(
            name,
            scope,
            formula,
            unit,
            low,
            high,
            source,
            version,
            per_layer,
            function,
            adjacent,
            from_directions,
            bias,
            from_law,
        )
        return function

    return add


# --- one layer -------------------------------------------------------------------------------------------------

ONE_DOCUMENT = "needs two halves of documents; the calibration is one document"
HALF_WITHOUT_UPDATE = "one half of the documents leaves layer {} without an update, so it has no direction there"
UNIT_ROWS = "unit rows are not in the stream's units; the variant raw has the share"


def spectral_entropy_rank(weights: Float64[np.ndarray, " rank"]) -> float:
    """exp(-sum p ln p) of non-negative weights scaled to sum 1; shares up to 1e-12 are left out."""
    p = weights / weights.sum()
    p = p[p > ENTROPY_FLOOR]
    return float(np.exp(-(p * np.log(p)).sum()))


def _top_energy(layer: LayerStatistics, count: int) -> Estimate:
    return Estimate(value=min(1.0, float(layer.energies[:count].sum())))


def _average(layer: LayerStatistics, quantity: str) -> Estimate:
    mean, sd = layer.averages[quantity]
    return Estimate(value=mean, sd=sd)


@_register("layer", "sigma_1", unit="stream units", source="reference script: top_singvals[0]")
def gamma(layer: LayerStatistics) -> Estimate:
    return Estimate(value=math.sqrt(layer.eigenvalues[0]))


@_register(
    "layer",
    "exp(-sum p_i ln p_i), p_i > 1e-12",
    unit="directions",
    low=1.0,
    source="reference script: eff_rank",
)
def effective_rank(layer: LayerStatistics) -> Estimate:
    return Estimate(value=spectral_entropy_rank(layer.eigenvalues))


@_register(
    "layer",
    "exp(-sum q_i ln q_i), q_i = sigma_i / sum sigma",
    unit="directions",
    low=1.0,
    source="Roy & Vetterli 2007, The effective rank",
)
def effective_rank_roy(layer: LayerStatistics) -> Estimate:
    return Estimate(value=spectral_entropy_rank(np.sqrt(layer.eigenvalues)))


@_register("layer", "1 / sum p_i^2", unit="directions", low=1.0, source="participation ratio of the energies")
def participation_ratio(layer: LayerStatistics) -> Estimate:
    return Estimate(value=float(1.0 / (layer.energies**2).sum()))


@_register(
    "layer",
    "[(tr G)^2 - sum (tr G_a)^2] / [||G||_F^2 - sum ||G_a||_F^2], G_a the Gram matrix of a group a of documents",
    unit="directions",
    low=1.0,
    source="participation_ratio from pairs of different groups alone, which few tokens do not make small",
    bias="none",
)
def participation_ratio_unbiased(layer: LayerStatistics) -> Estimate:
    if layer.between is None:
        return absent(ONE_DOCUMENT)
    traces, squares = layer.between
    if squares <= 0.0:
        return absent("the updates of different groups of documents have no energy in common directions")
    return Estimate(value=max(1.0, traces / squares))


@_register(
    "layer",
    "1 / p_1 = ||delta||_F^2 / sigma_1^2",
    unit="directions",
    low=1.0,
    source="Rudelson & Vershynin 2007",
)
def stable_rank(layer: LayerStatistics) -> Estimate:
    if layer.eigenvalues[0] == 0.0:  # without the group of documents that holds all of the leading direction
        return absent("nothing is left of the leading direction")
    return Estimate(value=float(1.0 / layer.energies[0]))


@_register("layer", "p_1", high=1.0, source="reference script: top1_frac")
def top1_energy(layer: LayerStatistics) -> Estimate:
    return _top_energy(layer, 1)


@_register("layer", "p_1 + p_2 + p_3", high=1.0, source="reference script: top3_frac")
def top3_energy(layer: LayerStatistics) -> Estimate:
    return _top_energy(layer, 3)


@_register("layer", "p_1 + ... + p_10", high=1.0, source="reference script: top10_frac")
def top10_energy(layer: LayerStatistics) -> Estimate:
    return _top_energy(layer, 10)


@_register("layer", "sigma_1 / sigma_2", low=1.0, source="Davis & Kahan 1970: the gap bounds how far v_L can turn")
def spectral_gap(layer: LayerStatistics) -> Estimate:
    if len(layer.eigenvalues) < 2 or layer.eigenvalues[1] == 0.0:
        return absent("the update has rank one, so there is no second singular value")
    return Estimate(value=math.sqrt(layer.eigenvalues[0] / layer.eigenvalues[1]))


@_register("layer", "||delta||_F", unit="stream units", source="reference script: frob")
def frobenius(layer: LayerStatistics) -> Estimate:
    return Estimate(value=math.sqrt(layer.eigenvalues.sum()))


@_register("layer", "mean (sd) over tokens of ||delta||", unit="stream units", source="reference script: token_norm")
def update_norm(layer: LayerStatistics) -> Estimate:
    return _average(layer, "update_norm")


@_register("layer", "mean (sd) over tokens of ||h_L||", unit="stream units", source="reference script: h_norm")
def stream_norm(layer: LayerStatistics) -> Estimate:
    return _average(layer, "stream_norm")


@_register("layer", "mean (sd) over tokens of ||delta|| / ||h_L||", source="reference script: rel_step")
def relative_step(layer: LayerStatistics) -> Estimate:
    return _average(layer, "relative_step")


@_register(
    "layer",
    "mean (sd) over tokens of cos(delta, h_L)",
    low=-1.0,
    high=1.0,
    source="reference script: cos_delta_h",
)
def alignment(layer: LayerStatistics) -> Estimate:
    return _average(layer, "alignment")


@_register("layer", "mean (sd) over tokens of |cos(delta, h_L)|", high=1.0, source="reference script: parallel_frac")
def parallel_fraction(layer: LayerStatistics) -> Estimate:
    return _average(layer, "parallel_fraction")


@_register("layer", "mean (sd) over tokens of 1 - cos(h_L, h_{L+1})", high=2.0, source="ShortGPT, arXiv 2403.03853")
def block_influence(layer: LayerStatistics) -> Estimate:
    return _average(layer, "block_influence")


@_register(
    "layer",
    "mean (sd) over tokens of arccos(cos(h_L, h_{L+1})) / pi",
    high=1.0,
    source="Gromov et al., arXiv 2403.17887",
)
def angular_distance(layer: LayerStatistics) -> Estimate:
    return _average(layer, "angular_distance")


@_register(
    "layer",
    "eps^2 / 24 * mean ||h_L||^2 / mean ||delta||^2, eps of the stream's dtype",
    source="uniform rounding error, per addition to the stream",
    version=2,
)
def rounding_share(layer: LayerStatistics) -> Estimate:
    """The share of the update's energy that is rounding: a state's last bit is off by eps / sqrt(24) of it, rms."""
    if layer.epsilon is None:
        return absent(UNIT_ROWS)
    mean, sd = layer.averages["stream_norm"]
    update = layer.eigenvalues.sum() / layer.tokens
    return Estimate(value=float(layer.epsilon**2 / 24 * (mean**2 + sd**2) / update))


@_register("layer", "n ||mean delta||^2 / ||delta||_F^2", high=1.0, source="what `centred` takes away")
def mean_energy(layer: LayerStatistics) -> Estimate:
    return Estimate(value=min(1.0, layer.mean_energy))


@_register(
    "layer",
    "r_L = |v_L^a . v_L^b|, v_L fitted on document halves a and b",
    high=1.0,
    from_directions=True,
    source="split-half reliability; below 0.9 a layer has no direction to speak of",
    bias="none",
)
def reliability(gram: DirectionGram, layer: int) -> Estimate:
    if gram.ab is None:
        return absent(ONE_DOCUMENT)
    if gram.without_half([layer]):
        return absent(HALF_WITHOUT_UPDATE.format(layer))
    return Estimate(value=min(1.0, abs(float(gram.ab[layer, 0, layer, 0]))))


# --- two layers ------------------------------------------------------------------------------------------------


def _overlap_singular_values(gram: DirectionGram, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles between the top-k subspaces of pairs of layers, descending."""
    singular = np.linalg.svd(gram.whole[first, :, second, :], compute_uv=False)
    return np.minimum(singular, 1.0)


@_register("pair", "|v_L . v_{L+1}|", high=1.0, adjacent=True, source="reference script: top1_cos_adjacent")
def adjacent_cosine(gram: DirectionGram, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.asarray(np.minimum(1.0, np.abs(gram.cosines[first, second])))


@_register(
    "pair",
    "||U_L U_M^T||_F^2 / k over the top k = 8 directions",
    high=1.0,
    source="Björck & Golub 1973",
    version=2,
    bias="none",
)
def subspace_overlap(gram: DirectionGram, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.asarray(np.minimum(1.0, np.square(gram.whole[first, :, second, :]).sum(axis=(1, 2)) / TOP_K))


@_register(
    "pair",
    "mean of the k = 8 principal angles arccos sigma_i(U_L U_M^T)",
    unit="radians",
    high=math.pi / 2,
    source="Björck & Golub 1973",
    version=2,
    bias="none",
)
def principal_angle(gram: DirectionGram, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.asarray(np.arccos(_overlap_singular_values(gram, first, second)).mean(axis=1))


# --- a phase ---------------------------------------------------------------------------------------------------


@_register(
    "phase",
    "mean of |v_L . v_M| over pairs in the phase; 1 for one layer",
    high=1.0,
    source="reference script",
)
def intra_cosine(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    if len(layers) == 1:
        return Estimate(value=1.0, per_layer={layers[0]: 1.0})  # the reference's convention
    cosines = np.minimum(np.abs(gram.cosines[np.ix_(layers, layers)]), 1.0)
    pairs = cosines[np.triu_indices(len(layers), k=1)]
    with_others = (cosines.sum(axis=1) - np.diag(cosines)) / (len(layers) - 1)
    return Estimate(value=float(pairs.mean()), per_layer=_by_layer(layers, with_others))


def _cross_fitted(gram: DirectionGram, layers: Sequence[int]) -> Float64[np.ndarray, "phase phase"] | None:
    """|v_L^a . v_M^b| averaged over which half is which; None without halves."""
    if gram.ab is None:
        return None
    products = np.minimum(np.abs(gram.ab[:, 0, :, 0][np.ix_(layers, layers)]), 1.0)
    return np.asarray((products + products.T) / 2)


@_register(
    "phase",
    "mean over pairs of |v_L^a . v_M^b|, each layer fitted on another half of the documents",
    high=1.0,
    source="cross-fit: tokens that two layers share cannot make them agree",
    version=2,
    bias="groups",
)
def intra_cosine_cross_fitted(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    products = _cross_fitted(gram, layers)
    if products is None:
        return absent(ONE_DOCUMENT)
    if len(layers) == 1:
        return absent("one layer has no pairs")
    if missing := gram.without_half(layers):
        return absent(HALF_WITHOUT_UPDATE.format(missing[0]))
    with_others = (products.sum(axis=1) - np.diag(products)) / (len(layers) - 1)
    pairs = products[np.triu_indices(len(layers), k=1)]
    return Estimate(value=float(pairs.mean()), per_layer=_by_layer(layers, with_others))


@_register(
    "phase",
    "mean over pairs of |v_L^a . v_M^b| / sqrt(r_L r_M), where r_L and r_M exceed 0.6",
    source="Spearman 1904, correction for attenuation",
    bias="none",
)
def intra_cosine_disattenuated(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    products = _cross_fitted(gram, layers)
    if products is None:
        return absent(ONE_DOCUMENT)
    reliable = np.diag(products)
    usable = reliable > DISATTENUATION_FLOOR
    if usable.sum() < 2:
        return absent(f"{usable.sum()} of {len(layers)} layers have a reliability above {DISATTENUATION_FLOOR}")
    corrected = products[np.ix_(usable, usable)] / np.sqrt(np.outer(reliable[usable], reliable[usable]))
    with_others = (corrected.sum(axis=1) - 1.0) / (usable.sum() - 1)
    per_layer: dict[int, float | None] = dict.fromkeys(layers)
    per_layer |= _by_layer([layer for layer, used in zip(layers, usable, strict=True) if used], with_others)
    return Estimate(value=float(corrected[np.triu_indices(len(corrected), k=1)].mean()), per_layer=per_layer)


@_register("phase", "mean of |v_L . v_M|, L in the phase, M outside", high=1.0, source="reference script")
def cross_cosine(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    inside = set(layers)
    others = [layer for layer in range(gram.layers) if layer not in inside]
    if not others:
        return absent("no layer lies outside")
    if missing := gram.without_direction(others):
        return absent(f"the update of layer {missing[0]} is zero, so it has no direction")
    cosines = np.minimum(np.abs(gram.cosines[np.ix_(layers, others)]), 1.0)
    return Estimate(value=float(cosines.mean()), per_layer=_by_layer(layers, cosines.mean(axis=1)))


@_register(
    "phase",
    "exp(-sum p_i ln p_i) of the N stacked v_L",
    unit="directions",
    low=1.0,
    per_layer=False,
    source="reference script, docstring: rank of the block",
)
def block_effective_rank(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    squared_singular_values = np.linalg.eigvalsh(gram.cosines[np.ix_(layers, layers)])
    return Estimate(value=spectral_entropy_rank(np.maximum(squared_singular_values, 0.0)))


@_register("phase", "block_effective_rank / N", high=1.0, per_layer=False, source="the same, over the layers' number")
def block_effective_rank_fraction(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    rank = block_effective_rank(gram, layers).value
    assert rank is not None
    return Estimate(value=min(1.0, rank / len(layers)))


def _captured(basis: np.ndarray, products: np.ndarray) -> np.ndarray:
    """Squared projections of unit vectors on the top-k right singular directions of a stack of rows.

    basis: inner products of the rows R = U S V^T with each other; products: of each row with each vector, one column
    a vector v. The projection of v on V_i is (U_i . R v) / S_i.
    """
    from scipy.linalg import eigh

    # The top k alone take half the time of all, and there is one such problem per layer, half and group of documents.
    size = len(basis)
    values, vectors = eigh(basis, subset_by_index=(max(0, size - TOP_K), size - 1), check_finite=False)
    present = values > size * np.finfo(np.float64).eps * values[-1]
    projections = (vectors[:, present].T @ products) ** 2 / values[present][:, None]
    return np.asarray(np.minimum(projections.sum(axis=0), 1.0))


@_register(
    "phase",
    "mean over L of ||B v_L||^2, B the top 8 right singular directions of the phase's stacked top-8 directions",
    high=1.0,
    source="reference script: capture",
    version=2,
    bias="none",
)
def capture_fraction(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    if len(layers) == 1:
        return absent("one layer spans its own basis")
    stack = _stack(gram.whole, layers, layers)
    captured = _captured(stack, stack[:, :: gram.whole.shape[1]])
    return Estimate(value=float(captured.mean()), per_layer=_by_layer(layers, captured))


@_register(
    "phase",
    "the same with B from the other layers of the phase, fitted on the other half of the documents",
    high=1.0,
    source="capture_fraction, cross-fitted over layers and documents",
    bias="none",
)
def capture_fraction_held_out(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    if len(layers) == 1:
        return absent("no other layer in the phase to form a basis from")
    if gram.aa is None or gram.ab is None or gram.bb is None:
        return absent(ONE_DOCUMENT)
    if missing := gram.without_half(layers):
        return absent(HALF_WITHOUT_UPDATE.format(missing[0]))
    captured = []
    for layer in layers:
        others = [other for other in layers if other != layer]
        a_in_b = _captured(_stack(gram.bb, others, others), _stack(gram.ab, [layer], others)[:1].T)
        b_in_a = _captured(_stack(gram.aa, others, others), _stack(gram.ab, others, [layer])[:, :1])
        captured.append(float(a_in_b[0] + b_in_a[0]) / 2)
    return Estimate(value=float(np.mean(captured)), per_layer=_by_layer(layers, np.array(captured)))


@_register(
    "phase",
    "largest eigenvalue of (1/N) sum V_L V_L^T; noise edge (1 + sqrt(8 N / d))^2 / N",
    high=1.0,
    per_layer=False,
    source="mean projector; Marchenko & Pastur 1967 for the edge",
    version=2,
    bias="none",
)
def shared_fraction(gram: DirectionGram, layers: Sequence[int]) -> Estimate:
    values = np.linalg.eigvalsh(_stack(gram.whole, layers, layers) / len(layers))[::-1][:TOP_K]
    edge = (1.0 + math.sqrt(TOP_K * len(layers) / gram.hidden)) ** 2 / len(layers)
    detail = {"noise_edge": edge, "eigenvalues": np.clip(values, 0.0, 1.0).tolist()}
    return Estimate(value=float(np.clip(values[0], 0.0, 1.0)), detail=detail)


def _stack(gram: np.ndarray, rows: Sequence[int], columns: Sequence[int]) -> np.ndarray:
    """The (len(rows) k) x (len(columns) k) matrix of inner products of two sets of layers' directions."""
    k = gram.shape[1]
    return np.asarray(gram[rows][:, :, columns].reshape(len(rows) * k, len(columns) * k))


def _by_layer(layers: Sequence[int], values: np.ndarray) -> dict[int, float | None]:
    return {layer: float(value) for layer, value in zip(layers, values, strict=True)}


# --- the update law over a phase -------------------------------------------------------------------------------

_LAW = "the update law, held out over documents: suite/analysis/update_law.py"


@_register(
    "phase",
    "median over L of [R2(c T^(-L)) - R2(c h)] / [R2(T_L) - R2(c h)]: shared map, fitted without L, against L's own",
    low=-math.inf,
    from_law=True,
    version=3,
    source=_LAW,
)
def sharing_index(law: PhaseLaw) -> Estimate:
    return law.ratio("shared", "scaled")


@_register(
    "phase",
    "median over L of R2 of c_L T^(-L), the map of the phase's other layers",
    low=-math.inf,
    high=1.0,
    from_law=True,
    version=3,
    source=_LAW,
)
def shared_r2(law: PhaseLaw) -> Estimate:
    return law.rung("shared")


@_register(
    "phase",
    "median over L of R2 of T_L, the layer's own map",
    low=-math.inf,
    high=1.0,
    from_law=True,
    version=3,
    source=_LAW,
)
def own_r2(law: PhaseLaw) -> Estimate:
    return law.rung("own")


@_register(
    "phase",
    "median over L of v^T R_L v / tr R_L, R_L the residual after the shared map, v its top eigenvector in training",
    high=1.0,
    from_law=True,
    version=3,
    source=_LAW,
)
def residual_rank_one_share(law: PhaseLaw) -> Estimate:
    return law.median(law.share)


@_register(
    "phase",
    "median over L of [R2(c T^(-L) + v w^T) - R2(c T^(-L))] / [R2(T_L) - R2(c T^(-L))]",
    low=-math.inf,
    from_law=True,
    version=3,
    source=_LAW,
)
def rank_one_closure(law: PhaseLaw) -> Estimate:
    return law.ratio("rank_one", "shared")


@_register(
    "phase",
    "median over L of the mean over M != L in the phase of R2 of c T_M on layer L",
    low=-math.inf,
    high=1.0,
    from_law=True,
    version=3,
    source=_LAW,
)
def transfer_r2(law: PhaseLaw) -> Estimate:
    return law.transferred()


# --- a model under its phase map -------------------------------------------------------------------------------


@_register(
    "model",
    "share of the orders of the phases' lengths that cut the depth at no higher cost than the declared order",
    high=1.0,
    per_layer=False,
    source="kernel cost of S: Arlot, Celisse & Harchaoui 2019",
)
def boundary_cost_rank(found: Boundaries) -> Estimate:
    if found.cost_rank is None:
        return absent(
            f"the phases' lengths have {found.orders} order{'s' if found.orders != 1 else ''}, too few to rank one"
        )
    detail = {
        "orders": found.orders,
        "any_lengths": found.cost_rank_any_lengths,
        "cost": found.declared_cost,
        "found_cost": found.found_cost,
        "total_cost": found.total_cost,
    }
    return Estimate(value=found.cost_rank, detail=detail)


@_register(
    "model",
    "share of the declared boundaries that a boundary of the segmentation of least cost meets within 1 layer",
    high=1.0,
    per_layer=False,
    source="kernel change points of S: Arlot, Celisse & Harchaoui 2019",
)
def boundary_agreement(found: Boundaries) -> Estimate:
    detail = {"by_chance": found.chance_agreement, "declared": list(found.declared), "found": list(found.found)}
    return Estimate(value=found.agreement, detail=detail)


@_register(
    "model",
    "p-value of the least cost over that of one segment, against smooth drift over depth; 1/1000 at the least",
    high=1.0,
    per_layer=False,
    source="999 Gaussian drifts with the mean of S by lag, as uneven as S",
)
def boundary_p(found: Boundaries) -> Estimate:
    detail = {
        "draws": found.draws,
        "least": 1 / (found.draws + 1),
        "share": found.found_cost / found.total_cost if found.total_cost > 0.0 else 1.0,
        "drift_dimensions": found.drift_dimensions,
    }
    return Estimate(value=found.p, detail=detail)
