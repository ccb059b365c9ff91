"""What is checked once is still checked for every other shape, and for what comes back."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float, TypeCheckError, jaxtyped
from torch import Tensor

from tests import shapes


@pytest.fixture(autouse=True)
def on() -> None:
    """Shapes are checked in these tests; the next test has its own setting."""
    shapes.switch(on=True)


@jaxtyped(typechecker=shapes.checked)
def product(one: Float[Tensor, "n k"], other: Float[Tensor, "k m"]) -> Float[Tensor, "n m"]:
    """Return a product, of which rows are missing where there are many."""
    return (one @ other)[: 9 - len(one)]


@jaxtyped(typechecker=shapes.checked)
def first(rows: list[Float[Tensor, " n"]]) -> Float[Tensor, " n"]:
    """Return the first of some tensors."""
    return rows[0]


def test_every_combination_of_shapes_is_checked_also_after_one_that_holds() -> None:
    for _ in range(2):
        product(torch.ones(2, 3), torch.ones(3, 4))
        for one, other in (
            (torch.ones(2, 3, 1), torch.ones(3, 4)),
            (torch.ones(2, 3), torch.ones(4, 3)),
            (torch.ones(2, 3, dtype=torch.int64), torch.ones(3, 4)),
        ):
            with pytest.raises(TypeCheckError, match="parameters"):
                product(one, other)
        with pytest.raises(TypeCheckError, match="return value"):
            product(torch.ones(8, 3), torch.ones(3, 4))


def test_what_containers_hold_is_checked_at_each_call() -> None:
    first([torch.ones(2)])
    with pytest.raises(TypeCheckError):
        first([torch.ones(2, 2)])


def test_the_rooms_are_checked() -> None:
    from delta_suite.reduction.orthonormal import orthonormal

    with pytest.raises(TypeCheckError):
        orthonormal(torch.ones(3))
