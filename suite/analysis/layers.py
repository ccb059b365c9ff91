"""Residual stream -> per-layer spectra, directions and token averages, one layer at a time, in every variant."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from suite.analysis.moments import Moments, token_quantities
from suite.analysis.resampling import GroupedMoments, GroupedRows, LayerSpectra, group_count, random_draws, resample
from suite.analysis.variants import Sinks, find_sinks, normalised
from suite.capture.forward import side_streams
from suite.capture.stream import Memory, ResidualStream
from suite.errors import CaptureError

LANES = 4
"""Layers reduced at once on one GPU, each on a CUDA stream of its own: while one waits for its eigenproblem another is
prepared. Each takes memory of its own: one lane took 25% more time than four, and 1 GB less for 2,047 x 5,120."""

ROWS_AT_ONCE = 8192
"""Tokens reduced at a time, so that float64 copies of them stay small beside the stream."""


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


@dataclass(frozen=True)
class _Lane:
    """Where some of the layers are reduced, one after the other. On a GPU a lane has a CUDA stream of its own.

    A layer stays in its lane over all shards, so its moments are added in order.
    """

    device: torch.device | None
    """None: where each layer's state lies."""
    stream: torch.cuda.Stream | None
    _entered: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def over(cls, devices: Sequence[torch.device], per_gpu: int) -> list[_Lane]:
        lanes = []
        for device in devices:
            if device.type == "cuda":
                # torch loads its CUDA linear algebra at the first call, and fails where two threads make that at once.
                torch.linalg.eigh(torch.eye(2, device=device, dtype=torch.float64))
                lanes += [cls(device, stream) for stream in side_streams(device, per_gpu)]
            else:
                lanes.append(cls(device, None))
        return lanes or [cls(None, None)]

    def __enter__(self) -> None:
        if self.stream is not None:
            self.stream.wait_stream(torch.cuda.default_stream(self.stream.device))
            self._entered.enter_context(torch.cuda.stream(self.stream))

    def __exit__(self, *_: object) -> None:
        if self.stream is not None:
            self.stream.synchronize()  # before the shard that it reads goes away
        self._entered.close()


Part = tuple[str, int, bool]
"""What moments are kept apart by: (as they are or normalised, group of documents, a sink). Sums make the variants."""


@dataclass(frozen=True)
class _Plan:
    """How a stream is reduced, the same for all layers and shards."""

    variants: Sequence[str]
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
    variants: Sequence[str] = ("raw",),
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

    Layer L is reduced on device L modulo their number, all devices at once; without devices, where its state lies.
    `advance` is told the tokens of each layer that has been reduced, `tokens` times `layers` in the end; `found_sinks`
    the tokens that `sink_free` leaves out, once for each shard.

    Raises CaptureError where the moments of several shards do not fit even then.
    """
    moments: list[dict[Part, Moments]] = [{} for _ in range(layers)]
    reduced: dict[int, dict[str, LayerSpectra]] = {}
    lanes: list[_Lane] = []
    plan: _Plan | None = None
    seen = 0
    draws: list[Future[Tensor]] = []
    workers = max(1, len(devices)) * LANES
    threads = _shared_threads(workers if any(device.type == "cuda" for device in devices) else 1)
    with threads, ThreadPoolExecutor(workers) as pool, ThreadPoolExecutor(1) as drawing:
        for stream in shards:
            sinks = find_sinks(stream) if "sink_free" in variants else None
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
            lanes = lanes or _Lane.over(devices, LANES if tokens <= stream.hidden else 1)

            def reduce_lane(
                lane: int,
                lanes: Sequence[_Lane] = lanes,
                shard: _Shard = shard,
                whole: bool = whole,
                last: bool = last,
                plan: _Plan = plan,
                draws: Sequence[Future[Tensor]] = tuple(draws),
            ) -> None:
                epsilon = torch.finfo(shard.stream.states[0].dtype).eps
                with lanes[lane]:
                    for layer in range(lane, layers, len(lanes)):
                        device = lanes[lane].device or shard.stream.states[layer].device
                        if whole:
                            reduced[layer] = _reduce_rows(shard, layer, device, plan, draws[layer], epsilon)
                        else:
                            own = moments[layer]
                            _accumulate(own, shard, layer, device, plan)
                            if last:
                                reduced[layer] = _reduce_moments(own, plan, draws[layer], epsilon)
                                own.clear()
                            elif plan.keep_on is not None:
                                own.update({part: held.to(plan.keep_on) for part, held in own.items()})
                        advance(int(shard.stream.kept.sum()))

            list(pool.map(reduce_lane, range(len(lanes))))
            # The shard is the largest thing in memory: nothing here may hold it while the next one is filled.
            del stream, shard, reduce_lane
    return {variant: [reduced[layer][variant] for layer in range(layers)] for variant in variants}


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


def _ways(variants: Sequence[str]) -> list[str]:
    return ["as they are", *(["normalised"] if "token_normalised" in variants else [])]


def _plan(stream: ResidualStream, variants: Sequence[str], documents: int, layers: int, memory: Memory | None) -> _Plan:
    """`layers`: whose moments are held at once."""
    groups = group_count(documents)
    if layers == 1:
        return _Plan(variants, groups, groups > 1, None)
    device = stream.states[0].device
    memory = memory or Memory.free(device)
    sets = len(_ways(variants)) + ("sink_free" in variants)
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


def _accumulate(moments: dict[Part, Moments], shard: _Shard, layer: int, device: torch.device, plan: _Plan) -> None:
    """Add the kept rows of a layer to the moments of their parts, some rows at a time."""
    stream = shard.stream
    for start in range(0, len(stream.kept), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        before, update = stream.step(layer, rows, device)
        quantities = token_quantities(before, update)
        for group in torch.unique(shard.group[rows]).tolist():
            in_group = stream.kept[rows] & (shard.group[rows] == group)
            for way in _ways(plan.variants):
                # Only `sink_free` tells sinks apart, and it takes the rows as they are.
                for sink in (False, True) if way == "as they are" and shard.sinks is not None else (None,):
                    chosen = in_group if sink is None else in_group & (shard.sink[rows] == sink)
                    if not bool(chosen.any()):
                        continue
                    own_update, own_quantities = _rows(chosen, update, quantities)
                    own_update = own_update if way == "as they are" else normalised(own_update)
                    own = Moments.of(own_update, own_quantities)
                    part = (way, group, bool(sink))
                    moments[part] = moments[part].to(own.gram.device) + own if part in moments else own


def _rows(chosen: Bool[Tensor, " tokens"], *matrices: Tensor) -> tuple[Tensor, ...]:
    if bool(chosen.all()):
        return matrices
    index = chosen.nonzero().flatten()
    return tuple(matrix.index_select(0, index.to(matrix.device)) for matrix in matrices)


def _reduce_rows(
    shard: _Shard, layer: int, device: torch.device, plan: _Plan, draws: Future[Tensor], epsilon: float
) -> dict[str, LayerSpectra]:
    stream = shard.stream
    before, update = _rows(stream.kept, *stream.step(layer, device=device))
    quantities = token_quantities(before, update)
    del before
    group, sink = shard.group[stream.kept], shard.sink[stream.kept]
    out = {}
    for variant in plan.variants:
        rows, own, own_group = update, quantities, group
        if variant == "sink_free":
            rows, own, own_group = _rows(~sink, update, quantities, group)
        elif variant == "token_normalised":
            rows = normalised(update)
        grouped = GroupedRows(rows, own, own_group, plan.groups, variant == "centred")
        out[variant] = resample(grouped, draws.result, epsilon=epsilon, intervals=plan.intervals)
    return out


def _reduce_moments(
    moments: Mapping[Part, Moments], plan: _Plan, draws: Future[Tensor], epsilon: float
) -> dict[str, LayerSpectra]:
    def grouped(way: str, sinks: bool, centre: bool) -> GroupedMoments:
        own: list[Moments | None] = [None] * plan.groups
        for (own_way, group, sink), part in moments.items():
            if own_way == way and (sinks or not sink):
                held = own[group]
                own[group] = part if held is None else held + part
        if all(part is None for part in own):  # every token is a sink
            own[0] = next(iter(moments.values())).none()
        return GroupedMoments(own, centre)

    out = {}
    for variant in plan.variants:
        way = "normalised" if variant == "token_normalised" else "as they are"
        own = grouped(way, variant != "sink_free", variant == "centred")
        out[variant] = resample(own, draws.result, epsilon=epsilon, intervals=plan.intervals)
    return out
