"""Orthonormal columns: both ways agree, in order, and dependent columns are factored by the exact one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from delta_suite.reduction import orthonormal as module
from delta_suite.reduction.orthonormal import by_cholesky, by_householder
from torch import Tensor


def columns(*shape: int, seed: int = 0) -> Tensor:
    """Return random columns."""
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def apart_from_identity(basis: Tensor) -> float:
    """Return how far the Gram matrix of a basis is from the identity."""
    return float((basis.mT @ basis - torch.eye(basis.shape[-1], dtype=basis.dtype)).abs().max())


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_both_ways_give_the_same_columns_in_order(scale: float) -> None:
    given = scale * columns(3, 40, 8)
    basis = by_cholesky(given)
    assert apart_from_identity(basis) < 1e-14
    torch.testing.assert_close(basis.abs(), by_householder(given).abs(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("apart", [1e-3, 1e-6, 1e-9, 1e-12, 0.0])
def test_nearly_dependent_columns(apart: float) -> None:
    given = columns(2, 30, 4)
    given[1, :, 3] = given[1, :, 2] + apart * given[1, :, 3]
    basis = by_cholesky(given)
    assert apart_from_identity(basis) < 1e-13
    others = given - basis @ (basis.mT @ given)
    assert float(others.abs().max()) < 1e-13  # they span what was given


def by_reflections(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Return the columns that are factored by Householder reflections from now on."""
    seen: list[Tensor] = []

    def counted(given: Tensor) -> Tensor:
        seen.append(given)
        return by_householder(given)

    monkeypatch.setattr(module, "by_householder", counted)
    return seen


@pytest.mark.parametrize(
    ("spoil", "fallen_back"),
    [(lambda given: given, False), (lambda given: given * 0.0, True), (lambda given: given[:, :2], True)],
)
def test_which_way_is_taken(
    spoil: Callable[[Tensor], Tensor], fallen_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = by_reflections(monkeypatch)
    basis = by_cholesky(spoil(columns(2, 10, 3)))
    assert bool(seen) == fallen_back
    assert apart_from_identity(basis) < 1e-14
