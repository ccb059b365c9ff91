"""Walk over the residual stream, layer by layer: spectra, directions and token averages in every variant.

The stream comes in one or more shards. A layer is reduced from its rows where one shard holds all tokens, and from
moments that are added over the shards otherwise (groups.py). Where layers run, and how many at once, is decided in
lanes.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from delta_suite.capture.sinks import Sinks, find_sinks
from delta_suite.capture.stream import Memory, ResidualStream
from delta_suite.capture.units import ADDED_GROUPS, Units
from delta_suite.process_group import Team
from delta_suite.reduction.eigen import Eigensolver
from delta_suite.reduction.gram import algebra_device
from delta_suite.reduction.grouped_moments import GroupedMoments, MomentsByGroup
from delta_suite.reduction.grouped_rows import GroupedRows, RowsByGroup, in_groups
from delta_suite.reduction.groups import Groups
from delta_suite.reduction.lanes import (
    LANES,
    Lane,
    Plan,
    Workload,
    make_lanes,
    make_plan,
    plan_of_group,
    rows_at_once,
    shared_threads,
)
from delta_suite.reduction.merge import Part, merged, tokens_of_all
from delta_suite.reduction.moments import Moments, token_quantities, widened
from delta_suite.reduction.replicates import LayerSpectra, random_draws, solve_layers
from delta_suite.reduction.variants import BLOCK_VARIANTS, VARIANTS, Variant, drops_sinks

KEEPS_SINKS = attrgetter("keeps_sinks")


def reduce_stream(
    shards: Iterable[ResidualStream],
    *,
    layers: int,
    tokens: int,
    units: Units,
    variants: Sequence[Variant] = (VARIANTS["raw"],),
    devices: Sequence[torch.device] = (),
    advance: Callable[[int], object] = lambda tokens: None,
    sinks: Callable[[ResidualStream], Sinks] = find_sinks,
    chosen: Sequence[int] | None = None,
    memory: Memory | None = None,
    keep: Memory | None = None,
    team: Team | None = None,
    tokens_here: int | None = None,
    directions: bool = True,
) -> dict[str, list[LayerSpectra]]:
    """Return the spectra of every layer, by name of the variant.

    The shards hold `tokens` kept rows in all, of the documents of `units`. One shard is reduced from the rows of each
    layer, without each group of units in turn. Otherwise moments are added over the shards, apart for each of at most
    units.ADDED_GROUPS groups; the moments of a layer are dropped as soon as the last shard has been added. Only the
    `chosen` layers are reduced, by default all; where there is no room for the moments of all, the caller asks for
    `lanes.layers_at_once` of them in each pass over the stream.

    Layer L is reduced on device L modulo their number, all devices at once; without devices, where its state lies. A
    GPU with enough memory reduces several layers at once and solves their eigenproblems together; a CPU reduces small
    ones beside each other, each with its part of the threads.
    `advance` is called with the tokens of each layer that has been reduced, `tokens` times their number in the end.
    `sinks` returns the tokens that `sink_free` leaves out; it is asked once for each shard, where a variant needs them.
    Without `directions` there are eigenvalues alone, of all tokens and without each group: half of the work.
    `memory` is what the work may take, and `keep`, by default the same, what moments may take between shards; both are
    by default a share of what is free.

    Of several processes, the `team`, each gives the shards of its own `tokens_here`. Layers are solved in turn by each
    of them, from the sums over all; process 0 returns the spectra, and the others return none.

    Raises DeviceError where memory does not hold the moments of several shards.
    """
    team = team or Team()
    chosen = range(layers) if chosen is None else chosen
    moments: list[dict[Part, Moments]] = [{} for _ in range(layers)]
    spectra: list[dict[str, LayerSpectra]] = [{} for _ in range(layers)]
    draws: list[Future[Tensor]] = []
    plan: Plan | None = None
    seen = 0
    with _pool(devices) as pool, ThreadPoolExecutor(1) as drawing:
        for stream in shards:
            dropped = sinks(stream) if drops_sinks(variants) else None
            kept = int(stream.kept.sum())
            seen += kept
            last = seen == (tokens if tokens_here is None else tokens_here)
            if plan is None:
                added = team.size > 1
                plan = make_plan(stream, variants, units, len(chosen), keep or memory, whole=last, added=added)
            if last:  # beside the first eigenproblems, which do not need them yet
                draws = [drawing.submit(random_draws, layer, min(tokens, stream.hidden)) for layer in range(layers)]
            shard = _Shard.of(stream, dropped, plan, last=last)
            on_device = bool(moments[chosen[0]]) and plan.keep_on is None
            if team.size > 1:  # they wait for each other, so that each has its layers in the same order
                lanes, of_all = [Lane(devices[0], None, team.size)], shard.tokens_of_all(moments[chosen[0]], team)
            else:
                workload = Workload.of(stream, plan, moments_on_device=on_device)
                lanes, of_all = make_lanes(devices, workload, memory), {}
            step = _Step(shard, plan, moments, spectra, draws, advance, team, of_all, directions)
            step.run(pool, lanes, chosen)
            # The shard is the largest thing in memory: nothing here may hold it while the next one is filled.
            del stream, shard, step
    for solved in team.gathered({layer: spectra[layer] for layer in chosen if spectra[layer]}):
        for layer, by_variant in solved.items():
            spectra[layer] = by_variant
    if team.rank:
        return {}
    return {variant.name: [spectra[layer][variant.name] for layer in chosen] for variant in variants}


def add_up(
    shards: Iterable[ResidualStream],
    *,
    layers: int,
    units: Units,
    devices: Sequence[torch.device],
    sinks: Callable[[ResidualStream], Sinks],
    memory: Memory | None = None,
) -> list[dict[Part, Moments]]:
    """Return the moments of every layer, of a stream whose documents are all in one group of the units.

    They are added over the shards, and solved elsewhere, with those of the other groups: `solve_moments`. `sinks` and
    `memory` as in `reduce_stream`. Raises DeviceError where memory does not hold the moments of one group.
    """
    moments: list[dict[Part, Moments]] = [{} for _ in range(layers)]
    plan: Plan | None = None
    with _pool(devices) as pool:
        for stream in shards:
            plan = plan or plan_of_group(stream, list(BLOCK_VARIANTS.values()), units.at_most(ADDED_GROUPS), memory)
            shard = _Shard.of(stream, sinks(stream), plan, last=False)
            workload = Workload.of(stream, plan, moments_on_device=bool(moments[0]) and plan.keep_on is None)
            step = _Step(shard, plan, moments, [], (), lambda tokens: None, Team(), {})
            step.run(pool, make_lanes(devices, workload, memory), range(layers))
            del stream, shard, step
    return moments


def solve_moments(
    moments: Mapping[Part, Moments], *, layer: int, tokens: int, units: Units, device: torch.device, epsilon: float
) -> dict[str, LayerSpectra]:
    """Return the spectra of one layer by name of the variant, from its moments over all `tokens` of the units.

    epsilon: machine epsilon of the stream's dtype.
    """
    plan = Plan(list(BLOCK_VARIANTS.values()), False, units.at_most(ADDED_GROUPS), None)
    hidden = len(next(iter(moments.values())).total)
    draws = [lambda: random_draws(layer, min(tokens, hidden))]
    spectra: dict[str, LayerSpectra] = {}
    with Eigensolver(device) as solve:
        for variant, grouped in _grouped_moments([moments], plan):
            (spectra[variant],) = solve_layers(grouped, draws, solve, epsilon=epsilon)
    return spectra


@contextmanager
def _pool(devices: Sequence[torch.device]) -> Iterator[ThreadPoolExecutor]:
    """Yield a pool with a thread for each lane of the devices."""
    workers = max(1, len(devices)) * LANES
    threads = shared_threads(workers if any(device.type == "cuda" for device in devices) else 1)
    with threads, ThreadPoolExecutor(workers) as pool:
        yield pool


@dataclass(frozen=True)
class _RowBlock:
    """A block of rows of a shard, and the moments to which they are added."""

    rows: slice
    order: Int64[Tensor, " _"] | None
    """The kept rows of the block, ordered so that each part is contiguous; None means every row, in original order."""
    parts: list[tuple[Part, slice]]
    """Each part and its slice of the ordered rows."""


@dataclass(frozen=True)
class _Shard:
    """A stream, and everything about its tokens that is the same for all layers."""

    stream: ResidualStream
    tokens: int
    """Number of kept tokens."""
    groupings: Sequence[tuple[Int64[Tensor, " tokens"], int]]
    """The group of each token and the number of groups, in each grouping of the plan."""
    sink: Bool[Tensor, " tokens"]
    """True for sinks; all False where no variant drops them."""
    last: bool
    """True for the last shard, after which layers are solved."""
    row_blocks: Sequence[_RowBlock]
    """All kept rows, in blocks; empty where layers are reduced as rows."""

    @classmethod
    def of(cls, stream: ResidualStream, sinks: Sinks | None, plan: Plan, *, last: bool) -> _Shard:
        document = stream.document.cpu()
        groupings = [(torch.tensor(groups)[document], count) for groups, count in plan.groupings]
        sink = torch.zeros_like(stream.kept) if sinks is None else sinks.dropped
        # Formed on the host and once, because they are the same for all layers.
        blocks = () if plan.as_rows else tuple(_row_blocks(stream, groupings[0][0], sink))
        return cls(stream, int(stream.kept.sum()), groupings, sink, last, blocks)

    def rows_of_parts(self) -> dict[Part, Int64[Tensor, " _"]]:
        """Return the kept rows of each part."""
        label = torch.where(self.stream.kept, 2 * self.groupings[0][0] + self.sink, -1)
        values = [value for value in torch.unique(label).tolist() if value >= 0]
        return {(value // 2, value % 2 == 1): (label == value).nonzero().flatten() for value in values}

    def tokens_of_all(self, earlier: Mapping[Part, Moments], team: Team) -> dict[Part, int]:
        """Return the tokens of each part over all processes, after the last shard of this one; before it nothing."""
        if not self.last:
            return {}
        tokens = {part: moments.tokens for part, moments in earlier.items()}
        for part, rows in self.rows_of_parts().items():
            tokens[part] = tokens.get(part, 0) + len(rows)
        return tokens_of_all(tokens, team)


def _row_blocks(
    stream: ResidualStream, group: Int64[Tensor, " tokens"], sink: Bool[Tensor, " tokens"]
) -> Iterator[_RowBlock]:
    """Yield all kept rows, in blocks of `rows_at_once`."""
    at_once = rows_at_once(stream.hidden)
    for start in range(0, len(group), at_once):
        rows = slice(start, start + at_once)
        label = 2 * group[rows] + sink[rows]
        order = torch.argsort(label, stable=True)
        order = order[stream.kept[rows][order]]
        parts: list[tuple[Part, slice]] = []
        values, counts = torch.unique_consecutive(label[order], return_counts=True)
        ends = counts.cumsum(0)
        for value, stop, count in zip(values.tolist(), ends.tolist(), counts.tolist(), strict=True):
            parts.append(((value // 2, value % 2 == 1), slice(stop - count, stop)))
        yield _RowBlock(rows, _unless_all(order, len(label)), parts)


@dataclass(frozen=True)
class _Step:
    """The reduction of one shard: its tokens, the moments of earlier shards, and the place of the results."""

    shard: _Shard
    plan: Plan
    moments: Sequence[dict[Part, Moments]]
    """The moments of each layer; added to, and emptied after the last shard."""
    spectra: list[dict[str, LayerSpectra]]
    """The results of each layer, by name of the variant; written after the last shard."""
    draws: Sequence[Future[Tensor]]
    """The `random_draws` of each layer; empty before the last shard."""
    advance: Callable[[int], object]
    team: Team
    of_all: Mapping[Part, int]
    """The tokens of each part over all processes, where there are several and this shard is the last."""
    directions: bool = True
    """False where eigenvalues alone are asked for."""

    def run(self, pool: ThreadPoolExecutor, lanes: Sequence[Lane], layers: Sequence[int]) -> None:
        """Reduce the layers, each in one of the lanes."""
        assigned = [layers[lane :: len(lanes)] for lane in range(len(lanes))]
        # One lane stays in this thread: in another the host's eigh of 325 took 38 ms instead of 5, as the threads of
        # its OpenMP pool and of this one's wait for each other. Several on a host have the threads divided.
        list((pool.map if len(lanes) > 1 else map)(self.reduce, lanes, assigned))

    def reduce(self, lane: Lane, layers: Sequence[int]) -> None:
        """Reduce the layers of one lane, portion by portion."""
        with lane.entered() as solve:
            rows = self.shard.rows_of_parts() if self.of_all else {}
            for portion in lane.portions(layers):
                mine = portion
                if self.of_all:
                    for owner, layer in enumerate(portion):
                        self._merge(layer, lane.device, rows, owner)
                    mine = portion[self.team.rank : self.team.rank + 1]
                elif not self.plan.as_rows:
                    for layer in portion:
                        self._accumulate(layer, lane.device)
                if self.shard.last and mine:
                    for layer, by_variant in self._solved(mine, lane, solve):
                        self.spectra[layer] = by_variant
                        self.moments[layer].clear()
                self.advance(len(portion) * self.shard.tokens)

    def _merge(
        self, layer: int, device: torch.device | None, rows: Mapping[Part, Int64[Tensor, " _"]], owner: int
    ) -> None:
        """Add up the moments of a layer over all processes, in its owner."""
        earlier = dict(self.moments[layer])
        self.moments[layer].clear()
        shard, of_all = self.shard, self.of_all
        self.moments[layer].update(merged(shard.stream, layer, device, rows, earlier, of_all, owner, self.team))

    def _accumulate(self, layer: int, device: torch.device | None) -> None:
        """Add the kept rows of a layer to the moments of their parts."""
        stream, moments = self.shard.stream, self.moments[layer]
        device = device or stream.states[layer].device
        home = algebra_device(device)
        for part, waiting in moments.items():
            moments[part] = waiting.to(home)
        for block in self.shard.row_blocks:
            before, update = (_taken(block.order, state) for state in stream.step(layer, block.rows, device))
            wide = widened(update)
            quantities = token_quantities(before, wide)
            for part, part_rows in block.parts:
                if part not in moments:
                    moments[part] = Moments.zeros(stream.hidden, device)
                moments[part].add(wide[part_rows], quantities[part_rows])
        for added in moments.values():
            added.complete()
        if self.plan.keep_on is not None and not self.shard.last:
            for part, added in moments.items():
                moments[part] = added.to(self.plan.keep_on)

    def _solved(
        self, layers: Sequence[int], lane: Lane, solve: Eigensolver
    ) -> Iterator[tuple[int, dict[str, LayerSpectra]]]:
        """Yield each layer and its spectra by variant.

        The layers are solved in one batch, and in halves of it where that turns out not to fit memory.
        """
        try:
            yield from zip(layers, self._solved_together(layers, lane, solve), strict=True)
            return
        except torch.OutOfMemoryError:
            if len(layers) == 1:
                raise
        # Outside of `except`, which holds everything that there was no room for.
        torch.cuda.empty_cache()
        for half in (layers[: len(layers) // 2], layers[len(layers) // 2 :]):
            yield from self._solved(half, lane, solve)

    def _solved_together(self, layers: Sequence[int], lane: Lane, solve: Eigensolver) -> list[dict[str, LayerSpectra]]:
        epsilon = torch.finfo(self.shard.stream.states[0].dtype).eps
        draws = [self.draws[layer].result for layer in layers]
        out: list[dict[str, LayerSpectra]] = [{} for _ in layers]
        if self.plan.as_rows:
            variants = _grouped_rows(self.shard, layers, lane.device, self.plan)
        else:
            variants = _grouped_moments([self.moments[layer] for layer in layers], self.plan)
        for variant, grouped in variants:
            solved = solve_layers(grouped, draws, solve, epsilon=epsilon, directions=self.directions)
            for by_variant, spectra in zip(out, solved, strict=True):
                by_variant[variant] = spectra
            del grouped  # before the next variant is formed
        return out


def _grouped_rows(
    shard: _Shard, layers: Sequence[int], device: torch.device | None, plan: Plan
) -> Iterator[tuple[str, Sequence[Sequence[Groups]]]]:
    """Yield the layers in each variant, as rows. Variants that take the same rows share them.

    Those without sinks come first: the Gram matrices of all rows are theirs and those of the sinks.
    """
    stream = shard.stream
    index = stream.kept.nonzero().flatten()
    index = index[in_groups(shard.groupings[0][0][index])]
    groupings = [(group[index], count) for group, count in shard.groupings]
    sink = shard.sink[index]
    order = _unless_all(index, len(stream.kept))
    updates, quantities = [], []
    for layer in layers:
        before, update = (_taken(order, state) for state in stream.step(layer, device=device))
        updates.append(update)
        quantities.append(token_quantities(before, update))
        del before, update  # `before` takes as much memory as a copy of the rows
    fewer: list[RowsByGroup] = []
    for keeps_sinks, same_rows in groupby(sorted(plan.variants, key=KEEPS_SINKS), KEEPS_SINKS):
        chosen = torch.ones_like(sink) if keeps_sinks else ~sink
        numbers = _unless_all(chosen.nonzero().flatten(), len(chosen))
        entering = [(group[chosen], count) for group, count in groupings]
        by_layer = [
            RowsByGroup(_taken(numbers, update), _taken(numbers, update_quantities), entering)
            for update, update_quantities in zip(updates, quantities, strict=True)
        ]
        for rows, without in zip(by_layer, fewer, strict=False):
            rows.take_grams(without, sink)
        fewer = []
        for variant in same_rows:
            yield (
                variant.name,
                [
                    [GroupedRows(layer_rows, variant.centre, grouping) for grouping in range(len(groupings))]
                    for layer_rows in by_layer
                ],
            )
        fewer = by_layer
        del by_layer  # before the rows of the next variant are chosen


def _grouped_moments(
    layers: Sequence[Mapping[Part, Moments]], plan: Plan
) -> Iterator[tuple[str, Sequence[Sequence[Groups]]]]:
    """Yield the layers in each variant, as moments. Variants that take the same rows share their sums."""
    for keeps_sinks, same_rows in groupby(plan.variants, KEEPS_SINKS):
        by_layer = [_moments_by_group(moments, keeps_sinks, plan.units.group_count) for moments in layers]
        for variant in same_rows:
            yield variant.name, [[GroupedMoments(moments, variant.centre)] for moments in by_layer]
        del by_layer  # before the sums of the next variant are formed


def _moments_by_group(moments: Mapping[Part, Moments], keeps_sinks: bool, groups: int) -> MomentsByGroup:
    """Return the moments of each group, with or without its sinks."""
    by_group: list[Moments | None] = [None] * groups
    for (group, sink), part in moments.items():
        if keeps_sinks or not sink:
            earlier = by_group[group]
            by_group[group] = part if earlier is None else earlier + part
    if all(part is None for part in by_group):  # every token is a sink
        by_group[0] = next(iter(moments.values())).zeros_like()
    return MomentsByGroup(by_group)


def _unless_all(numbers: Int64[Tensor, " _"], rows: int) -> Int64[Tensor, " _"] | None:
    """Return the row numbers, or None where they are all rows in original order."""
    return None if torch.equal(numbers, torch.arange(rows)) else numbers


def _taken(index: Int64[Tensor, " rows"] | None, matrix: Tensor) -> Tensor:
    """Return these rows of a matrix; None (see _unless_all) returns the matrix unchanged."""
    return matrix if index is None else matrix.index_select(0, index.to(matrix.device))
