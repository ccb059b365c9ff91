"""Each variant against its definition, as rows, as moments and over shards."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from delta_suite.capture.sinks import SINK_RATIO, find_sinks
from delta_suite.capture.stream import ResidualStream
from delta_suite.capture.units import Units
from delta_suite.metrics.estimators import layer_metrics
from delta_suite.reduction import eigen, moments
from delta_suite.reduction import gram as spectra
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra
from delta_suite.reduction.variants import BLOCK_VARIANTS

from tests.metrics.test_metrics import gram_of
from tests.metrics.test_metrics import stream as random_stream
from tests.reference import entropy_rank

FEW, MANY = (40, 64), (300, 24)
"""Tokens and hidden size: the token side and the hidden side."""


def with_sinks(tokens: int, hidden: int, documents: int = 6) -> ResidualStream:
    """Return a stream of sequences whose first token, and two others, have a state far above the rest."""
    stream = random_stream(tokens, hidden, layers=4, seed=5)
    document = torch.arange(tokens) * documents // tokens
    position = torch.cat([torch.arange(int((document == d).sum())) for d in range(documents)])
    states = [state.clone() for state in stream.states]
    for state in states[2:]:
        state[position == 0] *= 40
        state[[7, 20]] *= 200
    return ResidualStream(states, document, position, stream.kept, "device")


def plain(stream: ResidualStream, layer: int, variant: str, rows: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return singular values and top direction, straight from the definition."""
    delta = (stream.states[layer + 1] - stream.states[layer]).double().numpy()
    if not BLOCK_VARIANTS[variant].keeps_sinks:
        norms = np.stack([np.linalg.norm(state.numpy(), axis=1) for state in stream.states])
        medians = np.median(norms[:, stream.position.numpy() > 0], axis=1, keepdims=True)
        sink = (stream.position.numpy() == 0) | ((norms / medians) > SINK_RATIO).any(axis=0)
        rows = rows & torch.tensor(~sink)
    delta = delta[rows.numpy()]
    if BLOCK_VARIANTS[variant].centre:
        delta = delta - delta.mean(axis=0)
    _, sigma, vt = np.linalg.svd(delta, full_matrices=False)
    return sigma, vt[0]


def reduced(stream: ResidualStream, shards: int = 1) -> dict[str, list[LayerSpectra]]:
    documents = int(stream.document.max()) + 1
    pieces = [stream.take(rows) for rows in torch.arange(len(stream.kept)).chunk(shards)]
    variants = list(BLOCK_VARIANTS.values())
    return reduce_stream(
        pieces, layers=stream.layers, tokens=int(stream.kept.sum()), units=Units.of(documents), variants=variants
    )


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
def test_against_the_definition(size: tuple[int, int], variant: str) -> None:
    stream = with_sinks(*size)
    everything = torch.ones(size[0], dtype=torch.bool)
    got = reduced(stream)[variant]
    for layer in range(stream.layers):
        sigma, top = plain(stream, layer, variant, everything)
        values = np.sqrt(got[layer].statistics.eigenvalues)
        assert np.abs(values[: len(sigma)] - sigma).max() <= 1e-6 * sigma[0]
        assert not values[len(sigma) :].any()
        assert entropy_rank(values**2 / (values**2).sum()) == pytest.approx(
            entropy_rank(sigma**2 / (sigma**2).sum()), rel=1e-6
        )
        assert abs(float(got[layer].directions[0].numpy() @ top)) > 1 - 1e-6
        halves = got[layer].half_directions
        assert halves is not None
        for half, rows in zip(halves, (stream.document % 2 == 0, stream.document % 2 == 1), strict=True):
            _, top = plain(stream, layer, variant, rows)
            assert abs(float(half[0].numpy() @ top)) > 1 - 1e-6


def test_sinks_are_named_once_for_all_layers() -> None:
    stream = with_sinks(*MANY)
    sinks = find_sinks(stream)
    assert sinks.first == 6
    assert sinks.large >= 2
    assert {(int(stream.document[row]), int(stream.position[row])) for row in (7, 20)} <= {
        row[:2] for row in sinks.largest
    }
    assert all(row[3] > SINK_RATIO or row[1] == 0 for row in sinks.largest)


@pytest.mark.parametrize("variant", ["raw", "centred"])
def test_shards_add_up(variant: str) -> None:
    stream = with_sinks(*MANY)
    for one, two in zip(reduced(stream)[variant], reduced(stream, shards=3)[variant], strict=True):
        assert np.abs(one.statistics.eigenvalues - two.statistics.eigenvalues).max() <= (
            1e-11 * one.statistics.eigenvalues[0]
        )
        assert one.statistics.mean_energy == pytest.approx(two.statistics.mean_energy, rel=1e-9)


@pytest.mark.parametrize("size", [FEW, MANY])
def test_a_device_that_is_slow_in_float64_gives_the_same(
    size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = with_sinks(*size)
    want = reduced(stream)
    for room in (eigen, moments, spectra):
        monkeypatch.setattr(room, "slow_float64", lambda device: True)
    for variant, layers in reduced(stream).items():
        for one, other in zip(layers, want[variant], strict=True):
            largest = other.statistics.eigenvalues[0]
            assert one.statistics.eigenvalues == pytest.approx(other.statistics.eigenvalues, abs=1e-6 * largest)
            assert one.statistics.averages == other.statistics.averages


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("size", [FEW, MANY])
def test_centred_is_the_rows_of_sink_free_less_their_mean(size: tuple[int, int], shards: int) -> None:
    stream = with_sinks(*size)
    # In several shards the medians, and so the sinks, are those of each shard.
    pieces = [stream.take(rows) for rows in torch.arange(size[0]).chunk(shards)]
    sink = torch.cat([find_sinks(piece).dropped for piece in pieces])
    assert int(sink.sum()) > 6
    spectra = reduced(stream, shards)

    def squares(layer: int, rows: torch.Tensor) -> np.ndarray:
        delta = stream.step(layer)[1].double().numpy()[(rows & ~sink).numpy()]
        return np.asarray(np.linalg.svd(delta - delta.mean(axis=0), compute_uv=False) ** 2)

    for layer, (centred, sink_free) in enumerate(zip(spectra["centred"], spectra["sink_free"], strict=True)):
        assert centred.statistics.tokens == sink_free.statistics.tokens == int((~sink).sum())
        assert centred.statistics.averages == sink_free.statistics.averages
        expected = squares(layer, torch.ones_like(sink))
        values = centred.statistics.eigenvalues
        assert values == pytest.approx(np.resize(expected, len(values)), abs=1e-6 * expected[0])
        # What centring takes away is the energy of the mean.
        rest = 1 - sink_free.statistics.mean_energy
        assert values.sum() == pytest.approx(rest * sink_free.statistics.eigenvalues.sum(), rel=1e-9)
        assert centred.halves is not None
        for number, half in enumerate(centred.halves):  # each is centred on its mean, and scaled to all tokens
            rows = stream.document % 2 == number
            scale = int((~sink).sum()) / int((rows & ~sink).sum())
            expected = squares(layer, rows) * scale
            count = min(len(expected), len(half.eigenvalues))
            assert half.eigenvalues[:count] == pytest.approx(expected[:count], abs=1e-6 * expected[0])


@pytest.mark.parametrize("names", [["raw"], ["sink_free"], ["centred"], ["centred", "raw", "sink_free"]])
@pytest.mark.parametrize("size", [FEW, MANY])
def test_a_variant_does_not_depend_on_the_variants_beside_it(size: tuple[int, int], names: list[str]) -> None:
    stream = with_sinks(*size)
    variants = [BLOCK_VARIANTS[name] for name in names]
    together = reduced(stream)
    spectra = reduce_stream([stream], layers=stream.layers, tokens=size[0], units=Units.of(6), variants=variants)
    assert list(spectra) == names
    for name, layers in spectra.items():
        for one, other in zip(layers, together[name], strict=True):
            largest = other.statistics.eigenvalues[0]
            assert one.statistics.eigenvalues == pytest.approx(other.statistics.eigenvalues, abs=1e-12 * largest)
            assert one.statistics.averages["alignment"] == pytest.approx(other.statistics.averages["alignment"])
            assert abs(float(one.directions[0] @ other.directions[0])) > 1 - 1e-9


def test_sinks_move_raw_alone() -> None:
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

    def energy(stream: ResidualStream, variant: str) -> float:
        value = layer_metrics(reduced(stream)[variant][0].statistics)["top1_energy"].value
        assert value is not None
        return value

    assert energy(clean, "raw") < 0.05
    assert energy(dirty, "raw") > 0.8
    for variant in ("sink_free", "centred"):
        assert energy(dirty, variant) == pytest.approx(energy(clean, variant), rel=0.02)


def test_a_stream_of_sinks_alone_has_reasons() -> None:
    stream = random_stream(10, 16, layers=2)
    alone = ResidualStream(stream.states, torch.arange(10), torch.zeros(10, dtype=torch.int64), stream.kept, "device")
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
            [ResidualStream(states, document, rows % 10, rows >= 0, "device")], layers=3, tokens=400, units=Units.of(40)
        )["raw"]
    )
    planted_layers = [direction_metrics(gram, layer)["reliability"].value for layer in (0, 1)]
    assert min(value or 0 for value in planted_layers) > 0.98
    assert (direction_metrics(gram, 2)["reliability"].value or 0) < 0.8
    values = phase_metrics(gram, [0, 1])
    assert values["intra_cosine_cross_fitted"].value == pytest.approx(1.0, abs=0.05)
    assert values["intra_cosine_disattenuated"].value == pytest.approx(1.0, abs=0.02)
