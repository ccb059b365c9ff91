"""The Gram matrices and eigenproblems at the sizes that the core uses, each beside its floor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from delta_suite.reduction.eigen import eigh
from delta_suite.reduction.gram import gram, sliced_gram, spectrum_of_gram, spectrum_of_tokens_gram, tokens_gram
from delta_suite.reduction.statistics import TOP_K
from torch import Tensor

from tests.benchmarks.measuring import Rates, timed
from tests.benchmarks.page import Record
from tests.benchmarks.subjects import DEVICE

pytestmark = pytest.mark.benchmark(group="9. Algebra in float64")

CUDA = DEVICE.type == "cuda"
TOKENS, HIDDEN = (2047, 5120) if CUDA else (325, 576)
"""One sequence less its first token, and the hidden size: Qwen3-32B's, or the embedded model's."""

ROWS, WIDE = (8192, 5120) if CUDA else (1024, 2304)
"""Of the hidden-side Gram matrix; wide enough for blocks to be used."""

F64 = torch.float64


def normal(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, device=DEVICE, generator=torch.Generator(DEVICE).manual_seed(rows))


def symmetric(n: int) -> Tensor:
    x = normal(2 * n, n).double()
    return x.T @ x


@dataclass(frozen=True)
class Case:
    """What is timed, on what, and the seconds it takes at the least."""

    name: str
    call: str
    run: Callable[[Tensor], Any]
    given: Callable[[], Tensor]
    floor: Callable[[Rates], float]


def hidden_gram(rates: Rates) -> float:
    return rates.floor(float(WIDE) ** 2 * ROWS, F64, 8.0 * (ROWS * WIDE + WIDE**2))


def token_gram(rates: Rates) -> float:
    return rates.floor(float(TOKENS) ** 2 * HIDDEN, F64, 8.0 * TOKENS * HIDDEN)


CASES = [
    Case(
        f"Gram, tokens' side, {TOKENS:,} x {HIDDEN:,}",
        "x @ x.T",
        lambda x: x @ x.T,
        lambda: normal(TOKENS, HIDDEN).double(),
        token_gram,
    ),
    Case(
        f"Gram, hidden side, {ROWS:,} x {WIDE:,}",
        "x.T @ x, in full",
        lambda x: x.T @ x,
        lambda: normal(ROWS, WIDE).double(),
        hidden_gram,
    ),
    Case(
        f"Gram, hidden side, {ROWS:,} x {WIDE:,}, upper blocks",
        "suite: gram",
        gram,
        lambda: normal(ROWS, WIDE).double(),
        hidden_gram,
    ),
    Case(
        f"eigenproblem, {TOKENS:,}",
        "torch.linalg.eigh",
        torch.linalg.eigh,
        lambda: symmetric(TOKENS),
        lambda rates: rates.eigenproblem(TOKENS),
    ),
    Case(
        f"eigenvalues alone, {TOKENS:,}",
        "torch.linalg.eigvalsh",
        torch.linalg.eigvalsh,
        lambda: symmetric(TOKENS),
        lambda rates: rates.floor(4 / 3 * TOKENS**3, F64),
    ),
    Case(
        f"spectrum of rows, {TOKENS:,} x {HIDDEN:,}",
        "suite: tokens_gram, eigh, spectrum_of_tokens_gram",
        lambda x: spectrum_of_tokens_gram(eigh(tokens_gram(x)), x, TOP_K),
        lambda: normal(TOKENS, HIDDEN),
        lambda rates: token_gram(rates) + rates.eigenproblem(TOKENS),
    ),
    Case(
        f"spectrum of a Gram matrix, {HIDDEN:,}",
        "suite: eigh, spectrum_of_gram",
        lambda matrix: spectrum_of_gram(eigh(matrix), 2 * HIDDEN, TOP_K),
        lambda: symmetric(HIDDEN),
        lambda rates: rates.eigenproblem(HIDDEN),
    ),
    Case(
        f"SVD in float32, {TOKENS:,} x {HIDDEN:,}, for comparison",
        "torch.linalg.svd",
        lambda x: torch.linalg.svd(x, full_matrices=False),
        lambda: normal(TOKENS, HIDDEN),
        lambda rates: rates.floor(6.0 * TOKENS**2 * HIDDEN, torch.float32),
    ),
]


def test_rates(benchmark: Any, rates: Rates, record: Callable[..., Record]) -> None:
    benchmark.pedantic(lambda: None, rounds=1)
    report = record("rates of this machine")
    for dtype, rate in rates.product.items():
        report.add(f"matrix product, {str(dtype).removeprefix('torch.')}", rate, "FLOP/s")
    report.add("copy, bytes read and written", rates.copy, "B/s")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_algebra(benchmark: Any, case: Case, rates: Rates, record: Callable[..., Record]) -> None:
    given = case.given()
    _, own, _ = timed(benchmark, lambda: case.run(given), DEVICE, rounds=5)
    record(case.name).add(case.call, own, "s", floor=case.floor(rates))


def test_sliced_gram_against_float64(benchmark: Any, rates: Rates, record: Callable[..., Record]) -> None:
    """The way for GPUs that are slow in float64, held against float64 on this one."""
    x = normal(ROWS, WIDE)
    _, own, whole = timed(benchmark, lambda: sliced_gram(x), DEVICE, rounds=5, beside=lambda: gram(x))
    report = record(f"Gram, hidden side, {ROWS:,} x {WIDE:,}, without float64 products")
    report.add("suite: sliced_gram", own, "s", floor=rates.floor(6 * 2.0 * WIDE**2 * ROWS, torch.float32))
    report.add("suite: gram, in float64", whole, "s", floor=hidden_gram(rates))
    report.add("sliced over float64", own / whole, "x")
    exact = x.double().T @ x.double()
    assert (sliced_gram(x) - exact).abs().max() <= 1e-7 * exact.abs().max()


def test_upper_blocks_give_the_full_gram() -> None:
    x = normal(ROWS, WIDE)
    full = x.double().T @ x.double()
    assert (gram(x) - full).abs().max() <= 1e-12 * full.abs().max()
