"""Find the decoder blocks of a model by structure; there is no adapter class per architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from suite.errors import CaptureError

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Decoder:
    """The stack that turns token ids into last_hidden_state, and its blocks in the order they run."""

    module: nn.Module
    blocks: tuple[nn.Module, ...]
    path: str
    """Path of the list of blocks inside the model."""


def find_decoder(model: Any, layers_path: str | None = None) -> Decoder:
    """The decoder of a Hugging Face model and its blocks.

    The blocks are the ModuleList under `model.get_decoder()` with as many entries as the text config has layers;
    of several such lists the shallowest. `layers_path` names the list instead where that is not unique.

    Raises CaptureError where no list, or more than one at the same depth, fits.
    """
    import torch

    decoder = _decoder(model)
    config = model.config.get_text_config(decoder=True)
    if layers_path is not None:
        try:
            found = model.get_submodule(layers_path)
        except AttributeError:
            raise CaptureError(
                f"layers_path = {layers_path!r} names no module of {type(model).__name__}; "
                f"lists of modules it has: {_lists(model)}. Correct layers_path in models.toml."
            ) from None
        return Decoder(decoder, tuple(found.children()), layers_path)

    expected = getattr(config, "num_hidden_layers", None)
    fitting = [
        (name, module)
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == expected
    ]
    depth = min((name.count(".") for name, _ in fitting), default=0)
    shallowest = [(name, module) for name, module in fitting if name.count(".") == depth]
    if len(shallowest) != 1:
        which = "none has" if not fitting else f"{len(shallowest)} have"
        raise CaptureError(
            f"the decoder blocks of {type(model).__name__} cannot be told by structure: its config says "
            f"{expected} layers, and of its module lists {which} that length ({_lists(model)}). "
            f'Name the list in models.toml: layers_path = "...".'
        )
    name, blocks = shallowest[0]
    prefix = next((path for path, module in model.named_modules() if module is decoder), "")
    path = ".".join(part for part in (prefix, name) if part)
    return Decoder(decoder, tuple(blocks), path)


def _decoder(model: Any) -> Any:
    """`get_decoder()` where the class has one that finds something below it, else the base model."""
    found = model.get_decoder() if hasattr(model, "get_decoder") else None
    return model.base_model if found is None else found


def _lists(model: Any) -> str:
    import torch

    lists = [
        f"{name} ({len(module)})" for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)
    ]
    return ", ".join(lists[:8]) + (", ..." if len(lists) > 8 else "") if lists else "none"
