"""Find the decoder blocks of a model by structure; there is no adapter class per architecture."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from delta_suite.errors import CaptureError

if TYPE_CHECKING:
    from torch import nn


GIVEN = {"input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "decoder_input_ids"}
"""What a stack can be given; see capture/forward.py."""


@dataclass(frozen=True)
class Encoder:
    """Of an encoder-decoder: what reads the document before the decoder does."""

    module: nn.Module
    start: int
    """Id of the token that the decoder reads first, in the place of the document's first."""


@dataclass(frozen=True)
class Decoder:
    """The stack that turns token ids into last_hidden_state, and its blocks in the order they run."""

    module: nn.Module
    blocks: tuple[nn.Module, ...]
    path: str
    """Path of the list of blocks inside the model."""
    config: Any = None
    """The config of this stack: of a multimodal model or an encoder-decoder, that of the text decoder."""
    encoder: Encoder | None = None
    """None for a decoder that stands alone."""
    left_out: Mapping[int, nn.Module] = field(default_factory=dict)
    """By place in the list: what is not among the blocks, as text alone does not reach it."""
    last_parts: tuple[nn.Module, ...] = ()
    """Where a block is not one module but several that run in turn: the last of each; `blocks` has the first."""

    @property
    def ends(self) -> tuple[nn.Module, ...]:
        """The modules that give back what each block gives back."""
        return self.last_parts or self.blocks

    @property
    def hidden(self) -> int | None:
        """Width of the residual stream, as the config says; None where it does not."""
        return getattr(self.config, "hidden_size", None)


def find_decoder(model: Any, layers_path: str | None = None) -> Decoder:
    """The decoder of a Hugging Face model and its blocks.

    The blocks are the ModuleList under `get_decoder()` with as many entries as that decoder's config has layers, of
    several such lists the shallowest; where none has that length, the only list of what transformers marks as layers.
    `layers_path` names the list instead where that is not unique.

    Raises CaptureError where no list, or more than one, fits, and where an encoder reads something other than text.
    """
    left_out: dict[int, nn.Module] = {}
    last_parts: tuple[nn.Module, ...] = ()
    if layers_path is None:
        layers_path, blocks, last_parts = _blocks(model)
        blocks, left_out = _reached_by_text(blocks)
    else:
        blocks = _named(model, layers_path)
    module = _reader(model, layers_path)
    config = _config(model, module)
    for layer, block in enumerate(blocks):
        if block in blocks[:layer]:
            raise CaptureError(
                f"blocks {blocks.index(block)} and {layer} of {type(model).__name__} ({layers_path}) are one and the "
                f"same module. Which of its runs is which layer cannot be told; this architecture is not supported."
            )
    encoder = _encoder(model, config) if getattr(model.config, "is_encoder_decoder", False) else None
    return Decoder(module, blocks, layers_path, config, encoder, left_out, last_parts)


def _blocks(model: Any) -> tuple[str, tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """Path of the list, its modules, and where lists side by side make up the blocks, the last of each block."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = _get_decoder(model)
    config = _config(model, decoder)
    # Some configs of encoder-decoders count the encoder under num_hidden_layers; they say decoder_layers, too (FSMT's
    # own says it right, and what get_text_config makes of it does not).
    says_layers = ((model.config, "decoder_layers"), (config, "decoder_layers"), (config, "num_hidden_layers"))
    said = (getattr(holder, name, None) for holder, name in says_layers)
    expected = next((count for count in said if count is not None), None)
    lists = _module_lists(decoder)
    fitting = [(name, own) for name, own in lists if len(own) == expected]
    if not fitting:
        # Longcat counts two layers per block. The mark is put on whole layers only, and on those of every model.
        fitting = [(name, own) for name, own in lists if all(isinstance(x, GradientCheckpointingLayer) for x in own)]
    else:
        # T5's blocks are lists themselves, and can have that length, too; a vision tower lies deeper than the text.
        depth = min(name.count(".") for name, _ in fitting)
        fitting = [(name, own) for name, own in fitting if name.count(".") == depth]
    if len(fitting) == 1 or _side_by_side(fitting):
        name, blocks = fitting[0]
        prefix = next((path for path, module in model.named_modules() if module is decoder), "")
        path = ".".join(part for part in (prefix, name) if part)
        return path, tuple(blocks), tuple(fitting[-1][1]) if len(fitting) > 1 else ()
    if expected is None:
        says = "its config does not say how many layers it has"
    else:
        says = f"its config says {expected} layers"
    which = "none is that list" if not fitting else f"{', '.join(name for name, _ in fitting)} fit equally"
    raise CaptureError(
        f"the decoder blocks of {type(model).__name__} cannot be told by structure: {says}, and of its module lists "
        f"{which} ({_described(model)}). Where one of them holds the whole decoder, name it in models.toml: "
        f'layers_path = "...".'
    )


def _side_by_side(lists: list[tuple[str, nn.ModuleList]]) -> bool:
    """Whether block L is the members L of all lists, one after the other, as in XLM: attentions, norms, feed-forwards.

    That is supposed of lists in one module, each of one kind of module, where the first kind is not the last: stacks of
    blocks are of one kind, or in modules of their own. Whether it is so the certificate's continuity shows.
    """
    kinds = [{type(member) for member in own} for _, own in lists]
    parents = {name.rpartition(".")[0] for name, _ in lists}
    return len(lists) > 1 and len(parents) == 1 and all(len(own) == 1 for own in kinds) and kinds[0] != kinds[-1]


def _get_decoder(model: Any) -> Any:
    """`get_decoder()`, and again of what it gives: once finds the language model of a multimodal one, then its decoder.

    Not always does it give a stack (for ModernBert's decoder it is the head); what holds no list is not one.
    """
    decoder = model
    while True:
        found = decoder.get_decoder() if hasattr(decoder, "get_decoder") else None
        if found is None or not _module_lists(found):
            found = getattr(decoder, "base_model", decoder)
        if found is decoder:
            return decoder
        decoder = found


def _reader(model: Any, layers_path: str) -> Any:
    """The innermost module around the blocks that reads token ids: the stack without the language-model head.

    One that demands what only the modules around it know, such as FSMT's decoder its masks, is passed over.
    """
    path = layers_path
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        parameters = inspect.signature(module.forward).parameters
        if "input_ids" in parameters and _demanded(parameters.values()) <= GIVEN:
            return module
    return model


def _reached_by_text(blocks: tuple[nn.Module, ...]) -> tuple[tuple[nn.Module, ...], dict[int, nn.Module]]:
    """The blocks without those that demand more arguments than the others do, and these by their place.

    Such are Mllama's blocks of attention to an image: on text alone it passes them over. The tap sees to it that they
    do not run; a layers_path takes every block.
    """
    demands = [len(_demanded(list(inspect.signature(block.forward).parameters.values())[1:])) for block in blocks]
    left_out = {place: block for place, block in enumerate(blocks) if demands[place] > min(demands)}
    return tuple(block for block in blocks if block not in left_out.values()), left_out


def _demanded(parameters: Iterable[inspect.Parameter]) -> set[str]:
    named = [own for own in parameters if own.kind in (own.POSITIONAL_OR_KEYWORD, own.KEYWORD_ONLY)]
    return {own.name for own in named if own.default is own.empty}


def _config(model: Any, module: Any) -> Any:
    return getattr(module, "config", model.config).get_text_config(decoder=True)


def _named(model: Any, layers_path: str) -> tuple[nn.Module, ...]:
    from torch.nn import ModuleDict, ModuleList, Sequential

    try:
        found = model.get_submodule(layers_path)
    except AttributeError:
        raise CaptureError(
            f"layers_path = {layers_path!r} names no module of {type(model).__name__}; "
            f"lists of modules it has: {_described(model)}. Correct layers_path in models.toml."
        ) from None
    # children() would leave out a block that is listed twice.
    blocks = tuple(module for module in found._modules.values() if module is not None)
    if not blocks or not isinstance(found, ModuleList | Sequential | ModuleDict):
        raise CaptureError(
            f"layers_path = {layers_path!r} names a module of {type(model).__name__} that is no list of decoder blocks "
            f"({type(found).__name__}); lists of modules it has: {_described(model)}. "
            f"Correct layers_path in models.toml."
        )
    return blocks


def _encoder(model: Any, config: Any) -> Encoder:
    encoder = model.get_encoder()
    reads = getattr(encoder, "main_input_name", "input_ids")
    if reads != "input_ids":
        raise CaptureError(
            f"the encoder of {type(model).__name__} reads {reads}, not text, and its decoder puts into words what the "
            f"encoder has read. delta-suite measures models on text."
        )
    holders = (getattr(model, "generation_config", None), model.config, config)
    for name in ("decoder_start_token_id", "bos_token_id"):  # the order in which transformers' generate() looks
        for holder in holders:
            if isinstance(start := getattr(holder, name, None), int):
                return Encoder(encoder, start)
    raise CaptureError(
        f"what the decoder of {type(model).__name__} reads first is unknown: its config has neither "
        f"decoder_start_token_id nor bos_token_id. Add decoder_start_token_id to the config.json of the model."
    )


def _module_lists(module: Any) -> list[tuple[str, nn.ModuleList]]:
    import torch

    return [(name, own) for name, own in module.named_modules() if isinstance(own, torch.nn.ModuleList) and len(own)]


def _described(model: Any) -> str:
    lists = [f"{name} ({len(own)})" for name, own in _module_lists(model)]
    return ", ".join(lists[:8]) + (", ..." if len(lists) > 8 else "") if lists else "none"
