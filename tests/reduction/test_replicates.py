"""Replicates without a group of documents, against deleting the group for real; and lanes, which change nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.units import DOCUMENT_GROUPS as GROUPS
from delta_suite.capture.units import Units
from delta_suite.errors import DeviceError
from delta_suite.metrics.estimate import Estimate
from delta_suite.metrics.estimators import direction_metrics, layer_metrics, phase_metrics
from delta_suite.metrics.intervals import standard_errors, with_interval
from delta_suite.metrics.layer import spectral_entropy_rank
from delta_suite.records.arrays import direction_arrays, full_gram
from delta_suite.reduction import lanes as lanes_module
from delta_suite.reduction import reduce as walk
from delta_suite.reduction.disjoint import centred_pairs
from delta_suite.reduction.groups import Groups
from delta_suite.reduction.lanes import Lane, Workload, host_threads, layers_at_once, make_lanes, rows_at_once
from delta_suite.reduction.reduce import reduce_stream
from delta_suite.reduction.replicates import LayerSpectra
from delta_suite.reduction.variants import BLOCK_VARIANTS

FEW, MANY = (120, 150), (900, 40)
"""(tokens, hidden): reduced as rows, and as moments."""

DOCUMENTS = 30


def planted(tokens: int, hidden: int, seed: int = 0) -> ResidualStream:
    """Return two layers with a decaying spectrum and a mean update; documents differ in scale and mean."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    document = torch.arange(tokens) * DOCUMENTS // tokens
    decay = torch.arange(1, hidden + 1) ** -0.8
    scale = (0.3 * random(DOCUMENTS, 1)).exp()[document]
    document_mean = 0.4 * random(DOCUMENTS, hidden)[document] * decay
    states = [random(tokens, hidden)]
    for _ in range(2):
        update = scale * (random(tokens, hidden) * decay + document_mean + 0.3 * random(hidden) * decay)
        states.append(states[-1] + update @ torch.linalg.qr(random(hidden, hidden)).Q)
    position = torch.arange(tokens) % (tokens // DOCUMENTS)
    return ResidualStream(states, document, position, torch.ones(tokens, dtype=torch.bool), "device")


def reduced(
    stream: ResidualStream, shards: int = 1, devices: Sequence[torch.device] = ()
) -> dict[str, list[LayerSpectra]]:
    pieces = [stream.take(rows) for rows in torch.arange(len(stream.kept)).chunk(shards)]
    documents, variants = int(stream.document.max()) + 1, list(BLOCK_VARIANTS.values())
    units = Units.of(documents)
    return reduce_stream(
        pieces, layers=stream.layers, tokens=len(stream.kept), units=units, variants=variants, devices=devices
    )


def second_moment(stream: ResidualStream, layer: int, variant: str, rows: np.ndarray) -> np.ndarray:
    """Return the second moment straight from the definition."""
    delta = (stream.states[layer + 1] - stream.states[layer]).double().numpy()
    if not BLOCK_VARIANTS[variant].keeps_sinks:
        rows = rows & (stream.position.numpy() > 0)
    delta = delta[rows]
    if BLOCK_VARIANTS[variant].centre:
        delta = delta - delta.mean(axis=0)
    return np.asarray(delta.T @ delta)


@pytest.mark.parametrize("size", [FEW, MANY])
@pytest.mark.parametrize("variant", BLOCK_VARIANTS)
def test_replicates_match_deleting_the_group_for_real(size: tuple[int, int], variant: str) -> None:
    stream = planted(*size)
    group = stream.document.numpy() % GROUPS
    for layer, got in enumerate(reduced(stream)[variant]):
        assert got.replicates is not None
        assert len(got.replicates.statistics) == GROUPS
        ranks = []
        for index, replicate in enumerate(got.replicates.statistics):
            remaining = second_moment(stream, layer, variant, group != index)
            exact_values = np.linalg.eigvalsh(remaining)[::-1].clip(0)[: min(size)]
            share = exact_values / exact_values.sum()
            energies = replicate.eigenvalues / replicate.eigenvalues.sum()
            assert energies[:8] == pytest.approx(share[:8], rel=1e-3)
            ranks.append((spectral_entropy_rank(share), spectral_entropy_rank(energies)))
            exact = np.linalg.eigh(remaining)[1][:, ::-1]
            assert abs(got.replicates.directions[index, 0].numpy() @ exact[:, 0]) > 1 - 1e-4
            half = second_moment(stream, layer, variant, (group != index) & (group % 2 == index % 2))
            exact = np.linalg.eigh(half)[1][:, ::-1]
            assert abs(got.replicates.half_directions[index, 0].numpy() @ exact[:, 0]) > 1 - 1e-3
        exactly, got_ranks = np.array(ranks).T
        assert np.abs(got_ranks - exactly).max() < 0.05 * exactly.std()
        assert standard_errors(got_ranks) == pytest.approx(standard_errors(exactly), rel=0.01)


@pytest.mark.parametrize("size", [FEW, MANY])
def test_a_group_that_holds_all_of_the_leading_direction(size: tuple[int, int]) -> None:
    """A massive activation in one document may do so: without it another direction leads."""
    stream = planted(*size)
    stream.states[1][:, -1] = stream.states[0][:, -1]  # that dimension belongs to the row alone
    row = size[0] // 3
    stream.states[1][row] = stream.states[0][row]
    stream.states[1][row, -1] += 1000.0
    alone = int(stream.document[row]) % GROUPS
    got = reduced(stream)["raw"][0]
    leading = [replicate.eigenvalues.max() for replicate in got.resamples[1]]
    assert [value < 1e-2 * max(leading) for value in leading] == [g == alone for g in range(GROUPS)]
    metrics = layer_metrics(got.statistics, *got.resamples)
    assert metrics["stable_rank"].value == pytest.approx(1.0, abs=1e-2)
    assert metrics["stable_rank"].interval is not None
    gamma = metrics["gamma"]
    assert gamma.value == pytest.approx(1000.0, rel=1e-2)
    assert gamma.interval is not None
    assert gamma.interval[0] == 0.0  # one document decides it


@pytest.mark.parametrize("documents", [2, 3])
@pytest.mark.parametrize("size", [FEW, MANY])
def test_without_its_only_group_a_half_has_no_direction(size: tuple[int, int], documents: int) -> None:
    """With two groups each half is one group, so no comparison between halves has an interval."""
    stream = planted(*size)
    few = ResidualStream(stream.states, stream.document % documents, stream.position, stream.kept, "device")
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
    assert layer_metrics(spectra[0].statistics, *spectra[0].resamples)["gamma"].interval


def test_shards_and_sides_give_the_same_replicates() -> None:
    stream = planted(*MANY)
    whole, sharded = reduced(stream), reduced(stream, shards=4)
    for variant in BLOCK_VARIANTS:
        if not BLOCK_VARIANTS[variant].keeps_sinks:  # medians are taken shard by shard
            continue
        for one, two in zip(whole[variant], sharded[variant], strict=True):
            for a, b in zip(one.resamples[1], two.resamples[1], strict=True):
                assert a.eigenvalues == pytest.approx(b.eigenvalues, rel=1e-5)  # from float32
                assert a.averages["relative_step"] == pytest.approx(b.averages["relative_step"], rel=1e-9)


def test_random_directions_have_the_covariance_of_the_updates() -> None:
    stream = planted(*MANY)
    got = reduced(stream)["raw"][0]
    moment = second_moment(stream, 0, "raw", np.ones(MANY[0], dtype=bool))
    draws = got.random.numpy()
    assert np.linalg.norm(draws, axis=1) == pytest.approx(1.0)
    along = np.linalg.eigh(moment)[1][:, -1]
    expected = np.linalg.eigvalsh(moment)[-1] / np.trace(moment)
    assert ((draws @ along) ** 2).mean() == pytest.approx(expected, rel=0.5)


@pytest.mark.parametrize(("documents", "groups"), [(1, 1), (2, 2), (3, 2), (9, 8), (10, 10), (136, 10)])
def test_groups_lie_within_halves(documents: int, groups: int) -> None:
    units = Units.of(documents)
    assert units.group_count == groups
    assert units.groups == tuple(i % groups for i in range(documents))


def test_moments_that_do_not_fit_are_added_for_fewer_layers_at_a_time() -> None:
    stream = planted(*MANY)
    pieces = [stream.take(rows) for rows in torch.arange(len(stream.kept)).chunk(3)]
    units = Units.of(DOCUMENTS)
    options = {"layers": 2, "tokens": len(stream.kept), "units": units}
    matrix, raw = 40**2 * 8, [BLOCK_VARIANTS["raw"]]
    assert layers_at_once(40, raw, units, Memory(0, host=2 * 10 * matrix)) == 2
    together = reduce_stream(pieces, **options, memory=Memory(0, host=2 * 10 * matrix))["raw"]
    assert len(together[0].resamples[1]) == GROUPS
    one = Memory(0, host=2 * 10 * matrix - 1)
    assert layers_at_once(40, raw, units, one) == 1
    apart = [reduce_stream(pieces, **options, memory=one, chosen=[layer])["raw"][0] for layer in (0, 1)]
    for whole, alone in zip(together, apart, strict=True):
        assert np.array_equal(whole.statistics.eigenvalues, alone.statistics.eigenvalues)
        assert torch.equal(whole.random, alone.random)
    for refused in (
        lambda: reduce_stream(pieces, **options, memory=one),
        lambda: layers_at_once(40, raw, units, Memory(9)),
    ):
        with pytest.raises(DeviceError, match=r"moments of .* layer\(s\) that are added over them take .* GiB"):
            refused()


@pytest.mark.parametrize("devices", [[], [torch.device("cpu")] * 3], ids=["one lane", "three"])
def test_a_shard_is_freed_before_the_next_one_is_filled(devices: list[torch.device]) -> None:
    stream = planted(*MANY)
    alive: list[weakref.ref[ResidualStream]] = []

    def shards() -> Iterator[ResidualStream]:
        for rows in torch.arange(len(stream.kept)).chunk(3):
            assert not [shard for shard in alive if shard() is not None]
            shard = stream.take(rows)
            alive.append(weakref.ref(shard))
            yield shard
            del shard

    variants = list(BLOCK_VARIANTS.values())
    reduce_stream(shards(), layers=2, tokens=MANY[0], units=Units.of(DOCUMENTS), variants=variants, devices=devices)
    assert len(alive) == 3


def test_the_bias_of_a_figure_of_both_halves_is_removed_by_groups() -> None:
    """For mean(a)^2 + mean(b)^2 of five groups each the two-sample jackknife removes exactly s_a^2/5 + s_b^2/5."""
    groups = np.random.default_rng(3).standard_normal(10)

    def figure(kept: np.ndarray) -> Estimate:
        halves = [groups[half::2][kept[half::2]] for half in (0, 1)]
        return Estimate(value=float(sum(half.mean() ** 2 for half in halves)))

    everything = np.ones(10, dtype=bool)
    without = [figure(np.arange(10) != deleted) for deleted in range(10)]
    estimate = with_interval(figure(everything), [], without, bias="groups")
    exact = sum(half.mean() ** 2 - half.var(ddof=1) / 5 for half in (groups[::2], groups[1::2]))
    assert estimate.corrected == pytest.approx(exact, rel=1e-12)
    assert with_interval(figure(everything), [], without, bias="none").corrected == figure(everything).value


@pytest.mark.parametrize("variant", ["raw", "centred"])
@pytest.mark.parametrize("size", [FEW, MANY], ids=["rows", "moments"])
def test_pairs_of_groups(size: tuple[int, int], variant: str) -> None:
    """Check sums over different groups, of all and without one, against the matrices."""
    stream = planted(*size)
    layer = reduced(stream)[variant][1]
    update = stream.step(1)[1].double()
    rows = stream.position > 0 if variant == "centred" else stream.kept
    update = update - update[rows].mean(dim=0) if variant == "centred" else update
    updates = [update[rows & (stream.document % GROUPS == group)] for group in range(GROUPS)]
    grams = [rows.T @ rows for rows in updates]
    for deleted, statistics in [(None, layer.statistics), (3, layer.resamples[1][3])]:
        kept = [group for group in range(GROUPS) if group != deleted]
        if variant == "centred":
            left = [updates[group].numpy() for group in kept]
            assert statistics.between == pytest.approx(centred_pairs_by_definition(left), rel=1e-8)
            continue
        pairs = list(permutations(kept, 2))
        traces = sum(float(grams[a].trace() * grams[b].trace()) for a, b in pairs)
        overlaps = sum(float((grams[a] * grams[b]).sum()) for a, b in pairs)
        rel = 1e-9 if deleted is None else 1e-6
        assert statistics.between == pytest.approx((traces, overlaps), rel=rel)


def centred_pairs_by_definition(groups: list[np.ndarray]) -> tuple[float, float]:
    """Return (tr Sigma)^2 and tr Sigma^2 from means over all choices of different groups, one by one."""
    counts, totals = [len(rows) for rows in groups], [rows.sum(axis=0) for rows in groups]
    grams = [rows.T @ rows for rows in groups]

    def mean(size: int, term: Callable[..., float]) -> float:
        chosen = list(permutations(range(len(groups)), size))
        return sum(term(*each) for each in chosen) / sum(math.prod(counts[a] for a in each) for each in chosen)

    spread = mean(4, lambda a, b, c, d: (totals[a] @ totals[b]) * (totals[c] @ totals[d]))
    trace = mean(2, lambda a, b: grams[a].trace() * grams[b].trace())
    trace -= 2 * mean(3, lambda a, b, c: grams[a].trace() * (totals[b] @ totals[c]))
    squares = mean(2, lambda a, b: float((grams[a] * grams[b]).sum()))
    squares -= 2 * mean(3, lambda a, b, c: totals[b] @ grams[a] @ totals[c])
    return trace + spread, squares + spread


def test_the_ratio_of_centred_updates_has_no_bias_of_their_mean() -> None:
    """Ten groups of two tokens in 60 dimensions: the ratio of pairs about the sample mean loses a tenth."""
    draw = np.random.default_rng(8)
    variances, groups, length = np.array([3.0] + [1.0] * 59), 10, 2
    truth = variances.sum() ** 2 / (variances**2).sum()
    sums, pairs = np.zeros(2), np.zeros(2)
    for _ in range(300):
        rows = draw.standard_normal((groups, length, 60)) * np.sqrt(variances) + 1.5
        centred = rows - rows.mean(axis=(0, 1))
        totals = centred.sum(axis=1)
        grams = np.einsum("gti,gtj->gij", centred, centred)
        traces, overlaps = np.einsum("gii->g", grams), np.einsum("aij,bij->ab", grams, grams)
        through = np.stack(
            [
                np.einsum("ai,aij,aj->a", totals, grams, totals),
                np.einsum("aij,ij->a", grams, totals.T @ totals),
                np.einsum("ai,ij,aj->a", totals, grams.sum(axis=0), totals),
                totals @ np.einsum("aij,aj->i", grams, totals),
            ],
            axis=1,
        )
        squares = overlaps.sum() - overlaps.trace()
        sums += centred_pairs([length] * groups, traces, squares, totals @ totals.T, through) or (np.nan, np.nan)
        pairs += traces.sum() ** 2 - (traces**2).sum(), squares
    assert sums[0] / sums[1] == pytest.approx(truth, rel=0.02)
    assert pairs[0] / pairs[1] < 0.92 * truth
    assert centred_pairs([1] * 3, np.ones(3), 1.0, np.ones((3, 3)), np.ones((3, 4))) is None


def assert_equal(one: dict[str, list[LayerSpectra]], two: dict[str, list[LayerSpectra]]) -> None:
    for variant, layers in one.items():
        for a, b in zip(layers, two[variant], strict=True):
            for x, y in zip([a.statistics, *a.resamples[1]], [b.statistics, *b.resamples[1]], strict=True):
                assert x.averages == y.averages
                assert np.array_equal(x.eigenvalues, y.eigenvalues)
            assert torch.equal(a.directions, b.directions)
            assert torch.equal(a.random, b.random)
            assert a.replicates is not None
            assert b.replicates is not None
            assert torch.equal(a.replicates.directions, b.replicates.directions)
            assert torch.equal(a.replicates.half_directions, b.replicates.half_directions)


@pytest.mark.parametrize("size", [FEW, MANY])
def test_layers_together_give_what_each_gives_alone(size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reduce two layers in one portion, as a GPU does; and one after the other where two do not fit memory."""
    stream = planted(*size)
    alone = reduced(stream)
    monkeypatch.setattr(walk, "make_lanes", lambda *_: [Lane(None, None, 2)])
    sizes: list[int] = []
    solve_layers = walk.solve_layers

    def counted(portion: Sequence[Groups], *arguments: Any, **options: Any) -> list[LayerSpectra]:
        sizes.append(len(portion))
        return solve_layers(portion, *arguments, **options)

    monkeypatch.setattr(walk, "solve_layers", counted)
    assert_equal(alone, reduced(stream))
    assert sizes == [2] * len(BLOCK_VARIANTS)

    def no_room(portion: Sequence[Groups], *arguments: Any, **options: Any) -> list[LayerSpectra]:
        if len(portion) > 1:
            raise torch.OutOfMemoryError("not enough")
        return counted(portion, *arguments, **options)

    sizes.clear()
    monkeypatch.setattr(walk, "solve_layers", no_room)
    assert_equal(alone, reduced(stream))
    assert sizes == [1] * 2 * len(BLOCK_VARIANTS)


@pytest.mark.parametrize(
    ("given", "layers_of", "room_gb", "want"),
    [
        ("rows", 64, 11.0, (2, 22)),
        ("rows", 64, 60.0, (2, 32)),
        ("rows", 12, 60.0, (1, 12)),
        ("rows", 4, 60.0, (4, 1)),
        ("rows", 64, 0.6, (1, 1)),
        ("rows", 64, 1.3, (3, 1)),
        ("moments", 64, 60.0, (2, 12)),
        ("moments", 64, 6.0, (1, 1)),
        ("wide", 64, 60.0, (2, 1)),
    ],
)
def test_how_many_layers_at_once(
    given: str, layers_of: int, room_gb: float, want: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """2,047 x 5,120 as rows takes 0.24 GB each while solved, moments 2.3 GB; 8,192 is too large to batch."""
    monkeypatch.setattr(lanes_module, "can_batch", lambda device: True)
    n, hidden = 2047, 8192 if given == "wide" else 5120
    if given == "rows":
        workload = Workload(64, n, 4 * n * hidden, 8 * n * hidden, False)
    else:
        workload = Workload(64, hidden, 8 * hidden**2 * 5, 32 * rows_at_once(hidden) * hidden, True)
    assert workload.lanes(torch.device("cuda"), layers_of, int(room_gb * 1e9)) == want


@pytest.mark.parametrize(
    ("n", "threads", "want"), [(576, 1, [None]), (576, 2, [1, 1]), (576, 16, [4] * 4), (5120, 16, [None])]
)
def test_a_cpu_reduces_small_layers_beside_each_other(n: int, threads: int, want: list[int | None]) -> None:
    with host_threads(threads):
        lanes = make_lanes([torch.device("cpu")], Workload(8, n, 0, 0, True), None)
    assert [lane.threads for lane in lanes] == want


def test_layers_beside_each_other_give_what_each_gives_alone() -> None:
    stream = planted(*MANY)
    with host_threads(2):
        beside = reduced(stream, devices=[torch.device("cpu")])
        assert torch.get_num_threads() == 2
    with host_threads(1):
        assert_equal(beside, reduced(stream, devices=[torch.device("cpu")]))


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_a_layer_stays_on_its_gpu_however_many_lanes_a_shard_has(lanes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes_module, "load_algebra", lambda: None)
    monkeypatch.setattr(lanes_module, "side_streams", lambda device, count: [None] * count)
    monkeypatch.setattr(Workload, "lanes", lambda workload, device, layers, room: (lanes, 1))
    gpus = [torch.device("cuda:0"), torch.device("cuda:1")]
    everywhere = make_lanes(gpus, Workload(8, 100, 0, 0, True), Memory(device=1 << 40))
    assert [everywhere[layer % len(everywhere)].device for layer in range(8)] == gpus * 4
