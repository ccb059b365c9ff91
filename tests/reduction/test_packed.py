"""Moments that are packed and added come back to the last bit."""

from __future__ import annotations

import torch
from delta_suite.reduction.merge import Part
from delta_suite.reduction.moments import Moments, token_quantities
from delta_suite.reduction.packed import added, packed, unpacked

HIDDEN = 20
HOST = torch.device("cpu")


def moments_of(rows: int, seed: int) -> Moments:
    torch.manual_seed(seed)
    before, update = torch.randn(rows, HIDDEN), torch.randn(rows, HIDDEN)
    moments = Moments.zeros(HIDDEN, HOST)
    moments.add(update, token_quantities(before, update))
    moments.complete()
    return moments


def require_equal(first: Moments, second: Moments) -> None:
    assert first.tokens == second.tokens
    for name in ("gram", "total", "sums", "squares"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_packed_moments_come_back_to_the_bit() -> None:
    parts: dict[Part, Moments] = {(3, False): moments_of(20, 0), (3, True): moments_of(2, 1)}
    content = packed(parts)
    assert all(vector.ndim == 1 and len(vector) < HIDDEN**2 for vector in content.values())
    back = unpacked(content, HIDDEN, HOST)
    assert back.keys() == parts.keys()
    for part, moments in parts.items():
        require_equal(back[part], moments)


def test_packed_moments_are_added_as_moments_are() -> None:
    one, other, alone = moments_of(20, 0), moments_of(30, 1), moments_of(5, 2)
    total = added([packed({(0, False): one}), packed({(1, False): alone}), packed({(0, False): other})])
    back = unpacked(total, HIDDEN, HOST)
    require_equal(back[0, False], one + other)
    require_equal(back[1, False], alone)
