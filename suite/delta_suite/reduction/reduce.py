"""Residual stream -> per-layer spectra, directions and token averages, one layer at a time, in every variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from delta_suite.capture.forward import side_streams
from delta_suite.capture.sinks import Sinks, find_sinks
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.errors import CaptureError
from delta_suite.reduction.eigen import (
    FEWEST_TOGETHER,
    LARGEST_TOGETHER,
    MATRICES_EACH,
    MOST_TOGETHER,
    Eigensolver,
    load_algebra,
)
from delta_suite.reduction.eigen import together as can_solve_together
from delta_suite.reduction.gram import algebra_device
from delta_suite.reduction.moments import Moments, token_quantities, widened
from delta_suite.reduction.resampling import (
    GroupedMoments,
    GroupedRows,
    Groups,
    LayerSpectra,
    group_count,
    random_draws,
    resample,
    rows_by_group,
)
from delta_suite.reduction.variants import VARIANTS, Variant

LANES = 4
"""Lanes of one GPU, each with a CUDA stream of its own, where layers' eigenproblems are solved one after the other:
while one layer waits for its own, another is prepared. One lane took 25% more time than four."""

LANES_BUSY = 2
"""The same where one lane nearly fills the GPU: it solves several eigenproblems together, or multiplies more rows than
the hidden size. Of 65,536 x 5,120 a layer took 272 ms in one lane, 234 in two, 230 in three."""

SPECTRA_SHARE = 0.75
"""Of the memory that is free on a GPU once the stream is there, for what the layers of all lanes take. Less of it makes
fewer layers at once, and more time."""

FEWEST_ROWS_AT_ONCE = 8192
"""Tokens reduced at a time at the least: what a large matrix product needs to run at its rate."""

NARROW_ENTRIES_AT_ONCE = 1 << 24
"""Of narrower updates more tokens, up to this many entries: they cost what it takes to ask for them. Copies of them in
float64 stay small beside the stream, 134 MB each."""


Part = tuple[int, bool]
"""Key of a bucket of moments: group of documents, and whether its rows are sinks. Variants are sums of buckets."""


def rows_at_once(hidden: int) -> int:
    """Tokens reduced at a time."""
    return max(FEWEST_ROWS_AT_ONCE, NARROW_ENTRIES_AT_ONCE // hidden)


@dataclass(frozen=True)
class _RowBlock:
    """Some rows of a shard, and which of them are added to which moments."""

    rows: slice
    order: Int64[Tensor, " _"] | None
    """Those kept of them, so that what belongs together lies together; None: all, as they lie."""
    parts: list[tuple[Part, slice]]
    """In that order."""


@dataclass(frozen=True)
class _Shard:
    """A stream and what was chosen of its tokens once, for all layers."""

    stream: ResidualStream
    group: Int64[Tensor, " tokens"]
    """Each token's group of documents."""
    sinks: Sinks | None
    """None where no variant asks."""

    @property
    def sink(self) -> Bool[Tensor, " tokens"]:
        return torch.zeros_like(self.stream.kept) if self.sinks is None else self.sinks.dropped

    def row_blocks(self) -> Iterator[_RowBlock]:
        """All kept rows, some at a time. Asked on the host and once, as no layer differs."""
        at_once = rows_at_once(self.stream.hidden)
        for start in range(0, len(self.group), at_once):
            rows = slice(start, start + at_once)
            label = 2 * self.group[rows] + self.sink[rows]
            order = torch.argsort(label, stable=True)
            order = order[self.stream.kept[rows][order]]
            parts: list[tuple[Part, slice]] = []
            values, counts = torch.unique_consecutive(label[order], return_counts=True)
            ends = counts.cumsum(0)
            for value, stop, count in zip(values.tolist(), ends.tolist(), counts.tolist(), strict=True):
                parts.append(((value // 2, value % 2 == 1), slice(stop - count, stop)))
            yield _RowBlock(rows, _unless_all(order, len(label)), parts)


@dataclass(frozen=True)
class _Lane:
    """Where some of the layers are reduced. On a GPU a lane has a CUDA stream of its own.

    Shards come one after the other, so a layer's moments are added in order, whichever lane has it.
    """

    device: torch.device | None
    """None: where each layer's state lies."""
    stream: torch.cuda.Stream | None
    together: int
    """Layers whose eigenproblems are solved together, at the most."""

    @classmethod
    def over(cls, devices: Sequence[torch.device], task: _Task, memory: Memory | None) -> list[_Lane]:
        by_device = []
        for device in devices:
            if device.type == "cuda":
                load_algebra()
                free = memory or Memory.free(device, SPECTRA_SHARE)
                count, together = task.lanes(device, -(-task.layers // len(devices)), free.device)
                by_device.append([cls(device, stream, together) for stream in side_streams(device, count)])
            else:
                by_device.append([cls(device, None, 1)])
        # The devices in turn, so that a layer stays on one, however many lanes the next shard has.
        lanes = [lane for row in zip_longest(*by_device) for lane in row if lane is not None]
        return lanes or [cls(None, None, 1)]

    @contextmanager
    def entered(self) -> Iterator[Eigensolver]:
        """Everything inside runs in this lane, and has run on leaving."""
        with ExitStack() as stack:
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream(self.stream.device))
                stack.enter_context(torch.cuda.stream(self.stream))
                stack.callback(self.stream.synchronize)  # before the shard that it reads goes away
            yield stack.enter_context(Eigensolver(self.device))

    def portions(self, layers: Sequence[int]) -> Iterator[Sequence[int]]:
        """This lane's layers, in portions of about one size."""
        count = -(-len(layers) // self.together)
        for i in range(count):
            yield layers[len(layers) * i // count : len(layers) * (i + 1) // count]


@dataclass(frozen=True)
class _Task:
    """How much there is to reduce, as it decides how many layers at once."""

    layers: int
    n: int
    """Size of the eigenproblems."""
    held: int
    """Bytes that a layer takes until its eigenproblem is solved, beside it."""
    passing: int
    """Bytes that come and go, of one layer at a time."""
    busy: bool
    """Whether one layer alone nearly fills a GPU up to its eigenproblem."""

    @classmethod
    def of(
        cls,
        stream: ResidualStream,
        whole: bool,
        variants: Sequence[Variant],
        plan: _Plan,
        moments: Sequence[Mapping[Part, Moments]],
    ) -> _Task:
        hidden = n = stream.hidden
        if whole:  # updates in float32, and as the variant takes them; on the way, all directions in float64
            n = int(stream.kept.sum())
            held, passing = 4 * n * hidden * (1 + (len(variants) > 1)), 8 * n * hidden
        else:  # moments that are not there yet, what is added up of them, and some rows in float64
            new = 0 if moments[0] and plan.keep_on is None else _sets(variants)
            held = 8 * hidden**2 * (plan.groups * (new + _tells_sinks(variants)) + 4)
            passing = 32 * rows_at_once(hidden) * hidden
        return cls(stream.layers, n, held, passing, not whole)

    def lanes(self, device: torch.device, layers: int, room: int) -> tuple[int, int]:
        """Lanes of a GPU that has `layers` of them, and layers solved together in each, in `room` bytes."""
        alone = self.held + 8 * self.n**2 * MATRICES_EACH
        count = min(LANES_BUSY, layers // FEWEST_TOGETHER)
        if count and self.n <= LARGEST_TOGETHER and can_solve_together(device):
            together = min((room // count - self.passing) // alone, -(-layers // count), MOST_TOGETHER)
            if together >= FEWEST_TOGETHER:
                return count, together
        return max(1, min(LANES_BUSY if self.busy else LANES, room // (alone + self.passing))), 1


@dataclass(frozen=True)
class _Plan:
    """How a stream is reduced, the same for all layers and shards."""

    variants: Sequence[Variant]
    groups: int
    intervals: bool
    keep_on: torch.device | None
    """Where moments wait for the next shard; None: where they were formed."""


def reduce_stream(
    shards: Iterable[ResidualStream],
    *,
    layers: int,
    tokens: int,
    documents: int,
    variants: Sequence[Variant] = (VARIANTS["raw"],),
    devices: Sequence[torch.device] = (),
    advance: Callable[[int], object] = lambda tokens: None,
    found_sinks: Callable[[Sinks], object] = lambda sinks: None,
    memory: Memory | None = None,
) -> dict[str, list[LayerSpectra]]:
    """Every layer, by variant, of a stream that comes in one or more shards, `tokens` kept rows of `documents` in all.

    One shard of at most `hidden` tokens is reduced on the token side. Otherwise moments are added, apart for each group
    of documents (resampling.GROUPS), over the shards; a layer's moments are dropped as soon as the last shard has been
    added. Where the moments of several shards do not fit `memory` (found from what is free by default) in ten groups,
    they are kept in two, the halves, and there are no intervals.

    Layer L is reduced on device L modulo their number, all devices at once; without devices, where its state lies. On a
    GPU that has the memory, several layers at once, whose eigenproblems are solved together.
    `advance` is told the tokens of each layer that has been reduced, `tokens` times `layers` in the end; `found_sinks`
    the tokens that `sink_free` leaves out, once for each shard.

    Raises CaptureError where the moments of several shards do not fit even then.
    """
    moments: list[dict[Part, Moments]] = [{} for _ in range(layers)]
    reduced: list[dict[str, LayerSpectra]] = [{} for _ in range(layers)]
    plan: _Plan | None = None
    seen = 0
    draws: list[Future[Tensor]] = []
    workers = max(1, len(devices)) * LANES
    threads = _shared_threads(workers if any(device.type == "cuda" for device in devices) else 1)
    with threads, ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as drawing:
        for stream in shards:
            sinks = find_sinks(stream) if _tells_sinks(variants) else None
            if sinks is not None:
                found_sinks(sinks)
            kept = int(stream.kept.sum())
            seen += kept
            whole = seen == kept == tokens <= stream.hidden
            last = seen == tokens
            if plan is None:
                plan = _plan(stream, variants, documents, layers if not last else 1, memory)
            if last:  # beside the first eigenproblems, which do not need them yet
                draws = [drawing.submit(random_draws, layer, min(tokens, stream.hidden)) for layer in range(layers)]
            shard = _Shard(stream, stream.document % plan.groups, sinks)
            row_blocks = () if whole else tuple(shard.row_blocks())
            lanes = _Lane.over(devices, _Task.of(stream, whole, variants, plan, moments), memory)

            def reduce_lane(
                lane: int,
                lanes: Sequence[_Lane] = tuple(lanes),
                shard: _Shard = shard,
                row_blocks: Sequence[_RowBlock] = row_blocks,
                kept: int = kept,
                whole: bool = whole,
                last: bool = last,
                plan: _Plan = plan,
                draws: Sequence[Future[Tensor]] = tuple(draws),
            ) -> None:
                epsilon = torch.finfo(shard.stream.states[0].dtype).eps
                own = lanes[lane]

                def groups(some: Sequence[int]) -> Iterator[tuple[str, Sequence[Groups]]]:
                    if whole:
                        return _grouped_rows(shard, some, own.device, plan)
                    return _grouped_moments([moments[layer] for layer in some], plan)

                with own.entered() as solve:
                    for portion in own.portions(range(lane, layers, len(lanes))):
                        for layer in portion if not whole else ():
                            device = own.device or shard.stream.states[layer].device
                            _accumulate(moments[layer], shard.stream, layer, row_blocks, device)
                            if plan.keep_on is not None and not last:
                                held = moments[layer]
                                held.update({part: x.to(plan.keep_on) for part, x in held.items()})
                        if last:
                            for layer, spectra in _resampled(portion, groups, draws, solve, epsilon, plan.intervals):
                                reduced[layer] = spectra
                                moments[layer].clear()
                        advance(len(portion) * kept)

            # One lane stays in this thread: in another the host's eigh of 325 took 38 ms instead of 5, as the threads
            # of its OpenMP pool and of this one's wait for each other.
            list((pool.map if len(lanes) > 1 else map)(reduce_lane, range(len(lanes))))
            # The shard is the largest thing in memory: nothing here may hold it while the next one is filled.
            del stream, shard, reduce_lane
    return {variant.name: [reduced[layer][variant.name] for layer in range(layers)] for variant in variants}


def _resampled(
    layers: Sequence[int],
    groups: Callable[[Sequence[int]], Iterator[tuple[str, Sequence[Groups]]]],
    draws: Sequence[Future[Tensor]],
    solve: Eigensolver,
    epsilon: float,
    intervals: bool,
) -> Iterator[tuple[int, dict[str, LayerSpectra]]]:
    """Some layers in every variant, together; in halves where they are more than memory holds by now."""

    def together() -> list[dict[str, LayerSpectra]]:
        out: list[dict[str, LayerSpectra]] = [{} for _ in layers]
        asked = [draws[layer].result for layer in layers]
        for variant, grouped in groups(layers):
            resampled = resample(grouped, asked, solve, epsilon=epsilon, intervals=intervals)
            for by_variant, spectra in zip(out, resampled, strict=True):
                by_variant[variant] = spectra
            del grouped  # before the next variant is formed
        return out

    try:
        yield from zip(layers, together(), strict=True)
        return
    except torch.OutOfMemoryError:
        if len(layers) == 1:
            raise
    # Outside of `except`, which holds all that there was no room for.
    torch.cuda.empty_cache()
    for half in (layers[: len(layers) // 2], layers[len(layers) // 2 :]):
        yield from _resampled(half, groups, draws, solve, epsilon, intervals)


@contextmanager
def _shared_threads(lanes: int) -> Iterator[None]:
    """The host's cores shared out among lanes: each alone would take all of them for its small problems, and they would
    wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // lanes))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tells_sinks(variants: Sequence[Variant]) -> bool:
    """Return True if some variant takes no sinks."""
    return any(not variant.keeps_sinks for variant in variants)


def _sets(variants: Sequence[Variant]) -> int:
    """Return how many sets of moments are kept apart for each group of documents."""
    return 1 + _tells_sinks(variants)


def _plan(
    stream: ResidualStream, variants: Sequence[Variant], documents: int, layers: int, memory: Memory | None
) -> _Plan:
    """`layers`: whose moments are held at once."""
    groups = group_count(documents)
    if layers == 1:
        return _Plan(variants, groups, groups > 1, None)
    device = stream.states[0].device
    memory = memory or Memory.free(device)
    sets = _sets(variants)
    for count in dict.fromkeys([groups, min(groups, 2)]):
        needed = layers * sets * count * stream.hidden**2 * 8
        if needed <= memory.device:
            return _Plan(variants, count, count == groups > 1, None)
        if needed <= memory.host:
            return _Plan(variants, count, count == groups > 1, torch.device("cpu"))
    raise CaptureError(
        f"the stream needs several shards, and the moments that are added over them take {needed / 1e9:.0f} GB "
        f"({layers} layers, {sets} sets of rows, 2 halves of documents): more than the {memory.device / 1e9:.0f} GB of "
        f"{device} and {memory.host / 1e9:.0f} GB of host memory that are free for them. Use a calibration set of "
        f"fewer tokens, so that the whole stream fits, or a machine with more memory."
    )


def _accumulate(
    moments: dict[Part, Moments],
    stream: ResidualStream,
    layer: int,
    row_blocks: Sequence[_RowBlock],
    device: torch.device,
) -> None:
    """Add the kept rows of a layer to the moments of their parts."""
    home = algebra_device(device)
    for part, held in moments.items():
        moments[part] = held.to(home)
    for block in row_blocks:
        before, update = _taken(block.order, *stream.step(layer, block.rows, device))
        wide = widened(update)
        quantities = token_quantities(before, wide)
        for part, part_rows in block.parts:
            if part not in moments:
                moments[part] = Moments.none_yet(stream.hidden, device)
            moments[part].add(wide[part_rows], quantities[part_rows])
    for added in moments.values():
        added.complete()


def _unless_all(numbers: Int64[Tensor, " _"], rows: int) -> Int64[Tensor, " _"] | None:
    """Numbers of rows; None where they are all of so many, as they lie."""
    return None if torch.equal(numbers, torch.arange(rows)) else numbers


def _taken(index: Int64[Tensor, " rows"] | None, *matrices: Tensor) -> tuple[Tensor, ...]:
    """Their rows of these numbers; None (see _unless_all): the matrices as they are."""
    if index is None:
        return matrices
    return tuple(matrix.index_select(0, index.to(matrix.device)) for matrix in matrices)


def _grouped_rows(
    shard: _Shard, layers: Sequence[int], device: torch.device | None, plan: _Plan
) -> Iterator[tuple[str, Sequence[Groups]]]:
    """Some layers in each variant."""
    stream = shard.stream
    kept = stream.kept.nonzero().flatten()
    index = kept[rows_by_group(shard.group[kept], plan.groups)]
    group, sink = shard.group[index], shard.sink[index]
    order = _unless_all(index, len(stream.kept))
    updates, quantities = [], []
    for layer in layers:
        before, update = _taken(order, *stream.step(layer, device=device))
        updates.append(update)
        quantities.append(token_quantities(before, update))
        del before, update
    for variant in plan.variants:
        chosen = torch.ones_like(sink) if variant.keeps_sinks else ~sink
        numbers = _unless_all(chosen.nonzero().flatten(), len(chosen))
        tokens = torch.bincount(group[chosen], minlength=plan.groups).tolist()
        grouped = []
        for layer_update, layer_quantities in zip(updates, quantities, strict=True):
            rows, row_quantities = _taken(numbers, layer_update, layer_quantities)
            grouped.append(GroupedRows(rows, row_quantities, tokens, variant.centre))
        yield variant.name, grouped


def _grouped_moments(layers: Sequence[Mapping[Part, Moments]], plan: _Plan) -> Iterator[tuple[str, Sequence[Groups]]]:
    """Some layers in each variant."""

    def grouped(moments: Mapping[Part, Moments], variant: Variant) -> GroupedMoments:
        by_group: list[Moments | None] = [None] * plan.groups
        for (group, sink), part in moments.items():
            if variant.keeps_sinks or not sink:
                held = by_group[group]
                by_group[group] = part if held is None else held + part
        if all(part is None for part in by_group):  # every token is a sink
            by_group[0] = next(iter(moments.values())).none()
        return GroupedMoments(by_group, variant.centre)

    for variant in plan.variants:
        yield variant.name, [grouped(moments, variant) for moments in layers]
