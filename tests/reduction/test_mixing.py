"""Directions that mix where a group is removed: sums over the upper part are those over the whole matrix."""

from __future__ import annotations

import pytest
import torch
from delta_suite.reduction.groups import half_gaps, half_gaps_of, mixed, mixing, upper_blocks


@pytest.mark.parametrize("size", [1, 2, 7, 65])
def test_the_upper_part_is_enough(size: int) -> None:
    draw = torch.Generator().manual_seed(size)
    values = torch.sort(torch.rand(size, dtype=torch.float64, generator=draw), descending=True).values
    rows = torch.randn(3, 20, size, generator=draw) * 0.1
    removed, halves = rows.mT @ rows, half_gaps(values, values).fill_diagonal_(torch.inf)
    of_all = mixing(removed, halves).sum(dim=2)
    torch.testing.assert_close(mixed(removed, half_gaps_of(values)), of_all, rtol=1e-5, atol=1e-6)
    for start, _ in upper_blocks(size):
        removed[:, start:, :start] = torch.nan  # is not read
    torch.testing.assert_close(mixed(removed, half_gaps_of(values)), of_all, rtol=1e-5, atol=1e-6)


def test_equal_eigenvalues_move_apart_by_what_is_removed_and_keep_their_sum() -> None:
    removed = torch.tensor([[0.0, 0.5], [0.5, 0.0]])
    assert mixed(removed, half_gaps_of(torch.tensor([2.0, 2.0], dtype=torch.float64))).tolist() == [0.5, -0.5]


def test_nothing_is_moved_where_nothing_is_removed() -> None:
    zeros = torch.zeros(3, dtype=torch.float64)
    assert mixed(torch.zeros(3, 3), half_gaps_of(zeros)).tolist() == [0.0, 0.0, 0.0]
    assert mixing(torch.zeros(3, 3), half_gaps(zeros, zeros)).tolist() == [[0.0] * 3] * 3
