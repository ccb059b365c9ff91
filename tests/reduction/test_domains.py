"""The jackknife over domains, against deleting each domain from the rows and taking every SVD again."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.units import ADDED_GROUPS, Units
from delta_suite.metrics.estimators import layer_metrics, phase_metrics
from delta_suite.metrics.registry import METRICS
from delta_suite.records.arrays import direction_arrays, full_gram
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra
from scipy import stats

from tests.reference import domain_jackknife

DOCUMENTS, LENGTH, HIDDEN, LAYERS, DOMAINS = 51, 12, 40, 4, 17


@pytest.fixture(scope="module")
def stream() -> ResidualStream:
    """Return layers whose top directions are alike, in documents of domains that differ in scale, mean and spectrum."""
    draw = np.random.default_rng(5)
    document = np.repeat(np.arange(DOCUMENTS), LENGTH)
    domain = document % DOMAINS
    decay = np.arange(1, HIDDEN + 1) ** -0.7
    states = [3 * draw.standard_normal((len(document), HIDDEN))]
    common = np.linalg.qr(draw.standard_normal((HIDDEN, HIDDEN)))[0]
    for _ in range(LAYERS):
        tilt = np.exp(0.5 * draw.standard_normal((DOMAINS, HIDDEN)))[domain]
        mean = (
            0.5 * draw.standard_normal((DOMAINS, HIDDEN))[domain]
            + 0.4 * draw.standard_normal((DOCUMENTS, HIDDEN))[document]
        )
        basis = np.linalg.qr(common + 0.15 * draw.standard_normal((HIDDEN, HIDDEN)))[0]
        update = ((draw.standard_normal((len(document), HIDDEN)) + mean) * tilt * decay) @ basis.T
        states.append(states[-1] + np.exp(0.3 * draw.standard_normal(DOMAINS))[domain, None] * update)
    return ResidualStream(
        [torch.tensor(state, dtype=torch.float32) for state in states],
        torch.tensor(document),
        torch.tensor(np.tile(np.arange(LENGTH) + 1, DOCUMENTS)),
        torch.ones(len(document), dtype=torch.bool),
        "device",
    )


UNITS = Units.of(DOCUMENTS, [str(document % DOMAINS) for document in range(DOCUMENTS)])


def reduced(stream: ResidualStream, shards: int = 1) -> list[LayerSpectra]:
    pieces = [stream.take(rows) for rows in torch.arange(len(stream.kept)).chunk(shards)]
    return reduce_stream(pieces, layers=LAYERS, tokens=len(stream.kept), units=UNITS, memory=Memory(1 << 30))["raw"]


def test_every_domain_is_deleted_as_a_whole(stream: ResidualStream) -> None:
    layers = reduced(stream)
    domain = (stream.document % DOMAINS).numpy()
    expected = domain_jackknife([stream.step(layer)[1].numpy() for layer in range(LAYERS)], domain, [0, 1, 2, 3])
    got = layer_metrics(layers[0].statistics, *layers[0].resamples)
    gram = full_gram(direction_arrays("raw", layers), "raw")
    got |= phase_metrics(gram, [0, 1, 2, 3])
    assert UNITS.groups[:DOMAINS] == tuple(range(DOMAINS))  # as many documents of each: in order
    reach = stats.t.ppf(0.975, DOMAINS - 1)
    for name, (value, without) in expected.items():
        estimate = got[name]
        assert estimate.value == pytest.approx(value, rel=1e-6), name
        # Directions are kept as float16, less the whole, and so are their replicates.
        tolerance = 1e-3 if name == "intra_cosine" else 1e-6
        spread = float(np.std(without))
        assert estimate.replicates == pytest.approx(without, abs=max(tolerance * spread, 1e-7 * value)), name
        error = np.sqrt((DOMAINS - 1) / DOMAINS * ((without - without.mean()) ** 2).sum())
        assert estimate.corrected is not None
        half, metric = reach * error, METRICS[name]
        ends = np.clip([estimate.corrected - half, estimate.corrected + half], metric.low, metric.high)
        assert estimate.interval == pytest.approx(ends, abs=(2 * tolerance + 1e-5) * half), name
        if name not in {"intra_cosine", "spectral_gap"}:
            assert estimate.corrected == pytest.approx(DOMAINS * value - (DOMAINS - 1) * without.mean(), rel=1e-5), name
        # The narrower question keeps all domains in, and has ten groups of documents.
        assert estimate.interval_documents is not None
        assert len(estimate.replicates_documents or ()) == 10
        assert estimate.interval_documents != estimate.interval


def test_halves_are_of_different_domains(stream: ResidualStream) -> None:
    layers = reduced(stream)
    domain = (stream.document % DOMAINS).numpy()
    for layer, got in enumerate(layers):
        assert got.half_directions is not None
        for half, directions in enumerate(got.half_directions):
            rows = stream.step(layer)[1].double().numpy()[domain % 2 == half]
            exact = np.linalg.svd(rows, full_matrices=False)[2][0]
            assert abs(directions[0].numpy() @ exact) == pytest.approx(1.0, abs=1e-12)


def test_shards_delete_the_same_domains_and_have_no_narrower_question(stream: ResidualStream) -> None:
    assert DOMAINS <= ADDED_GROUPS
    for one, other in zip(reduced(stream), reduced(stream, shards=3), strict=True):
        assert one.replicates is not None
        assert other.replicates is not None
        assert one.documents is not None
        assert other.documents is None
        for a, b in zip(one.resamples[1], other.resamples[1], strict=True):
            assert a.eigenvalues == pytest.approx(b.eigenvalues, rel=1e-6)
        assert torch.allclose(one.replicates.half_directions, other.replicates.half_directions, atol=1e-6)


def test_halves_of_many_dimensions_come_from_the_whole() -> None:
    """Block iteration gives what eigenproblems of the halves give."""
    draw = torch.Generator().manual_seed(1)
    hidden, documents, length = 300, 30, 20
    document = torch.arange(documents * length) // length
    decay = torch.arange(1, hidden + 1) ** -0.6
    update = torch.randn(len(document), hidden, generator=draw) * decay
    update = update @ torch.linalg.qr(torch.randn(hidden, hidden, generator=draw)).Q
    states = [torch.zeros_like(update), update]
    kept = torch.ones(len(document), dtype=torch.bool)
    wide = ResidualStream(states, document, torch.arange(len(document)) % length + 1, kept, "device")
    (got,) = reduce_stream([wide], layers=1, tokens=len(document), units=Units.of(documents))["raw"]
    assert got.half_directions is not None
    for half, directions in enumerate(got.half_directions):
        exact = np.linalg.svd(update[document % 2 == half].double().numpy(), full_matrices=False)[2][:8]
        assert np.abs((directions.numpy() * exact).sum(axis=1)) == pytest.approx(np.ones(8), abs=1e-12)
