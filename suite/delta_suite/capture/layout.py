"""Layouts of the tensors that blocks pass on, for models where it is not (batch, time, hidden)."""

from __future__ import annotations

from enum import Enum

from torch import Tensor


class Layout(Enum):
    """Place of the token positions in a tensor of states; the value is the shape in words."""

    BATCH_TIME = "(batch, time, hidden)"
    TIME_BATCH = "(time, batch, hidden)"
    IDS_FIRST = "(batch, time + more, hidden), the ids' positions first"
    """As in ProphetNet, where streams that predict several tokens ahead follow; they read the stream of the ids
    alone."""
    IDS_LAST = "(batch, time + more, hidden), the ids' positions last"
    """As with a learned prompt, whose positions come first."""

    def of_ids(self, tensor: Tensor, batch: int, time: int) -> Tensor | None:
        """Return a view (batch, time, width) of the positions of the ids, or None where the tensor has another shape.

        Example:
            >>> import torch
            >>> Layout.IDS_LAST.of_ids(torch.zeros(2, 7, 4), batch=2, time=5).shape
            torch.Size([2, 5, 4])
        """
        if tensor.dim() != 3:
            return None
        if self is Layout.TIME_BATCH:
            tensor = tensor.transpose(0, 1)
        elif self is not Layout.BATCH_TIME and tensor.shape[1] > time:
            tensor = tensor[:, :time] if self is Layout.IDS_FIRST else tensor[:, -time:]
        return tensor if tuple(tensor.shape[:2]) == (batch, time) else None
