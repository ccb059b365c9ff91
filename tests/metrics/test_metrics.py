"""Metrics against the plainly written reference, and the properties that each metric must have."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from delta_suite.capture.stream import ResidualStream
from delta_suite.capture.units import Units
from delta_suite.metrics.boundaries import boundaries_under, boundary_metrics
from delta_suite.metrics.direction_gram import DirectionGram
from delta_suite.metrics.drift import FITTED, SmoothDrifts, against_drifts
from delta_suite.metrics.estimators import (
    direction_metrics,
    layer_metrics,
    phase_metrics,
    phase_value,
)
from delta_suite.metrics.layer import TOO_FEW_GROUPS
from delta_suite.metrics.nulls import OVER_PAIRS, lag_matched
from delta_suite.metrics.registry import METRICS, OF_LOSSES
from delta_suite.metrics.segmentation import DRAWS, SEED
from delta_suite.records.arrays import direction_arrays, full_gram
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.reference import drift_p, edge_contrast, held_out_capture, layer_figures, phase_figures

SIZES = [(40, 64), (200, 64), (64, 64), (20, 96)]


def stream(tokens: int, hidden: int, layers: int = 6, seed: int = 0, documents: int = 1) -> ResidualStream:
    """Return states whose updates share a direction, and have a decaying spectrum and two outlier rows."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    shared, decay = random(hidden), torch.arange(1, hidden + 1) ** -0.7
    states = [random(tokens, hidden)]
    for layer in range(layers):
        update = random(tokens, hidden) * decay @ random(hidden, hidden) / hidden**0.5
        update += random(tokens, 1) * (shared + 0.5 * layer * random(hidden))
        update[:2] *= 30
        states.append(states[-1] + update)
    document = torch.arange(tokens) * documents // tokens
    return ResidualStream(states, document, torch.arange(tokens), torch.ones(tokens, dtype=torch.bool), "device")


def reduced(residual: ResidualStream) -> list[LayerSpectra]:
    documents = int(residual.document.max()) + 1
    return reduce_stream([residual], layers=residual.layers, tokens=len(residual.document), units=Units.of(documents))[
        "raw"
    ]


def gram_of(layers: list[LayerSpectra]) -> DirectionGram:
    return full_gram(direction_arrays("raw", layers), "raw")


@pytest.mark.parametrize("name", OVER_PAIRS)
def test_a_layer_without_a_direction_is_no_part_of_the_lag_null(name: str) -> None:
    residual = stream(60, 16, documents=12)
    states = [*residual.states[:5], residual.states[4], *(state - residual.step(4)[1] for state in residual.states[6:])]
    still = ResidualStream(states, residual.document, residual.position, residual.kept, "device")
    gram = gram_of(reduced(still))
    assert gram.without_direction(range(6)) == [4]
    matched = lag_matched(gram, name, [0, 1])
    pairs = [(1, 2), (2, 3)]  # at distance 1, neither in the phase nor with layer 4
    expected = np.mean([phase_value(METRICS[name], gram, pair).value for pair in pairs])
    assert matched.value == pytest.approx(expected)


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
def test_layer_metrics_equal_the_reference(tokens: int, hidden: int) -> None:
    residual = stream(tokens, hidden)
    for layer, spectra in enumerate(reduced(residual)):
        expected = layer_figures(residual.states[layer].numpy(), residual.states[layer + 1].numpy())
        for name, estimate in layer_metrics(spectra.statistics).items():
            if name == "participation_ratio_unbiased":  # needs documents; compared with matrices in tests/reduction
                assert estimate.reason == TOO_FEW_GROUPS
                continue
            assert estimate.value == pytest.approx(expected[name], rel=1e-6), (layer, name)
            if f"{name}_sd" in expected:
                assert estimate.sd == pytest.approx(expected[f"{name}_sd"], rel=1e-6), (layer, name)
        cosines = np.abs(np.sum(spectra.directions.numpy() * expected["directions"], axis=1))
        assert cosines.min() > 1 - 1e-8


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
@pytest.mark.parametrize("phase", [[0, 1, 2], [3], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
def test_phase_metrics_equal_the_reference(tokens: int, hidden: int, phase: list[int]) -> None:
    residual = stream(tokens, hidden)
    directions = [
        layer_figures(residual.states[layer].numpy(), residual.states[layer + 1].numpy())["directions"]
        for layer in range(6)
    ]
    expected = phase_figures(directions, phase)
    got = phase_metrics(gram_of(reduced(residual)), phase)
    assert len(expected) >= 5
    for name, estimate in got.items():
        if name in expected:
            assert estimate.value == pytest.approx(expected[name], rel=1e-6), name
        else:
            assert estimate.value is None
            assert estimate.reason


def test_every_metric_of_the_registry_is_computed() -> None:
    layers = reduced(stream(40, 64, documents=4))
    gram = gram_of(layers)
    computed = (
        set(layer_metrics(layers[0].statistics))
        | set(direction_metrics(gram, 0))
        | set(phase_metrics(gram, [0, 1, 2]))
        | set(boundary_metrics(boundaries_under(gram, {"A": (0, 2), "B": (3, 5)})))
    )
    assert computed == {name for name, metric in METRICS.items() if metric.takes not in {"law", "stream", *OF_LOSSES}}


@pytest.mark.parametrize(("tokens", "hidden"), SIZES)
def test_held_out_capture_equals_the_reference(tokens: int, hidden: int) -> None:
    residual = stream(tokens, hidden, documents=5)
    in_a = residual.document % 2 == 0
    halves = [
        [
            layer_figures(residual.states[layer][rows].numpy(), residual.states[layer + 1][rows].numpy())["directions"]
            for layer in range(6)
        ]
        for rows in (in_a, ~in_a)
    ]
    if min(int(in_a.sum()), int((~in_a).sum())) < 8:
        pytest.skip("the reference needs eight directions per half")
    got = phase_metrics(gram_of(reduced(residual)), [1, 2, 3])["capture_fraction_held_out"]
    assert got.value == pytest.approx(held_out_capture(*halves, [1, 2, 3]), rel=1e-6)


@pytest.mark.parametrize(("tokens", "hidden"), [(200, 64), (120, 24)])
@pytest.mark.parametrize("metric", FITTED)
def test_smooth_drifts_equal_the_reference(tokens: int, hidden: int, metric: str) -> None:
    """The states alone are shared: directions, cosines, fit and drifts are formed anew, one pair after the other."""
    residual, phase = stream(tokens, hidden, layers=20, documents=4), range(6, 12)
    halves = [residual.document % 2 == 0, residual.document % 2 == 1, residual.document >= 0]
    a, b, whole = (
        [layer_figures(h[rows].numpy(), after[rows].numpy())["directions"][0] for h, after in pairwise(residual.states)]
        for rows in halves
    )
    if metric == "intra_cosine":
        cosines = np.abs(np.array(whole) @ np.array(whole).T)
    else:
        crossed = np.abs(np.array(a) @ np.array(b).T)
        cosines = (crossed + crossed.T) / 2
    drifts = against_drifts(gram_of(reduced(residual)), metric, phase)
    assert isinstance(drifts, SmoothDrifts)
    assert drifts.statistic == pytest.approx(edge_contrast(cosines, phase), rel=1e-6)
    assert drifts.p == pytest.approx(drift_p(cosines, phase, SEED, DRAWS), abs=1e-12)


def test_one_document_has_no_held_out_capture() -> None:
    got = phase_metrics(gram_of(reduced(stream(40, 64))), [1, 2, 3])["capture_fraction_held_out"]
    assert got.value is None
    assert "halves" in str(got.reason)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(3, 90), hidden=st.integers(2, 40))
def test_values_lie_in_their_range_and_ranks_are_ordered(seed: int, tokens: int, hidden: int) -> None:
    layers = reduced(stream(tokens, hidden, layers=3, seed=seed, documents=2))
    gram = gram_of(layers)
    for layer in layers:
        values = layer_metrics(layer.statistics)
        for name, estimate in (values | phase_metrics(gram, [0, 1, 2])).items():
            metric = METRICS[name]
            if estimate.value is not None:
                assert metric.low - 1e-9 <= estimate.value <= metric.high + 1e-9, name
        stable, participation, entropy = (
            values[name].value for name in ("stable_rank", "participation_ratio", "effective_rank")
        )
        assert stable is not None
        assert participation is not None
        assert entropy is not None
        assert stable <= participation * (1 + 1e-12)
        assert participation <= entropy * (1 + 1e-9)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), factor=st.floats(0.01, 100))
def test_rotation_changes_nothing_and_scale_only_what_has_units(seed: int, factor: float) -> None:
    residual = stream(50, 24, layers=3, seed=seed)
    rotation = torch.linalg.qr(torch.randn(24, 24, generator=torch.Generator().manual_seed(seed + 1)))[0]
    turned = ResidualStream(
        [(state @ rotation) * factor for state in residual.states],
        residual.document,
        residual.position,
        residual.kept,
        "device",
    )
    before, after = reduced(residual), reduced(turned)
    for one, two in zip(before, after, strict=True):
        for name, estimate in layer_metrics(one.statistics).items():
            scale = factor if METRICS[name].unit == "stream units" else 1.0
            expected = None if estimate.value is None else pytest.approx(estimate.value * scale, rel=2e-4, abs=1e-6)
            assert layer_metrics(two.statistics)[name].value == expected, name
    for name, estimate in phase_metrics(gram_of(before), [0, 1, 2]).items():
        # float32 states: the rotation rounds them, and a direction near a neighbour turns by that over the gap
        assert phase_metrics(gram_of(after), [0, 1, 2])[name].value == pytest.approx(estimate.value, abs=5e-3), name


def test_block_influence_identity() -> None:
    """The formula is 1 - (1 + sc) / sqrt(1 + 2sc + s^2), without cancellation where the step is 1e-6 of the stream."""
    generator = torch.Generator().manual_seed(3)
    before = torch.randn(30, 16, generator=generator, dtype=torch.float64)
    direction = torch.randn(30, 16, generator=generator, dtype=torch.float64)
    from delta_suite.reduction.moments import TOKEN_QUANTITIES, token_quantities

    for size in (1e-6, 1e-3, 1.0, 50.0):
        update = (direction * size).float()
        quantities = token_quantities(before.float(), update)
        get = {name: quantities[:, index] for index, name in enumerate(TOKEN_QUANTITIES)}
        s, c = get["relative_step"], get["alignment"]
        # the same quantity by the half-angle form 2 sin^2(angle / 2), computed in Python floats
        expected = [
            1 - (1 + a * b) / math.sqrt(1 + 2 * a * b + a * a) for a, b in zip(s.tolist(), c.tolist(), strict=True)
        ]
        assert get["block_influence"].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-15)
        assert torch.allclose(1 - get["block_influence"], torch.cos(get["angular_distance"] * torch.pi), atol=1e-12)


def test_a_zero_update_gives_reasons_in_place_of_values() -> None:
    residual = stream(30, 16, layers=3)
    still = ResidualStream(
        [residual.states[0], residual.states[0].clone(), residual.states[2], residual.states[3]],
        residual.document,
        residual.position,
        residual.kept,
        "device",
    )
    layers = reduced(still)
    values = layer_metrics(layers[0].statistics)
    assert values["frobenius"].value == 0.0
    assert values["effective_rank"].value is None
    assert "zero" in str(values["effective_rank"].reason)
    gram = gram_of(layers)
    assert phase_metrics(gram, [0, 1, 2])["intra_cosine"].value is None
    assert "layer 0" in str(phase_metrics(gram, [0, 1, 2])["intra_cosine"].reason)
    assert phase_metrics(gram, [1, 2])["cross_cosine"].value is None
    assert direction_metrics(gram, 0)["adjacent_cosine"].value is None


def test_planted_subspaces_are_told_apart() -> None:
    """Layers that share a direction, as claimed of C, and layers with one each, as claimed of E."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 8, generator=generator))[0].T

    def layers(directions: list[torch.Tensor]) -> DirectionGram:
        states = [torch.randn(300, 64, generator=generator)]
        for direction in directions:
            noise = 0.05 * torch.randn(300, 64, generator=generator)
            states.append(states[-1] + 3 * torch.randn(300, 1, generator=generator) * direction + noise)
        rows = torch.arange(300)
        return gram_of(reduced(ResidualStream(states, rows * 0, rows, rows >= 0, "device")))

    shared = phase_metrics(layers([basis[0]] * 6), range(6))
    apart = phase_metrics(layers(list(basis[:6])), range(6))
    assert shared["intra_cosine"].value == pytest.approx(1.0, abs=0.01)
    assert apart["intra_cosine"].value == pytest.approx(0.0, abs=0.02)
    assert shared["block_effective_rank"].value == pytest.approx(1.0, abs=0.02)
    assert apart["block_effective_rank"].value == pytest.approx(6.0, abs=0.02)
