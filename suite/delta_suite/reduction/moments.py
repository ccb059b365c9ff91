"""Additive moments of one layer's updates, so that any split of the tokens gives the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from delta_suite.reduction.eigen import slow_float64
from delta_suite.reduction.gram import add_gram, algebra_device, mirror
from delta_suite.reduction.lanes import entries_at_once

TOKEN_QUANTITIES = (
    "update_norm",  # ||delta||
    "stream_norm",  # ||h_L||
    "relative_step",  # ||delta|| / ||h_L||
    "alignment",  # cos(delta, h_L)
    "parallel_fraction",  # |cos(delta, h_L)|
    "block_influence",  # 1 - cos(h_L, h_{L+1})
    "angular_distance",  # arccos(cos(h_L, h_{L+1})) / pi
)
"""Quantities averaged over tokens, in the order of the columns of `token_quantities`."""

NORM_FLOOR = 1e-8
"""Smallest norm that is divided by, as in the reference script."""


def token_quantities(
    before: Float[Tensor, "tokens hidden"], update: Float[Tensor, "tokens hidden"]
) -> Float64[Tensor, "tokens quantities"]:
    """Return the TOKEN_QUANTITIES of each token from its state h_L and its update delta.

    `update` is float32, or the same numbers in float64 where the caller has them.

    cos(h_L, h_{L+1}) is computed from s = ||delta|| / ||h|| and c = cos(delta, h) as (1 + sc) / sqrt(1 + 2sc + s^2),
    which is exact, and 1 - cos by a form that does not cancel where the step is small.

    Example:
        >>> quantities = token_quantities(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 4.0]]))
        >>> dict(zip(TOKEN_QUANTITIES, quantities[0].tolist()))["relative_step"]
        1.0
    """
    at_once = max(1, entries_at_once(before.device) // before.shape[1])  # so that their float64 copies stay small
    parts = zip(torch.split(before, at_once), torch.split(update, at_once), strict=True)
    update_norm, stream_norm, product = torch.cat([_norms_and_product(h, delta) for h, delta in parts], dim=1)
    cosine = product / (stream_norm * update_norm).clamp_min(NORM_FLOOR)
    ratio = update_norm / stream_norm.clamp_min(NORM_FLOOR)
    # h' = h + delta has a part along h, 1 + sc, and one across it, s sqrt(1 - c^2), in units of ||h||.
    along = 1.0 + ratio * cosine
    across = ratio * (1.0 - cosine.square()).clamp_min(0.0).sqrt()
    angle = torch.atan2(across, along)
    influence = 2.0 * (angle / 2).sin().square()  # 1 - cos(angle)
    return torch.stack([update_norm, stream_norm, ratio, cosine, cosine.abs(), influence, angle / torch.pi], dim=1)


def _norms_and_product(
    before: Float[Tensor, "tokens hidden"], update: Float[Tensor, "tokens hidden"]
) -> Float64[Tensor, "3 tokens"]:
    """Return ||delta||, ||h|| and <delta, h> of each token."""
    device = algebra_device(before.device)
    # Cast first: otherwise each of the three would make its own copy in float64.
    h, delta = before.to(device).double(), update.to(device).double()
    norm = torch.linalg.vector_norm
    return torch.stack([norm(delta, dim=1), norm(h, dim=1), torch.einsum("td,td->t", h, delta)])


def rms(rows: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens 1"]:
    """Return the root of the mean square of each row, by which a block's first norm divides; at least NORM_FLOOR."""
    return rows.square().mean(dim=1, keepdim=True).sqrt_().clamp_min_(NORM_FLOOR)


def widened(rows: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
    """Return the rows in float64, for everything that is formed from them; unchanged where float64 is slow."""
    return rows if slow_float64(rows.device) else rows.to(algebra_device(rows.device)).double()


@dataclass
class Moments:
    """Sums over the tokens of one layer. `a + b` are the moments of both sets of tokens."""

    tokens: int
    gram: Float64[Tensor, "hidden hidden"]
    """Sum of delta delta^T, (hidden, hidden). Never formed by differencing moments of h, which loses u / s^2."""
    total: Float64[Tensor, " hidden"]
    """Sum of delta."""
    sums: Float64[Tensor, " quantities"]
    """Sums of the TOKEN_QUANTITIES."""
    squares: Float64[Tensor, " quantities"]
    """Sums of their squares."""

    @classmethod
    def zeros(cls, hidden: int, device: torch.device) -> Moments:
        """Return empty moments, ready to accumulate."""
        home = algebra_device(device)
        shapes = ((hidden, hidden), (hidden,), (len(TOKEN_QUANTITIES),), (len(TOKEN_QUANTITIES),))
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=home) for shape in shapes))

    def add(self, rows: Float[Tensor, "tokens hidden"], quantities: Float64[Tensor, "tokens quantities"]) -> None:
        """Add updates and their token quantities, in place.

        Only the upper blocks of the Gram matrix are added to; call `complete` once after the last of many calls.
        """
        self.tokens += len(rows)
        wide = widened(rows)
        add_gram(self.gram, wide)
        self.total += wide.to(self.gram.device).sum(dim=0, dtype=torch.float64)
        self.sums += quantities.sum(dim=0)
        self.squares += quantities.square().sum(dim=0)

    def complete(self) -> None:
        """Mirror the upper blocks of the Gram matrix into the lower ones."""
        mirror(self.gram)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.tokens + other.tokens,
            self.gram + other.gram,
            self.total + other.total,
            self.sums + other.sums,
            self.squares + other.squares,
        )

    def to(self, device: torch.device) -> Moments:
        """Return the moments on another device."""
        return Moments(self.tokens, *(x.to(device) for x in (self.gram, self.total, self.sums, self.squares)))

    def zeros_like(self) -> Moments:
        """Return empty moments of the same size, on the same device."""
        return Moments.zeros(len(self.total), self.total.device)

    def centred_gram(self) -> Float64[Tensor, "hidden hidden"]:
        """Return the Gram matrix of the updates less their mean over these tokens."""
        return self.gram - torch.outer(self.total, self.total) / max(1, self.tokens)
