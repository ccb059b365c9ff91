"""Metrics of one layer's update, from its spectrum and from averages over tokens.

Notation. delta is the update of one block, n tokens x d; sigma_i its singular values, p_i = sigma_i^2 / sum sigma^2.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64

from delta_suite.metrics.definition import metric
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.reduction.statistics import LayerStatistics

ENTROPY_FLOOR = 1e-12
"""Energy shares at or below this are left out of an entropy, as the reference does."""

TOO_FEW_GROUPS = "needs two groups of documents, and four where the updates are centred"
"""The reason why there is no unbiased participation ratio."""


def spectral_entropy_rank(weights: Float64[np.ndarray, " rank"]) -> float:
    """Return exp(-sum p ln p) of non-negative weights scaled to sum 1; shares up to 1e-12 are left out.

    Example:
        >>> round(spectral_entropy_rank(np.array([2.0, 2.0, 2.0])), 6)
        3.0
    """
    p = weights / weights.sum()
    p = p[p > ENTROPY_FLOOR]
    return float(np.exp(-(p * np.log(p)).sum()))


def _top_energy(layer: LayerStatistics, count: int) -> Estimate:
    """Return the share of the energy in the top `count` directions."""
    return Estimate(value=min(1.0, float(layer.energies[:count].sum())))


def _average(layer: LayerStatistics, quantity: str) -> Estimate:
    """Return the mean of a quantity over tokens, with its standard deviation."""
    mean, sd = layer.averages[quantity]
    return Estimate(value=mean, sd=sd)


@metric(
    "layer", "sigma_1", takes="spectrum", unit="stream units", source="reference script: top_singvals[0]", version=2
)
def gamma(layer: LayerStatistics) -> Estimate:
    """Return the top singular value of the update."""
    return Estimate(value=math.sqrt(layer.eigenvalues[0]))


@metric(
    "layer",
    "exp(-sum p_i ln p_i), p_i > 1e-12",
    takes="spectrum",
    unit="directions",
    low=1.0,
    most="rank",
    source="reference script: eff_rank",
    version=2,
)
def effective_rank(layer: LayerStatistics) -> Estimate:
    """Return the exponential of the spectral entropy: the number of directions that the energy is spread over."""
    return Estimate(value=spectral_entropy_rank(layer.eigenvalues))


@metric(
    "layer",
    "exp(-sum q_i ln q_i), q_i = sigma_i / sum sigma",
    takes="spectrum",
    unit="directions",
    low=1.0,
    most="rank",
    source="Roy & Vetterli 2007, The effective rank",
    version=2,
)
def effective_rank_roy(layer: LayerStatistics) -> Estimate:
    """Return the effective rank of Roy and Vetterli, which weighs singular values, not energies."""
    return Estimate(value=spectral_entropy_rank(np.sqrt(layer.eigenvalues)))


@metric(
    "layer",
    "1 / sum p_i^2",
    takes="spectrum",
    unit="directions",
    low=1.0,
    most="rank",
    source="participation ratio of the energies",
    version=2,
)
def participation_ratio(layer: LayerStatistics) -> Estimate:
    """Return the participation ratio of the energies: 1 for one direction, d for d equal ones."""
    return Estimate(value=float(1.0 / (layer.energies**2).sum()))


@metric(
    "layer",
    "[(tr G)^2 - sum (tr G_a)^2] / [||G||_F^2 - sum ||G_a||_F^2], G_a the Gram matrix of a group a of units; "
    "centred: (tr Sigma)^2 / tr Sigma^2, the mean from groups that enter nothing else",
    takes="spectrum",
    unit="directions",
    low=1.0,
    source="participation_ratio from different groups alone, which few tokens do not make small; arXiv 2509.26560",
    version=2,
    bias="none",
)
def participation_ratio_unbiased(layer: LayerStatistics) -> Estimate:
    """Return the participation ratio from different groups of units; absent with one document."""
    if layer.between is None:
        return absent(TOO_FEW_GROUPS)
    traces, squares = layer.between
    if squares <= 0.0:
        return absent("the updates of different groups of units have no energy in common directions")
    return Estimate(value=max(1.0, traces / squares))


@metric(
    "layer",
    "1 / p_1 = ||delta||_F^2 / sigma_1^2",
    takes="spectrum",
    unit="directions",
    low=1.0,
    most="rank",
    source="Rudelson & Vershynin 2007",
    version=2,
)
def stable_rank(layer: LayerStatistics) -> Estimate:
    """Return the energy of the update over that of its top direction."""
    return Estimate(value=float(1.0 / layer.energies[0]))


@metric("layer", "p_1", takes="spectrum", high=1.0, source="reference script: top1_frac", version=2)
def top1_energy(layer: LayerStatistics) -> Estimate:
    """Return the share of the energy in the top direction."""
    return _top_energy(layer, 1)


@metric("layer", "p_1 + p_2 + p_3", takes="spectrum", high=1.0, source="reference script: top3_frac", version=2)
def top3_energy(layer: LayerStatistics) -> Estimate:
    """Return the share of the energy in the top 3 directions."""
    return _top_energy(layer, 3)


@metric("layer", "p_1 + ... + p_10", takes="spectrum", high=1.0, source="reference script: top10_frac", version=2)
def top10_energy(layer: LayerStatistics) -> Estimate:
    """Return the share of the energy in the top 10 directions."""
    return _top_energy(layer, 10)


@metric(
    "layer",
    "sigma_1 / sigma_2",
    takes="spectrum",
    low=1.0,
    source="Davis & Kahan 1970: the gap bounds how far v_L can turn",
    version=2,
    bias="none",
)
def spectral_gap(layer: LayerStatistics) -> Estimate:
    """Return the ratio of the first two singular values; absent for an update of rank one."""
    if len(layer.eigenvalues) < 2 or layer.eigenvalues[1] == 0.0:
        return absent("the update has rank one, so there is no second singular value")
    return Estimate(value=math.sqrt(layer.eigenvalues[0] / layer.eigenvalues[1]))


@metric("layer", "||delta||_F", takes="spectrum", unit="stream units", source="reference script: frob", version=2)
def frobenius(layer: LayerStatistics) -> Estimate:
    """Return the Frobenius norm of the update."""
    return Estimate(value=math.sqrt(layer.eigenvalues.sum()))


@metric(
    "layer",
    "mean (sd) over tokens of ||delta||",
    takes="tokens",
    unit="stream units",
    source="reference script: token_norm",
)
def update_norm(layer: LayerStatistics) -> Estimate:
    """Return the mean length of a token's update."""
    return _average(layer, "update_norm")


@metric(
    "layer", "mean (sd) over tokens of ||h_L||", takes="tokens", unit="stream units", source="reference script: h_norm"
)
def stream_norm(layer: LayerStatistics) -> Estimate:
    """Return the mean length of a token's state before the block."""
    return _average(layer, "stream_norm")


@metric("layer", "mean (sd) over tokens of ||delta|| / ||h_L||", takes="tokens", source="reference script: rel_step")
def relative_step(layer: LayerStatistics) -> Estimate:
    """Return the mean ratio of the update's length to the state's."""
    return _average(layer, "relative_step")


@metric(
    "layer",
    "mean (sd) over tokens of cos(delta, h_L)",
    takes="tokens",
    low=-1.0,
    high=1.0,
    source="reference script: cos_delta_h",
)
def alignment(layer: LayerStatistics) -> Estimate:
    """Return the mean cosine of the update and the state: positive where a block lengthens the state."""
    return _average(layer, "alignment")


@metric(
    "layer",
    "mean (sd) over tokens of |cos(delta, h_L)|",
    takes="tokens",
    high=1.0,
    source="reference script: parallel_frac",
)
def parallel_fraction(layer: LayerStatistics) -> Estimate:
    """Return the mean absolute cosine of the update and the state."""
    return _average(layer, "parallel_fraction")


@metric(
    "layer",
    "mean (sd) over tokens of 1 - cos(h_L, h_{L+1})",
    takes="tokens",
    high=2.0,
    source="ShortGPT, arXiv 2403.03853",
)
def block_influence(layer: LayerStatistics) -> Estimate:
    """Return one minus the mean cosine of the state before and after the block."""
    return _average(layer, "block_influence")


@metric(
    "layer",
    "mean (sd) over tokens of arccos(cos(h_L, h_{L+1})) / pi",
    takes="tokens",
    high=1.0,
    source="Gromov et al., arXiv 2403.17887",
)
def angular_distance(layer: LayerStatistics) -> Estimate:
    """Return the mean angle between the state before and after the block, as a share of half a turn."""
    return _average(layer, "angular_distance")


@metric(
    "layer",
    "eps^2 / 24 * mean ||h_L||^2 / mean ||delta||^2, eps of the stream's dtype",
    takes="spectrum",
    source="uniform rounding error, per addition to the stream",
    version=3,
)
def rounding_share(layer: LayerStatistics) -> Estimate:
    """Return the share of the update's energy that is rounding error.

    Rounding moves a state by eps / sqrt(24) of its length, as a root mean square.
    """
    mean, sd = layer.averages["stream_norm"]
    update = layer.eigenvalues.sum() / layer.tokens
    return Estimate(value=float(layer.epsilon**2 / 24 * (mean**2 + sd**2) / update))


@metric(
    "layer",
    "n ||mean delta||^2 / ||delta||_F^2",
    takes="spectrum",
    high=1.0,
    source="the share of energy that centring removes",
    version=2,
)
def mean_energy(layer: LayerStatistics) -> Estimate:
    """Return the share of the energy that the mean update holds, which centring removes."""
    return Estimate(value=min(1.0, layer.mean_energy))
