"""Hooks on the decoder: input and output of each block in a forward pass, and the modules after the last block."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from delta_suite.capture.certificate import FinalNorm, Observations, Witnesses, require_fired_once
from delta_suite.capture.layout import Layout
from delta_suite.capture.stream import wide
from delta_suite.capture.sublayers import Sublayers
from delta_suite.errors import CaptureError, CertificateError
from delta_suite.models.blocks import Decoder, state_given, state_of


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to one length. They fill rows start .. start + tokens of the stream."""

    ids: Int64[Tensor, "sequences length"]
    mask: Int64[Tensor, "sequences length"]
    real: Int64[Tensor, " tokens"] | None
    """Places of the tokens in the flattened ids, on the host; None where nothing is padding."""
    start: int
    tokens: int
    """Number of tokens without padding."""
    shortest: int
    """Number of tokens of the last sequence, which has the most padding."""


@dataclass(frozen=True)
class Between:
    """The sublayers of every block, and what takes the states between them."""

    sublayers: Sequence[Sublayers]
    write: Callable[[int, Tensor, Tensor | None], None]
    """Called as the `write` of the tap is, with the state between the sublayers of block L."""


class UnfamiliarShapeError(CaptureError):
    """Error of a block 0 whose input is not in the layout of the tap; another layout may fit."""


class Tap(AbstractContextManager["Tap"]):
    """Hooks on the decoder blocks, and on the modules after the last one; a context manager that removes them.

    `write(L, states, real)` is called with each state h_L as soon as it exists, because a block may write into its
    input. There `states` is the flattened batch, `real` the rows of it to keep (None keeps all). `read(L)` returns the
    rows of this batch that were stored.
    """

    def __init__(
        self,
        decoder: Decoder,
        write: Callable[[int, Tensor, Tensor | None], None],
        read: Callable[[int], Tensor],
        layout: Layout = Layout.BATCH_TIME,
        between: Between | None = None,
    ) -> None:
        self.decoder, self.between = decoder, between
        self.write, self.read, self.layout = write, read, layout
        self.observed = Observations.of(len(decoder.blocks))
        self._paused = False
        self._handles = ExitStack()
        self._shape: tuple[int, int] = (0, 0)
        self._hidden = decoder.hidden
        self._real: _Rows | None = None
        self._witnesses: _Rows | None = None
        self._given: list[Tensor] = []
        self._gave: list[Tensor] = []
        self._scales: list[float] = []
        self._middle: dict[int, Tensor] = {}
        self._mlp: dict[int, Tensor] = {}
        self._output: Tensor | None = None
        self._version = 0
        self._next = 0
        self._scale = 1.0
        self._after_last: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def __enter__(self) -> Tap:
        for layer, (block, end) in enumerate(zip(self.decoder.blocks, self.decoder.ends, strict=True)):
            before = block.register_forward_pre_hook(partial(self._before, layer), with_kwargs=True)
            after = end.register_forward_hook(partial(self._after, layer))
            self._handles.callback(before.remove)
            self._handles.callback(after.remove)
        for layer, parts in enumerate(self.between.sublayers if self.between else ()):
            self._watch_sublayers(layer, parts)
        for place, block in self.decoder.left_out.items():
            self._handles.callback(block.register_forward_pre_hook(partial(self._unexpected, place)).remove)
        for name, module in _outside_blocks(self.decoder.module, self.decoder.blocks):
            outside = module.register_forward_hook(partial(self._outside, name), with_kwargs=True)
            self._handles.callback(outside.remove)
        return self

    def _watch_sublayers(self, layer: int, parts: Sublayers) -> None:
        block = self.decoder.blocks[layer]
        module = block.get_submodule(parts.place)
        if parts.side == "input":
            handle = module.register_forward_pre_hook(partial(self._into, layer, parts.argument), with_kwargs=True)
        else:
            handle = module.register_forward_hook(partial(self._out_of, layer))
        self._handles.callback(handle.remove)
        if parts.whole and not parts.parallel:
            mlp = block.get_submodule(parts.mlp).register_forward_hook(partial(self._out_of_mlp, layer))
            self._handles.callback(mlp.remove)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.close()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Ignore everything that runs inside."""
        self._paused = True
        try:
            yield
        finally:
            self._paused = False

    def begin(self, batch: Batch, witnesses: Int64[Tensor, " witnesses"]) -> None:
        """Start a batch and forget the last one.

        `witnesses` are the rows of this batch whose updates are kept as the hooks see them, apart from the stored
        states.
        """
        self._shape = (batch.ids.shape[0], batch.ids.shape[1])
        # Row numbers from the host: a boolean index would make every copy wait for the device.
        self._real = None if batch.real is None else _Rows(batch.real)
        self._witnesses = _Rows(witnesses if batch.real is None else batch.real[witnesses])
        self._given, self._gave, self._scales = [], [], []
        self._middle, self._mlp = {}, {}
        self._output = None
        self._next = 0
        self._scale = 1.0
        self._after_last.clear()

    def end(self, batch: Batch, witnesses: Int64[Tensor, " witnesses"], last: Tensor) -> None:
        """End a batch: check what it alone can show, and count the forward pass.

        `last` is the last_hidden_state of the decoder. Raises CertificateError where a block did not run exactly once.
        """
        require_fired_once(self.observed.firings, self.observed.passes + 1)
        if self.between:
            self._check_sublayers(self.between)
        final = self.final_norm(last)
        # Subtracted here, all at once: in the hooks it would take three more kernels per block.
        updates = _stacked(self._gave) - _stacked(self._given)
        if any(scale != 1.0 for scale in self._scales):
            updates = updates / torch.tensor(self._scales, device=updates.device)[:, None, None]
        self.observed.passed(final, Witnesses(batch.start + witnesses, updates))

    def rows(self, state: Tensor) -> Float[Tensor, "tokens hidden"]:
        """Return the rows of real tokens, in the order of the stream."""
        flat = state.reshape(-1, state.shape[-1])
        return flat if self._real is None else self._real.of(flat)

    def _before(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._paused:
            return
        if layer != self._next:
            raise self._out_of_order(layer)
        given = state_given(args, kwargs)
        state = self._state(given, layer, "input")
        if layer == 0:
            self._write(0, state)
        elif isinstance(given, Tensor) and given is self._output and given._version == self._version:
            self._given.append(self._gave[-1])
            return
        else:
            self._compare(layer, state)
        self._given.append(self._witnessed(state))

    def _compare(self, layer: int, state: Tensor) -> None:
        """Compare the input with the output of the block before, where they are not the same tensor. This seldom runs.

        RWKV halves stream and weights every few blocks, so that half precision does not overflow. A power of two loses
        no digit, so it is divided out: all states are stored in the units of h_0.
        """
        rows, stored = self.rows(state).float(), self.read(layer).to(state.device).float() * self._scale
        factor = _power_of_two(rows, stored)
        if factor != 1.0:
            self._scale *= factor
            self.observed.factors[layer] = factor
        self.observed.continuity(layer, (rows - stored * factor).abs().max())

    def _after(self, layer: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self._paused:
            return
        self.observed.firings[layer] += 1
        self._next = layer + 1
        gave = state_of(output)
        state = self._state(gave, layer, "output")
        self._write(layer + 1, state if self._scale == 1.0 else state / self._scale)
        self._gave.append(self._witnessed(state))
        self._scales.append(self._scale)
        self._output, self._version = gave, gave._version
        self._after_last.clear()

    def _into(
        self, layer: int, argument: int | str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not self._paused:
            given = args[argument : argument + 1] if isinstance(argument, int) else (kwargs.get(argument),)
            self._between(layer, next(iter(given), None))

    def _out_of(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._paused:
            self._between(layer, state_of(output))

    def _between(self, layer: int, value: object) -> None:
        """Store what passes between the sublayers of a block, or in a parallel one what its MLP writes."""
        assert self.between is not None
        parts = self.between.sublayers[layer]
        if layer in self._middle:
            self._not_apart(layer, f"{parts.place} runs twice in one forward pass")
        elif len(self._middle) < layer:
            earlier = len(self._middle)
            self._not_apart(earlier, f"{self.between.sublayers[earlier].place} did not run")
        state = self._sublayer_state(value, layer, "state between its sublayers")
        if state is None or self.observed.not_apart is not None:
            return
        state = state * parts.scale if parts.parallel and parts.scale != 1.0 else state
        state = state if self._scale == 1.0 else state / self._scale
        real = None if self._real is None else self._real.on(state.device)
        self.between.write(layer, state.reshape(-1, state.shape[-1]), real)
        self._middle[layer] = self._witnessed(state)

    def _out_of_mlp(self, layer: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._paused:
            gave = self._sublayer_state(state_of(output), layer, "MLP's output")
            if gave is not None:
                self._mlp[layer] = self._witnessed(gave)

    def _sublayer_state(self, value: object, layer: int, side: str) -> Tensor | None:
        """Return a state inside a block; None, and the reason is kept, where it is of another kind than the stream."""
        try:
            return self._state(self._unflattened(value) if isinstance(value, Tensor) else value, layer, side)
        except CaptureError as error:
            self._not_apart(layer, str(error))
            return None

    def _not_apart(self, layer: int, why: str) -> None:
        """Keep the first reason why attention and MLP are not told apart; the blocks are measured all the same."""
        self.observed.not_apart = self.observed.not_apart or f"block {layer}: {why}"

    def _unflattened(self, value: Tensor) -> Tensor:
        """Return a tensor of all positions in one dimension, as in OPT, with those of batch and time."""
        batch, time = self._shape
        if value.dim() != 2 or len(value) != batch * time:
            return value
        return value.view(time, batch, -1) if self.layout is Layout.TIME_BATCH else value.view(batch, time, -1)

    def _check_sublayers(self, between: Between) -> None:
        """Compare what follows the state between the sublayers with what the MLP gave out, for the witnesses.

        The rest of the update is what attention wrote, so a + m = delta holds by itself.
        """
        for layer, parts in enumerate(between.sublayers):
            if layer not in self._middle:
                self._not_apart(layer, f"{parts.place} did not run")
                return
            if layer in self._mlp:
                scale, gave = self._scales[layer], wide(self._gave[layer])
                wrote = gave / scale - wide(self._middle[layer]).to(gave.device)
                error = (wrote - wide(self._mlp[layer]).to(gave.device) * parts.scale / scale).norm(dim=1)
                self.observed.wrote(layer, (error / (gave / scale).norm(dim=1).clamp_min(1e-30)).max())

    def _outside(
        self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        given = [*args, *kwargs.values()]
        if not self._paused and len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            self._after_last.append((name, module, given[0], output))

    def _unexpected(self, place: int, block: nn.Module, args: tuple[Any, ...]) -> None:
        raise CaptureError(
            f"block {place} of {self.decoder.path} ({type(block).__name__}) runs on text, but was not counted as a "
            f"layer, as it demands more arguments than the other blocks. "
            f'To count every block, set layers_path = "{self.decoder.path}" in models.toml.'
        )

    def _write(self, layer: int, state: Tensor) -> None:
        real = None if self._real is None else self._real.on(state.device)
        self.write(layer, state.reshape(-1, state.shape[-1]), real)

    def _witnessed(self, state: Tensor) -> Tensor:
        assert self._witnesses is not None
        return self._witnesses.of(state.reshape(-1, state.shape[-1]))

    def _out_of_order(self, layer: int) -> CertificateError:
        block = f"block {layer} ({type(self.decoder.blocks[layer]).__name__})"
        if layer < self._next:
            return CertificateError(
                f"capture certificate: fire count fails at {block}: it runs again after block {self._next - 1}, in one "
                f"forward pass. A block that runs repeatedly is not one layer; this architecture is not supported."
            )
        skipped = type(self.decoder.blocks[self._next]).__name__
        return CertificateError(
            f"capture certificate: fire count fails at block {self._next} ({skipped}): it is passed over, and {block} "
            f"runs in its place. It may need an input other than text; this architecture is not supported."
        )

    def _state(self, value: object, layer: int, side: str) -> Tensor:
        where = f"block {layer} ({type(self.decoder.blocks[layer]).__name__}): its {side}"
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"{where} is a {type(value).__name__}, not a tensor. "
                f"The residual stream of this architecture is not supported."
            )
        if self._hidden is None:
            self._hidden = int(value.shape[-1])  # where the config does not say, the first state does
        state = self.layout.of_ids(value, *self._shape)
        if state is None or state.shape[-1] != self._hidden:
            kind = UnfamiliarShapeError if (layer, side) == (0, "input") else CaptureError
            raise kind(
                f"{where} has shape {tuple(value.shape)}, where a residual stream is (batch, time, hidden) = "
                f"({self._shape[0]}, {self._shape[1]}, {self._hidden}). This architecture has another kind of stream, "
                f"and is not supported."
            )
        return state

    def final_norm(self, last: Tensor) -> FinalNorm:
        """Apply the modules that ran after the last block to the stored h_N, and compare with last_hidden_state."""
        chain = self._final_chain(last) if tuple(last.shape[:2]) == self._shape else None
        if chain is None:
            return FinalNorm(None, float("inf"))
        modules, factor = chain
        state = self.read(len(self.decoder.blocks)).to(last.device)[None]
        state = state if self._scale * factor == 1.0 else state * (self._scale * factor)
        for _, module in modules:
            state = module(state)
        reference = self.rows(last).float()
        error = (state[0].float() - reference).abs().max() / reference.abs().max().clamp_min(1e-30)
        damaged = [
            f"{name}.{key}"
            for name, module in (modules if error.isnan() else [])
            for key, parameter in module.named_parameters()
            if not parameter.is_meta and not parameter.isfinite().all()  # meta: offloaded, and brought by a hook
        ]
        return FinalNorm([name for name, _ in modules], float(error), tuple(damaged))

    def _final_chain(self, last: Tensor) -> tuple[list[tuple[str, nn.Module]], float] | None:
        """Return the modules that lead from the last block's output, times a factor, to last_hidden_state, else None.

        They are sought from the end, so that of nested modules the outermost counts. Modules that change nothing, such
        as dropout, are left out.
        """
        chain: list[tuple[str, nn.Module]] = []
        current, factor = last, self._times_output(last)
        for name, module, given, output in reversed(self._after_last):
            if factor is None and any(_same(form, current) for form in self._forms(output)):
                current, factor = given, self._times_output(given)
                if not _same(given, output):
                    chain.insert(0, (name, module))
        return None if factor is None else (chain, factor)

    def _times_output(self, state: Tensor) -> float | None:
        """Return the power of two by which a state is the output of the last block, or None if there is none."""
        assert self._output is not None
        for output in self._forms(self._output):
            if output.shape != state.shape:
                continue
            if _same(output, state):
                return 1.0
            factor = _power_of_two(state, output.to(state))
            if factor != 1.0 and _same(output * factor, state):
                return factor
        return None

    def _forms(self, tensor: Tensor) -> list[Tensor]:
        """Return the tensor, and its positions of the ids where the layout is not (batch, time, hidden)."""
        of_ids = None if self.layout is Layout.BATCH_TIME else self.layout.of_ids(tensor, *self._shape)
        return [tensor] if of_ids is None else [tensor, of_ids]


class _Rows:
    """Row numbers that are copied once to each device on which they are used."""

    def __init__(self, index: Int64[Tensor, " rows"]) -> None:
        self._index = {index.device: index}

    def on(self, device: torch.device) -> Tensor:
        if device not in self._index:
            self._index[device] = next(iter(self._index.values())).to(device)
        return self._index[device]

    def of(self, flat: Tensor) -> Tensor:
        return flat.index_select(0, self.on(flat.device))


def _outside_blocks(decoder: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    """Return all modules below the decoder that are neither a block, nor inside one, nor hold one, with their names.

    named_modules() is not used: most modules are inside blocks, and walking those takes longer than all hooks.
    """
    holds: dict[nn.Module, bool] = dict.fromkeys(blocks, True)
    outside: list[tuple[str, nn.Module]] = []

    def walk(module: nn.Module, path: str) -> bool:
        if module not in holds:
            below = [walk(child, f"{path}{name}.") for name, child in module.named_children()]
            holds[module] = any(below)
            if path and not holds[module]:
                outside.append((path.removesuffix("."), module))
        return holds[module]

    walk(decoder, "")
    return outside


def _stacked(states: list[Tensor]) -> Float[Tensor, "blocks witnesses hidden"]:
    """Stack states in float32, on the device of the first."""
    return torch.stack([state.to(states[0].device) for state in states]).float()


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one.to(other), other))


def _power_of_two(one: Tensor, other: Tensor) -> float:
    """Return the factor between two tensors, judged by the largest entry, if it is a power of two; else 1."""
    at = other.abs().argmax()
    new, old = float(one.flatten()[at]), float(other.flatten()[at])
    ratio = new / old if old else 1.0
    return ratio if ratio > 0 and math.frexp(ratio)[0] == 0.5 else 1.0
