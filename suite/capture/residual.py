"""The tap: forward passes over token sequences -> the residual stream h_0 .. h_N, and what proves the tap right.

h_L is block L's input as the block receives it (after any embedding scale or norm); h_N is the last block's raw
output, before the final norm. States are copied at the moment they are seen, because a block may write into its input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from suite.capture.calibration import TokenSequences
from suite.capture.certificate import Certificate, FinalNorm, Observations, Witnesses, certify, require_fired_once
from suite.capture.forward import Prefix, last_hidden_state
from suite.capture.stream import Memory, ResidualStream, StreamWriter, plan_shards
from suite.errors import CaptureError, CertificateError
from suite.models.blocks import Decoder

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Padded tokens of the first batch tried, by device; halved whenever memory runs out."""

WITNESSES = 64
"""Tokens of a shard, evenly spread, whose updates are also kept as the hooks see them, for the telescoping sum."""

Advance = Callable[[int], object]
"""Told how many tokens have gone through the model."""


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to one length; rows start .. start + tokens of the stream come from it."""

    ids: Int64[Tensor, "sequences length"]
    mask: Int64[Tensor, "sequences length"]
    start: int
    tokens: int


class Tap(AbstractContextManager["Tap"]):
    """Hooks on the decoder blocks, and on what runs after the last one; removed on leaving."""

    def __init__(self, decoder: Decoder, write: Callable[[int, Tensor], None], read: Callable[[int], Tensor]) -> None:
        self.decoder = decoder
        self.write, self.read = write, read
        self.observed = Observations.of(len(decoder.blocks))
        self._handles = ExitStack()
        self._shape: tuple[int, int] = (0, 0)
        self._real: _Rows | None = None
        self._witnesses: _Rows | None = None
        self._updates: list[Tensor] = []
        self._given: Tensor | None = None
        self._output: Tensor | None = None
        self._version = 0
        self._next = 0
        self._after_last: list[tuple[str, nn.Module, Tensor, Tensor]] = []

    def __enter__(self) -> Tap:
        inside = {module for block in self.decoder.blocks for module in block.modules()}
        for layer, block in enumerate(self.decoder.blocks):
            before = block.register_forward_pre_hook(partial(self._before, layer), with_kwargs=True)
            after = block.register_forward_hook(partial(self._after, layer))
            self._handles.callback(before.remove)
            self._handles.callback(after.remove)
        for name, module in self.decoder.module.named_modules():
            if name and module not in inside and not any(child in inside for child in module.modules()):
                outside = module.register_forward_hook(partial(self._outside, name), with_kwargs=True)
                self._handles.callback(outside.remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.close()

    def begin(self, batch: Batch, witnesses: Int64[Tensor, " witnesses"]) -> None:
        """Forget the last batch; states that follow belong to this one.

        witnesses: rows of this batch whose updates are kept as the hooks see them, apart from what is stored.
        """
        self._shape = (batch.ids.shape[0], batch.ids.shape[1])
        # Computed once on the host: a boolean index would make every copy wait for the device.
        real = batch.mask.flatten().nonzero().flatten()
        self._real = _Rows(real) if len(real) < batch.ids.numel() else None
        self._witnesses = _Rows(real[witnesses.to(real.device)])
        self._updates = []
        self._given = self._output = None
        self._next = 0
        self._after_last.clear()

    def end(self, batch: Batch, witnesses: Int64[Tensor, " witnesses"], last: Tensor) -> None:
        """Check what this batch alone can show, and count the forward pass."""
        require_fired_once(self.observed.firings, self.observed.passes + 1)
        final = self._final_norm(last)
        self.observed.passed(final, Witnesses(batch.start + witnesses.cpu(), tuple(self._updates)))

    def rows(self, state: Tensor) -> Float[Tensor, "tokens hidden"]:
        """The rows of real tokens, in the order of the stream."""
        flat = state.reshape(-1, state.shape[-1])
        return flat if self._real is None else self._real.of(flat)

    def _before(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if layer != self._next:
            raise self._out_of_order(layer)
        # The stream is a block's first argument, whatever its name.
        given = args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))
        state = self._state(given, layer, "input")
        if layer == 0:
            self.write(0, self.rows(state))
        elif not (state is self._output and state._version == self._version):
            # Not the very tensor that block L-1 returned, so its values are compared. Seldom runs.
            stored = self.read(layer).to(state.device)
            self.observed.continuity(layer, (self.rows(state).float() - stored.float()).abs().max())
        self._given = self._witnessed(state)

    def _after(self, layer: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.observed.firings[layer] += 1
        self._next = layer + 1
        state = self._state(output[0] if isinstance(output, tuple | list) and output else output, layer, "output")
        self.write(layer + 1, self.rows(state))
        assert self._given is not None
        self._updates.append(self._witnessed(state) - self._given.to(state.device))
        self._output, self._version = state, state._version
        self._after_last.clear()

    def _outside(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [*args, *kwargs.values()]
        if len(given) == 1 and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            self._after_last.append((name, module, given[0], output))

    def _witnessed(self, state: Tensor) -> Tensor:
        assert self._witnesses is not None
        return self._witnesses.of(state.reshape(-1, state.shape[-1])).float()

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
            f"runs in its place. It may need an input other than text, or not belong to the same stack."
        )

    def _state(self, value: object, layer: int, side: str) -> Tensor:
        where = f"block {layer} ({type(self.decoder.blocks[layer]).__name__}): its {side}"
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"{where} is a {type(value).__name__}, not a tensor. "
                f"The residual stream of this architecture is not supported."
            )
        hidden = value.shape[-1] if self.decoder.hidden is None else self.decoder.hidden
        if value.ndim != 3 or tuple(value.shape) != (*self._shape, hidden):
            raise CaptureError(
                f"{where} has shape {tuple(value.shape)}, where a residual stream is (batch, time, hidden) = "
                f"({self._shape[0]}, {self._shape[1]}, {self.decoder.hidden or 'hidden'}). This architecture has "
                f"another kind of stream, and is not supported."
            )
        return value

    def _final_norm(self, last: Tensor) -> FinalNorm:
        """Apply the modules found after the last block to the stored h_N, and compare with last_hidden_state."""
        chain = self._final_chain(last)
        if chain is None:
            return FinalNorm(None, float("inf"))
        state = self.read(len(self.decoder.blocks)).to(last.device)[None]
        for _, module in chain:
            state = module(state)
        reference = self.rows(last).float()
        error = (state[0].float() - reference).abs().max() / reference.abs().max().clamp_min(1e-30)
        return FinalNorm([name for name, _ in chain], float(error))

    def _final_chain(self, last: Tensor) -> list[tuple[str, nn.Module]] | None:
        """The modules that lead from the last block's output to last_hidden_state; None where none do.

        Sought from the end, so that of nested modules the outermost is found. Dropout and the like are left out.
        """
        assert self._output is not None
        chain: list[tuple[str, nn.Module]] = []
        current = last
        for name, module, given, output in reversed(self._after_last):
            if _same(self._output, current):
                break
            if _same(output, current):
                current = given
                if not _same(given, output):
                    chain.insert(0, (name, module))
        return chain if _same(self._output, current) else None


class _Rows:
    """Row numbers, copied once to each device that asks."""

    def __init__(self, index: Int64[Tensor, " rows"]) -> None:
        self._index = {index.device: index}

    def of(self, flat: Tensor) -> Tensor:
        if flat.device not in self._index:
            self._index[flat.device] = next(iter(self._index.values())).to(flat.device)
        return flat.index_select(0, self._index[flat.device])


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.shape == other.shape and torch.equal(one.to(other), other))


def capture(
    model: Any,
    decoder: Decoder,
    sequences: TokenSequences,
    *,
    device: torch.device,
    memory: Memory | None = None,
    tokens_per_batch: int | None = None,
    advance: Advance = lambda tokens: None,
) -> Iterator[tuple[ResidualStream, Certificate]]:
    """Run the sequences through the decoder and yield the residual stream, in shards where it is too large for memory.

    `memory` bounds what the stream may take (found from what is free by default), `tokens_per_batch` the padded tokens
    of a batch; on running out of memory a batch is halved and run again.

    Raises CaptureError where a block's state is not (batch, time, hidden), or the model does not run on text alone,
    CertificateError where an identity fails.
    """
    prefix: Prefix | None = None
    for shard, storage in plan_shards(
        [len(ids) for ids in sequences.ids], _bytes_per_token(model, decoder), device, memory
    ):
        first = prefix is None
        writer = StreamWriter(sum(len(sequences.ids[i]) for i in shard), storage)
        with torch.no_grad(), Tap(decoder, writer.write, writer.read) as tap:
            limit = tokens_per_batch or TOKENS_PER_BATCH[device.type]
            done = 0
            while done < len(shard):
                batch, used = _batch(sequences, shard[done:], writer.filled, limit, device)
                writer.range = (batch.start, batch.start + batch.tokens)
                before = tap.observed.copy()
                try:
                    witnesses = _witnesses(batch, writer.tokens)
                    tap.begin(batch, witnesses)
                    last = last_hidden_state(model, decoder, batch.ids, batch.mask)
                    tap.end(batch, witnesses, last)
                except torch.OutOfMemoryError:
                    if used == 1:
                        raise CaptureError(
                            f"out of memory on {device} with a single sequence of {batch.tokens} tokens. "
                            f"Use a larger device, or a calibration set of shorter documents."
                        ) from None
                    tap.observed = before
                    limit = batch.ids.numel() // 2
                    torch.cuda.empty_cache()
                    continue
                prefix = prefix or Prefix.of(batch.ids, batch.mask, last)
                writer.filled += batch.tokens
                done += used
                advance(batch.tokens)
        writer.finish()
        stream = ResidualStream(writer.states, *_rows(sequences, shard), storage)
        stream.require_finite()
        if first and prefix is not None:
            # Once, after the tap is gone: what holds for one sequence of a model holds for all.
            tap.observed.causality = prefix.error_alone(model, decoder)
        yield stream, certify(tap.observed, stream)


def _batch(
    sequences: TokenSequences, remaining: Sequence[int], start: int, limit: int, device: torch.device
) -> tuple[Batch, int]:
    """As many of the remaining sequences as fit `limit` padded tokens (one at least), and how many they are.

    Padding is on the right: what follows a token cannot reach it in a causal model, so positions need no care.
    """
    longest = len(sequences.ids[remaining[0]])
    used = max(1, min(len(remaining), limit // longest))
    chosen = [sequences.ids[i] for i in remaining[:used]]
    ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    lengths = torch.tensor([len(own) for own in chosen])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    return Batch(ids.to(device), mask.to(device), start, int(lengths.sum())), used


def _witnesses(batch: Batch, tokens: int) -> Int64[Tensor, " witnesses"]:
    """Rows of the batch, evenly spread: its share of the WITNESSES of a shard, one at least."""
    share = min(batch.tokens, max(1, WITNESSES * batch.tokens // tokens))
    return torch.linspace(0, batch.tokens - 1, share).round().long()


def _bytes_per_token(model: Any, decoder: Decoder) -> int:
    hidden = decoder.hidden or model.config.get_text_config(decoder=True).hidden_size
    return int((len(decoder.blocks) + 1) * hidden * model.dtype.itemsize)


def _rows(sequences: TokenSequences, shard: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Document and position of each row of a shard's stream, and whether the calibration keeps it."""
    lengths = torch.tensor([len(sequences.ids[i]) for i in shard])
    document = torch.tensor([sequences.documents[i] for i in shard]).repeat_interleave(lengths)
    position = torch.cat([torch.arange(int(length)) for length in lengths])
    starts = torch.tensor([sequences.starts_document[i] for i in shard]).repeat_interleave(lengths)
    kept = ~(starts & (position == 0)) if sequences.drop_first_token else torch.ones_like(starts)
    return document, position, kept
