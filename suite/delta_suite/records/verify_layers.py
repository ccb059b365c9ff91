"""Check the figures of layers against the spectra, cosines, halves and replicates beside the record, and each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float64

from delta_suite.capture.tolerances import EPSILON
from delta_suite.metrics.layer import ENTROPY_FLOOR
from delta_suite.metrics.registry import METRICS
from delta_suite.records.arrays import KINDS, STATES, Arrays, matrices_without, pairs_of_layers
from delta_suite.records.problem import (
    SINGLE,
    WRITTEN,
    Figures,
    Numbers,
    Part,
    Problem,
    Resampled,
    Resamples,
)
from delta_suite.records.record import Record
from delta_suite.reduction.variants import VARIANTS, WRITE_VARIANTS, has_averages, of_write

SMALLEST_ENERGY = 2.0**-100
"""Least energy of a layer whose spectrum is checked: below, float32 stores small eigenvalues with fewer digits."""


WITHOUT_SINKS = {"sink_free": 1, "centred": 2}
"""Variants of whole blocks that leave out the sinks of the record, and the version since which they do."""


def tokens_of(record: Record, variant: str) -> int:
    """Return the number of tokens that enter a variant."""
    if variant not in WRITE_VARIANTS and record.variants.get(variant, 0) < WITHOUT_SINKS.get(variant, math.inf):
        return record.calibration.tokens
    return record.calibration.tokens - record.sinks.position_zero - record.sinks.large_norm


@dataclass(frozen=True)
class LayerFigures:
    """The figures of all layers in one variant, metric by metric."""

    figures: Figures
    spans: Mapping[str, slice]
    """The places of the figures of each metric that every layer has."""

    def __contains__(self, name: str) -> bool:
        """Return True if every layer has the metric."""
        return name in self.spans

    def __getitem__(self, name: str) -> Figures:
        """Return the figures of one metric."""
        return self.figures.take(self.spans[name])

    def value(self, name: str) -> Numbers:
        """Return the value of a metric in each layer."""
        return self.figures.value[self.spans[name]]

    def mean_square(self, name: str) -> Numbers:
        """Return the mean square over tokens, from mean and standard deviation."""
        span = self.spans[name]
        return np.asarray(self.figures.value[span] ** 2 + self.figures.sd[span] ** 2)


_AT_MOST = (
    ("stable_rank", "participation_ratio"),
    ("participation_ratio", "effective_rank"),
    ("effective_rank", "effective_rank_roy"),
    ("top1_energy", "top3_energy"),
    ("top3_energy", "top10_energy"),
    ("gamma", "frobenius"),
)
"""Pairs of metrics of which the first never exceeds the second. Renyi entropies fall with their order: 1 / p_1 is of
infinite order, 1 / sum p^2 of order 2, the spectral entropy of order 1, and that of sigma is of flatter weights."""


def relation_problems(layers: LayerFigures, rank: int, tokens: int) -> Iterator[Problem]:
    """Yield where figures of one layer contradict each other, which shows without any array.

    tokens: those that enter. rank: the most directions of an update; each share at the floor that an entropy leaves
    out is missing from it.
    """
    rounding = 1 + 2 * WRITTEN - max(rank, 1) * ENTROPY_FLOOR * math.log(ENTROPY_FLOOR)
    for smaller, larger in _AT_MOST:
        if smaller in layers and larger in layers:
            bound = np.where(np.isnan(layers.value(larger)), np.inf, layers.value(larger)) * rounding
            yield from layers[smaller].outside("the value", layers.value(smaller), -np.inf, bound, f", its {larger}")
    for name in layers.spans:
        figures = layers[name]
        if METRICS[name].takes == "tokens" and METRICS[name].low == 0.0:
            # Of n numbers that are not negative, the mean square is n times the squared mean at most.
            most = figures.value * math.sqrt(max(tokens - 1, 0)) * rounding
            yield from figures.outside("the sd", figures.sd, 0.0, most, f", by its value over {tokens} tokens")
    equal: list[tuple[str, Numbers, Numbers, str]] = []
    if "stable_rank" in layers and "top1_energy" in layers:
        stable = layers.value("stable_rank")
        equal.append(("top1_energy", layers.value("top1_energy"), 1 / stable, "1 / stable_rank"))
        if "gamma" in layers and "frobenius" in layers:
            energy = layers.value("frobenius") ** 2
            equal.append(("gamma", layers.value("gamma") ** 2, energy / stable, "frobenius^2 / stable_rank"))
    if "alignment" in layers and "parallel_fraction" in layers:
        bound = np.where(np.isnan(layers.value("parallel_fraction")), np.inf, layers.value("parallel_fraction"))
        signed = np.abs(layers.value("alignment"))
        yield from layers["alignment"].outside("its size", signed, 0.0, bound * rounding, ", parallel_fraction")
        squares = layers.mean_square("alignment"), layers.mean_square("parallel_fraction")
        equal.append(("alignment", *squares, "parallel_fraction"))
    for name, first, second, source in equal:
        both = ~(np.isnan(first) | np.isnan(second))
        stated, expected = np.where(both, first, np.nan), np.where(both, second, np.nan)
        tolerance = 8 * WRITTEN * (np.abs(stated) + np.abs(expected))
        yield from layers[name].differing("its value or mean square", stated, expected, tolerance, source)
    if "block_influence" in layers and "angular_distance" in layers:
        # 2 x^2 / pi^2 <= 1 - cos x <= x^2 / 2 up to x = pi, and the angle is pi times the distance.
        square = layers.mean_square("angular_distance")
        least = np.where(np.isnan(square), -np.inf, square * 2 * (1 - 4 * WRITTEN))
        most = np.where(np.isnan(square), np.inf, square * np.pi**2 / 2 * (1 + 4 * WRITTEN))
        value = layers.value("block_influence")
        yield from layers["block_influence"].outside("the value", value, least, most, ", by angular_distance")


def layer_problems(
    record: Record, arrays: Arrays, variant: str, layers: LayerFigures, resampled: Resampled, *, merged: bool
) -> Iterator[Problem]:
    """Yield where the figures of layers contradict the arrays; their intervals are checked with others.

    layers: the metrics whose version is today's. resampled: what has intervals is added here. merged: the record of a
    baseline that was added to, whose figures and arrays may come from two measurements; then intervals alone are held
    against replicates.
    """
    names = [name for name in layers.spans if not merged or f"{variant}.units.{name}" in arrays]
    if not names:
        return
    parts: list[Part] = []
    narrower: list[Part] = []
    for name in names:
        halves = arrays.get(f"{variant}.halves.{name}")
        if name == "adjacent_cosine":
            halves = _adjacent_halves(record, arrays, variant)
        for out, kind in zip((parts, narrower), KINDS, strict=True):
            replicates = arrays.get(f"{variant}.{kind}.{name}")
            # Stored as float32; those of records of ten groups of documents are of float64.
            error = 0.0 if replicates is None or replicates.dtype == np.float64 else SINGLE * np.abs(replicates).max(0)
            out.append((replicates, halves, error))
    chosen = layers.figures.joined([layers.spans[name] for name in names])
    resamples = Resamples.join(parts, record.model.layers, record.resampling.groups)
    resampled.add(chosen, resamples, centred=not merged)
    if (groups := record.resampling.document_groups) is not None:
        of_documents = Resamples.join(narrower, record.model.layers, groups)
        resampled.add(chosen.over_documents(), of_documents, centred=False, narrower=True)
    if merged:
        return
    yield from _mean_problems(chosen, resamples, centre=VARIANTS[variant].centre)
    yield from _group_problems(arrays, variant, layers)
    yield from _spectrum_problems(record, arrays, variant, layers)
    yield from _state_problems(arrays, variant, layers)
    yield from _pair_problems(record, arrays, variant, layers)


def _mean_problems(figures: Figures, resamples: Resamples, *, centre: bool) -> Iterator[Problem]:
    """Yield where a mean over tokens, or a ratio of sums over pairs of groups, is beyond all its replicates.

    Each token, and each pair of groups, is in the same number of replicates, so the value is a weighted mean of them.
    """
    means = np.array(
        [
            metric.takes == "tokens" or (metric.name == "participation_ratio_unbiased" and not centre)
            for metric in figures.metrics
        ]
    )
    least, most = resamples.replicates.min(axis=0), resamples.replicates.max(axis=0)
    known = means & ~np.isnan(least)
    slack = (WRITTEN + SINGLE) * (np.abs(least) + np.abs(most))
    least, most = np.where(known, least - slack, -np.inf), np.where(known, most + slack, np.inf)
    yield from figures.outside("the value", figures.value, least, most, ", the range of its replicates")


def _group_problems(arrays: Arrays, variant: str, layers: LayerFigures) -> Iterator[Problem]:
    """Yield where replicates of several metrics are not those of one spectrum, group by group.

    So it is where those of one are in another order than the others', which its own interval does not show.
    """

    def without(kind: str, name: str) -> np.ndarray | None:
        stored = arrays.get(f"{variant}.{kind}.{name}")
        return None if stored is None or name not in layers else stored.astype(np.float64)

    for kind in KINDS:
        stable, top1 = without(kind, "stable_rank"), without(kind, "top1_energy")
        gamma, frobenius = without(kind, "gamma"), without(kind, "frobenius")
        pairs: list[tuple[str, str, np.ndarray, np.ndarray]] = []
        if stable is not None and top1 is not None:
            pairs.append(("top1_energy", "stable_rank", top1 * stable, np.ones_like(stable)))
        if stable is not None and gamma is not None and frobenius is not None:
            pairs.append(("gamma", "frobenius and stable_rank", gamma**2 * stable, frobenius**2))
        for name, other, product, expected in pairs:
            # Each factor is off by half of SINGLE of itself, a square by twice that.
            for layer in np.flatnonzero((np.abs(product - expected) > 4 * SINGLE * expected).any(axis=0)):
                says = f"its replicates over {kind} are not those of {other}, group by group"
                yield Problem(layers[name].where(int(layer)), says)


# --- spectra ---------------------------------------------------------------------------------------------------


def spectrum_figures(eigenvalues: Float64[np.ndarray, "layers rank"]) -> dict[str, Numbers]:
    """Return the metrics that follow from the eigenvalues of each layer, NaN for a layer without energy."""
    total = eigenvalues.sum(axis=1)
    positive = np.where(total > 0, total, np.nan)
    p = eigenvalues / positive[:, None]
    roots = np.sqrt(eigenvalues)
    top = eigenvalues[:, 0]
    second = eigenvalues[:, 1] if eigenvalues.shape[1] > 1 else np.zeros(len(top))
    return {
        "gamma": np.sqrt(top) + 0 * positive,
        "effective_rank": _entropy_rank(p),
        "effective_rank_roy": _entropy_rank(roots / roots.sum(axis=1, keepdims=True)),
        "participation_ratio": 1 / (p**2).sum(axis=1),
        "stable_rank": 1 / p[:, 0],
        "top1_energy": np.minimum(1.0, p[:, 0]),
        "top3_energy": np.minimum(1.0, p[:, :3].sum(axis=1)),
        "top10_energy": np.minimum(1.0, p[:, :10].sum(axis=1)),
        "spectral_gap": np.sqrt(top / np.where(second > 0, second, np.nan)),
        "frobenius": np.sqrt(total),
    }


def _entropy_rank(p: np.ndarray) -> Numbers:
    entropies = -(p * np.log(np.where(p > ENTROPY_FLOOR, p, 1.0))).sum(axis=1)
    return np.asarray(np.exp(entropies))


def _spectrum_problems(record: Record, arrays: Arrays, variant: str, layers: LayerFigures) -> Iterator[Problem]:
    """Yield where figures are not those of the eigenvalues beside the record."""
    eigenvalues = arrays[f"{variant}.eigenvalues"].astype(np.float64)
    tokens = tokens_of(record, variant)
    if tokens < 2 or not eigenvalues.shape[1]:
        return
    total, rank = eigenvalues.sum(axis=1), max(2, eigenvalues.shape[1])
    checked = (total == 0) | ((total > SMALLEST_ENERGY) & np.isfinite(total))
    followed = {name: values for name, values in spectrum_figures(eigenvalues).items() if name in layers}
    if not followed:
        return
    # Rounding moves each share of the energy by SINGLE of itself at most, and an entropy by SINGLE times the entropy;
    # what is left out of an entropy, or taken into it, at the floor is at most the floor's own term for each share.
    floor = rank * -ENTROPY_FLOOR * math.log(ENTROPY_FLOOR)
    relative = SINGLE * (2 + math.log(rank)) + floor + WRITTEN
    expected = np.concatenate([np.where(checked, values, np.nan) for values in followed.values()])
    chosen = layers.figures.joined([layers.spans[name] for name in followed])
    stated = np.where(np.tile(checked, len(followed)), chosen.value, np.nan)
    yield from chosen.differing("the value", stated, expected, relative * expected, "its eigenvalues")
    if not checked.all():
        return
    if "update_norm" in layers:
        mean_square, expected = layers.mean_square("update_norm"), total / tokens
        tolerance = (SINGLE + 4 * WRITTEN) * expected
        norms = layers["update_norm"]
        yield from norms.differing("its mean square", mean_square, expected, tolerance, "the sum of its eigenvalues")
    if "rounding_share" in layers:
        yield from _rounding_problems(record, variant, layers["rounding_share"], total / tokens)
    if "mean_energy" not in layers:
        return
    share = layers["mean_energy"]
    if VARIANTS[variant].centre:
        yield from share.outside("the value", share.value, 0.0, 0.0, ": its mean is taken away")
    centred = f"{of_write('centred', VARIANTS[variant].write)}.eigenvalues"
    if VARIANTS[variant].rows == "sink_free" and centred in arrays:
        # Centring takes away the energy of the mean, and nothing else.
        expected = 1 - arrays[centred].astype(np.float64).sum(axis=1) / total
        tolerance = SINGLE + 2 * WRITTEN
        yield from share.differing("the value", share.value, expected, tolerance, "the energy that centring removes")


def _state_problems(arrays: Arrays, variant: str, layers: LayerFigures) -> Iterator[Problem]:
    """Yield where the effective rank of the states is not that of their eigenvalues."""
    if "stream_effective_rank" not in layers:
        return
    stored = arrays.get(f"{variant}.{STATES}")
    if stored is None:
        yield Problem(f"{variant}.{STATES}", "the array is missing")
    if stored is None or stored.shape[1] < 2:
        return
    eigenvalues = stored.astype(np.float64)
    total, rank = eigenvalues.sum(axis=1, keepdims=True), eigenvalues.shape[1]
    expected = np.where(total[:, 0] > 0, _entropy_rank(eigenvalues / np.where(total > 0, total, 1.0)), np.nan)
    relative = SINGLE * (2 + math.log(rank)) - rank * ENTROPY_FLOOR * math.log(ENTROPY_FLOOR) + WRITTEN
    figures = layers["stream_effective_rank"]
    source = f"the array {variant}.{STATES}"
    yield from figures.differing("the value", figures.value, expected, relative * expected, source)


def _rounding_problems(record: Record, variant: str, share: Figures, energy: Numbers) -> Iterator[Problem]:
    """Yield where the share of rounding is not that of the stream's norm, for any dtype. energy: a token's."""
    stored = variant if has_averages(VARIANTS[variant]) else "sink_free"
    norms = [layer.metrics.get(stored, {}).get("stream_norm") for layer in record.layers]
    if any(norm is None or norm.value is None or norm.sd is None for norm in norms):
        return
    pairs = [(norm.value, norm.sd) for norm in norms if norm and norm.value and norm.sd is not None]
    squares = np.square(np.array(pairs, dtype=np.float64)).sum(axis=1) if pairs else np.zeros(0)
    if len(squares) < len(norms):
        return
    per_square = squares / 24 / np.where(energy > 0, energy, np.nan)
    choices = np.array([epsilon**2 * per_square for epsilon in EPSILON.values()])
    closest = np.abs(np.log(choices / share.value)).argmin(axis=0)
    expected = choices[closest, np.arange(len(closest))]
    tolerance = (SINGLE + 8 * WRITTEN) * expected
    yield from share.differing("the value", share.value, expected, tolerance, "stream_norm and its eigenvalues")


# --- directions ------------------------------------------------------------------------------------------------


@lru_cache
def pair_index(layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the places, among the pairs of layers L <= M of the arrays, of (L, L) and of (L, L + 1)."""
    first, second = pairs_of_layers(layers)
    return np.flatnonzero(first == second), np.flatnonzero(second == first + 1)


def _adjacent_halves(record: Record, arrays: Arrays, variant: str) -> np.ndarray | None:
    """Return the cosines of neighbouring layers in each half, NaN where one of them has no direction there."""
    halves = [arrays.get(f"{variant}.cosines_{half}") for half in "ab"]
    if halves[0] is None or halves[1] is None:
        return None
    return np.array([_between(half, half, record.model.layers) for half in halves if half is not None])


def _between(values: np.ndarray, cosines: np.ndarray, layers: int, most: float = 1.0) -> Numbers:
    """Return the size of each layer's value with the next; NaN where one of them has no direction."""
    diagonal, following = pair_index(layers)
    present = cosines[diagonal] >= 0.5
    out = np.full(layers, np.nan)
    out[:-1] = np.where(present[:-1] & present[1:], np.minimum(np.abs(values[following]), most), np.nan)
    return out


_MATRIX_OF = {"adjacent_cosine": "cosines", "subspace_overlap": "overlaps", "principal_angle": "angles"}
"""The matrix beside the record that holds each pair metric."""


def _pair_problems(record: Record, arrays: Arrays, variant: str, layers: LayerFigures) -> Iterator[Problem]:
    """Yield where figures of neighbouring layers are not those of the matrices beside the record."""
    count = record.model.layers
    cosines = arrays[f"{variant}.cosines"]
    diagonal, following = pair_index(count)
    for name, stored in _MATRIX_OF.items():
        if name not in layers:
            continue
        figures, values, most = layers[name], arrays[f"{variant}.{stored}"], METRICS[name].high
        expected = _between(values, cosines, count, most)
        yield from figures.differing("the value", figures.value, expected, WRITTEN, f"the array {variant}.{stored}")
        for kind in KINDS:
            replicates = matrices_without(arrays, f"{variant}.{stored}", kind)
            units = arrays.get(f"{variant}.{kind}.{name}")
            if replicates is not None and units is not None and count > 1:
                between = np.minimum(np.abs(replicates[:, following]), most)
                yield from _apart(figures, between, units[:, :-1], f"{variant}.{stored}.{kind}")
    cross = arrays.get(f"{variant}.cross")
    if "reliability" in layers and cross is not None:
        for kind in KINDS:
            replicates = matrices_without(arrays, f"{variant}.cross", kind)
            units = arrays.get(f"{variant}.{kind}.reliability")
            if replicates is not None and units is not None:
                alike = np.minimum(replicates[:, diagonal], 1.0)
                yield from _apart(layers["reliability"], alike, units, f"{variant}.cross.{kind}")
        present = np.all([arrays.get(f"{variant}.{name}", cosines)[diagonal] >= 0.5 for name in _COSINES], axis=0)
        expected = np.where(present, np.minimum(1.0, cross[diagonal]), np.nan)
        figures = layers["reliability"]
        yield from figures.differing("the value", figures.value, expected, WRITTEN, f"the array {variant}.cross")


def _apart(figures: Figures, expected: np.ndarray, units: np.ndarray, array: str) -> Iterator[Problem]:
    """Yield where the replicates of a metric of layers are not those that a matrix gives."""
    for layer in np.flatnonzero((np.abs(expected - units) > 2 * SINGLE).any(axis=0)):
        yield Problem(figures.where(int(layer)), f"its replicates are not those of the array {array}")


_COSINES = ("cosines", "cosines_a", "cosines_b")
