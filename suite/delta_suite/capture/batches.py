"""Batches of token sequences, as tensors, and which of their rows are kept."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from delta_suite.capture.tap import Batch
from delta_suite.capture.tokens import TokenSequences

WITNESSES = 64
"""Number of tokens of a shard, evenly spread, whose updates are also kept as the hooks see them, for the telescoping
sum."""


def batch_of(
    sequences: TokenSequences,
    together: Sequence[int],
    chosen: Sequence[int],
    start: int,
    device: torch.device,
    passed: int = 0,
    mine: tuple[int, int] = (0, 1),
) -> Batch:
    """Return a batch of the sequences that run together, of which the rows of the chosen ones are kept.

    `passed` rows of the shard came before them; of all rows every `mine[1]`-th is kept, from `mine[0]` on.

    Padding is on the right: in a causal model no token sees what follows it, so positions stay as they are.
    """
    rows = [sequences.ids[i] for i in together]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
    kept = set(chosen)
    real = mask * torch.tensor([int(i in kept) for i in together])[:, None]
    places = real.flatten().nonzero().flatten()[(mine[0] - passed) % mine[1] :: mine[1]]
    real_rows = places if len(places) < ids.numel() else None
    return Batch(ids.to(device), mask.to(device), real_rows, start, len(places), int(lengths[-1]))


def witnesses_of(batch: Batch, tokens: int) -> Int64[Tensor, " witnesses"]:
    """Return rows of the batch, evenly spread: its share of the WITNESSES of a shard, at least one."""
    share = min(batch.tokens, max(1, WITNESSES * batch.tokens // tokens))
    return torch.linspace(0, batch.tokens - 1, share).round().long()


def rows_of(sequences: TokenSequences, shard: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the document and position of each row of a shard, and whether the calibration keeps it."""
    lengths = torch.tensor([len(sequences.ids[i]) for i in shard])
    document = torch.tensor([sequences.documents[i] for i in shard]).repeat_interleave(lengths)
    position = torch.cat([torch.arange(int(length)) for length in lengths])
    starts = torch.tensor([sequences.starts_document[i] for i in shard]).repeat_interleave(lengths)
    kept = ~(starts & (position == 0)) if sequences.drop_first_token else torch.ones_like(starts)
    return document, position, kept
