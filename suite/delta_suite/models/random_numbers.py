"""Random numbers that are the same on every device: value i of a stream is a function of the stream and of i alone.

The integers are those of SplitMix64, in torch's int64, which wraps (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", 2014, https://doi.org/10.1145/2660193.2660195). Each tensor has a stream of its own: a
start and an odd step, both from a SHA-256. Normal numbers follow by the formula of Box and Muller. They are formed in
float64, in which the logarithms and cosines of two devices differ by parts in 10^16, and rounded to float32: so all
devices give the same float32, but for one in millions that lies at a boundary of rounding. Any other dtype is the
float32, rounded once more.
"""

from __future__ import annotations

import hashlib
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

WORD = 1 << 64
"""Number of integers that SplitMix64 counts through."""

FEWEST_CHANGES = 24
"""Fewest changes between neighbouring bits of a step (the paper, section 5): steps with fewer mix badly."""

BLOCK = 1 << 15
"""Pairs of numbers that one thread of a CPU forms at once: its working arrays stay in the cache, and torch's operations
on so few begin no threads of their own."""

GPU_BLOCK = 1 << 21
"""Pairs of numbers that a GPU forms at once: 80 MB of working arrays, and calls so long that the host keeps ahead."""


@dataclass(frozen=True)
class Stream:
    """A sequence of 64-bit integers of SplitMix64."""

    start: int
    """State before the first integer, from 0 to 2^64 - 1."""
    step: int
    """Odd number by which the state grows."""

    @classmethod
    def of(cls, *labels: int) -> Stream:
        """Return the stream with these labels, such as a seed and the number of a tensor.

        Example:
            >>> Stream.of(0, 1) == Stream.of(0, 1), Stream.of(0, 1) == Stream.of(1, 0)
            (True, False)
        """
        digest = hashlib.sha256(",".join(map(str, labels)).encode()).digest()
        start, step = (int.from_bytes(digest[place : place + 8], "little") for place in (0, 8))
        step |= 1
        if (step ^ (step >> 1)).bit_count() < FEWEST_CHANGES:
            step ^= 0xAAAA_AAAA_AAAA_AAAA
        return cls(start, step)

    def states(self, places: Tensor) -> Tensor:
        """Return the states that the integers at these places, counted from 0, are mixed from: int64, which wraps."""
        return places.mul(_signed(self.step)).add_(_signed(self.start + self.step))


@dataclass(frozen=True)
class Draw:
    """The numbers of a distribution that a tensor is filled with, from a stream of its own."""

    labels: tuple[int, ...]
    """Labels of the stream."""
    kind: Literal["normal", "uniform"]
    """The distribution."""
    first: float
    """Mean of the normal numbers; lower end of the uniform ones, which belongs to them."""
    second: float
    """Standard deviation of the normal numbers; upper end of the uniform ones."""
    bounds: tuple[float, float] | None = None
    """Ends of a truncated normal distribution: what lies outside is drawn again."""

    def fill(self, tensor: Tensor, block: int | None = None) -> None:
        """Write the numbers into a tensor, in row-major order, whatever its device, dtype and strides.

        block: pairs of numbers that are formed at once; no number depends on it.
        """
        flat = tensor.view(-1) if tensor.is_contiguous() else tensor.new_empty(tensor.numel())
        half = (flat.numel() + 1) // 2
        block = block or (GPU_BLOCK if tensor.is_cuda else BLOCK)
        begins = range(0, half, block)
        workers = 1 if tensor.is_cuda else min(torch.get_num_threads(), len(begins))
        if workers > 1:  # each with blocks of its own: nobody waits for anybody, as the threads within an operation do
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(lambda worker: self._fill_blocks(flat, block, begins[worker::workers]), range(workers)))
        else:
            self._fill_blocks(flat, block, begins)
        if not tensor.is_contiguous():
            tensor.copy_(flat.view(tensor.shape))

    def _fill_blocks(self, flat: Tensor, block: int, begins: range) -> None:
        """Write the numbers of some blocks of pairs. Pair p gives number p, and number p of the second half."""
        half = (flat.numel() + 1) // 2
        size = min(block, half)
        stream = Stream.of(*self.labels)
        room = _Room(size, flat.device)
        states = torch.arange(1, size + 1, device=flat.device).mul_(_signed(stream.step))
        for begin in begins:
            count = min(size, half - begin)
            state = torch.add(states[:count], _signed(stream.start + begin * stream.step), out=room.state[:count])
            for offset, numbers in zip((0, half), self._pair(state, room), strict=True):
                part = flat[offset + begin : offset + begin + count]
                if self.bounds is not None:
                    self._redraw(numbers, offset + begin)
                rounded = part if part.dtype == torch.float32 else room.rounded[: part.numel()]
                part.copy_(rounded.copy_(numbers[: part.numel()]))

    def _pair(self, state: Tensor, room: _Room) -> tuple[Tensor, Tensor]:
        """Return two numbers for each state, in float64: of the upper and the lower 32 bits of its integer.

        They, and the states, are overwritten by the next call with the same room.
        """
        spare, first, second = (tensor[: state.numel()] for tensor in (room.spare, room.first, room.second))
        bits = _mixed(state, spare)
        if self.kind == "uniform":  # 24 bits each, which float32 holds: 0 is among them, and 1 is not
            width = (self.second - self.first) / 2**24
            first.copy_(_shifted(bits, 40, spare)).mul_(width)
            second.copy_(bits.bitwise_and_(0xFFFFFF)).mul_(width)
            return (first, second) if self.first == 0.0 else (first.add_(self.first), second.add_(self.first))
        upper = first.copy_(torch.bitwise_right_shift(bits, 32, out=spare))  # from -2^31
        upper.add_(2**31 + 0.5)  # above 0, so that its logarithm is finite
        radius = upper.mul_(2.0**-32).log_().mul_(-2.0 * self.second**2).sqrt_()
        angle = second.copy_(bits.bitwise_and_(0xFFFF_FFFF)).mul_(2.0 * math.pi * 2.0**-32)
        cosine = torch.cos(angle, out=spare.view(torch.float64)).mul_(radius)
        sine = angle.sin_().mul_(radius)
        return (cosine, sine) if self.first == 0.0 else (cosine.add_(self.first), sine.add_(self.first))

    def _redraw(self, numbers: Tensor, begin: int) -> None:
        """Replace the numbers outside the bounds, each by the first inside of streams of their own.

        begin: the place of the first number among all.
        """
        assert self.bounds is not None
        low, high = self.bounds
        attempt = 0
        while (outside := ((numbers < low) | (numbers > high)).nonzero().squeeze(1)).numel():
            attempt += 1
            states = Stream.of(*self.labels, attempt).states(outside + begin)
            numbers[outside] = self._pair(states, _Room(outside.numel(), numbers.device))[0]


class _Room:
    """Arrays to work in: memory that is asked for anew in each block costs twice the time of the arithmetic."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.state, self.spare = (torch.empty(size, dtype=torch.int64, device=device) for _ in range(2))
        self.first, self.second = (torch.empty(size, dtype=torch.float64, device=device) for _ in range(2))
        self.rounded = torch.empty(size, dtype=torch.float32, device=device)


def _mixed(state: Tensor, spare: Tensor) -> Tensor:
    """Return the integers of states of SplitMix64, in place of these."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        state.bitwise_xor_(_shifted(state, shift, spare)).mul_(_signed(factor))
    return state.bitwise_xor_(_shifted(state, 31, spare))


def _shifted(bits: Tensor, places: int, out: Tensor) -> Tensor:
    """Return integers shifted to the right, with zeros from the left: torch repeats the sign."""
    return torch.bitwise_right_shift(bits, places, out=out).bitwise_and_((1 << (64 - places)) - 1)


def _signed(number: int) -> int:
    """Return the number from -2^63 to 2^63 - 1 with the same 64 bits."""
    return (number + WORD // 2) % WORD - WORD // 2
