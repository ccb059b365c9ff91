"""Finding the two sublayers of each block by structure: attention, which mixes tokens, and MLP, which does not.

What a block adds to the stream is the sum of what the two add: delta = a + m. Where one follows the other, the state
between them, h + a, passes in or out of some module of the block. Where both read the same input, as in GPT-J, no such
state exists, and the MLP's output is the tensor to take.

A few tokens run through the model once, and every tensor of the stream's shape that goes into or out of a module of a
block is kept. The output of the block must then be one of them plus the output of a module that works on each token
alone; or the block's input plus the outputs of two modules, one of which works on each token alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import combinations
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from delta_suite.models.blocks import Decoder, state_given, state_of

PROBE_TOKENS = 8
"""Number of tokens that run through the model once to find the sublayers: reversed, they must differ."""

CLOSE = 1e-3
"""Largest norm of what a sum leaves of the block's output, relative to the norm of the smallest term. Sums are compared
bit by bit first: this is for terms with a factor."""


@dataclass(frozen=True)
class Sublayers:
    """Places at which attention and MLP write in a block that has both.

    Example:
        >>> Sublayers("post_attention_layernorm", "input", 0, "mlp").parallel
        False
    """

    place: str
    """Module of the block through which the tensor passes: the state between the sublayers, h + a; or in a parallel
    block what the MLP writes."""
    side: str
    """`input` or `output` of that module."""
    argument: int | str
    """Position or name of the argument where it is an input; 0 otherwise."""
    mlp: str
    """Module whose output, times `scale`, is what the MLP writes."""
    scale: float = 1.0
    """Factor of the MLP's output, as in Granite."""
    parallel: bool = False
    """True if both sublayers read the input of the block."""
    whole: bool = True
    """False where the module's output is not all that the MLP writes: the block ends in a norm, or experts and a shared
    MLP are added up."""


def find_sublayers(decoder: Decoder, run: Callable[[], object]) -> tuple[Sublayers, ...] | str:
    """Return the sublayers of every block, or the reason why a block has not two.

    run: sends PROBE_TOKENS tokens, one sequence, through the decoder.
    """
    if decoder.last_parts:
        return f"a block of {type(decoder.module).__name__} is made of several modules"
    probes = [_Probe(block) for block in decoder.blocks]
    with ExitStack() as handles, torch.no_grad():
        for probe in probes:
            probe.watch(handles)
        run()
    layers: list[Sublayers] = []
    for number, probe in enumerate(probes):
        name = f"block {number} ({type(decoder.blocks[number]).__name__})"
        with torch.no_grad():
            answer = probe.sublayers()
        if isinstance(answer, str):
            return f"{name} {answer}"
        layers.append(answer)
    return tuple(layers)


@dataclass(frozen=True)
class _Passage:
    """A tensor of the stream's shape that went into or out of a module."""

    module: str
    side: str
    argument: int | str
    rows: Float[Tensor, "tokens hidden"]


@dataclass
class _Probe:
    """Everything of the stream's shape that passed through the modules of a block, in order."""

    block: nn.Module
    passages: list[_Passage] = field(default_factory=list)
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=dict)
    alone: dict[str, bool] = field(default_factory=dict)
    """Whether a module works on each token alone, where that was tried."""
    _shape: tuple[int, int] = (0, 0)

    def watch(self, handles: ExitStack) -> None:
        """Hook every module of the block."""
        for name, module in self.block.named_modules():
            before = module.register_forward_pre_hook(partial(self._before, name), with_kwargs=True)
            after = module.register_forward_hook(partial(self._after, name))
            handles.callback(before.remove)
            handles.callback(after.remove)

    def _before(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name == "":
            first = state_given(args, kwargs)
            self._shape = (first.shape[-1], first.numel() // first.shape[-1])
        # Copies, because a block may write into its input.
        copies = tuple(_copied(value) for value in args), {key: _copied(value) for key, value in kwargs.items()}
        self.calls.setdefault(name, []).append(copies)
        arguments: list[tuple[int | str, Any]] = [*enumerate(copies[0]), *copies[1].items()]
        for argument, value in arguments:
            if (rows := self._rows(value)) is not None:
                self.passages.append(_Passage(name, "input", argument, rows))

    def _after(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if (rows := self._rows(_copied(state_of(output)))) is not None:
            self.passages.append(_Passage(name, "output", 0, rows))

    def _rows(self, value: Any) -> Tensor | None:
        hidden, tokens = self._shape
        fits = isinstance(value, Tensor) and value.is_floating_point() and value.shape[-1:] == (hidden,)
        return value.reshape(-1, hidden) if fits and value.numel() == hidden * tokens else None

    def sublayers(self) -> Sublayers | str:
        """Return the sublayers of the block, or why there are not two."""
        ends = [passage for passage in self.passages if passage.module == ""]
        if not ends or ends[0].side != "input" or ends[-1].side != "output":
            return "gives out no state of the stream's shape"
        given, gave = ends[0].rows, ends[-1].rows
        inside = [
            passage
            for passage in self.passages
            # A module that runs twice, such as a shared dropout, names no place.
            if passage.module and len(self.calls[passage.module]) == 1
        ]
        single: str | None = None
        for target in self._ends(gave, inside):
            for number, wrote in reversed([*enumerate(inside)]):
                if wrote.side != "output":
                    continue
                scale = _factor(target - given, wrote.rows, given, target)
                if scale is not None:
                    single = single or wrote.module
                    continue
                for middle in inside[:number]:
                    scale = _factor(target - middle.rows, wrote.rows, middle.rows, target)
                    if scale is not None and not torch.equal(middle.rows, given) and self._is_mlp(wrote):
                        whole = target is gave
                        return Sublayers(middle.module, middle.side, middle.argument, wrote.module, scale, whole=whole)
        if single is not None:
            return f"has one sublayer, {single}"
        sublayers = self._side_by_side(given, gave, inside) or self._two_mlps(given, gave, inside)
        return sublayers or "has not two sublayers that can be told by structure"

    def _two_mlps(self, given: Tensor, gave: Tensor, inside: Sequence[_Passage]) -> Sublayers | None:
        """Return the sublayers of a block that adds the outputs of two MLPs, of experts and a shared one."""
        for number, middle in enumerate(inside):
            if torch.equal(middle.rows, given) or torch.equal(middle.rows, gave):
                continue
            outputs = [passage for passage in inside[number + 1 :] if passage.side == "output"]
            for one, other in combinations(outputs, 2):
                if _factor(gave - middle.rows, one.rows + other.rows, middle.rows, gave) is None:
                    continue
                if not torch.equal(one.rows, other.rows) and self._is_mlp(one) and self._is_mlp(other):
                    return Sublayers(middle.module, middle.side, middle.argument, other.module, whole=False)
        return None

    def _side_by_side(self, given: Tensor, gave: Tensor, inside: Sequence[_Passage]) -> Sublayers | None:
        """Return the sublayers of a block in which both read the block's input."""
        outputs: list[_Passage] = []
        for passage in inside:
            if passage.side == "output" and not any(torch.equal(passage.rows, other.rows) for other in outputs):
                outputs.append(passage)
        for mlp in outputs:
            if not self._is_mlp(mlp):
                continue
            for attention in outputs:
                if attention is not mlp and not self._is_mlp(attention):
                    scale = _factor_of_two(given, gave, attention.rows, mlp.rows)
                    if scale is not None:
                        return Sublayers(mlp.module, "output", 0, mlp.module, scale, parallel=True)
        return None

    def _ends(self, gave: Tensor, inside: Sequence[_Passage]) -> Iterator[Tensor]:
        """Yield the output of the block, and the input of a norm whose output it is."""
        yield gave
        for passage in inside:
            if passage.side == "output" and torch.equal(passage.rows, gave):
                given = [other.rows for other in inside if (other.module, other.side) == (passage.module, "input")]
                if len(given) == 1 and not torch.equal(given[0], gave) and self._works_alone(passage.module):
                    yield given[0]

    def _is_mlp(self, wrote: _Passage) -> bool:
        """Return True if everything that gives out this tensor, and what it lies in, works on each token alone."""
        names = {other.module for other in self.passages if torch.equal(other.rows, wrote.rows)} - {""}
        names = {name for name in names if self._gives(name, wrote.rows)} | {wrote.module}
        for name in [*names]:
            parts = name.split(".")
            names |= {".".join(parts[:end]) for end in range(1, len(parts))}
        return all(self._works_alone(name) for name in names if name in self.calls)

    def _gives(self, name: str, rows: Tensor) -> bool:
        """Return True if a module gives out these rows and was not given them, as dropout is."""
        sides = {other.side for other in self.passages if other.module == name and torch.equal(other.rows, rows)}
        return sides == {"output"}

    def _works_alone(self, name: str) -> bool:
        """Return True if a module, given the tokens in reversed order, answers in reversed order."""
        if name not in self.alone:
            outputs = [passage.rows for passage in self.passages if (passage.module, passage.side) == (name, "output")]
            (args, kwargs), *again = self.calls[name]
            self.alone[name] = bool(outputs) and not again
            if self.alone[name]:
                try:
                    answer = self._rows(
                        state_of(
                            self.block.get_submodule(name)(
                                *(self._reversed(value) for value in args),
                                **{key: self._reversed(value) for key, value in kwargs.items()},
                            )
                        )
                    )
                except Exception:  # the module of another library, called with what it never saw
                    answer = None
                self.alone[name] = answer is not None and _near(answer.flip(0), outputs[0])
        return self.alone[name]

    def _reversed(self, value: Any) -> Any:
        """Return a tensor of the tokens in reversed order; anything else as it is."""
        tokens = self._shape[1]
        if not isinstance(value, Tensor):
            return value
        if value.shape[:2] == (1, tokens):
            return value.flip(1)
        return value.flip(0) if value.shape[:1] == (tokens,) else value


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _near(one: Tensor, other: Tensor) -> bool:
    """Return True if two outputs of a module for the same tokens are equal but for the order of its sums."""
    epsilon = torch.finfo(other.dtype).eps
    error = (one.double() - other.double()).norm()
    return bool(error <= max(CLOSE, 4 * epsilon) * other.double().norm())


def _factor(rest: Tensor, wrote: Tensor, before: Tensor, after: Tensor) -> float | None:
    """Return the factor with which before + factor * wrote is after, or None if there is none."""
    if torch.equal(before + wrote, after) and bool(wrote.any()):
        return 1.0
    norm = float(wrote.double().norm())
    if norm == 0.0:
        return None
    factor = float((rest.double() * wrote.double()).sum()) / norm**2
    error = float((rest.double() - factor * wrote.double()).norm())
    # A term that is lost in the rounding of the sum shows nothing.
    rounding = float(torch.finfo(after.dtype).eps) * float(after.double().norm())
    near = error <= max(CLOSE * abs(factor) * norm, rounding) and abs(factor) * norm > 20 * rounding
    return factor if near else None


def _factor_of_two(given: Tensor, gave: Tensor, attention: Tensor, mlp: Tensor) -> float | None:
    """Return the factor of the MLP's output where the block adds both outputs to its input, else None."""
    if any(
        torch.equal(total, gave)
        for total in ((attention + mlp) + given, (given + attention) + mlp, (given + mlp) + attention)
    ):
        return 1.0
    terms = torch.stack([attention.double().flatten(), mlp.double().flatten()], dim=1)
    rest = gave.double().flatten() - given.double().flatten()
    products = terms.T @ terms
    if torch.linalg.cond(products) > 1e8:
        return None
    factors = torch.linalg.solve(products, terms.T @ rest)
    smallest = float((factors.abs() * terms.norm(dim=0)).min())
    rounding = float(torch.finfo(gave.dtype).eps) * float(gave.double().norm())
    error = float((terms @ factors - rest).norm())
    return float(factors[1]) if error <= max(CLOSE * smallest, rounding) and smallest > 20 * rounding else None
