"""The tap: forward passes over token sequences -> the residual stream h_0 .. h_N, and what proves the tap right.

h_L is block L's input as the block receives it (after any embedding scale or norm); h_N is the last block's raw
output, before the final norm. States are copied at the moment they are seen, because a block may write into its input.
"""

from __future__ import annotations

import inspect
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
from suite.capture.certificate import Certificate, FinalNorm, Observations, certify
from suite.capture.stream import Memory, ResidualStream, StreamWriter, plan_shards
from suite.errors import CaptureError
from suite.models.blocks import Decoder

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Padded tokens of the first batch tried, by device; halved whenever memory runs out."""

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
        self.after_last: list[tuple[str, nn.Module, Tensor, Tensor]] = []
        self._shape: tuple[int, int] = (0, 0)
        self._valid: Tensor | None = None
        self._output: Tensor | None = None
        self._version = 0
        self._handles = ExitStack()

    def __enter__(self) -> Tap:
        inside = {module for block in self.decoder.blocks for module in block.modules()}
        for layer, block in enumerate(self.decoder.blocks):
            before = block.register_forward_pre_hook(partial(self._before, layer), with_kwargs=True)
            after = block.register_forward_hook(partial(self._after, layer))
            self._handles.callback(before.remove)
            self._handles.callback(after.remove)
        for name, module in self.decoder.module.named_modules():
            if name and module not in inside and not any(child in inside for child in module.modules()):
                self._handles.callback(module.register_forward_hook(partial(self._outside, name)).remove)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handles.close()

    def begin(self, batch: Batch) -> None:
        """Forget the last batch; states that follow belong to this one."""
        self._shape = (batch.ids.shape[0], batch.ids.shape[1])
        # Computed once on the host: a boolean index would make every copy wait for the device.
        padded = batch.tokens < batch.ids.numel()
        self._valid = batch.mask.flatten().nonzero().flatten() if padded else None
        self._output = None
        self.after_last.clear()

    def rows(self, state: Tensor) -> Float[Tensor, "tokens hidden"]:
        """The rows of real tokens, in the order of the stream."""
        flat = state.reshape(-1, state.shape[-1])
        return flat if self._valid is None else flat.index_select(0, self._valid.to(flat.device))

    def _before(self, layer: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        state = self._state(args[0] if args else kwargs.get("hidden_states"), layer, "input")
        if layer == 0:
            self.write(0, self.rows(state))
        elif not (state is self._output and state._version == self._version):
            # Not the very tensor that block L-1 returned, so its values are compared. Seldom runs.
            stored = self.read(layer).to(state.device)
            self.observed.continuity(layer, (self.rows(state).float() - stored.float()).abs().max())

    def _after(self, layer: int, block: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.observed.firings[layer] += 1
        state = self._state(output[0] if isinstance(output, tuple | list) else output, layer, "output")
        self.write(layer + 1, self.rows(state))
        self._output, self._version = state, state._version
        self.after_last.clear()

    def _outside(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            self.after_last.append((name, module, args[0], output))

    def _state(self, value: object, layer: int, side: str) -> Tensor:
        if not isinstance(value, Tensor):
            raise CaptureError(
                f"block {layer} ({type(self.decoder.blocks[layer]).__name__}): its {side} is a {type(value).__name__}, "
                f"not a tensor. The residual stream of this architecture is not supported."
            )
        if value.ndim != 3 or tuple(value.shape[:2]) != self._shape:
            raise CaptureError(
                f"block {layer} ({type(self.decoder.blocks[layer]).__name__}): its {side} has shape "
                f"{tuple(value.shape)}, where a residual stream is (batch, time, hidden) = "
                f"({self._shape[0]}, {self._shape[1]}, hidden). This architecture is not supported."
            )
        return value

    def final_chain(self) -> list[tuple[str, nn.Module, Tensor]]:
        """The modules that led from the last block's output to the end, each with its output: the final norm."""
        chain: list[tuple[str, nn.Module, Tensor]] = []
        current = self._output
        for name, module, given, output in self.after_last:
            if current is not None and given.shape == current.shape and torch.equal(given.to(current.device), current):
                chain.append((name, module, output))
                current = output
        return chain


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

    Raises CaptureError where a block's state is not (batch, time, hidden), CertificateError where an identity fails.
    """
    for shard, storage in plan_shards(
        [len(ids) for ids in sequences.ids], _bytes_per_token(model, len(decoder.blocks)), device, memory
    ):
        writer = StreamWriter(sum(len(sequences.ids[i]) for i in shard), storage)
        with torch.no_grad(), Tap(decoder, writer.write, writer.read) as tap:
            limit = tokens_per_batch or TOKENS_PER_BATCH[device.type]
            done = 0
            while done < len(shard):
                batch, used = _batch(sequences, shard[done:], writer.filled, limit, device)
                writer.range = (batch.start, batch.start + batch.tokens)
                before = tap.observed.copy()
                try:
                    tap.begin(batch)
                    last = _forward(decoder.module, batch)
                    final = _check_final(tap, writer, last)
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
                tap.observed.passed(final)
                writer.filled += batch.tokens
                done += used
                advance(batch.tokens)
            writer.finish()
            stream = ResidualStream(writer.states, *_rows(sequences, shard), storage)
            stream.require_finite()
            yield stream, certify(tap.observed, stream)


def _forward(decoder: nn.Module, batch: Batch) -> Tensor:
    """last_hidden_state of the padded batch; without the head, whose logits would be the largest tensor."""
    accepted = inspect.signature(decoder.forward).parameters
    kwargs = {"input_ids": batch.ids, "attention_mask": batch.mask, "use_cache": False, "return_dict": True}
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in accepted.values())
    output = decoder(**{key: value for key, value in kwargs.items() if takes_any or key in accepted})
    last: Tensor | None = getattr(output, "last_hidden_state", None)
    return output[0] if last is None else last


def _check_final(tap: Tap, writer: StreamWriter, last: Tensor) -> FinalNorm:
    """Apply the modules found after the last block to the stored h_N, and compare with last_hidden_state."""
    chain = tap.final_chain()
    writer.synchronize()
    state = tap.read(len(tap.decoder.blocks)).to(last.device)[None]
    for _, module, _ in chain:
        state = module(state)
    reference = tap.rows(last).float()
    if state[0].shape != reference.shape:
        return FinalNorm([name for name, _, _ in chain], float("inf"))
    error = (state[0].float() - reference).abs().max() / reference.abs().max().clamp_min(1e-30)
    return FinalNorm([name for name, _, _ in chain], float(error))


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


def _bytes_per_token(model: Any, blocks: int) -> int:
    config = model.config.get_text_config(decoder=True)
    return int((blocks + 1) * config.hidden_size * model.dtype.itemsize)


def _rows(sequences: TokenSequences, shard: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Document and position of each row of a shard's stream, and whether the calibration keeps it."""
    lengths = torch.tensor([len(sequences.ids[i]) for i in shard])
    document = torch.tensor([sequences.documents[i] for i in shard]).repeat_interleave(lengths)
    position = torch.cat([torch.arange(int(length)) for length in lengths])
    starts = torch.tensor([sequences.starts_document[i] for i in shard]).repeat_interleave(lengths)
    kept = ~(starts & (position == 0)) if sequences.drop_first_token else torch.ones_like(starts)
    return document, position, kept
