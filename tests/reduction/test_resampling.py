"""Leaving a group of documents out: what is kept of it, against leaving it out for real."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import direction_metrics, layer_metrics, phase_metrics
from delta_suite.metrics.intervals import with_interval
from delta_suite.records.arrays import direction_arrays, full_gram
from delta_suite.reduction import reduce as layers
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.resampling import GROUPS, Groups, LayerSpectra, group_count
from delta_suite.reduction.variants import VARIANTS

FEW, MANY = (120, 150), (900, 40)
"""(tokens, hidden): reduced as rows, and as moments."""

DOCUMENTS = 30


def planted(tokens: int, hidden: int, seed: int = 0) -> ResidualStream:
    """Two layers with a decaying spectrum and a mean update; documents differ in scale and mean."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    document = torch.arange(tokens) * DOCUMENTS // tokens
    decay = torch.arange(1, hidden + 1) ** -0.8
    scale = (0.3 * random(DOCUMENTS, 1)).exp()[document]
    own_mean = 0.4 * random(DOCUMENTS, hidden)[document] * decay
    states = [random(tokens, hidden)]
    for _ in range(2):
        update = scale * (random(tokens, hidden) * decay + own_mean + 0.3 * random(hidden) * decay)
        states.append(states[-1] + update @ torch.linalg.qr(random(hidden, hidden)).Q)
    position = torch.arange(tokens) % (tokens // DOCUMENTS)
    return ResidualStream(states, document, position, torch.ones(tokens, dtype=torch.bool), "device")


def reduced(own: ResidualStream, shards: int = 1) -> dict[str, list[LayerSpectra]]:
    pieces = [own.take(rows) for rows in torch.arange(len(own.kept)).chunk(shards)]
    documents, variants = int(own.document.max()) + 1, list(VARIANTS.values())
    return reduce_stream(pieces, layers=own.layers, tokens=len(own.kept), documents=documents, variants=variants)


def second_moment(own: ResidualStream, layer: int, variant: str, rows: np.ndarray) -> np.ndarray:
    """Straight from the definition."""
    delta = (own.states[layer + 1] - own.states[layer]).double().numpy()
    if not VARIANTS[variant].keeps_sinks:
        rows = rows & (own.position.numpy() > 0)
    delta = delta[rows]
    if VARIANTS[variant].centre:
        delta = delta - delta.mean(axis=0)
    return np.asarray(delta.T @ delta)


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("variant", VARIANTS)
def test_replicates_against_leaving_out_for_real(size: tuple[int, int], variant: str) -> None:
    own = planted(*size)
    group = own.document.numpy() % GROUPS
    everything = np.ones(size[0], dtype=bool)
    for layer, got in enumerate(reduced(own)[variant]):
        values, vectors = np.linalg.eigh(second_moment(own, layer, variant, everything))
        order = np.argsort(-values)[: min(size)]
        values, vectors = values[order], vectors[:, order]
        assert len(got.replicates) == GROUPS
        for index, replicate in enumerate(got.replicates):
            left = second_moment(own, layer, variant, group != index)
            first_order = np.einsum("ij,ik,kj->j", vectors, left, vectors)
            share = first_order.clip(0) / first_order.clip(0).sum()
            found = replicate.eigenvalues / replicate.eigenvalues.sum()
            assert found == pytest.approx(share[: len(found)], abs=1e-7)
            exact = np.linalg.eigh(left)[1][:, ::-1]
            assert got.replicate_directions is not None
            assert got.replicate_half_directions is not None
            assert abs(got.replicate_directions[index, 0].numpy() @ exact[:, 0]) > 1 - 1e-4
            half = second_moment(own, layer, variant, (group != index) & (group % 2 == index % 2))
            exact = np.linalg.eigh(half)[1][:, ::-1]
            assert abs(got.replicate_half_directions[index, 0].numpy() @ exact[:, 0]) > 1 - 1e-3


@pytest.mark.parametrize("size", [FEW, MANY])
def test_a_group_that_holds_all_of_the_leading_direction(size: tuple[int, int]) -> None:
    """As a massive activation in one document may: without it that direction has nothing, and so no stable rank."""
    own = planted(*size)
    own.states[1][:, -1] = own.states[0][:, -1]  # that dimension is the row's alone
    row = size[0] // 3
    own.states[1][row] = own.states[0][row]
    own.states[1][row, -1] += 1000.0
    alone = int(own.document[row]) % GROUPS
    got = reduced(own)["raw"][0]
    assert [replicate.eigenvalues[0] == 0.0 for replicate in got.replicates] == [g == alone for g in range(GROUPS)]
    found = layer_metrics(got.statistics, got.halves or (), got.replicates)
    assert found["stable_rank"].value == pytest.approx(1.0, abs=1e-2)
    assert found["stable_rank"].interval is None
    gamma = found["gamma"]
    assert gamma.value == pytest.approx(1000.0, rel=1e-2)
    assert gamma.interval is not None
    assert gamma.interval[0] == 0.0  # one document decides it


@pytest.mark.parametrize("documents", [2, 3])
@pytest.mark.parametrize("size", [FEW, MANY])
def test_two_groups_leave_halves_nothing_to_be_fitted_on(size: tuple[int, int], documents: int) -> None:
    """Each half is one group. Without it there is no direction in it, and so nothing between halves has an interval."""
    own = planted(*size)
    few = ResidualStream(own.states, own.document % documents, own.position, own.kept, "device")
    spectra = reduced(few)["raw"]
    gram = full_gram(direction_arrays("raw", spectra), "raw")
    assert len(gram.replicates) == 2
    for layer in range(2):
        reliability = direction_metrics(gram, layer)["reliability"]
        assert reliability.value is not None
        assert reliability.interval is None
    both = phase_metrics(gram, [0, 1])
    for name in ("intra_cosine_cross_fitted", "capture_fraction_held_out"):
        assert both[name].value is not None
        assert both[name].interval is None
    assert both["intra_cosine"].interval is not None
    assert layer_metrics(spectra[0].statistics, spectra[0].halves or (), spectra[0].replicates)["gamma"].interval


def test_shards_and_sides_give_the_same_replicates() -> None:
    own = planted(*MANY)
    whole, sharded = reduced(own), reduced(own, shards=4)
    for variant in VARIANTS:
        if not VARIANTS[variant].keeps_sinks:  # medians are taken shard by shard
            continue
        for one, two in zip(whole[variant], sharded[variant], strict=True):
            for a, b in zip(one.replicates, two.replicates, strict=True):
                assert a.eigenvalues == pytest.approx(b.eigenvalues, rel=1e-9)
                assert a.averages["relative_step"] == pytest.approx(b.averages["relative_step"], rel=1e-9)


def test_random_directions_have_the_covariance_of_the_updates() -> None:
    own = planted(*MANY)
    got = reduced(own)["raw"][0]
    moment = second_moment(own, 0, "raw", np.ones(MANY[0], dtype=bool))
    draws = got.random.numpy()
    assert np.linalg.norm(draws, axis=1) == pytest.approx(1.0)
    along = np.linalg.eigh(moment)[1][:, -1]
    expected = np.linalg.eigvalsh(moment)[-1] / np.trace(moment)
    assert ((draws @ along) ** 2).mean() == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize(("documents", "groups"), [(1, 1), (2, 2), (3, 2), (9, 8), (10, 10), (136, 10)])
def test_groups_lie_within_halves(documents: int, groups: int) -> None:
    assert group_count(documents) == groups
    halves = {(i % groups, i % 2) for i in range(documents)}
    assert groups == 1 or len(halves) == groups


def test_moments_that_do_not_fit_in_groups_are_kept_in_halves_or_refused() -> None:
    from delta_suite.capture.stream import Memory
    from delta_suite.errors import CaptureError

    own = planted(*MANY)
    pieces = [own.take(rows) for rows in torch.arange(len(own.kept)).chunk(3)]
    options = {"layers": 2, "tokens": len(own.kept), "documents": DOCUMENTS}
    matrix = 40**2 * 8
    with_groups = reduce_stream(pieces, **options, memory=Memory(0, host=2 * 10 * matrix))["raw"]
    assert len(with_groups[0].replicates) == GROUPS
    in_halves = reduce_stream(pieces, **options, memory=Memory(0, host=2 * 2 * matrix))["raw"]
    assert in_halves[0].replicates == ()
    assert in_halves[0].half_directions is not None
    assert in_halves[0].statistics.eigenvalues == pytest.approx(with_groups[0].statistics.eigenvalues, rel=1e-9)
    with pytest.raises(CaptureError, match="moments that are added over them take"):
        reduce_stream(pieces, **options, memory=Memory(0))


def test_the_bias_of_a_figure_made_of_both_halves_comes_off_by_groups() -> None:
    """mean(a)^2 + mean(b)^2 of five groups each: the two-sample jackknife takes off exactly s_a^2/5 + s_b^2/5."""
    groups = np.random.default_rng(3).standard_normal(10)

    def figure(kept: np.ndarray) -> Estimate:
        halves = [groups[half::2][kept[half::2]] for half in (0, 1)]
        return Estimate(value=float(sum(own.mean() ** 2 for own in halves)))

    everything = np.ones(10, dtype=bool)
    without = [figure(np.arange(10) != left_out) for left_out in range(10)]
    found = with_interval(figure(everything), [], without, bias="groups")
    exact = sum(own.mean() ** 2 - own.var(ddof=1) / 5 for own in (groups[::2], groups[1::2]))
    assert found.corrected == pytest.approx(exact, rel=1e-12)
    assert with_interval(figure(everything), [], without, bias="none").corrected == figure(everything).value


@pytest.mark.parametrize("variant", ["raw", "centred"])
@pytest.mark.parametrize("size", [FEW, MANY], ids=["rows", "moments"])
def test_pairs_of_groups(size: tuple[int, int], variant: str) -> None:
    """tr G_a tr G_b and tr G_a G_b over pairs of groups, of all and without one, against the matrices themselves."""
    own = planted(*size)
    layer = reduced(own)[variant][1]
    update = own.delta(1).double()
    rows = own.position > 0 if variant == "centred" else own.kept
    update = update - update[rows].mean(dim=0) if variant == "centred" else update
    grams = [update[rows & (own.document % GROUPS == group)] for group in range(GROUPS)]
    grams = [rows.T @ rows for rows in grams]
    for left_out, found in [(None, layer.statistics), (3, layer.replicates[3])]:
        pairs = [(a, b) for a in range(GROUPS) for b in range(GROUPS) if a != b and left_out not in (a, b)]
        traces = sum(float(grams[a].trace() * grams[b].trace()) for a, b in pairs)
        overlaps = sum(float((grams[a] * grams[b]).sum()) for a, b in pairs)
        assert found.between == pytest.approx((traces, overlaps), rel=1e-9)


def assert_equal(one: dict[str, list[LayerSpectra]], two: dict[str, list[LayerSpectra]]) -> None:
    for variant, found in one.items():
        for a, b in zip(found, two[variant], strict=True):
            for x, y in zip([a.statistics, *a.replicates], [b.statistics, *b.replicates], strict=True):
                assert x.averages == y.averages
                assert np.array_equal(x.eigenvalues, y.eigenvalues)
            for name in ("directions", "random", "replicate_directions", "replicate_half_directions"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("size", [FEW, MANY])
def test_layers_together_give_what_each_gives_alone(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: two layers in one portion; and where there turns out to be no room for two, one after the other."""
    own = planted(*size)
    alone = reduced(own)
    monkeypatch.setattr(layers._Lane, "over", lambda *_: [layers._Lane(None, None, 2)])
    asked: list[int] = []
    resample = layers.resample

    def counted(portion: Sequence[Groups], *arguments: Any, **options: Any) -> list[LayerSpectra]:
        asked.append(len(portion))
        return resample(portion, *arguments, **options)

    monkeypatch.setattr(layers, "resample", counted)
    assert_equal(alone, reduced(own))
    assert asked == [2] * len(VARIANTS)

    def no_room(portion: Sequence[Groups], *arguments: Any, **options: Any) -> list[LayerSpectra]:
        if len(portion) > 1:
            raise torch.OutOfMemoryError("not enough")
        return counted(portion, *arguments, **options)

    asked.clear()
    monkeypatch.setattr(layers, "resample", no_room)
    assert_equal(alone, reduced(own))
    assert asked == [1] * 2 * len(VARIANTS)


@pytest.mark.parametrize(
    ("given", "layers_of", "room_gb", "want"),
    [
        ("rows", 64, 11.0, (2, 22)),
        ("rows", 64, 60.0, (2, 32)),
        ("rows", 12, 60.0, (1, 12)),
        ("rows", 4, 60.0, (4, 1)),
        ("rows", 64, 0.6, (1, 1)),
        ("rows", 64, 1.3, (3, 1)),
        ("moments", 64, 60.0, (2, 1)),
        ("moments", 64, 6.0, (1, 1)),
    ],
)
def test_how_many_layers_at_once(
    given: str, layers_of: int, room_gb: float, want: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,047 x 5,120, as rows: 0.24 GB each while solved; as moments of 8,192 tokens: 5,120 is too large for several."""
    monkeypatch.setattr(layers, "can_solve_together", lambda device: True)
    n, hidden = 2047, 5120
    if given == "rows":
        task = layers._Task(64, n, 4 * n * hidden, 8 * n * hidden, False)
    else:
        task = layers._Task(64, hidden, 8 * hidden**2 * 5, 32 * layers.rows_at_once(hidden) * hidden, True)
    assert task.lanes(torch.device("cuda"), layers_of, int(room_gb * 1e9)) == want


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_layer_stays_on_its_gpu_however_many_lanes_a_shard_has(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "load_algebra", lambda: None)
    monkeypatch.setattr(layers, "side_streams", lambda device, count: [None] * count)
    monkeypatch.setattr(layers._Task, "lanes", lambda task, device, own, room: (lanes, 1))
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    found = layers._Lane.over(gpus, layers._Task(8, 100, 0, 0, True), Memory(device=1 << 40))
    assert [found[layer % len(found)].device for layer in range(8)] == gpus * 4
