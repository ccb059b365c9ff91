"""Forward passes over token sequences: the residual stream h_0 .. h_N, and the certificate that it is right.

h_L is the input of block L as the block receives it (after any embedding scale or norm); h_N is the raw output of the
last block, before the final norm. States are copied as soon as the hooks see them, because a block may write into its
input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from delta_suite.capture.certificate import Certificate, certify
from delta_suite.capture.forward import ForwardError, Prefix, last_hidden_state, side_streams
from delta_suite.capture.layout import Layout
from delta_suite.capture.stream import MEMORY_SHARE, Memory, ResidualStream, StreamWriter, plan_shards
from delta_suite.capture.tap import Batch, Tap, UnfamiliarShapeError
from delta_suite.capture.tokens import TokenSequences
from delta_suite.errors import CaptureError
from delta_suite.models.blocks import Decoder

TOKENS_PER_BATCH = {"cpu": 2048, "cuda": 16384, "mps": 4096}
"""Largest number of padded tokens of a batch, by device. Larger batches gave no speed-up."""

COPIES_PER_TOKEN = 6
"""Memory of a forward pass for each token, in outputs of the widest matrix of a block. Measured on 20 architectures:
dense blocks with sdpa take 2.5 to 5.9. Others take up to 60 (eager attention of long documents, scans of state-space
models without their kernels, experts); where memory runs out, the batch is halved."""

WITNESSES = 64
"""Number of tokens of a shard, evenly spread, whose updates are also kept as the hooks see them, for the telescoping
sum."""

LAYOUT_TOKENS = 8
"""Number of tokens on which another layout is tried: few, but more than one, at which batch and time look alike."""

Advance = Callable[[int], object]
"""Function that is called with the number of tokens that have gone through the model."""


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

    `memory` limits the size of the stream, `tokens_per_batch` the padded tokens of a batch; both follow from free
    memory by default. A batch that runs out of memory is halved and run again. A model that takes no padded batch is
    given one sequence at a time.

    Raises CaptureError where the state of a block is not (batch, time, hidden), or the model does not run on text
    alone, and CertificateError where an identity fails.
    """
    causality: Tensor | None = None
    layout = Layout.BATCH_TIME
    limit = tokens_per_batch or tokens_that_fit(model, decoder, device)
    for shard, storage in plan_shards(
        [len(ids) for ids in sequences.ids], _bytes_per_token(model, decoder), device, memory
    ):
        writer = StreamWriter(sum(len(sequences.ids[i]) for i in shard), storage)
        with torch.no_grad(), Tap(decoder, writer.write, writer.read, layout) as tap:
            done = 0
            while done < len(shard):
                batch, used = _batch(sequences, shard[done:], writer.filled, limit, device)
                writer.range = (batch.start, batch.start + batch.tokens)
                before = tap.observed.copy()
                try:
                    witnesses = _witnesses(batch, writer.tokens)
                    tap.begin(batch, witnesses)
                    beside = _side_stream(model, device)
                    last = _forward(decoder, batch)
                    if causality is None:
                        # Once, because it holds for all sequences of a model or for none; before `end`, which waits.
                        with tap.paused():
                            causality = Prefix.of(batch.ids, batch.shortest, last).error_alone(decoder, beside)
                    tap.end(batch, witnesses, last)
                except UnfamiliarShapeError as unfamiliar:
                    if layout is not Layout.BATCH_TIME:
                        raise
                    with tap.paused():
                        tap.layout = layout = _find_layout(decoder, batch, unfamiliar)
                    continue
                except ForwardError:
                    if used == 1:
                        raise
                    tap.observed = before
                    limit = 1
                    continue
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
                writer.filled += batch.tokens
                done += used
                advance(batch.tokens)
        writer.finish()
        stream = ResidualStream(writer.states, *_rows(sequences, shard), storage)
        stream.require_finite()
        assert causality is not None
        tap.observed.causality = float(causality)
        yield stream, certify(tap.observed, stream)
        # The shard is the largest thing in memory: nothing here may hold it while the next one is filled.
        del stream, writer, tap, last


def tokens_that_fit(model: Any, decoder: Decoder, device: torch.device) -> int:
    """Return the padded tokens of the first batch: an estimate of how many fit in memory beside the stream."""
    sizes = (getattr(module, "out_features", None) for block in decoder.blocks for module in block.modules())
    widest = max((size for size in sizes if isinstance(size, int)), default=0)
    token = COPIES_PER_TOKEN * max(widest, hidden_size(model, decoder)) * int(model.dtype.itemsize)
    return max(1, min(TOKENS_PER_BATCH[device.type], Memory.free(device, 1 - MEMORY_SHARE).device // token))


def _side_stream(model: Any, device: torch.device) -> torch.cuda.Stream | None:
    """Return a CUDA stream on which the causality check may run from here on; None unless the model is on one GPU."""
    if device.type != "cuda" or len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return None
    (beside,) = side_streams(device, 1)
    beside.wait_stream(torch.cuda.current_stream(device))  # for the token ids, not for the batch, which comes now
    return beside


def _find_layout(decoder: Decoder, batch: Batch, unfamiliar: UnfamiliarShapeError) -> Layout:
    """Return the layout under which the output of the last block leads to last_hidden_state, for a few tokens.

    Raises the error `unfamiliar` where no layout does.
    """
    ids = batch.ids[:1, :LAYOUT_TOKENS]
    few = Batch(ids, batch.mask[:1, :LAYOUT_TOKENS], None, 0, ids.numel(), ids.numel())
    for layout in Layout:
        if layout is Layout.BATCH_TIME:
            continue
        states: dict[int, Tensor] = {}

        def write(layer: int, rows: Tensor, real: Tensor | None, states: dict[int, Tensor] = states) -> None:
            states[layer] = rows.clone()

        with Tap(decoder, write, states.__getitem__, layout) as tap:
            tap.begin(few, torch.zeros(1, dtype=torch.int64))
            try:
                last = _forward(decoder, few)
            except CaptureError:
                continue
            if tap.final_norm(last).modules is not None:
                return layout
    raise unfamiliar


def _forward(decoder: Decoder, batch: Batch) -> Float[Tensor, "sequences length width"]:
    return last_hidden_state(decoder, batch.ids, batch.mask)


def _batch(
    sequences: TokenSequences, remaining: Sequence[int], start: int, limit: int, device: torch.device
) -> tuple[Batch, int]:
    """Return a batch of the remaining sequences that fit `limit` padded tokens (at least one), and their number.

    Padding is on the right: in a causal model no token sees what follows it, so positions stay as they are.
    """
    longest = len(sequences.ids[remaining[0]])
    used = max(1, min(len(remaining), limit // longest))
    chosen = [sequences.ids[i] for i in remaining[:used]]
    ids = nn.utils.rnn.pad_sequence(chosen, batch_first=True)
    lengths = torch.tensor([len(sequence) for sequence in chosen])
    mask = (torch.arange(longest) < lengths[:, None]).long()
    tokens, shortest = int(lengths.sum()), int(lengths[-1])
    real = mask.flatten().nonzero().flatten() if tokens < ids.numel() else None
    return Batch(ids.to(device), mask.to(device), real, start, tokens, shortest), used


def _witnesses(batch: Batch, tokens: int) -> Int64[Tensor, " witnesses"]:
    """Return rows of the batch, evenly spread: its share of the WITNESSES of a shard, at least one."""
    share = min(batch.tokens, max(1, WITNESSES * batch.tokens // tokens))
    return torch.linspace(0, batch.tokens - 1, share).round().long()


def stream_bytes(model: Any, decoder: Decoder, tokens: int) -> int:
    """Return the bytes of the residual stream of this many tokens; no weights are read, so a model may lack them."""
    return tokens * _bytes_per_token(model, decoder)


def _bytes_per_token(model: Any, decoder: Decoder) -> int:
    return (len(decoder.blocks) + 1) * hidden_size(model, decoder) * int(model.dtype.itemsize)


def hidden_size(model: Any, decoder: Decoder) -> int:
    """Return the width of the residual stream."""
    return int(decoder.hidden or model.get_input_embeddings().weight.shape[-1])


def _rows(sequences: TokenSequences, shard: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the document and position of each row of a shard, and whether the calibration keeps it."""
    lengths = torch.tensor([len(sequences.ids[i]) for i in shard])
    document = torch.tensor([sequences.documents[i] for i in shard]).repeat_interleave(lengths)
    position = torch.cat([torch.arange(int(length)) for length in lengths])
    starts = torch.tensor([sequences.starts_document[i] for i in shard]).repeat_interleave(lengths)
    kept = ~(starts & (position == 0)) if sequences.drop_first_token else torch.ones_like(starts)
    return document, position, kept
