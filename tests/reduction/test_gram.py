"""Spectra from Gram matrices against a full SVD in float64, where that is hard; and the additivity of moments."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from delta_suite.metrics.layer import spectral_entropy_rank
from delta_suite.reduction import gram as spectra
from delta_suite.reduction.eigen import Eigensolver, bordered, can_batch, eigh, slow_float64, without_border
from delta_suite.reduction.gram import (
    Spectrum,
    add_gram,
    gram,
    mirror,
    sliced_gram,
    spectrum_of_gram,
    spectrum_of_tokens_gram,
    tokens_gram,
)
from delta_suite.reduction.moments import Moments, token_quantities
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

SIZES = [(60, 200), (200, 60), (128, 128), (9, 300), (700, 24)]


def spectrum(rows: torch.Tensor, k: int, side: str) -> Spectrum:
    if side == "tokens":
        return spectrum_of_tokens_gram(eigh(tokens_gram(rows)), rows, k)
    return spectrum_of_gram(eigh(gram(rows)), len(rows), k)


def matrix(kind: str, tokens: int, hidden: int, seed: int = 0) -> torch.Tensor:
    """Return a float32 matrix with one kind of spectrum."""
    generator = torch.Generator().manual_seed(seed)
    small = min(tokens, hidden)
    u = torch.linalg.qr(torch.randn(tokens, small, generator=generator, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(hidden, small, generator=generator, dtype=torch.float64))[0]
    index = torch.arange(1, small + 1, dtype=torch.float64)
    sigma = {
        "flat": torch.ones_like(index),
        "slow": index**-0.5,
        "steep": index**-3,
        "geometric": 0.5**index,
        "deficient": (index <= small // 3).double() * index**-1,
        "outlier": index**-0.5,
    }[kind]
    out = (u * sigma) @ v.T
    if kind == "outlier":
        out[0] *= 1000
    return out.float()


@pytest.mark.parametrize(
    ("size", "side"),
    [(size, side) for size in SIZES for side in ("tokens", "hidden") if side == "hidden" or size[0] <= size[1]],
)
@pytest.mark.parametrize("kind", ["flat", "slow", "steep", "geometric", "deficient", "outlier"])
@pytest.mark.parametrize("slow", [False, True], ids=["float64", "sliced"])
def test_against_a_full_svd(
    kind: str, size: tuple[int, int], side: str, slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spectra, "slow_float64", lambda device: slow)
    rows = matrix(kind, *size)
    _, sigma, vt = np.linalg.svd(rows.double().numpy(), full_matrices=False)
    got = spectrum(rows, 8, side)
    values = got.eigenvalues.numpy()
    assert len(values) == min(size)
    assert np.abs(np.sqrt(values) - sigma).max() <= 1e-6 * sigma[0]
    assert spectral_entropy_rank(values) == pytest.approx(spectral_entropy_rank(sigma**2), rel=1e-6)
    for index in range(min(8, len(sigma) - 1)):
        neighbours = np.delete(sigma, index)
        if np.abs(neighbours - sigma[index]).min() > 1e-2 * sigma[0]:  # well separated
            assert abs(float(got.directions[index].numpy() @ vt[index])) > 1 - 1e-8


@pytest.mark.parametrize("tokens", [1, 1024, 2500])
def test_slices_multiply_exactly(tokens: int) -> None:
    """The only error is one rounding of the rows, to 24 bits below the largest of their column."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens, 40, generator=generator) * 10.0 ** torch.linspace(-15, 15, 40)
    rows[0] *= 1000
    rows[:, 7] = 0
    unit = 2.0 ** (torch.frexp(rows.abs().amax(dim=0)).exponent - 23).double()
    rounded = torch.where(unit > 0, (rows.double() / unit).round() * unit, 0)
    assert (rounded - rows).abs().max() <= unit.max() / 2
    exact = rounded.T @ rounded
    largest = exact.diagonal().sqrt()
    assert ((sliced_gram(rows) - exact).abs() <= 1e-15 * tokens * largest[:, None] * largest).all()


def test_slices_of_the_largest_sums_are_exact() -> None:
    """With slices of 128, -128 and 128, the largest, sums of EXACT_TERMS products reach the last digit of float32."""
    rows = torch.full((4096, 3), 127.5 / 2**7 + 0.5 / 2**15)
    rows[:, 1] = -rows[:, 0]
    want = rows.double().T @ rows.double()
    assert torch.equal(sliced_gram(rows), want)


@pytest.mark.parametrize(
    ("capability", "slow"), [((8, 0), False), ((9, 0), False), ((8, 6), True), ((8, 9), True), ((12, 0), True)]
)
def test_which_gpus_are_slow(capability: tuple[int, int], slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert slow_float64(torch.device("cuda:0")) is slow
    assert slow_float64(torch.device("mps"))
    assert not slow_float64(torch.device("cpu"))


def test_the_blocked_gram_is_the_whole_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(50, 137, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr("delta_suite.reduction.gram.WIDE_ENOUGH_FOR_BLOCKS", 10)
    want = rows.double().T @ rows.double()
    got = gram(rows)
    assert torch.allclose(got, want, rtol=1e-13, atol=1e-13)
    # Not inside the blocks on the diagonal, where a processor may round the last bit below and above it differently.
    for start, stop in spectra._column_blocks(137):
        assert torch.equal(got[start:stop, stop:], got[stop:, start:stop].T)
    added = torch.zeros_like(want)
    for part in rows.split(17):
        add_gram(added, part)
    mirror(added)
    assert torch.allclose(added, want, rtol=1e-13, atol=1e-13)
    assert torch.allclose(tokens_gram(rows), rows.double() @ rows.double().T, rtol=1e-13, atol=1e-13)


def test_a_border_of_zeros_changes_no_eigenpair() -> None:
    """The matrices have several sizes, and one is singular."""
    rows = [torch.randn(n, 40, dtype=torch.float64) for n in (30, 29, 40)]
    rows[1][0] = rows[1][1]
    packed = bordered((tokens_gram(part) for part in rows), [len(part) for part in rows])
    assert packed.shape == (3, 40, 40)
    for part, matrix in zip(rows, packed, strict=True):
        values, vectors = without_border(*torch.linalg.eigh(matrix), len(part))
        want, _ = torch.linalg.eigh(tokens_gram(part))
        assert (values - want).abs().max() <= 1e-13 * want[-1]
        again = (vectors * values) @ vectors.T
        assert (again - tokens_gram(part)).abs().max() <= 1e-13 * want[-1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("sizes", [[300] * 9, [129, 128, 129, 128, 129, 128, 129, 128], [511], [2]])
def test_batches_on_a_gpu(sizes: list[int]) -> None:
    device = torch.device("cuda")
    if not can_batch(device):
        pytest.skip("this GPU solves matrices one after the other")
    spectra = ("slow", "steep", "deficient", "outlier")
    rows = [matrix(spectra[i % 4], n, n + 70, i).to(device) for i, n in enumerate(sizes)]
    with Eigensolver(device) as solve:
        solved = solve((tokens_gram(part) for part in rows), sizes)
    for part, eigen in zip(rows, solved, strict=True):
        got = spectrum_of_tokens_gram(eigen, part, 8)
        sigma = torch.linalg.svdvals(part.double())
        assert (got.eigenvalues.sqrt() - sigma).abs().max() <= 1e-6 * sigma[0]
        values, vectors = eigen
        assert ((vectors * values) @ vectors.T - tokens_gram(part)).abs().max() <= 1e-12 * values[-1]


def test_directions_beyond_the_rank_are_zero() -> None:
    rows = torch.outer(torch.arange(1.0, 7.0), torch.ones(10))
    for side in ("tokens", "hidden"):
        got = spectrum(rows, 8, side)
        assert got.directions.shape == (8, 10)
        assert torch.allclose(got.directions[0], torch.full((10,), 10**-0.5, dtype=torch.float64))
        assert not got.directions[1:].any()


def moments(before: torch.Tensor, update: torch.Tensor) -> Moments:
    out = Moments.zeros(update.shape[1], update.device)
    out.add(update, token_quantities(before, update))
    out.complete()
    return out


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.lists(st.integers(1, 59), max_size=6), order=st.randoms())
def test_any_split_and_order_gives_the_same_moments(seed: int, cuts: list[int], order: object) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = torch.randn(60, 12, generator=generator) * 100
    update = torch.randn(60, 12, generator=generator)
    update[0] *= 1000
    edges = [0, *sorted(set(cuts)), 60]
    parts = [moments(before[start:stop], update[start:stop]) for start, stop in pairwise(edges)]
    order.shuffle(parts)  # type: ignore[attr-defined]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    whole = moments(before, update)
    assert total.tokens == whole.tokens == 60
    for name in ("gram", "total", "sums", "squares"):
        one, two = getattr(total, name), getattr(whole, name)
        assert (one - two).abs().max() <= 1e-12 * two.abs().max(), name


def test_shapes_are_checked_in_this_folder() -> None:
    """By tests/conftest.py, which leaves the checks out of most other tests."""
    with pytest.raises(TypeCheckError, match="rows"):
        gram(torch.zeros(2, 3, 4))


@pytest.mark.repeats
def test_shapes_are_not_checked_in_tests_that_repeat() -> None:
    with pytest.raises(IndexError):  # of rows without columns, which a check would have refused before
        gram(torch.zeros(4))
