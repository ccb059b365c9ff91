"""The mode under which controls are built: what is drawn, when, where, and what is left to torch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from delta_suite.models.drawing import Drawing
from delta_suite.models.random_numbers import Draw
from torch import Tensor, nn

CPU = torch.device("cpu")


@pytest.fixture
def fills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[int, ...], Tensor]]:
    """Return the labels and tensors of all draws that are made."""
    made = []
    fill = Draw.fill

    def noted(draw: Draw, tensor: Tensor, block: int | None = None) -> None:
        made.append((draw.labels, tensor))
        fill(draw, tensor, block)

    monkeypatch.setattr(Draw, "fill", noted)
    return made


def normal(number: int, *shape: int, std: float = 1.0) -> Tensor:
    tensor = torch.empty(shape)
    Draw((0, number), "normal", 0.0, std).fill(tensor)
    return tensor


def test_only_the_last_draw_of_a_tensor_is_made(fills: list[tuple[tuple[int, ...], Tensor]]) -> None:
    with Drawing(0):
        layer = nn.Linear(5, 3)  # draws weight and bias
        nn.init.normal_(layer.weight, std=0.02)
        nn.init.zeros_(layer.bias)
        assert fills == []
    assert [labels for labels, _ in fills] == [(0, 2)]
    assert torch.equal(layer.weight, normal(2, 3, 5, std=0.02))
    assert torch.equal(layer.bias, torch.zeros(3))


def test_what_nobody_holds_is_not_drawn(fills: list[tuple[tuple[int, ...], Tensor]]) -> None:
    with Drawing(0):
        embedding, head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        head.weight = embedding.weight
    assert [labels for labels, _ in fills] == [(0, 0)]
    assert torch.equal(head.weight, normal(0, 7, 5))


READS: dict[str, Callable[[Tensor], object]] = {
    "sum": lambda tensor: tensor.sum(),
    "item": lambda tensor: tensor[0, 0].item(),
    "clone": lambda tensor: tensor.clone(),
    "copy": lambda tensor: torch.empty(4, 6).copy_(tensor),
    "cast": lambda tensor: tensor.to(torch.float64),
    "a view": lambda tensor: tensor.t()[1:].abs(),
    "another's product": lambda tensor: torch.ones(2, 4) @ tensor,
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_read_was_drawn_before(read: Callable[[Tensor], object]) -> None:
    expected = read(normal(0, 4, 6))
    with Drawing(0):
        tensor = torch.empty(4, 6).normal_()
        result = read(tensor)
        tensor.mul_(2.0)  # what is done later is done once
    assert torch.equal(torch.as_tensor(result), torch.as_tensor(expected))
    assert torch.equal(tensor, 2.0 * normal(0, 4, 6))


def changed(tensor: Tensor) -> Tensor:
    """Change a tensor in place, in whole and in part."""
    nn.init.zeros_(tensor[1])
    tensor.mul_(0.5).add_(1.0)
    tensor[:, 2:].normal_()
    tensor.data.t()[3].div_(4.0).sub_(1.0)
    return tensor


def test_changes_in_place_are_made_in_their_order(fills: list[tuple[tuple[int, ...], Tensor]]) -> None:
    expected = normal(0, 4, 6)
    expected[1] = 0.0
    expected = expected * 0.5 + 1.0
    expected[:, 2:] = normal(1, 4, 4)
    expected[:, 3] = expected[:, 3] / 4.0 - 1.0
    fills.clear()
    with Drawing(0) as drawing:
        first = changed(nn.Parameter(torch.empty(4, 6).normal_(), requires_grad=False))
        assert fills == []
        moved = drawing._moved(first, CPU)  # as to a GPU: the numbers are drawn there, and here is nothing
        untouched = first.untyped_storage().data_ptr()
        assert fills
        assert all(tensor.untyped_storage().data_ptr() != untouched for _, tensor in fills)
    assert torch.equal(moved, expected)
    assert torch.equal(first, expected)


def test_a_part_of_what_holds_something_is_drawn_at_once() -> None:
    tensor = torch.arange(12.0).reshape(3, 4)
    with Drawing(0):
        tensor[1].normal_()
        assert torch.equal(tensor[1], normal(0, 4))
    assert torch.equal(tensor[::2], torch.arange(12.0).reshape(3, 4)[::2])


def test_moving_draws_on_the_device_and_casts_there(monkeypatch: pytest.MonkeyPatch) -> None:
    moves: list[torch.device] = []

    def moved(_: Drawing, tensor: Tensor, device: torch.device) -> Tensor:
        moves.append(device)
        return torch.zeros_like(tensor, device="cpu")

    monkeypatch.setattr(Drawing, "_moved", moved)
    with Drawing(0) as drawing:
        tensor = torch.empty(4).normal_()
        options = {"device": torch.device("cuda:1"), "dtype": torch.bfloat16}
        there = drawing.__torch_dispatch__(torch.ops.aten._to_copy.default, (), (tensor,), options)
        assert tensor.to("meta").is_meta
    assert moves == [torch.device("cuda:1")]
    assert there.dtype == torch.bfloat16


def test_truncated_numbers_are_drawn_without_being_read(fills: list[tuple[tuple[int, ...], Tensor]]) -> None:
    plain = nn.init._no_grad_trunc_normal_
    with Drawing(0):
        tensor = nn.init.trunc_normal_(torch.empty(5000), 0.0, 1.0, -1.0, 0.5)
        tail = nn.init.trunc_normal_(torch.empty(5000), 0.0, 1.0, 2.0, 3.0)  # evenly drawn and rejected, by torch
        assert len(fills) > 1  # for the tail, which is read
        assert fills[0][0] == (0, 1)
    assert nn.init._no_grad_trunc_normal_ is plain
    assert -1.0 <= tensor.min() < -0.95
    assert 0.45 < tensor.max() <= 0.5
    assert 2.0 <= tail.min() < tail.max() <= 3.0


def test_orthogonal_matrices_are_drawn() -> None:
    with Drawing(0):
        matrix = nn.init.orthogonal_(torch.empty(8, 8))
    assert torch.allclose(matrix @ matrix.T, torch.eye(8), atol=1e-5)


def test_the_rest_is_left_to_torch_on_the_cpu() -> None:
    torch.manual_seed(3)
    generator = torch.Generator().manual_seed(4)
    expected = torch.rand(3), torch.randperm(5), torch.empty(3).normal_(generator=generator)
    torch.manual_seed(3)
    generator.manual_seed(4)
    with Drawing(0) as drawing:
        found = torch.rand(3), torch.randperm(5), torch.empty(3).normal_(generator=generator)
        assert drawing.count == 0
        assert torch.empty(3, device="meta").normal_().is_meta
        with pytest.raises(RuntimeError, match="std"):
            torch.empty(3).normal_(0.0, -1.0)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_random_numbers_of_another_device_are_refused() -> None:
    options = {"device": torch.device("cuda:0")}
    with pytest.raises(RuntimeError, match=r"aten\.rand\.default draws on cuda:0"):
        Drawing(0).__torch_dispatch__(torch.ops.aten.rand.default, (), ([2],), options)


def test_nothing_is_drawn_after_an_error(fills: list[tuple[tuple[int, ...], Tensor]]) -> None:
    plain = nn.init._no_grad_trunc_normal_

    def build() -> None:
        torch.empty(4).normal_()
        raise KeyError

    with pytest.raises(KeyError), Drawing(0):
        build()
    assert fills == []
    assert nn.init._no_grad_trunc_normal_ is plain
