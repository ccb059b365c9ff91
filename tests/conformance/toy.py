"""A decoder to break on purpose: a test chooses its blocks, their order, and how they are called."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from tests.conformance.build import FIRST_SPECIAL

HIDDEN = 16


class Block(nn.Module):
    """Adds tanh(W x), which is causal because it acts on each token alone."""

    def __init__(self) -> None:
        super().__init__()
        self.update = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: Tensor) -> Any:
        return x + torch.tanh(self.update(x))


class InPlaceBlock(Block):
    """Writes the result into its input."""

    def forward(self, x: Tensor) -> Any:
        return x.add_(torch.tanh(self.update(x)))


class ListBlock(Block):
    """Returns a list, and takes the stream under another name."""

    def forward(self, *, residual: Tensor) -> Any:
        return [residual + torch.tanh(self.update(residual)), "attention weights"]


class DemandingBlock(Block):
    """Takes one argument more than the others."""

    def forward(self, x: Tensor, depth: int) -> Any:  # type: ignore[override]
        return super().forward(x) * (depth > 0)


class UnseenBlock(Block):
    """Runs without its hooks, as compiled code does."""

    def __call__(self, x: Tensor) -> Any:
        return self.forward(x)


class WideningBlock(Block):
    """Returns a wider stream than it takes."""

    def forward(self, x: Tensor) -> Any:
        return torch.cat([x, x[..., :4]], dim=-1)


class NoisyNorm(nn.Module):
    """Returns another result each time."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


class OverflowingNorm(nn.Module):
    """Overflows in sequences of one length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, x: Tensor) -> Tensor:
        return x * (float("inf") if x.shape[1] == self.length else 2.0)


class Toy(nn.Module):
    """Four blocks that run in the given order, with `between` applied to the stream before each but the first."""

    dtype = torch.float32

    def __init__(
        self,
        *,
        blocks: type[Block] = Block,
        order: tuple[int, ...] = (0, 1, 2, 3),
        between: Callable[[Tensor, int], Tensor] = lambda x, block: x,
        after: nn.Module | Callable[[Tensor], Tensor] | None = None,
        says_hidden: bool = True,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(FIRST_SPECIAL, HIDDEN)
        self.layers = nn.ModuleList(blocks() for _ in range(4))
        self.norm = nn.LayerNorm(HIDDEN) if after is None else after
        self.order, self.between = order, between
        width = {"hidden_size": HIDDEN} if says_hidden else {}
        self.config = SimpleNamespace(num_hidden_layers=4, is_encoder_decoder=False, **width)
        self.config.get_text_config = lambda decoder: self.config

    def get_decoder(self) -> Toy:
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed

    def forward(self, input_ids: Tensor) -> tuple[Tensor]:
        x = self.embed(input_ids)
        for place, index in enumerate(self.order):
            block = self.layers[index]
            x = self.between(x, index) if place else x
            if isinstance(block, ListBlock):
                out = block(residual=x)
            else:
                out = block(x, 1) if isinstance(block, DemandingBlock) else block(x)
            x = out[0] if isinstance(out, list) else out
        return (self.norm(x),)
