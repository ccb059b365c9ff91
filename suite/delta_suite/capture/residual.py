"""Forward passes over token sequences: the residual stream h_0 .. h_N, and the certificate that it is right.

h_L is the input of block L as the block receives it (after any embedding scale or norm); h_N is the raw output of the
last block, before the final norm. States are copied as soon as the hooks see them, because a block may write into its
input.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from delta_suite.capture.batches import batch_of, rows_of, witnesses_of
from delta_suite.capture.certificate import Certificate, Identity, Observations, certify, check_writes
from delta_suite.capture.forward import ForwardError, Prefix, last_hidden_state, side_streams
from delta_suite.capture.layout import Layout
from delta_suite.capture.plan import REFERENCE_DOCUMENTS, plan_batches, planned_tokens
from delta_suite.capture.stream import (
    Memory,
    ResidualStream,
    Storage,
    StreamWriter,
    fixed_shards,
    plan_shards,
)
from delta_suite.capture.sublayers import PROBE_TOKENS, Sublayers, find_sublayers
from delta_suite.capture.tap import Batch, Between, Tap, UnfamiliarShapeError
from delta_suite.capture.tokens import TokenSequences
from delta_suite.errors import CaptureError, DeviceError
from delta_suite.models.blocks import Decoder
from delta_suite.process_group import FSDP, TP, Team

LAYOUT_TOKENS = 8
"""Number of tokens on which another layout is tried: few, but more than one, at which batch and time look alike."""

Advance = Callable[[int], object]
"""Function that is called with the number of tokens that have gone through the model."""


class NotApartError(CaptureError):
    """Error of a pass in which what attention and MLP write turned out not to be told apart."""


class Capture:
    """Forward passes of a model over token sequences, each of which can be repeated in the same batches.

    The states of a token are the same, whichever shard it is in: where a shard begins or ends within a batch, the whole
    batch runs, and the rows of the shard are kept.

    Of several processes each keeps its share of the rows: that of its own sequences where it runs these alone (FSDP),
    or every n-th row where all run all of them (tensor parallel). They run as many passes, because in each they wait
    for each other's weights or results.
    """

    def __init__(
        self,
        model: Any,
        decoder: Decoder,
        sequences: TokenSequences,
        *,
        device: torch.device,
        memory: Memory | None = None,
        tokens_per_batch: int | None = None,
        advance: Advance = lambda tokens: None,
        writes: bool = False,
        team: Team | None = None,
        shard_rows: int | None = None,
    ) -> None:
        """Plan the batches.

        `memory` limits the size of the stream, by default a share of what is free; `tokens_per_batch` the padded tokens
        of a batch, by default `planned_batch`. A batch that runs out of memory is halved and run again, as are all that
        follow. A model that takes no padded batch is given one sequence at a time. With `writes` the states between
        attention and MLP are sought, and kept by `shards` where memory holds them beside a stream that is whole:
        otherwise they come from `updates`, so that the shards are the same without them. With `shard_rows` the shards
        are whole batches of at most so many rows, whatever memory there is (`stream.fixed_shards`). Of several
        processes, the `team`, none repeats a batch: a failure of one ends all.
        """
        self.team = team or Team()
        self.model, self.decoder = model, decoder
        self.sequences = sequences.dealt(self.team.rank, self.team.size) if self.team.mode == FSDP else sequences
        self.device, self.memory, self.advance = device, memory, advance
        self.planned_tokens = tokens_per_batch or planned_batch(model, decoder, device)
        """Largest number of padded tokens of a batch, as planned."""
        self.batch_tokens = self.planned_tokens
        """The same after the last forward pass: less where memory ran out."""
        self.sublayers: tuple[Sublayers, ...] | str = "attention and MLP were not asked for apart"
        """Where attention and MLP write in each block; or why they are not measured apart."""
        self._lengths = [len(ids) for ids in self.sequences.ids]
        self._batches = plan_batches(self._lengths, self.planned_tokens)
        self._shard_rows = shard_rows
        self._shards = self._planned(self._states)
        self._require_rows(len(sequences.ids))
        self.whole = all(self.team.shared(len(self._shards) == 1))
        """True if the stream comes in one shard, in each process."""
        self._layout = Layout.BATCH_TIME
        self._causality: Tensor | None = None
        self.apart: Identity | None = None
        """The identity of what attention and MLP write, with the largest error of all passes so far."""
        self.scaled = False
        """True if the model multiplies its stream by a factor between blocks, which the states are divided by."""
        self.keeps_middles = False
        """True if `shards` keeps the states between attention and MLP."""
        if writes:
            self.sublayers = self._find_sublayers()
            self._plan_middles()

    def _plan_middles(self) -> None:
        """Keep the states between the sublayers beside a whole stream, where there is a place for both."""
        if not self.whole or isinstance(self.sublayers, str):
            return
        together = self._planned(self._states + len(self.sublayers))
        if len(together) == 1:
            self._shards, self.keeps_middles = together, True

    def _planned(self, states: int) -> list[tuple[list[int], Storage]]:
        """Return the shards, and the place of each, for a stream of so many states.

        Processes that run all batches together have the same shards: those for which the fullest of them has room.
        """
        memory, share = self.memory or Memory.free(self.device), 1
        if self._shard_rows is not None:
            size = self._bytes_per_state * states
            return list(fixed_shards(self._lengths, self._batches, self._shard_rows, size, memory))
        if self.team.mode == TP:
            memory, share = Memory.least(self.team.shared(memory)), self.team.size
        return list(plan_shards(self._lengths, -(-self._bytes_per_state * states // share), self.device, memory))

    def _require_rows(self, sequences: int) -> None:
        """Raise CaptureError where some process would have no row of a shard."""
        rows = sequences if self.team.mode == FSDP else min(sum(self._lengths[i] for i in s) for s, _ in self._shards)
        if rows < self.team.size:
            what = "sequences" if self.team.mode == FSDP else "tokens in a shard"
            raise CaptureError(
                f"{self.team.size} processes have {rows} {what} to share. Start fewer, or use a larger calibration."
            )

    def shards(self) -> Iterator[tuple[ResidualStream, Certificate]]:
        """Run the sequences through the decoder and yield the stream, in shards where it is too large for memory.

        Raises CaptureError where the state of a block is not (batch, time, hidden), or the model does not run on text
        alone, and CertificateError where an identity fails.
        """
        idle = self._idle_passes([shard for shard, _ in self._shards])
        for number, (shard, storage) in enumerate(self._shards, start=1):
            document, position, kept = self._rows(shard)
            writer = StreamWriter(len(document), storage, norms=True)
            middles = StreamWriter(writer.tokens, storage) if self.keeps_middles else None
            observed = self._run(shard, writer, self.advance, middles, idle if number == len(self._shards) else 0)
            stream = ResidualStream(writer.states, document, position, kept, storage, norms=writer.norms or ())
            stream.require_finite()
            assert self._causality is not None
            observed.causality = float(self._causality)
            certificate = certify(observed, stream)
            if middles is not None and self._told_apart(observed):
                stream = self._with_middles(stream, middles)
            yield stream, certificate
            # The shard is the largest thing in memory: nothing here may hold it while the next one is filled.
            del stream, writer, middles, observed

    def updates(self, layers: Container[int], *, writes: bool = False) -> Iterator[ResidualStream]:
        """Run the sequences again and yield streams of the states around these blocks alone, in fewer shards.

        The other states have no rows. What the hooks see was certified by `shards`, but for the states between
        attention and MLP, which the streams hold with `writes`. Raises NotApartError where those turn out not to be
        told apart.
        """
        kept = {layer for layer in range(self._states) if layer in layers or layer - 1 in layers}
        size = len(kept) + (sum(layer in layers for layer in range(self._states - 1)) if writes else 0)
        shards = self._planned(size)
        idle = self._idle_passes([shard for shard, _ in shards])
        for number, (shard, storage) in enumerate(shards, start=1):
            rows = self._rows(shard)
            writer = StreamWriter(len(rows[0]), storage, kept)
            middles = StreamWriter(writer.tokens, storage, layers) if writes else None
            observed = self._run(shard, writer, middles=middles, idle=idle if number == len(shards) else 0)
            stream = ResidualStream(writer.states, *rows, storage)
            if middles is not None:
                if not self._told_apart(observed):
                    raise NotApartError(str(self.sublayers))
                stream = self._with_middles(stream, middles)
            yield stream
            del stream, writer, middles

    def _told_apart(self, observed: Observations) -> bool:
        """Check the identity of the sublayers, and keep it, or the reason why it does not hold."""
        answer = check_writes(observed, len(self.decoder.blocks), self.model.dtype)
        if isinstance(answer, str):
            self.sublayers = answer
        elif self.apart is None or answer.error > self.apart.error:
            self.apart = answer
        return not isinstance(answer, str)

    def _with_middles(self, stream: ResidualStream, middles: StreamWriter) -> ResidualStream:
        assert not isinstance(self.sublayers, str)
        parallel = tuple(parts.parallel for parts in self.sublayers)
        return replace(stream, middles=middles.states, parallel=parallel)

    def reference_norms(self) -> list[Float[Tensor, " tokens"]]:
        """Run the reference documents of the sinks, and return the norms of their tokens in each state.

        Tokens that the calibration drops, and those at position 0, are left out.
        """
        shard = [i for i, document in enumerate(self.sequences.documents) if document < REFERENCE_DOCUMENTS]
        _, position, kept = self._rows(shard)
        writer = StreamWriter(len(kept), "device", layers=(), norms=True)
        self._run(shard, writer, idle=self._idle_passes([shard]))
        if not writer.norms:  # they are empty texts, or those of other processes
            return [torch.zeros(0)] * self._states
        return [norms[kept & (position > 0)] for norms in writer.norms]

    @property
    def kept_tokens(self) -> int:
        """Number of tokens of this process that enter the metrics."""
        return sum(int(self._rows(shard)[2].sum()) for shard, _ in self._shards)

    @property
    def hidden(self) -> int:
        """Width of the stream."""
        return hidden_size(self.model, self.decoder)

    @property
    def _states(self) -> int:
        """N + 1, the number of states."""
        return len(self.decoder.blocks) + 1

    @property
    def _bytes_per_state(self) -> int:
        return self.hidden * int(self.model.dtype.itemsize)

    def _find_sublayers(self) -> tuple[Sublayers, ...] | str:
        ids = next((ids for ids in self.sequences.ids if len(ids) > 1), self.sequences.ids[0])[None, :PROBE_TOKENS]
        ids = ids.to(self.device)
        try:
            return find_sublayers(self.decoder, lambda: last_hidden_state(self.decoder, ids, torch.ones_like(ids)))
        except CaptureError as error:
            return str(error)

    def _rows(self, shard: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the document and position of each row of a shard here, and whether the calibration keeps it."""
        document, position, kept = rows_of(self.sequences, shard)
        if self.team.mode == TP:
            mine = slice((self.team.rank - self._before(shard)) % self.team.size, None, self.team.size)
            return document[mine], position[mine], kept[mine]
        return document, position, kept

    def _before(self, shard: Sequence[int]) -> int:
        """Return the number of rows before a shard, so that every n-th row is the same one in any shards."""
        return sum(self._lengths[: shard[0]]) if shard else 0

    def _idle_passes(self, shards: Sequence[Sequence[int]]) -> int:
        """Return how many passes more than this process another one needs for its shards."""
        if self.team.mode != FSDP:
            return 0
        starts = [batch.start for batch in self._batches]
        passes = sum(len({bisect_right(starts, i) for i in shard}) for shard in shards)
        return max(self.team.shared(passes)) - passes

    def _run(
        self,
        shard: Sequence[int],
        writer: StreamWriter,
        advance: Advance | None = None,
        middles: StreamWriter | None = None,
        idle: int = 0,
    ) -> Observations:
        """Run the batches that hold sequences of a shard, write their states, and return what the hooks observed.

        idle: passes that follow, of which nothing is kept.
        """
        tokens, passed, filled, done = sum(self._lengths[i] for i in shard), self._before(shard), 0, 0
        mine = (self.team.rank, self.team.size) if self.team.mode == TP else (0, 1)
        between = None
        if middles is not None and not isinstance(self.sublayers, str):
            between = Between(self.sublayers, middles.write)
        with torch.no_grad(), Tap(self.decoder, writer.write, writer.read, self._layout, between) as tap:
            while done < len(shard):
                together = next(batch for batch in self._batches if shard[done] in batch)
                used = sum(i in together for i in shard)
                chosen = shard[done : done + used]
                batch = batch_of(self.sequences, together, chosen, filled, self.device, passed, mine)
                writer.range = (batch.start, batch.start + batch.tokens)
                if middles is not None:
                    middles.range = writer.range
                before = tap.observed.copy()
                try:
                    if batch.tokens:
                        self._pass(tap, batch, max(1, tokens // mine[1]))
                    else:
                        self._pass_unkept(tap, together)
                except UnfamiliarShapeError as unfamiliar:
                    if self._layout is not Layout.BATCH_TIME or self.team.mode:
                        raise
                    with tap.paused():
                        tap.layout = self._layout = _find_layout(self.decoder, batch, unfamiliar)
                    continue
                except ForwardError:
                    if len(together) == 1 or self.team.mode:
                        raise
                    self._split(together.start, 1)
                    tap.observed = before
                    continue
                except torch.OutOfMemoryError:
                    if self.team.mode:
                        raise DeviceError(
                            f"out of memory on {self.device} with a batch of {batch.ids.numel()} tokens. Start more "
                            f"processes, or use GPUs with more memory."
                        ) from None
                    if len(together) == 1:
                        raise DeviceError(
                            f"out of memory on {self.device} with a single sequence of {batch.ids.numel()} tokens. "
                            f"Use a larger device, or a calibration set of shorter documents."
                        ) from None
                    self.batch_tokens = batch.ids.numel() // 2
                    self._split(together.start, self.batch_tokens)
                    tap.observed = before
                    torch.cuda.empty_cache()
                    continue
                passed += sum(self._lengths[i] for i in chosen)
                filled += batch.tokens
                done += used
                if advance is not None:
                    advance(batch.tokens)
            for _ in range(idle):
                self._pass_unkept(tap, self._batches[0])
        writer.finish()
        if middles is not None:
            middles.finish()
        self.scaled = self.scaled or bool(tap.observed.factors)
        return tap.observed

    def _pass(self, tap: Tap, batch: Batch, tokens: int) -> None:
        """Run one batch of a shard of so many rows."""
        witnesses = witnesses_of(batch, tokens)
        tap.begin(batch, witnesses)
        beside = None if self.team.mode else _side_stream(self.model, self.device)
        last = _forward(self.decoder, batch)
        if self._causality is None:
            # Once, because it holds for all sequences of a model or for none; before `end`, which waits.
            with tap.paused():
                prefix = Prefix.of(batch.ids, batch.shortest, last)
                self._causality = prefix.error_alone(self.decoder, beside, keeps_weights=not self.team.mode)
        tap.end(batch, witnesses, last)

    def _pass_unkept(self, tap: Tap, together: Sequence[int]) -> None:
        """Run a batch of which no row is kept here, because other processes run one."""
        batch = batch_of(self.sequences, together, together, 0, self.device)
        writer = StreamWriter(batch.tokens, "device", layers=())
        observed, write, read = tap.observed.copy(), tap.write, tap.read
        tap.write, tap.read = writer.write, writer.read
        try:
            self._pass(tap, batch, batch.tokens)
        finally:
            tap.observed, tap.write, tap.read = observed, write, read

    def _split(self, first: int, limit: int) -> None:
        """Split each batch from the one with sequence `first` on into batches of at most `limit` padded tokens."""
        batches = []
        for batch in self._batches:
            parts = plan_batches(self._lengths[batch.start : batch.stop], limit) if batch.start >= first else ()
            batches += [range(batch.start + part.start, batch.start + part.stop) for part in parts] or [batch]
        self._batches = batches


def planned_batch(model: Any, decoder: Decoder, device: torch.device) -> int:
    """Return the padded tokens of a batch: by the kind of device, and fewer where the blocks of the model are wide."""
    sizes = (getattr(module, "out_features", None) for block in decoder.blocks for module in block.modules())
    widest = max((size for size in sizes if isinstance(size, int)), default=0)
    return planned_tokens(device.type, max(widest, hidden_size(model, decoder)) * int(model.dtype.itemsize))


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


def stream_bytes(model: Any, decoder: Decoder, tokens: int) -> int:
    """Return the bytes of the residual stream of this many tokens; no weights are read, so a model may lack them."""
    return tokens * (len(decoder.blocks) + 1) * hidden_size(model, decoder) * int(model.dtype.itemsize)


def hidden_size(model: Any, decoder: Decoder) -> int:
    """Return the width of the residual stream."""
    return int(decoder.hidden or model.get_input_embeddings().weight.shape[-1])
