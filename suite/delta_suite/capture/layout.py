"""How a batch's states lie in the tensors that the blocks pass on, where that is not (batch, time, hidden)."""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class Layout(Enum):
    """Where the positions of the token ids are; the value is the shape in words."""

    BATCH_TIME = "(batch, time, hidden)"
    TIME_BATCH = "(time, batch, hidden)"
    IDS_FIRST = "(batch, time + more, hidden), the ids' positions first"
    """As in ProphetNet, where streams that predict several tokens ahead follow; they read the ids' stream alone."""
    IDS_LAST = "(batch, time + more, hidden), the ids' positions last"
    """As behind a learned prompt."""

    def of_ids(self, tensor: Tensor, batch: int, time: int) -> Tensor | None:
        """The tensor's view as (batch, time, width) with the positions of the ids alone; None where it does not fit."""
        if tensor.dim() != 3:
            return None
        if self is Layout.TIME_BATCH:
            tensor = tensor.transpose(0, 1)
        elif self is not Layout.BATCH_TIME and tensor.shape[1] > time:
            tensor = tensor[:, :time] if self is Layout.IDS_FIRST else tensor[:, -time:]
        return tensor if tuple(tensor.shape[:2]) == (batch, time) else None
