"""Moments of a layer over several processes: each adds its own rows, and one of them receives the sums."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from delta_suite.capture.stream import ResidualStream
from delta_suite.process_group import Team
from delta_suite.reduction.gram import algebra_device
from delta_suite.reduction.lanes import rows_at_once
from delta_suite.reduction.moments import Moments, token_quantities, widened

Part = tuple[int, bool]
"""Key of a moments bucket: group of units, and whether its rows are sinks. Variants are sums of buckets."""


def tokens_of_all(here: Mapping[Part, int], team: Team) -> dict[Part, int]:
    """Return the number of tokens of each part over all processes, in one order for all.

    Example:
        >>> tokens_of_all({(1, False): 5, (0, False): 7}, Team())
        {(0, False): 7, (1, False): 5}
    """
    total: dict[Part, int] = {}
    for tokens in team.shared(dict(here)):
        for part, count in tokens.items():
            total[part] = total.get(part, 0) + count
    return dict(sorted(total.items()))


def merged(
    stream: ResidualStream,
    layer: int,
    device: torch.device | None,
    rows: Mapping[Part, Int64[Tensor, " _"]],
    earlier: dict[Part, Moments],
    tokens: Mapping[Part, int],
    owner: int,
    team: Team,
) -> dict[Part, Moments]:
    """Return the moments of a layer over all processes in its `owner`, and none in the others.

    rows: those of each part in this last shard. earlier: the moments of the shards before, which are used up. tokens:
    those of each part over all processes; a part is added up as soon as it is formed, so that one is held at a time.
    """
    before, update = stream.step(layer, device=device)
    quantities = token_quantities(before, update)
    del before
    hidden, home = stream.hidden, algebra_device(update.device)
    out: dict[Part, Moments] = {}
    for part, count in tokens.items():
        moments = earlier.pop(part).to(home) if part in earlier else Moments.zeros(hidden, update.device)
        for block in torch.split(rows[part], rows_at_once(hidden)) if part in rows else ():
            chosen = update.index_select(0, block.to(update.device))
            moments.add(widened(chosen), quantities.index_select(0, block.to(quantities.device)))
        moments.complete()
        vectors = torch.cat([moments.total, moments.sums, moments.squares])
        for tensor in (moments.gram, vectors):
            team.add_up(tensor, owner)
        if team.rank == owner:
            sizes = [len(moments.total), len(moments.sums), len(moments.squares)]
            total, sums, squares = torch.split(vectors, sizes)
            out[part] = replace(moments, tokens=count, total=total, sums=sums, squares=squares)
    return out
