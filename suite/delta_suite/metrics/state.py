"""Metrics of the states h_L themselves, which the part `stream` measures.

Notation. H_L holds the states h_L of all tokens, n x d; delta = h_{L+1} - h_L. A map is fitted on one half of the units
and scored on the other, in both directions, with a ridge chosen inside the half of the fit; SSE is what it leaves, and
SST(y) the energy of y about its mean in the half of the fit.
"""

from __future__ import annotations

from delta_suite.metrics.definition import metric
from delta_suite.metrics.estimate import Estimate, absent
from delta_suite.metrics.layer import spectral_entropy_rank
from delta_suite.reduction.state_statistics import LINEAR, TOKENWISE, StateStatistics

OF_VARIANT = {
    "raw": ("stream_effective_rank", "sink_norm_ratio", "linearity", "update_linearity", "curvature"),
    "sink_free": ("stream_effective_rank", "linearity", "update_linearity", "tokenwise_share", "curvature"),
    "centred": ("stream_effective_rank",),
}
"""The metrics that stand under each variant. Fits and angles are the same centred, sink_norm_ratio is about sinks, and
the tokenwise map is fitted without them."""


@metric(
    "layer",
    "exp(-sum p_i ln p_i), p_i = s_i^2 / sum s^2, s_i the singular values of H_L, p_i > 1e-12",
    takes="stream",
    unit="directions",
    low=1.0,
    most="rank",
    source="matrix-based entropy of the states, Skean et al., arXiv 2502.02013; Queipo-de-Llano et al., 2510.06477",
    bias="replicates",
)
def stream_effective_rank(state: StateStatistics) -> Estimate:
    """Return the number of directions that the energy of the states is spread over."""
    if state.eigenvalues.sum() == 0.0:
        return absent("the states are zero on every token that enters")
    return Estimate(value=spectral_entropy_rank(state.eigenvalues))


@metric(
    "layer",
    "mean over documents of ||h_L|| at position 0 / median over the other tokens of ||h_L||",
    takes="stream",
    source="massive activations of the first token, Sun et al., arXiv 2402.17762; arXiv 2510.06477",
    bias="none",
)
def sink_norm_ratio(state: StateStatistics) -> Estimate:
    """Return how many times the usual norm the first token of a text has."""
    if state.norms is None:
        return absent("no token at position 0 enters, or none elsewhere")
    first, usual = state.norms
    return Estimate(value=first / usual) if usual > 0.0 else absent("half of the states are zero")


@metric(
    "layer",
    "1 - SSE / SST(h_{L+1}), SSE of the ridge regression of delta on h_L, held out",
    takes="stream",
    low=float("-inf"),
    high=1.0,
    source="linearity score of Razzhigaev et al., arXiv 2405.12250, held out",
    bias="none",
)
def linearity(state: StateStatistics) -> Estimate:
    """Return how well a linear map of a state gives the next one, on text that it was not fitted on."""
    return _explained(state, LINEAR, state.energy[1])


@metric(
    "layer",
    "1 - SSE / SST(delta), SSE as in linearity",
    takes="stream",
    low=float("-inf"),
    high=1.0,
    source="linearity without the residual connection, arXiv 2405.12250, held out",
    bias="none",
)
def update_linearity(state: StateStatistics) -> Estimate:
    """Return how well a linear map of a state gives its update, on text that it was not fitted on."""
    return _explained(state, LINEAR, state.energy[0])


@metric(
    "layer",
    "1 - SSE / SST(delta), SSE of the ridge regression of delta on x = h_L / rms(h_L) and 512 random features "
    "relu(W x + b), held out",
    takes="stream",
    low=float("-inf"),
    high=1.0,
    source="the tokenwise part of an update, after Yoo, arXiv 2604.02459; random features for local maps are ours",
    bias="none",
)
def tokenwise_share(state: StateStatistics) -> Estimate:
    """Return the share of the update that a function of the token's own state gives, found in a class that may bend."""
    return _explained(state, TOKENWISE, state.energy[0])


@metric(
    "layer",
    "mean (sd) over t of the angle between h_{t+1} - h_t and h_{t+2} - h_{t+1}, t the position in a document",
    takes="stream",
    unit="radians",
    high=3.141592653589793,
    source="Hosseini & Fedorenko 2023; Skean et al., arXiv 2502.02013",
    bias="none",
)
def curvature(state: StateStatistics) -> Estimate:
    """Return the mean angle by which the path of the states over a text turns at each token."""
    if state.angle is None:
        return absent("no three tokens that enter follow each other with two steps between them")
    mean, sd = state.angle
    return Estimate(value=mean, sd=sd)


def _explained(state: StateStatistics, name: str, energy: float) -> Estimate:
    """Return the share of an energy that a fitted map explains."""
    if state.not_fitted is not None:
        return absent(state.not_fitted)
    if name not in state.unexplained or energy == 0.0:
        return absent("what is to be explained does not vary")
    return Estimate(value=min(1.0, 1.0 - state.unexplained[name] / energy))
