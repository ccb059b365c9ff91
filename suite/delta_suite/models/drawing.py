"""Weights drawn where they are wanted: a mode for torch under which a model is built, and moved to its devices.

The model is built on the CPU, so that its constants are those of the CPU on every device. Under `Drawing` what fills a
whole tensor with random numbers is noted and not done, and a tensor that nothing was written to takes no memory of the
host. The numbers are drawn when the tensor goes to a GPU (there), is read (here), or when the mode ends (here). So of
several draws of one tensor, of its constructor and of its class, only the last is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from delta_suite.models.random_numbers import Draw

aten = torch.ops.aten

OVERWRITES = {aten.zero_.default, aten.fill_.Scalar}
"""Operations that leave nothing of what a tensor held."""

NOTED = OVERWRITES | {aten.mul_.Tensor, aten.mul_.Scalar, aten.div_.Tensor, aten.add_.Tensor, aten.sub_.Tensor}
"""Operations in place that are noted as well, if no other tensor takes part."""

PARAMETERS = {"normal": (("mean", 0.0), ("std", 1.0)), "uniform": (("from", 0.0), ("to", 1.0))}
"""The names and defaults of what the operations take."""

DRAWN_ON = ("cuda",)
"""Kinds of devices on which numbers are drawn; another gets them from the CPU (Apple's knows no float64)."""


@dataclass(frozen=True)
class _Place:
    """Where a tensor lies in its storage."""

    dtype: torch.dtype
    offset: int
    shape: torch.Size
    stride: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> _Place:
        """Return the place of a tensor."""
        return cls(tensor.dtype, int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def view(self, storage: torch.UntypedStorage) -> Tensor:
        """Return the tensor at this place of a storage."""
        return torch.empty(0, dtype=self.dtype, device=storage.device).set_(
            storage, self.offset, self.shape, self.stride
        )


@dataclass
class _Unwritten:
    """A storage of the CPU to which nothing was written yet, and what is to be done to it, in order."""

    reference: StorageWeakRef
    """It does not keep the storage: what nobody holds, such as an output layer that was tied, is never drawn."""
    steps: list[tuple[Callable[[Tensor], object], _Place]]

    def write(self, storage: torch.UntypedStorage | None = None) -> None:
        """Do it to the storage if it is still there, or to another of the same size, on any device."""
        if storage is None:
            storage = torch.UntypedStorage._new_with_weak_ptr(self.reference.cdata)
        with torch.no_grad(), torch._C._DisableTorchDispatch():
            for step, place in self.steps if storage is not None else ():
                step(place.view(storage))


class Drawing(TorchDispatchMode):
    """Mode in which `normal_`, `uniform_` and `trunc_normal_` fill tensors by `Draw`; the k-th has labels (seed, k).

    Every other random operation draws on the CPU as torch does; on another device it is refused with a RuntimeError,
    as each device has numbers of its own.

    Example:
        >>> with Drawing(seed=0):
        ...     first = torch.nn.Linear(2, 2).weight
        >>> with Drawing(seed=0):
        ...     second = torch.nn.Linear(2, 2).weight
        >>> torch.equal(first, second)
        True
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seed = seed
        self.count = 0
        self._unwritten: dict[int, _Unwritten] = {}
        self._around = ExitStack()

    def __enter__(self) -> Self:
        self._around.enter_context(_truncated_by(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._around.close()
        if error is None:
            self.write()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note a draw, or carry an operation out, after the draws that it depends on."""
        kwargs = kwargs or {}
        draw = self._draw_of(func, args, kwargs)
        if draw is not None:
            self.fill(args[0], draw)
            return args[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if torch.Tag.nondeterministic_seeded in func.tags:
            _require_cpu(func, [tensor.device for tensor in tensors], kwargs.get("device"))
        waiting = [tensor for tensor in tensors if _key(tensor) in self._unwritten]
        if not waiting or _is_view(func):
            return func(*args, **kwargs)
        if func in NOTED and len(tensors) == 1 and not kwargs:
            self._note(args[0], lambda view: func(view, *args[1:]), overwrites=func in OVERWRITES)
            return args[0]
        if func is aten._to_copy.default and kwargs.get("device") is not None:
            device = torch.device(kwargs["device"])
            if device.type == "meta":
                return func(*args, **kwargs)
            if device.type in DRAWN_ON:
                moved = self._moved(args[0], device)
                return moved if kwargs.get("dtype") is None else moved.to(kwargs["dtype"])
        self.write(waiting)
        return func(*args, **kwargs)

    def write(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Draw now, on the CPU, what is still to be drawn: of these tensors, or of all."""
        keys = list(self._unwritten) if tensors is None else [_key(tensor) for tensor in tensors]
        for key in keys:
            if unwritten := self._unwritten.pop(key, None):
                unwritten.write()

    def fill(self, tensor: Tensor, draw: Draw) -> None:
        """Note that a tensor is to be filled; fill it at once where it is a part of one that holds something."""
        if _key(tensor) in self._unwritten or (_key(tensor) and _is_whole(tensor)):
            self._note(tensor, draw.fill, overwrites=True)
        else:
            with torch.no_grad(), torch._C._DisableTorchDispatch():
                draw.fill(tensor.detach())

    def labels(self) -> tuple[int, int]:
        """Return the labels of the next draw."""
        self.count += 1
        return self.seed, self.count - 1

    def _draw_of(self, func: Any, args: Any, kwargs: Any) -> Draw | None:
        """Return the draw that an operation asks for, or None where it is left to torch."""
        if func not in (aten.normal_.default, aten.uniform_.default) or kwargs.get("generator") is not None:
            return None
        if not args[0].is_floating_point() or args[0].is_meta:
            return None
        kind: Literal["normal", "uniform"] = "normal" if func is aten.normal_.default else "uniform"
        first, second = (
            args[place] if place < len(args) else kwargs.get(name, default)
            for place, (name, default) in enumerate(PARAMETERS[kind], start=1)
        )
        if second < (0.0 if kind == "normal" else first):  # an error, which torch explains
            return None
        return Draw(self.labels(), kind, first, second)

    def _note(self, tensor: Tensor, step: Callable[[Tensor], object], *, overwrites: bool) -> None:
        """Note a step. overwrites: it leaves nothing of what the tensor held, so that earlier steps can be dropped."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self._unwritten:
            reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._unwritten[storage._cdata] = _Unwritten(reference, [])
        unwritten = self._unwritten[storage._cdata]
        if overwrites and _is_whole(tensor):
            unwritten.steps.clear()
        unwritten.steps.append((step, _Place.of(tensor)))

    def _moved(self, tensor: Tensor, device: torch.device) -> Tensor:
        """Return an unwritten tensor on another device, where its numbers are drawn."""
        unwritten = self._unwritten[_key(tensor)]
        there = torch.empty(tensor.untyped_storage().nbytes(), dtype=torch.uint8, device=device).untyped_storage()
        unwritten.write(there)
        return _Place.of(tensor).view(there)


@contextmanager
def _truncated_by(drawing: Drawing) -> Iterator[None]:
    """Have `trunc_normal_` of torch.nn.init, which reads what it draws, filled by a draw of its own.

    Where less than a third of the numbers lies within the bounds, torch draws evenly between them and rejects; that is
    left to it.
    """
    plain = getattr(torch.nn.init, "_no_grad_trunc_normal_", None)

    def truncated(tensor: Tensor, mean: float, std: float, a: float, b: float, generator: Any = None) -> Tensor:
        wide = a <= mean <= b and b - a >= std > 0.0
        if not wide or generator is not None or tensor.is_meta or not tensor.is_floating_point():
            return plain(tensor, mean, std, a, b, generator=generator)  # type: ignore[misc, no-any-return]
        drawing.fill(tensor, Draw(drawing.labels(), "normal", mean, std, bounds=(a, b)))
        return tensor

    if plain is not None:
        torch.nn.init._no_grad_trunc_normal_ = truncated
    try:
        yield
    finally:
        if plain is not None:
            torch.nn.init._no_grad_trunc_normal_ = plain


def _require_cpu(func: Any, devices: list[torch.device], asked: Any) -> None:
    """Raise RuntimeError where a random operation that is not answered here would draw on another device."""
    for device in [*devices, *([] if asked is None else [torch.device(asked)])]:
        if device.type not in ("cpu", "meta"):
            raise RuntimeError(f"{func} draws on {device}, and its numbers there are not those of other devices")


def _key(tensor: Tensor) -> int:
    """Return what identifies the storage of a tensor of the CPU; 0 for other devices and for tensors without one."""
    if tensor.device.type != "cpu" or tensor.layout != torch.strided or is_traceable_wrapper_subclass(tensor):
        return 0
    return int(tensor.untyped_storage()._cdata)


def _is_whole(tensor: Tensor) -> bool:
    """Return True for a tensor that is all of its storage, in row-major order."""
    return tensor.is_contiguous() and tensor.nbytes == tensor.untyped_storage().nbytes()


def _is_view(func: Any) -> bool:
    """Return True for an operation that returns a view, or changes the shape of its tensor, and reads nothing."""
    result = func._schema.returns[0].alias_info if func._schema.returns else None
    return torch.Tag.inplace_view in func.tags or (result is not None and not result.is_write)
