"""Each variant against its plain definition, on both sides of the Gram matrix and over shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from delta_suite.capture.sinks import SINK_RATIO, find_sinks
from delta_suite.capture.stream import ResidualStream
from delta_suite.metrics.estimators import layer_metrics
from delta_suite.reduction import eigen, moments
from delta_suite.reduction import gram as spectra
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.resampling import LayerSpectra
from delta_suite.reduction.variants import VARIANTS

from tests.metrics.test_metrics import gram_of, stream
from tests.reference import entropy_rank

FEW, MANY = (40, 64), (300, 24)
"""Tokens and hidden size: the token side and the hidden side."""


def with_sinks(tokens: int, hidden: int, documents: int = 6) -> ResidualStream:
    """A stream of sequences whose first token, and two others, have a state far above the rest."""
    own = stream(tokens, hidden, layers=4, seed=5)
    document = torch.arange(tokens) * documents // tokens
    position = torch.cat([torch.arange(int((document == d).sum())) for d in range(documents)])
    states = [state.clone() for state in own.states]
    for state in states[2:]:
        state[position == 0] *= 40
        state[[7, 20]] *= 200
    return ResidualStream(states, document, position, own.kept, "device")


def plain(own: ResidualStream, layer: int, variant: str, rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Singular values and top direction, straight from the definition."""
    delta = (own.states[layer + 1] - own.states[layer]).double().numpy()
    if not VARIANTS[variant].keeps_sinks:
        norms = np.stack([np.linalg.norm(state.numpy(), axis=1) for state in own.states])
        medians = np.median(norms[:, own.position.numpy() > 0], axis=1, keepdims=True)
        sink = (own.position.numpy() == 0) | ((norms / medians) > SINK_RATIO).any(axis=0)
        rows = rows & torch.tensor(~sink)
    delta = delta[rows.numpy()]
    if VARIANTS[variant].centre:
        delta = delta - delta.mean(axis=0)
    _, sigma, vt = np.linalg.svd(delta, full_matrices=False)
    return sigma, vt[0]


def reduced(own: ResidualStream, shards: int = 1) -> dict[str, list[LayerSpectra]]:
    documents = int(own.document.max()) + 1
    pieces = [own.take(rows) for rows in torch.arange(len(own.kept)).chunk(shards)]
    variants = list(VARIANTS.values())
    return reduce_stream(pieces, layers=own.layers, tokens=int(own.kept.sum()), documents=documents, variants=variants)


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_the_definition(size: tuple[int, int], variant: str) -> None:
    own = with_sinks(*size)
    everything = torch.ones(size[0], dtype=torch.bool)
    got = reduced(own)[variant]
    for layer in range(own.layers):
        sigma, top = plain(own, layer, variant, everything)
        values = np.sqrt(got[layer].statistics.eigenvalues)
        assert np.abs(values[: len(sigma)] - sigma).max() <= 1e-6 * sigma[0]
        assert not values[len(sigma) :].any()
        assert entropy_rank(values**2 / (values**2).sum()) == pytest.approx(
            entropy_rank(sigma**2 / (sigma**2).sum()), rel=1e-6
        )
        assert abs(float(got[layer].directions[0].numpy() @ top)) > 1 - 1e-6
        halves = got[layer].half_directions
        assert halves is not None
        for half, rows in zip(halves, (own.document % 2 == 0, own.document % 2 == 1), strict=True):
            _, top = plain(own, layer, variant, rows)
            assert abs(float(half[0].numpy() @ top)) > 1 - 1e-6


def test_sinks_are_named_once_for_all_layers() -> None:
    own = with_sinks(*MANY)
    sinks = find_sinks(own)
    assert sinks.first == 6
    assert sinks.large >= 2
    assert {(int(own.document[row]), int(own.position[row])) for row in (7, 20)} <= {row[:2] for row in sinks.largest}
    assert all(row[3] > SINK_RATIO or row[1] == 0 for row in sinks.largest)


@pytest.mark.parametrize("variant", ["raw", "centred"])
def test_shards_add_up(variant: str) -> None:
    own = with_sinks(*MANY)
    for one, two in zip(reduced(own)[variant], reduced(own, shards=3)[variant], strict=True):
        assert np.abs(one.statistics.eigenvalues - two.statistics.eigenvalues).max() <= (
            1e-11 * one.statistics.eigenvalues[0]
        )
        assert one.statistics.mean_energy == pytest.approx(two.statistics.mean_energy, rel=1e-9)


@pytest.mark.parametrize("size", [FEW, MANY])
def test_a_device_that_is_slow_in_float64_gives_the_same(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = with_sinks(*size)
    want = reduced(own)
    for room in (eigen, moments, spectra):
        monkeypatch.setattr(room, "slow_float64", lambda device: True)
    for variant, layers in reduced(own).items():
        for one, other in zip(layers, want[variant], strict=True):
            largest = other.statistics.eigenvalues[0]
            assert one.statistics.eigenvalues == pytest.approx(other.statistics.eigenvalues, abs=1e-6 * largest)
            assert one.statistics.averages == other.statistics.averages


def test_sinks_move_raw_and_not_sink_free() -> None:
    """25 of 4,096 rows at 30 times the norm take most of the energy; without them the truth comes back."""
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(4096, 64, generator=generator)
    update = torch.randn(4096, 64, generator=generator)
    rows = torch.arange(4096)
    clean = ResidualStream([before, before + update], rows // 512, rows % 512, rows >= 0, "device")
    spiked = update.clone()
    hit = 100 + 150 * torch.arange(25)
    spiked[hit] = 30 * update[hit].norm(dim=1, keepdim=True) * torch.eye(64)[3]
    dirty = ResidualStream([before, before + spiked], rows // 512, rows % 512, rows >= 0, "device")

    def energy(own: ResidualStream, variant: str) -> float:
        value = layer_metrics(reduced(own)[variant][0].statistics)["top1_energy"].value
        assert value is not None
        return value

    assert energy(clean, "raw") < 0.05
    assert energy(dirty, "raw") > 0.8
    assert energy(dirty, "sink_free") == pytest.approx(energy(clean, "sink_free"), rel=0.02)


def test_a_stream_of_sinks_alone_has_reasons() -> None:
    own = stream(10, 16, layers=2)
    alone = ResidualStream(own.states, torch.arange(10), torch.zeros(10, dtype=torch.int64), own.kept, "device")
    for shards in (1, 2):
        values = layer_metrics(reduced(alone, shards)["sink_free"][0].statistics)
        assert all(estimate.value is None and estimate.reason for estimate in values.values())


def test_reliability_tells_a_planted_direction_from_noise() -> None:
    from delta_suite.metrics.estimators import direction_metrics, phase_metrics

    generator = torch.Generator().manual_seed(1)
    document = torch.arange(400) // 10
    noise = [torch.randn(400, 64, generator=generator) for _ in range(5)]
    planted = 4 * torch.randn(400, 1, generator=generator) * torch.eye(64)[0]
    states = [noise[0], noise[0] + noise[1] + planted]
    states += [states[1] + noise[2] + planted, states[1] + noise[2] + planted + noise[3]]
    rows = torch.arange(400)
    gram = gram_of(
        reduce_stream(
            [ResidualStream(states, document, rows % 10, rows >= 0, "device")], layers=3, tokens=400, documents=40
        )["raw"]
    )
    planted_layers = [direction_metrics(gram, layer)["reliability"].value for layer in (0, 1)]
    assert min(value or 0 for value in planted_layers) > 0.98
    assert (direction_metrics(gram, 2)["reliability"].value or 0) < 0.8
    values = phase_metrics(gram, [0, 1])
    assert values["intra_cosine_cross_fitted"].value == pytest.approx(1.0, abs=0.05)
    assert values["intra_cosine_disattenuated"].value == pytest.approx(1.0, abs=0.02)
