"""The counter-based generator: its integers, its distributions, and that no number depends on how it is formed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.models.random_numbers import Draw, Stream, _mixed
from scipy import stats

NORMAL = Draw((0, 3), "normal", 0.0, 1.0)
UNIFORM = Draw((0, 3), "uniform", 0.0, 1.0)
TRUNCATED = Draw((0, 3), "normal", 0.5, 2.0, bounds=(-1.0, 3.0))
ALL = pytest.mark.parametrize("draw", [NORMAL, UNIFORM, TRUNCATED], ids=["normal", "uniform", "truncated"])
LEAST_P = 1e-4
"""The draws are fixed, so what passes here passes always."""


def filled(draw: Draw, *shape: int, **options: Any) -> torch.Tensor:
    tensor = torch.full(shape, math.nan, **options)
    draw.fill(tensor)
    return tensor


def unsigned(stream: Stream, count: int) -> list[int]:
    states = stream.states(torch.arange(count))
    return [int(value) % 2**64 for value in _mixed(states, torch.empty_like(states))]


@pytest.mark.parametrize(
    ("seed", "expected"),
    [
        (0, [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC, 0x1B39896A51A8749B]),
        (
            1234567,
            [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821],
        ),
    ],
)
def test_the_integers_are_those_of_the_reference_implementation(seed: int, expected: list[int]) -> None:
    """Its step is the golden ratio of 2^64 (https://prng.di.unimi.it/splitmix64.c)."""
    assert unsigned(Stream(seed, 0x9E3779B97F4A7C15), 5) == expected


def test_streams_have_odd_steps_that_mix() -> None:
    streams = [Stream.of(0, number) for number in range(2000)]
    assert len({stream.start for stream in streams}) == len({stream.step for stream in streams}) == 2000
    for stream in streams:
        assert stream.step % 2 == 1
        assert (stream.step ^ (stream.step >> 1)).bit_count() >= 24


def test_numbers_follow_from_the_integers_by_formula() -> None:
    count = 7
    half = 4
    integers = unsigned(Stream.of(*NORMAL.labels), half)
    upper = [((value >> 32) + 2**31) % 2**32 for value in integers]  # in the order of signed numbers
    radii = [math.sqrt(-2.0 * math.log((value + 0.5) / 2**32)) for value in upper]
    angles = [2.0 * math.pi * (value % 2**32) / 2**32 for value in integers]
    expected = [r * math.cos(a) for r, a in zip(radii, angles, strict=True)]
    expected += [r * math.sin(a) for r, a in zip(radii, angles, strict=True)]
    assert filled(NORMAL, count).tolist() == pytest.approx(expected[:count], abs=1e-6)
    scaled = filled(Draw(NORMAL.labels, "normal", 3.0, 0.02), count)
    assert scaled.tolist() == pytest.approx([3.0 + 0.02 * value for value in expected[:count]], abs=1e-6)
    even = [(value >> 40) / 2**24 for value in integers] + [value % 2**24 / 2**24 for value in integers]
    assert filled(UNIFORM, count).tolist() == even[:count]


@ALL
@pytest.mark.parametrize("count", [0, 1, 2, 1001])
def test_no_number_depends_on_blocks_threads_or_strides(draw: Draw, count: int) -> None:
    expected = filled(draw, count)
    assert not expected.isnan().any()
    for block in (1, 3, 1000, 1 << 20):
        tensor = torch.empty(count)
        draw.fill(tensor, block)
        assert torch.equal(tensor, expected), block
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        tensor = torch.empty(count)
        draw.fill(tensor, 16)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(tensor, expected)
    strided = torch.empty(2, count).t()
    draw.fill(strided)
    assert torch.equal(strided.reshape(-1), filled(draw, 2 * count))


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_another_dtype_is_the_float32_rounded(draw: Draw, dtype: torch.dtype) -> None:
    assert torch.equal(filled(draw, 999, dtype=dtype), filled(draw, 999).to(dtype))


@pytest.mark.parametrize(
    ("draw", "distribution"),
    [
        (NORMAL, stats.norm()),
        (UNIFORM, stats.uniform()),
        (Draw((0, 4), "uniform", -3.0, 5.0), stats.uniform(-3.0, 8.0)),
        (TRUNCATED, stats.truncnorm(-0.75, 1.25, loc=0.5, scale=2.0)),
        (Draw((0, 5), "normal", 0.0, 1.0, bounds=(0.0, 1.0)), stats.truncnorm(0.0, 1.0)),
    ],
)
def test_distributions(draw: Draw, distribution: Any) -> None:
    numbers = filled(draw, 200_001).double().numpy()
    assert stats.kstest(numbers, distribution.cdf).pvalue > LEAST_P
    mean, variance, skewness, kurtosis = (float(value) for value in distribution.stats(moments="mvsk"))
    centred = (numbers - mean) / math.sqrt(variance)
    for power, expected in enumerate((0.0, 1.0, skewness, kurtosis + 3.0), start=1):
        values = centred**power
        assert abs(values.mean() - expected) < 4.5 * values.std() / math.sqrt(len(values)), power


def test_far_tails_are_drawn_and_finite() -> None:
    numbers = filled(NORMAL, 4_000_000).numpy()
    assert np.isfinite(numbers).all()
    for bound in (4.0, 4.5):
        expected = 2 * stats.norm.sf(bound) * len(numbers)
        assert abs((np.abs(numbers) > bound).sum() - expected) < 4.5 * math.sqrt(expected)


def test_numbers_of_tensors_halves_and_neighbours_are_independent() -> None:
    count = 200_000
    first = filled(NORMAL, count)
    pairs = {
        "tensors": (first, filled(Draw((0, 4), "normal", 0.0, 1.0), count)),
        "seeds": (first, filled(Draw((1, 3), "normal", 0.0, 1.0), count)),
        "halves": (first[: count // 2], first[count // 2 :]),
        "neighbours": (first[:-1], first[1:]),
        "rows": (first[:-768], first[768:]),
    }
    for name, (one, other) in pairs.items():
        for power in (1, 2):  # squares, as the numbers of a pair have one radius
            correlation = np.corrcoef(one.numpy() ** power, other.numpy() ** power)[0, 1]
            assert abs(correlation) < 4.5 / math.sqrt(len(one)), (name, power)


@ALL
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_draws_the_same(draw: Draw) -> None:
    here, there = (filled(draw, 10_000_001, device=device) for device in ("cpu", "cuda"))
    assert (here - there.cpu()).abs().max() <= 1e-6
    assert (here != there.cpu()).float().mean() < 1e-6
    narrow = filled(draw, 1001, device="cuda", dtype=torch.bfloat16).cpu()
    assert torch.equal(narrow, filled(draw, 1001, dtype=torch.bfloat16))
