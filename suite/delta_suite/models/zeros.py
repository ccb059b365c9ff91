"""Weights that are zero, as a broken download leaves them; and as some models have them, so that nothing is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtyping import Bool, Shaped
    from torch import Tensor

SHARE = 8
"""One in so many rows of a matrix must be zero for it to be named. Padding of a vocabulary is a hundredth at most."""

SAMPLED = 2 * SHARE
"""Rows of a matrix that are looked at first, evenly spaced: one of them lies in any run of zeros to be named."""

AT_ONCE = 4096
"""Rows that are counted at once."""


def zero_weights(model: Any) -> tuple[str, ...]:
    """Return the names of weight matrices that are zero, or are so in one of SHARE rows or more.

    Of a matrix without zero rows only SAMPLED are read. Parameters that are not in memory, are spread over processes,
    or have fewer rows than SHARE are passed over.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Linear(16, 16))
        >>> model[1].weight.data[12:] = 0
        >>> zero_weights(model)
        ('1.weight',)
    """
    import torch

    return tuple(
        name
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and type(parameter.data) is torch.Tensor and not parameter.is_meta and parameter.numel()
        if _is_zero(parameter.data.flatten(0, -2))
    )


def zero_note(name: str, zero: tuple[str, ...]) -> str:
    """Return what a user should know of a model whose weight matrices of these names are zero."""
    shown = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
    are = "matrix is" if len(zero) == 1 else "matrices are"
    return (
        f"{name}: {len(zero)} weight {are} zero, in whole or in at least one of {SHARE} rows: {shown}. A broken "
        f"download leaves zeros; so do blocks that were added to deepen a model. If they are not meant, copy or "
        f"download the weights again."
    )


def _is_zero(rows: Shaped[Tensor, "rows columns"]) -> bool:
    """Return True if one of SHARE rows is zero, or more."""
    import torch

    count = len(rows)
    if count < SHARE:
        return False
    places = torch.linspace(0, count - 1, min(SAMPLED, count), device=rows.device).long()
    if bool(_has_value(rows[places]).all()):
        return False
    having = int(torch.cat([_has_value(part) for part in torch.split(rows, AT_ONCE)]).sum())
    return (count - having) * SHARE >= count


def _has_value(rows: Shaped[Tensor, "rows columns"]) -> Bool[Tensor, " rows"]:
    return rows.float().any(dim=1)  # in float32, as float8 cannot be compared
