"""Contexts that leave a process as it was: torch's and transformers' settings, random states, a module in memory."""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from delta_suite.errors import CaptureError

if TYPE_CHECKING:
    from torch import Tensor, nn

COPIED_BUFFER = 1 << 20
"""Most bytes of a buffer that is copied beforehand, such as rotary frequencies. Larger ones hold weights, which a
forward pass in evaluation mode does not change."""

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def usual_torch() -> Iterator[None]:
    """Measure as a fresh process would, whatever the caller has set, and leave random states as they were.

    Set aside are inference mode, autocast, and another default dtype or device. Gradients are not recorded.
    """
    import torch

    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    with ExitStack() as stack:
        stack.enter_context(random_states_kept())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        for kind in {"cpu", _accelerator()}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        if device.type != "cpu":
            stack.enter_context(torch.device("cpu"))
        if dtype != torch.float32:
            torch.set_default_dtype(torch.float32)
            stack.callback(torch.set_default_dtype, dtype)
        yield


def _accelerator() -> str:
    """Return the kind of device beside the CPU, "cuda" where there is none."""
    import torch

    device = torch.accelerator.current_accelerator()
    return "cuda" if device is None else device.type


@contextmanager
def errors_only() -> Iterator[None]:
    """Silence the warnings of transformers; its table of tensors that do not fit would stand above our message."""
    from transformers.utils import logging as transformers_logging

    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


@contextmanager
def replaced(attributes: Sequence[tuple[Any, str, Any]]) -> Iterator[None]:
    """Give attributes of modules other values within a block; one that a module lacks is None afterwards."""
    before = [getattr(module, name, None) for module, name, _ in attributes]
    for module, name, value in attributes:
        setattr(module, name, value)
    try:
        yield
    finally:
        for (module, name, _), value in zip(attributes, before, strict=True):
            setattr(module, name, value)


@contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave the random states of Python, numpy, torch and its devices as they were; torch's where it is loaded."""
    import numpy as np  # here, as runs from the cache import this module, and do without

    python, legacy = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    states = [] if torch is None else _torch_states(torch)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)
        for set_state, state in states:
            set_state(state)


def _torch_states(torch: Any) -> list[tuple[Callable[[Tensor], object], Tensor]]:
    """Return the random state of each device of torch that has one by now, and the function that sets it."""
    states = [(torch.set_rng_state, torch.get_rng_state())]
    if torch.cuda.is_initialized():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            states.append((partial(torch.cuda.set_rng_state, device=index), state))
    if torch.backends.mps.is_available():
        states.append((torch.mps.set_rng_state, torch.mps.get_rng_state()))
    return states


@contextmanager
def left_as_it_was(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode, and leave it and all below it as they were.

    The mode is set without `module.eval()`, which a class may override to change weights. What a forward pass keeps in
    attributes and buffers, such as frequencies for longer texts, is undone.

    Raises CaptureError where weights were changed in place, which cannot be undone.
    """
    before = [_Part.of(name, part) for name, part in module.named_modules()]
    for saved in before:
        saved.part.training = False
    try:
        yield
    finally:
        changed = [name for saved in before for name in saved.restore()]
    if changed:
        raise CaptureError(
            f"{type(module).__name__} changes its weights when it runs ({', '.join(changed[:4])}), so that it is not "
            f"as it was. Load it again before it is used, and measure it by its path."
        )


@dataclass(frozen=True)
class _Part:
    """A module below the one measured, and what it held."""

    path: str
    part: nn.Module
    attributes: dict[str, Any]
    tables: dict[str, dict[str, Any]]
    """Parameters, buffers and modules."""
    versions: dict[str, int]
    """How often each tensor was changed in place."""
    copies: dict[str, Tensor]

    @classmethod
    def of(cls, path: str, part: nn.Module) -> _Part:
        tables = {name: dict(vars(part)[name]) for name in _TABLES}
        tensors = {
            name: tensor for name, tensor in (tables["_parameters"] | tables["_buffers"]).items() if tensor is not None
        }
        copies = {
            name: buffer.detach().clone()
            for name, buffer in tables["_buffers"].items()
            if buffer is not None and not buffer.is_meta and buffer.nbytes <= COPIED_BUFFER
        }
        versions = {name: _version(tensor) for name, tensor in tensors.items()}
        return cls(path, part, dict(vars(part)), tables, versions, copies)

    def restore(self) -> Iterator[str]:
        """Put everything back, and yield the names of tensors for which that cannot be done."""
        attributes = vars(self.part)
        for name in attributes.keys() - self.attributes.keys():
            del attributes[name]
        attributes.update(self.attributes)
        for name, table in self.tables.items():
            attributes[name].clear()
            attributes[name].update(table)
        held = self.tables["_parameters"] | self.tables["_buffers"]
        for name, version in self.versions.items():
            if _version(held[name]) == version:
                continue
            if name in self.copies:
                held[name].detach().copy_(self.copies[name])
            else:
                yield f"{self.path}.{name}".removeprefix(".")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
