"""Lanes in which layers are reduced, and how many run at once: devices, CUDA streams, host threads and memory.

Nothing here changes a number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch

from delta_suite.capture.forward import side_streams
from delta_suite.capture.stream import Memory, ResidualStream, gib
from delta_suite.capture.units import ADDED_GROUPS, Units
from delta_suite.errors import DeviceError
from delta_suite.reduction.eigen import (
    LARGEST_BATCH,
    LARGEST_BATCHED,
    MATRICES_EACH,
    SMALLEST_BATCH,
    Eigensolver,
    can_batch,
    load_algebra,
)
from delta_suite.reduction.variants import Variant, drops_sinks

LANES = 4
"""Number of lanes of one GPU, each with its own CUDA stream, in which the eigenproblems of layers are solved one after
the other: while one layer waits for its eigenproblem, another is prepared. One lane took 25% more time than four."""

LANES_BUSY = 2
"""Number of lanes where one lane nearly fills the GPU, because it solves eigenproblems in batches or multiplies more
rows than the hidden size. For 65,536 x 5,120 a layer took 272 ms in one lane, 234 in two, 230 in three."""

LARGEST_IN_HOST_LANES = 1024
"""Largest eigenproblem of layers that a CPU reduces at the same time, each with its part of the threads. Larger ones
fill all threads, and would take much memory."""

SPECTRA_SHARE = 0.75
"""Share of the memory that is free on a GPU beside the stream, for the layers of all lanes. A smaller share allows
fewer layers at once, and takes more time."""

FEWEST_ROWS_AT_ONCE = 8192
"""Smallest number of tokens reduced at a time: a large matrix product needs as many to run at its full rate."""

NARROW_ENTRIES_AT_ONCE = 1 << 24
"""Entries of narrow updates reduced at a time. The cost of such small products is that of launching them, so more
tokens are taken at once; copies of them in float64 stay small beside the stream, at 134 MB each."""

CACHED_ENTRIES_AT_ONCE = 1 << 20
"""Entries of the products of groups that the CPU works on at a time: several copies of them stay in its cache."""

HOST_ROWS = 2048
"""Rows worked on together on the host: copies of more are mapped anew by the system each time, page by page."""

ROW_COPIES = 3
"""Copies of the rows of a layer, in float32, that are held while it is reduced: before and after sinks are left out,
and those of a group or block."""


def rows_at_once(hidden: int) -> int:
    """Return how many tokens are reduced at a time.

    Example:
        >>> rows_at_once(576), rows_at_once(5120)
        (29127, 8192)
    """
    return max(FEWEST_ROWS_AT_ONCE, NARROW_ENTRIES_AT_ONCE // hidden)


def entries_at_once(device: torch.device) -> int:
    """Return how many entries of rows, or of products, of several groups are worked on together on a device."""
    return CACHED_ENTRIES_AT_ONCE if device.type == "cpu" else NARROW_ENTRIES_AT_ONCE


@dataclass(frozen=True)
class Plan:
    """How a stream is reduced; the same for all layers and shards."""

    variants: Sequence[Variant]
    as_rows: bool
    """True if layers are reduced from their rows, False if moments are added over shards."""
    units: Units
    """The units, in as many groups as are left out."""
    keep_on: torch.device | None
    """Device on which moments wait for the next shard; None leaves them where they were formed."""

    @property
    def groupings(self) -> list[tuple[Sequence[int], int]]:
        """The group of each document and the number of groups: of units, and of documents where domains are units."""
        of_units = (self.units.groups, self.units.group_count)
        of_documents = self.units.documents
        return [of_units] if of_documents is None else [of_units, (of_documents, self.units.document_group_count)]


def make_plan(
    stream: ResidualStream,
    variants: Sequence[Variant],
    units: Units,
    layers: int,
    memory: Memory | None,
    *,
    whole: bool,
    added: bool = False,
) -> Plan:
    """Return the plan for a stream, from its first shard.

    added: the moments of several processes are added, so that layers are not reduced from rows.

    `layers` is the number of layers whose moments are held at once, where the stream is not `whole`, in one shard.
    `memory` is what they may take, by default a share of what is free. The rows of a layer that memory does not hold
    are reduced as if they came in shards.

    Raises DeviceError where the moments of several shards fit neither the device nor the host.
    """
    device = stream.states[0].device
    memory = memory or Memory.free(device)
    if whole:
        as_rows = not added and ROW_COPIES * 4 * len(stream.kept) * stream.hidden <= max(memory.device, memory.host)
        return Plan(variants, as_rows, units if as_rows else units.at_most(ADDED_GROUPS), None)
    if layers > layers_at_once(stream.hidden, variants, units, memory):
        raise _no_room(layers, stream.hidden, variants, units, memory)
    fits = layers * _moments_bytes(stream.hidden, variants, units) <= memory.device
    return Plan(variants, False, units.at_most(ADDED_GROUPS), None if fits else torch.device("cpu"))


def plan_of_group(stream: ResidualStream, variants: Sequence[Variant], units: Units, memory: Memory | None) -> Plan:
    """Return the plan for a stream of one group of the units, whose moments wait for those of the others.

    Raises DeviceError where those of all layers fit neither the device nor the host.
    """
    device = stream.states[0].device
    memory = memory or Memory.free(device)
    needed = stream.layers * _row_sets(variants) * stream.hidden**2 * 8
    if needed > max(memory.device, memory.host):
        raise DeviceError(
            f"the sums of {stream.layers} layers, over one group of {units.unit}s, take {gib(needed)}. May be taken: "
            f"{memory}. Let fewer workers run on a machine, or use one with more memory."
        )
    return Plan(variants, False, units, None if needed <= memory.device else torch.device("cpu"))


def layers_at_once(hidden: int, variants: Sequence[Variant], units: Units, memory: Memory) -> int:
    """Return for how many layers memory holds the moments that are added over several shards.

    The other layers are reduced in further passes over the stream. Raises DeviceError where there is room for none.
    """
    most = max(memory.device, memory.host) // _moments_bytes(hidden, variants, units)
    if most == 0:
        raise _no_room(1, hidden, variants, units, memory)
    return most


def _moments_bytes(hidden: int, variants: Sequence[Variant], units: Units) -> int:
    """Return the size of the moments of one layer: a Gram matrix for each group of units and set of rows."""
    return _row_sets(variants) * units.at_most(ADDED_GROUPS).group_count * hidden**2 * 8


def _no_room(layers: int, hidden: int, variants: Sequence[Variant], units: Units, memory: Memory) -> DeviceError:
    needed = layers * _moments_bytes(hidden, variants, units)
    return DeviceError(
        f"the stream needs several shards, and the moments of {layers} layer(s) that are added over them take "
        f"{gib(needed)} ({units.at_most(ADDED_GROUPS).group_count} groups of {units.unit}s, {_row_sets(variants)} sets "
        f"of rows, {hidden} x {hidden}). May be taken: {memory}. Use a calibration set of fewer tokens, so that the "
        f"whole stream fits, or a machine with more memory."
    )


def _row_sets(variants: Sequence[Variant]) -> int:
    """Return how many sets of moments each group has: sinks are kept apart where a variant drops them."""
    return 1 + drops_sinks(variants)


@dataclass(frozen=True)
class Workload:
    """Size of the work on one layer of a shard; it decides how many layers run at once on a GPU."""

    layers: int
    """Number of layers of the stream."""
    n: int
    """Size of the eigenproblems."""
    held: int
    """Bytes that a layer takes beside its eigenproblem until that is solved."""
    passing: int
    """Bytes that are taken only for a while, by one layer at a time."""
    busy: bool
    """True if everything before the eigenproblem of one layer nearly fills a GPU."""

    @classmethod
    def of(cls, stream: ResidualStream, plan: Plan, *, moments_on_device: bool) -> Workload:
        """Return the workload of a shard. moments_on_device: the moments of earlier shards are there already."""
        hidden, tokens = stream.hidden, int(stream.kept.sum())
        n = hidden
        block = 32 * rows_at_once(hidden) * hidden  # a block of rows in float64, and its coordinates
        if plan.as_rows:  # updates in float32, and again as the variant takes them; for a while all in float64
            n = min(tokens, hidden)
            held, passing = 4 * tokens * hidden * (1 + (len(plan.variants) > 1)), 8 * tokens * hidden
            if tokens > hidden:  # Gram matrices of the halves and of both, and those of one group
                held, passing = held + 8 * hidden**2 * 5, min(block, 4 * passing)
        else:  # moments that are not there yet, the sums formed of them, and a block of rows in float64
            new = 0 if moments_on_device else _row_sets(plan.variants)
            held = 8 * hidden**2 * (plan.units.group_count * (new + drops_sinks(plan.variants)) + 4)
            passing = block
        return cls(stream.layers, n, held, passing, not plan.as_rows or tokens > hidden)

    def lanes(self, device: torch.device, layers: int, room: int) -> tuple[int, int]:
        """Return how many lanes a GPU has, and how many layers are solved in one batch in each.

        The GPU reduces `layers` of the layers, in `room` bytes.
        """
        alone = self.held + 8 * self.n**2 * MATRICES_EACH
        count = min(LANES_BUSY, layers // SMALLEST_BATCH)
        if count and self.n <= LARGEST_BATCHED and can_batch(device):
            batch = min((room // count - self.passing) // alone, -(-layers // count), LARGEST_BATCH)
            if batch >= SMALLEST_BATCH:
                return count, batch
        return max(1, min(LANES_BUSY if self.busy else LANES, room // (alone + self.passing))), 1

    def host_lanes(self, threads: int) -> int:
        """Return how many lanes a CPU has, for so many threads. It does not follow free memory, nor does any figure."""
        return max(1, min(threads, LANES, self.layers)) if self.n <= LARGEST_IN_HOST_LANES else 1


@dataclass(frozen=True)
class Lane:
    """One of the places in which layers are reduced at the same time. On a GPU a lane has its own CUDA stream.

    Shards come one after the other, so the moments of a layer are added in order, whichever lane has it.
    """

    device: torch.device | None
    """Device of the lane; None reduces each layer where its state lies."""
    stream: torch.cuda.Stream | None
    """CUDA stream of the lane, on a GPU."""
    batch: int
    """Largest number of layers whose eigenproblems are solved in one batch."""
    threads: int | None = None
    """Threads of the host for the algebra of the lane, where it has some of its own."""

    @contextmanager
    def entered(self) -> Iterator[Eigensolver]:
        """Run everything inside in this lane; on leaving, wait until it is done."""
        with ExitStack() as stack:
            if self.threads is not None:
                stack.enter_context(host_threads(self.threads))
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream(self.stream.device))
                stack.enter_context(torch.cuda.stream(self.stream))
                stack.callback(self.stream.synchronize)  # before the shard that it reads is freed
            yield stack.enter_context(Eigensolver(self.device))

    def portions(self, layers: Sequence[int]) -> Iterator[Sequence[int]]:
        """Split the layers of this lane into portions of nearly equal size, each at most one batch.

        Example:
            >>> [list(portion) for portion in Lane(None, None, batch=3).portions(range(4))]
            [[0, 1], [2, 3]]
        """
        count = -(-len(layers) // self.batch)
        for i in range(count):
            yield layers[len(layers) * i // count : len(layers) * (i + 1) // count]


def make_lanes(devices: Sequence[torch.device], workload: Workload, memory: Memory | None) -> list[Lane]:
    """Return the lanes of all devices; layer L belongs to lane L modulo their number.

    `memory` is what the layers of all lanes of a GPU may take, by default SPECTRA_SHARE of what is free.
    """
    by_device = []
    for device in devices:
        if device.type == "cuda":
            load_algebra()
            free = memory or Memory.free(device, SPECTRA_SHARE)
            count, batch = workload.lanes(device, -(-workload.layers // len(devices)), free.device)
            by_device.append([Lane(device, stream, batch) for stream in side_streams(device, count)])
        elif device.type == "cpu":
            # Half of the work on a layer is problems too small for several threads.
            threads = max(1, torch.get_num_threads() // len(devices))
            count = workload.host_lanes(threads)
            by_device.append([Lane(device, None, 1, threads // count if count > 1 else None)] * count)
        else:
            by_device.append([Lane(device, None, 1)])
    # One lane of each device in turn, so that a layer stays on its device, however many lanes the next shard has.
    lanes = [lane for row in zip_longest(*by_device) for lane in row if lane is not None]
    return lanes or [Lane(None, None, 1)]


@contextmanager
def host_threads(threads: int) -> Iterator[None]:
    """Let torch use so many threads of the host, called from this one."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def shared_threads(lanes: int) -> AbstractContextManager[None]:
    """Share the host's cores among lanes that run at the same time.

    Otherwise each would use all cores for its small problems, and they would wait for each other.
    """
    return host_threads(max(1, torch.get_num_threads() // lanes))
