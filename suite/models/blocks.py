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
    config: Any = None
    """The config of this stack: of a multimodal model or an encoder-decoder, that of the text decoder."""

    @property
    def hidden(self) -> int | None:
        """Width of the residual stream, as the config says; None where it does not."""
        return getattr(self.config, "hidden_size", None)


def find_decoder(model: Any, layers_path: str | None = None) -> Decoder:
    """The decoder of a Hugging Face model and its blocks.

    The blocks are the ModuleList inside the innermost `get_decoder()` with as many entries as that decoder's config
    has layers, of several such lists the shallowest; where none has that length, the only list of what transformers
    marks as layers. `layers_path` names the list instead where that is not unique.

    Raises CaptureError where no list, or more than one at the same depth, fits.
    """
    decoder = _innermost_decoder(model)
    config = getattr(decoder, "config", model.config).get_text_config(decoder=True)
    # Composite configs of some encoder-decoders count the encoder under num_hidden_layers, and say decoder_layers too.
    expected = getattr(config, "decoder_layers", None) or getattr(config, "num_hidden_layers", None)
    if layers_path is None:
        name, blocks = _blocks(model, decoder, expected)
        prefix = next((path for path, module in model.named_modules() if module is decoder), "")
        layers_path = ".".join(part for part in (prefix, name) if part)
    else:
        blocks = _named(model, layers_path)
    for layer, block in enumerate(blocks):
        if block in blocks[:layer]:
            raise CaptureError(
                f"blocks {blocks.index(block)} and {layer} of {type(model).__name__} ({layers_path}) are one and the "
                f"same module. Which of its runs is which layer cannot be told; this architecture is not supported."
            )
    return Decoder(decoder, blocks, layers_path, config)


def _innermost_decoder(model: Any) -> Any:
    """`get_decoder()`, and again of what it gives, until that is the stack itself.

    Once is not enough: of a multimodal model it can give a whole language model, head included, whose output would be
    logits. Nor is it always a stack: for ModernBert's decoder it gives the head; then the base model is taken.
    """
    decoder = model
    while True:
        found = decoder.get_decoder() if hasattr(decoder, "get_decoder") else decoder.base_model
        inner = found if found is not None and _module_lists(found) else getattr(decoder, "base_model", decoder)
        if inner is decoder:
            return decoder
        decoder = inner


def _blocks(model: Any, decoder: nn.Module, expected: int | None) -> tuple[str, tuple[nn.Module, ...]]:
    from transformers.modeling_layers import GradientCheckpointingLayer

    lists = _module_lists(decoder)
    fitting = [(name, own) for name, own in lists if len(own) == expected]
    if not fitting:
        # Longcat counts two layers per block. The mark is put on whole layers only, and on those of every model.
        fitting = [(name, own) for name, own in lists if all(isinstance(x, GradientCheckpointingLayer) for x in own)]
    depth = min((name.count(".") for name, _ in fitting), default=0)
    shallowest = [(name, own) for name, own in fitting if name.count(".") == depth]
    if len(shallowest) == 1:
        return shallowest[0][0], tuple(shallowest[0][1])
    if expected is None:
        says = "its config does not say how many layers it has"
    else:
        says = f"its config says {expected} layers"
    which = "none is that list" if not fitting else f"{', '.join(name for name, _ in shallowest)} fit equally"
    raise CaptureError(
        f"the decoder blocks of {type(model).__name__} cannot be told by structure: {says}, and of its module lists "
        f"{which} ({_described(model)}). Where one of them holds the whole decoder, name it in models.toml: "
        f'layers_path = "...".'
    )


def _named(model: Any, layers_path: str) -> tuple[nn.Module, ...]:
    try:
        found = model.get_submodule(layers_path)
    except AttributeError:
        raise CaptureError(
            f"layers_path = {layers_path!r} names no module of {type(model).__name__}; "
            f"lists of modules it has: {_described(model)}. Correct layers_path in models.toml."
        ) from None
    # children() would leave out a block that is listed twice.
    return tuple(module for module in found._modules.values() if module is not None)


def _module_lists(module: Any) -> list[tuple[str, nn.ModuleList]]:
    import torch

    return [(name, own) for name, own in module.named_modules() if isinstance(own, torch.nn.ModuleList) and len(own)]


def _described(model: Any) -> str:
    lists = [f"{name} ({len(own)})" for name, own in _module_lists(model)]
    return ", ".join(lists[:8]) + (", ..." if len(lists) > 8 else "") if lists else "none"
