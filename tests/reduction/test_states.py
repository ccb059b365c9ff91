"""Figures of the states: on planted streams, against the plain reference, and of a stream that comes in shards."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture.sinks import find_sinks
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.tokens import TokenSequences
from delta_suite.capture.units import Units
from delta_suite.errors import DeviceError
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import state_metrics
from delta_suite.metrics.state import OF_VARIANT
from delta_suite.models.blocks import find_decoder
from delta_suite.provenance import Clock
from delta_suite.reduction import state_maps
from delta_suite.reduction.passes import Captured, Passes
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.states import state_layers, state_streams
from delta_suite.reduction.variants import BLOCK_VARIANTS

from tests.reduction.test_of_writes import BYTES
from tests.reduction.test_passes import CPU, DOCUMENTS, LAYERS, MOMENTS, loaded
from tests.reference import state_figures

__all__ = ["loaded"]  # the fixture of that module, used here

HIDDEN, LENGTH, TEXTS = 12, 30, 40
TOKENS = LENGTH * TEXTS


def planted(update: Any, sink: float = 1.0, drift: float = 0.0, seed: int = 0) -> ResidualStream:
    """Return states of two layers: `update` gives the second from the first, a first token has `sink` times the norm.

    drift: how far each token goes on in a direction of its text, against a step of noise of length about 1.
    """
    draw = np.random.default_rng(seed)
    position = np.tile(np.arange(LENGTH), TEXTS)
    ways = np.repeat(draw.standard_normal((TEXTS, HIDDEN)), LENGTH, axis=0)
    states = draw.standard_normal((TOKENS, HIDDEN)) * np.arange(1, HIDDEN + 1) ** -0.5
    states = states + drift * position[:, None] * ways
    states[position == 0] *= sink
    after = states + update(states, draw)
    return ResidualStream(
        [torch.tensor(rows, dtype=torch.float32) for rows in (states, after)],
        torch.tensor(np.repeat(np.arange(TEXTS), LENGTH)),
        torch.tensor(position),
        torch.ones(TOKENS, dtype=torch.bool),
        "device",
    )


def measured(stream: ResidualStream, units: Units | None = None) -> dict[str, dict[str, Estimate]]:
    """Return the metrics of the first state, by variant."""
    units, sinks = units or Units.of(TEXTS), find_sinks(stream)
    spectra = reduce_stream(
        state_streams([stream]),
        layers=1,
        tokens=len(stream.document),
        units=units,
        variants=list(BLOCK_VARIANTS.values()),
        sinks=lambda _: sinks,
        directions=False,
    )
    layers = state_layers(lambda _: [stream], sinks.dropped, spectra, units=units, chosen=[0], at_once=1)
    return {variant: state_metrics(first, variant) for variant, (first,) in layers.items()}


def linear(states: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.asarray(states @ draw.standard_normal((HIDDEN, HIDDEN)))


def bent(states: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    x = states / np.sqrt((states**2).mean(axis=1, keepdims=True))
    return np.asarray(np.abs(x @ draw.standard_normal((HIDDEN, HIDDEN))))


def unrelated(states: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    return np.asarray(draw.standard_normal(states.shape))


@pytest.mark.parametrize("update", [linear, bent, unrelated])
def test_the_figures_are_those_of_the_plain_reference(update: Any) -> None:
    stream = planted(update, sink=20.0, drift=0.1)
    sinks = find_sinks(stream).dropped.numpy()
    document = stream.document.numpy()
    group = np.array(Units.of(TEXTS).groups)[document]
    before, after = (state.numpy() for state in stream.states)
    expected = state_figures(before, after, document, stream.position.numpy(), sinks, group)
    for variant, metrics in measured(stream).items():
        assert set(metrics) == set(OF_VARIANT[variant]) == set(expected[variant])
        for name, estimate in metrics.items():
            assert estimate.value == pytest.approx(expected[variant][name], rel=1e-6, abs=1e-7), (variant, name)
            assert estimate.interval is not None


def test_planted_maps_are_told_apart() -> None:
    """A linear map is found by both, a bent one by the tokenwise map alone, and no map where there is none."""
    shares = {}
    for update in (linear, bent, unrelated):
        metrics = measured(planted(update))["sink_free"]
        shares[update.__name__] = tuple(
            round(metrics[name].value or 0.0, 1) for name in ("update_linearity", "tokenwise_share")
        )
    assert shares["linear"][0] == 1.0
    assert shares["bent"][0] < 0.3 < shares["bent"][1]
    assert max(shares["unrelated"]) <= 0.0


def test_a_planted_sink_compresses_the_states_and_leaves_them_without_it() -> None:
    metrics = measured(planted(unrelated, sink=100.0))
    ratio = metrics["raw"]["sink_norm_ratio"].value
    assert ratio == pytest.approx(100, rel=0.2)
    raw, sink_free = (metrics[variant]["stream_effective_rank"].value or 0.0 for variant in ("raw", "sink_free"))
    p = 1 / np.arange(1, HIDDEN + 1)
    truth = math.exp(-float((p / p.sum() * np.log(p / p.sum())).sum()))
    assert sink_free == pytest.approx(truth, rel=0.02)
    assert metrics["raw"]["linearity"].value is not None
    fewer = measured(planted(unrelated, sink=1.0))["raw"]["stream_effective_rank"].value
    assert fewer == pytest.approx(truth, rel=0.02)
    assert raw < truth


def test_curvature_is_that_of_a_straight_path_and_of_noise() -> None:
    """Successive differences of independent states are at cosine -1/2, an angle of 2 pi / 3 in many dimensions."""
    straight = measured(planted(unrelated, drift=50.0))["raw"]["curvature"]
    assert (straight.value or 9.0) < 0.1
    noise = measured(planted(unrelated))["raw"]["curvature"]
    assert noise.value == pytest.approx(2 * math.pi / 3, abs=0.1)
    assert (noise.sd or 0.0) > 0.1


def test_what_cannot_be_measured_says_why() -> None:
    stream = planted(linear)
    one = ResidualStream(
        [state[:LENGTH] for state in stream.states],
        stream.document[:LENGTH],
        stream.position[:LENGTH] + 1,
        stream.kept[:LENGTH],
        "device",
    )
    metrics = measured(one, Units.of(1))["raw"]
    assert metrics["linearity"].reason == (
        "maps are fitted on one half of the units, a quarter of them choosing the ridge: needs four groups"
    )
    assert metrics["sink_norm_ratio"].reason == "no token at position 0 enters, or none elsewhere"
    assert metrics["stream_effective_rank"].interval is None
    few = stream.take(torch.arange(4 * LENGTH))
    reason = measured(few, Units.of(4))["raw"]["linearity"].reason
    assert reason == "a map needs 160 tokens, and a half has 60"


def test_eigenvalues_alone_are_those_of_the_spectra() -> None:
    """Of rows, and of moments that are added over two shards; of units and of documents."""
    stream, units = planted(bent, sink=20.0), Units.of(TEXTS, [f"domain {text // 2}" for text in range(TEXTS)])
    half = TOKENS // 2
    shards = [stream.take(torch.arange(start, start + half)) for start in (0, half)]
    for streams in ([stream], shards):
        whole, alone = (
            reduce_stream(
                streams,
                layers=1,
                tokens=TOKENS,
                units=units,
                variants=list(BLOCK_VARIANTS.values()),
                memory=Memory(1 << 30),
                directions=directions,
            )
            for directions in (True, False)
        )
        for variant, (layer,) in whole.items():
            (values,) = alone[variant]
            assert len(values.directions) == 0
            assert len(values.resamples[1]) == len(layer.resamples[1]) > 1
            for one, other in zip(
                (layer.statistics, *layer.resamples[1], *layer.resamples[2]),
                (values.statistics, *values.resamples[1], *values.resamples[2]),
                strict=True,
            ):
                assert np.array_equal(one.eigenvalues, other.eigenvalues)


def passes(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch, stream: int, moments: int = LAYERS
) -> tuple[Captured, Passes]:
    """Measure blocks and states where the stream may take this many bytes a token."""
    model, sequences = loaded
    rooms = {0.5: Memory(stream * sequences.tokens), 0.25: Memory(moments * MOMENTS), 0.75: Memory(1 << 23)}
    monkeypatch.setattr(Memory, "free", classmethod(lambda cls, device, share=0.5: rooms[share]))
    monkeypatch.setattr(state_maps, "FEATURES", 16)
    made = Passes(model, find_decoder(model), sequences, [CPU], Clock(), states=True)
    return made.run(None, units=Units.of(DOCUMENTS)), made


def test_shards_change_no_figure_of_a_state(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, once = passes(loaded, monkeypatch, BYTES["states"])
    apart, several = passes(loaded, monkeypatch, BYTES["states"] // 3, moments=2)
    assert [len(captured.storage) > 1 for captured in (whole, apart)] == [False, True]
    assert once.clock.seconds.keys() == several.clock.seconds.keys() == {"capture", "analysis", "stream"}
    assert isinstance(whole.states, dict)
    assert isinstance(apart.states, dict)
    for variant, layers in whole.states.items():
        for one, other in zip(layers, apart.states[variant], strict=True):
            for name, estimate in state_metrics(one, variant).items():
                same = state_metrics(other, variant)[name]
                assert (estimate.value is None, estimate.reason) == (same.value is None, same.reason)
                if estimate.value is not None:
                    assert same.value == pytest.approx(estimate.value, rel=1e-6, abs=1e-8), (variant, name)


def test_states_without_memory_keep_the_spectra(
    loaded: tuple[Any, TokenSequences], monkeypatch: pytest.MonkeyPatch
) -> None:
    def out_of_memory(*args: Any, **options: Any) -> Any:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr("delta_suite.reduction.passes.state_layers", out_of_memory)
    captured, _ = passes(loaded, monkeypatch, BYTES["states"])
    assert isinstance(captured.states, DeviceError)
    assert "leave out the claims about the states" in str(captured.states)
    assert len(captured.spectra["raw"]) == LAYERS
