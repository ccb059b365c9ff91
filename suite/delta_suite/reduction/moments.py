"""What one layer's updates leave behind: additive moments, so that any split of the tokens gives the same numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from delta_suite.reduction.eigen import slow_float64
from delta_suite.reduction.gram import add_gram, algebra_device, mirror

TOKEN_QUANTITIES = (
    "update_norm",  # ||delta||
    "stream_norm",  # ||h_L||
    "relative_step",  # ||delta|| / ||h_L||
    "alignment",  # cos(delta, h_L)
    "parallel_fraction",  # |cos(delta, h_L)|
    "block_influence",  # 1 - cos(h_L, h_{L+1})
    "angular_distance",  # arccos(cos(h_L, h_{L+1})) / pi
)
"""What is averaged over tokens, in the order of the columns of `token_quantities`."""

ENTRIES_AT_ONCE = 1 << 23
"""Of the rows whose norms are taken, so that float64 copies of them stay small: 64 MB each."""

NORM_FLOOR = 1e-8
"""The reference's guard: no division by a norm below this."""


def token_quantities(
    before: Float[Tensor, "tokens hidden"], update: Float[Tensor, "tokens hidden"]
) -> Float64[Tensor, "tokens quantities"]:
    """The TOKEN_QUANTITIES of each token. `update` is float32, or the same in float64 where that is at hand.

    cos(h_L, h_{L+1}) is taken from s = ||delta|| / ||h|| and c = cos(delta, h) as (1 + sc) / sqrt(1 + 2sc + s^2),
    which is exact, and 1 - cos by a form that does not cancel where the step is small.
    """
    at_once = max(1, ENTRIES_AT_ONCE // before.shape[1])
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
    """||delta||, ||h|| and <delta, h> of each token."""
    device = algebra_device(before.device)
    # Cast first: each of the three would make a copy in float64 of its own.
    h, delta = before.to(device).double(), update.to(device).double()
    norm = torch.linalg.vector_norm
    return torch.stack([norm(delta, dim=1), norm(h, dim=1), torch.einsum("td,td->t", h, delta)])


def widened(rows: Float[Tensor, "tokens hidden"]) -> Float[Tensor, "tokens hidden"]:
    """In float64, once for all that is formed of them; as they are where the device is slow in float64."""
    return rows if slow_float64(rows.device) else rows.to(algebra_device(rows.device)).double()


@dataclass
class Moments:
    """Sums over tokens. `a + b` are the moments of both sets of tokens."""

    tokens: int
    gram: Float64[Tensor, "hidden hidden"]
    """Sum of delta delta^T. Formed from delta, never by differencing moments of h, which loses u / s^2."""
    total: Float64[Tensor, " hidden"]
    """Sum of delta."""
    sums: Float64[Tensor, " quantities"]
    squares: Float64[Tensor, " quantities"]

    @classmethod
    def none_yet(cls, hidden: int, device: torch.device) -> Moments:
        """Of no tokens, to be added to."""
        home = algebra_device(device)
        shapes = ((hidden, hidden), (hidden,), (len(TOKEN_QUANTITIES),), (len(TOKEN_QUANTITIES),))
        return cls(0, *(torch.zeros(shape, dtype=torch.float64, device=home) for shape in shapes))

    def add(self, rows: Float[Tensor, "tokens hidden"], quantities: Float64[Tensor, "tokens quantities"]) -> None:
        """Add, in place, updates as a variant takes them, and the token quantities of the updates as they are.

        `complete` makes the Gram matrix whole, once after many of these.
        """
        self.tokens += len(rows)
        wide = widened(rows)
        add_gram(self.gram, wide)
        self.total += wide.to(self.gram.device).sum(dim=0, dtype=torch.float64)
        self.sums += quantities.sum(dim=0)
        self.squares += quantities.square().sum(dim=0)

    def complete(self) -> None:
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
        """The same on another device."""
        return Moments(self.tokens, *(x.to(device) for x in (self.gram, self.total, self.sums, self.squares)))

    def none(self) -> Moments:
        """Of no tokens."""
        return Moments.none_yet(len(self.total), self.total.device)

    def centred(self) -> Moments:
        """The same of delta minus its mean over these tokens."""
        gram = self.gram - torch.outer(self.total, self.total) / max(1, self.tokens)
        return Moments(self.tokens, gram, torch.zeros_like(self.total), self.sums, self.squares)
