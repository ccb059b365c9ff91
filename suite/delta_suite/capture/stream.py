"""Residual stream of a set of tokens, and the place where it is stored."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from delta_suite.capture.writes import Write
from delta_suite.errors import CaptureError, DeviceError
from delta_suite.models.host_memory import free_host_memory, workers_here
from delta_suite.writing import temporary_folder

Storage = Literal["device", "host", "disk"]
"""Place of a stream: the device, pinned memory of the host, or a memory-mapped file."""

MEMORY_SHARE = 0.5
"""Share of free memory that the stream may take; the rest is for the forward pass and the algebra."""


@dataclass(frozen=True)
class ResidualStream:
    """The states h_0 .. h_N of a set of tokens, in the dtype of the model."""

    states: Sequence[Float[Tensor, "_ hidden"]]
    """N + 1 tensors of all tokens; those that were not asked for have no rows. Where a model is split over devices,
    each is on the device of its block."""
    document: Int64[Tensor, " tokens"]
    """Number of the document of each token."""
    position: Int64[Tensor, " tokens"]
    """Position of each token in its sequence, from 0."""
    kept: Bool[Tensor, " tokens"]
    """False for a token that the calibration drops."""
    storage: Storage
    middles: Sequence[Float[Tensor, "_ hidden"]] = ()
    """For each block the state between attention and MLP, or where `parallel` what the MLP writes, of all tokens or as
    the states of those that were asked for; empty where they are not apart."""
    parallel: Sequence[bool] = ()
    """For each block whether both sublayers read its input."""
    write: Write = "block"
    """The write that `step` returns beside the state."""
    norms: Sequence[Float[Tensor, " tokens"]] = ()
    """The norm of each row of each state, on the host, where they were taken as the states came; else empty."""

    @property
    def layers(self) -> int:
        """N, the number of blocks."""
        return len(self.states) - 1

    @property
    def hidden(self) -> int:
        """Width of the stream."""
        return int(self.states[0].shape[1])

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes."""
        return sum(state.nbytes for state in (*self.states, *self.middles))

    def of_write(self, write: Write) -> ResidualStream:
        """Return a view of the same states whose `step` returns what attention, the MLP, or the whole block writes."""
        return replace(self, write=write)

    def step(
        self, layer: int, rows: slice | Int64[Tensor, " rows"] = slice(None), device: torch.device | None = None
    ) -> tuple[Float[Tensor, "rows hidden"], Float[Tensor, "rows hidden"]]:
        """Return h_L in the dtype of the stream and what is written to it in float32, for a slice or these rows.

        That is delta_L = h_{L+1} - h_L; or where `write` names a sublayer, what it adds, a + m = delta_L. They are
        returned on `device`, by default that of h_L. The subtraction is in float32, as the spacing of bfloat16 numbers
        near 3,000 is 16; that of states in float64 is in float64.
        """
        device = self.states[layer].device if device is None else device

        def there(states: Tensor) -> Tensor:
            return states[rows].to(device, non_blocking=True)

        before = there(self.states[layer])
        if self.write == "block":
            return before, wide(there(self.states[layer + 1])) - before
        middle = there(self.middles[layer])
        if self.parallel[layer]:
            wrote = wide(middle)
            return before, wrote if self.write == "mlp" else wide(there(self.states[layer + 1])) - before - wrote
        return before, (
            wide(middle) - before if self.write == "attention" else wide(there(self.states[layer + 1])) - middle
        )

    def row_norms(self, layer: int) -> Float[Tensor, " tokens"]:
        """Return the norm of each row of h_layer, on the host, in float32 or float64."""
        if self.norms:
            return self.norms[layer]
        states = self.states[layer]
        norms: Tensor = torch.linalg.vector_norm(states, dim=1, dtype=wide_dtype(states))
        return norms.cpu()

    def take(self, rows: Int64[Tensor, " rows"]) -> ResidualStream:
        """Return the stream of the tokens in these rows."""
        on = {device: rows.to(device) for device in {state.device for state in self.states}}
        states = [state.index_select(0, on[state.device]) for state in self.states]
        return ResidualStream(states, self.document[rows], self.position[rows], self.kept[rows], self.storage)

    def require_finite(self) -> None:
        """Raise CaptureError naming the first layer and token that is NaN or infinite, or whose square is."""
        # A norm is finite only if all its row is, and if no square overflows.
        large = [layer for layer in range(len(self.states)) if not self.row_norms(layer).isfinite().all()]
        for layer in large:
            state = self.states[layer]
            finite = torch.isfinite(state).all(dim=1)
            what = "the input of block 0" if layer == 0 else f"the output of block {layer - 1}"
            if finite.all():
                largest = float(state.abs().max())
                raise CaptureError(
                    f"the residual stream is too large: at h_{layer} ({what}) it reaches {largest:.3g}, whose square "
                    "overflows. The weights may be damaged: copy or download them again."
                )
            row = int((~finite).nonzero()[0])
            cure = (
                "The weights may be damaged: copy or download them again."
                if state.dtype == torch.float32
                else f"{state.dtype} may overflow here: try --dtype float32."
            )
            raise CaptureError(
                f"the residual stream is not finite: first at h_{layer} ({what}), document {int(self.document[row])}, "
                f"token {int(self.position[row])} of its sequence. {cure}"
            )


def wide(states: Float[Tensor, "rows hidden"]) -> Float[Tensor, "rows hidden"]:
    """Return states in float32, or in float64 where they are in it.

    Example:
        >>> [wide(torch.ones(1, 1, dtype=each)).dtype for each in (torch.bfloat16, torch.float64)]
        [torch.float32, torch.float64]
    """
    return states.to(wide_dtype(states))


def gib(size: int) -> str:
    """Return a number of bytes in words.

    Example:
        >>> gib(3 << 29)
        '1.5 GiB'
    """
    return f"{size / 2**30:.3g} GiB"


@dataclass(frozen=True)
class Memory:
    """Bytes that may be taken in each place."""

    device: int
    host: int = 0
    disk: int = 0

    @property
    def places(self) -> tuple[tuple[Storage, int], ...]:
        """The places and their bytes, the fastest first."""
        return ("device", self.device), ("host", self.host), ("disk", self.disk)

    @property
    def roomiest(self) -> tuple[Storage, int]:
        """The place with the most bytes; of equal ones the fastest."""
        return max(self.places, key=lambda place: place[1])

    def place(self, size: int) -> Storage | None:
        """Return the fastest place that holds `size` bytes, or None."""
        return next((place for place, free in self.places if size <= free), None)

    def __str__(self) -> str:
        """Return what may be taken where, in words.

        Example:
            >>> print(Memory(device=1 << 30, disk=1 << 31))
            1 GiB on the device, 0 GiB in host memory beside it, 2 GiB on disk
        """
        where = {"device": "on the device", "host": "in host memory beside it", "disk": "on disk"}
        return ", ".join(f"{gib(size)} {where[place]}" for place, size in self.places)

    @classmethod
    def least(cls, several: Sequence[Memory]) -> Memory:
        """Return what each of several processes may take.

        Example:
            >>> Memory.least([Memory(3, 1), Memory(2, 5)])
            Memory(device=2, host=1, disk=0)
        """
        return cls(*(min(getattr(memory, place) for memory in several) for place in ("device", "host", "disk")))

    @classmethod
    def free(cls, device: torch.device, share: float = MEMORY_SHARE) -> Memory:
        """Return a share of the memory that is free now, to this one of the workers on the host.

        Of a GPU it is no more than torch may take of it (the option per_process_memory_fraction of its allocator). On
        the CPU, device and host are one place, which is counted as device.
        """
        host = int(free_host_memory() * share)
        disk = int(shutil.disk_usage(tempfile.gettempdir()).free * share) // workers_here()
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            held = torch.cuda.memory_stats_as_nested_dict(device)
            reserved, allocated = (held[f"{what}_bytes"]["all"]["current"] for what in ("reserved", "allocated"))
            index = torch.cuda.current_device() if device.index is None else device.index
            allowed = int(torch.cuda.get_per_process_memory_fraction(index) * total) - reserved
            # Blocks that torch holds and does not use are free to the stream too.
            unused = reserved - allocated
            return cls(int((max(0, min(free, allowed)) + unused) * share), host, disk)
        return cls(host, 0, disk)


def plan_shards(
    lengths: Sequence[int], bytes_per_token: int, device: torch.device, memory: Memory | None = None
) -> Iterator[tuple[list[int], Storage]]:
    """Yield the sequences of each shard, and the place of its stream.

    All sequences are one shard on the device if they fit there; else in pinned host memory; else in a memory-mapped
    file. Otherwise there are several shards, each on the device, or where that does not hold the longest sequence, in
    the roomiest place; a sequence that fits nowhere is a shard alone.

    Example:
        >>> lengths = [50, 30, 20]
        >>> list(plan_shards(lengths, 10, torch.device("cpu"), Memory(device=500)))
        [([0], 'device'), ([1, 2], 'device')]
    """
    memory = memory or Memory.free(device)
    sizes = [length * bytes_per_token for length in lengths]
    whole = memory.place(sum(sizes))
    if whole is not None:
        yield list(range(len(sizes))), whole
        return
    storage, room = memory.places[0] if max(sizes) <= memory.device else memory.roomiest
    shard: list[int] = []
    used = 0
    for index, size in enumerate(sizes):
        if shard and used + size > room:
            yield shard, storage
            shard, used = [], 0
        shard.append(index)
        used += size
    yield shard, storage


def fixed_shards(
    lengths: Sequence[int], batches: Sequence[Sequence[int]], rows: int, bytes_per_token: int, memory: Memory
) -> Iterator[tuple[list[int], Storage]]:
    """Yield shards of whole batches, of at most so many rows or one batch, whatever memory there is, and their places.

    Sums over their rows are then the same on every machine, to the last bit.

    Example:
        >>> list(fixed_shards([50, 30, 20], [[0], [1], [2]], 60, 10, Memory(device=500)))
        [([0], 'device'), ([1, 2], 'device')]
    """
    shard: list[int] = []
    for batch in batches:
        if shard and sum(lengths[i] for i in (*shard, *batch)) > rows:
            yield shard, _roomiest(shard, lengths, bytes_per_token, memory)
            shard = []
        shard = [*shard, *batch]
    yield shard, _roomiest(shard, lengths, bytes_per_token, memory)


def _roomiest(shard: Sequence[int], lengths: Sequence[int], bytes_per_token: int, memory: Memory) -> Storage:
    """Return the fastest place that holds a shard, or the one with the most room."""
    return memory.place(sum(lengths[i] for i in shard) * bytes_per_token) or memory.roomiest[0]


def mapped(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return a tensor of zeros in a memory-mapped file, which is gone from the folder at once.

    The mapping keeps it until the tensor is freed, even if the run is killed. Raises DeviceError where the disk has no
    room for it.
    """
    size = math.prod(shape)
    with temporary_folder(Path(tempfile.gettempdir())) as folder:
        path = folder / "tensor"
        try:
            with path.open("wb") as file:
                if hasattr(os, "posix_fallocate"):  # asked for now: writing to a full disk later would kill the process
                    os.posix_fallocate(file.fileno(), 0, max(1, size) * dtype.itemsize)
                else:
                    file.truncate(max(1, size) * dtype.itemsize)
        except OSError as error:
            raise DeviceError(
                f"{gib(size * dtype.itemsize)} are needed in {tempfile.gettempdir()}: {error.strerror}. "
                f"Make room there, or set TMPDIR to a folder of a larger disk."
            ) from None
        flat = torch.from_file(str(path), shared=True, size=max(1, size), dtype=dtype)
    return flat[:size].view(tuple(shape))


class StreamWriter:
    """Writer of the states of one shard, a range of rows per batch."""

    def __init__(
        self, tokens: int, storage: Storage, layers: Container[int] | None = None, *, norms: bool = False
    ) -> None:
        """Take the rows and the place of the shard, and the layers L whose states h_L are kept; None for all.

        A state that is not kept has no rows in the stream. norms: take the norm of each row of all states, too, where
        they are computed: to read a stream of 14 GB again on the host took 44 s of a measurement on an H100.
        """
        self.tokens, self.storage, self.layers = tokens, storage, layers
        self.states: list[Tensor] = []
        self.norms: list[Tensor] | None = [] if norms else None
        self.filled = 0
        """Number of rows that are complete."""
        self.range = (0, 0)
        """First row of the current batch, and the row after its last."""
        self._copies: dict[torch.device, torch.cuda.Stream] = {}
        self._passing: tuple[int, Tensor] | None = None
        """The last state of the batch that is not kept, and its layer: the hooks may read it until the next one."""

    def write(
        self, layer: int, states: Float[Tensor, "positions hidden"], real: Int64[Tensor, " rows"] | None = None
    ) -> None:
        """Store h_layer of the current batch: the rows `real` of its states, or all.

        Raises CaptureError where the width differs from that of h_layer in earlier batches.
        """
        start, stop = self.range
        kept = self.layers is None or layer in self.layers
        if layer == len(self.states):
            self.states.append(self._allocate(states) if kept else states.new_empty(0, states.shape[1]))
            if self.norms is not None:
                self.norms.append(states.new_empty(self.tokens, dtype=wide_dtype(states)))
        target = self.states[layer]
        if target.shape[1] != states.shape[1]:
            raise CaptureError(
                f"the stream changes width at h_{layer}: {target.shape[1]} before, {states.shape[1]} now. "
                f"Updates are differences of states of one width; this architecture is not supported."
            )
        if not kept:
            rows = states.clone() if real is None else states.index_select(0, real)
            self._passing = layer, rows
            self._take_norms(layer, rows)
            return
        if target.device == states.device:  # one kernel selects and copies
            if real is None:
                target[start:stop].copy_(states)
            else:
                torch.index_select(states, 0, real, out=target[start:stop])
            self._take_norms(layer, target[start:stop])
            return
        # A copy, because the next block may overwrite the state.
        staged = states.clone() if real is None else states.index_select(0, real)
        self._take_norms(layer, staged)
        if not states.is_cuda:
            target[start:stop].copy_(staged)
            return
        # To the host on a separate CUDA stream, beside the forward pass.
        copies = self._copies.get(states.device)
        if copies is None:
            copies = self._copies[states.device] = torch.cuda.Stream(states.device)  # type: ignore[no-untyped-call]
        copies.wait_stream(torch.cuda.current_stream(states.device))
        with torch.cuda.stream(copies):
            target[start:stop].copy_(staged, non_blocking=True)
        staged.record_stream(copies)

    def _take_norms(self, layer: int, rows: Tensor) -> None:
        if self.norms is not None:
            norms = self.norms[layer]
            norms[slice(*self.range)] = torch.linalg.vector_norm(rows, dim=1, dtype=norms.dtype)

    def _allocate(self, rows: Tensor) -> Tensor:
        shape = (self.tokens, rows.shape[1])
        if self.storage == "disk":
            return mapped(shape, rows.dtype)
        on_host = self.storage == "host"
        place = torch.device("cpu") if on_host else rows.device
        if on_host and rows.is_cuda:
            pin_by_several_threads()
        return torch.empty(shape, dtype=rows.dtype, device=place, pin_memory=on_host and rows.is_cuda)

    def read(self, layer: int) -> Float[Tensor, "rows hidden"]:
        """Return the rows of the current batch as they are stored; a state that is not kept only until the next one."""
        if self._passing is not None and self._passing[0] == layer:
            return self._passing[1]
        self.synchronize()
        return self.states[layer][self.range[0] : self.range[1]]

    def synchronize(self) -> None:
        """Wait until everything written has arrived."""
        for copies in self._copies.values():
            copies.synchronize()

    def finish(self) -> None:
        """Wait for the last copies. Raises CaptureError where the states are not of one width."""
        self.synchronize()
        if self.norms is not None:
            self.norms = [norms.cpu() for norms in self.norms]
        widths = [int(state.shape[1]) for state in self.states]
        if len(set(widths)) > 1:
            raise CaptureError(
                f"the stream changes width over depth: {widths}. "
                f"Updates are differences of states of one width; this architecture is not supported."
            )


PINNING_THREADS = 8
"""Threads that touch the pages of pinned memory. On an H100's host ten states of 178 MB took 1.28 s with the driver's
one thread, and 0.34 with eight."""


@lru_cache
def pin_by_several_threads() -> None:
    """Let torch take pinned memory by several threads from now on, unless its allocator has been configured."""
    configure = getattr(torch._C, "_accelerator_setAllocatorSettings", None)  # since torch 2.10
    if configure is not None and not any(name.endswith("_ALLOC_CONF") for name in os.environ):
        configure(f"pinned_use_cuda_host_register:True,pinned_num_register_threads:{PINNING_THREADS}")


def wide_dtype(states: Tensor) -> torch.dtype:
    """Return the dtype that is computed in with states: float32, or float64 where they are in it."""
    return torch.promote_types(states.dtype, torch.float32)
