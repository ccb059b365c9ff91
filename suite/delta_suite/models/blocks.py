"""Finding the decoder blocks of a model by structure; there is no adapter class per architecture."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from delta_suite.errors import CaptureError

if TYPE_CHECKING:
    from torch import nn


GIVEN = {"input_ids", "attention_mask", "encoder_hidden_states", "encoder_attention_mask", "decoder_input_ids"}
"""Arguments that the forward pass gives to a stack; see capture/forward.py."""


@dataclass(frozen=True)
class Encoder:
    """The encoder of an encoder-decoder, which reads the document before the decoder does."""

    module: nn.Module
    """The encoder itself."""
    start: int
    """Id of the token that the decoder reads first, in place of the document's first."""


@dataclass(frozen=True)
class Decoder:
    """The stack that turns token ids into last_hidden_state, and its blocks in the order they run."""

    module: nn.Module
    """The stack, without the language-model head."""
    blocks: tuple[nn.Module, ...]
    """The decoder blocks; of a block made of several modules, the first."""
    path: str
    """Path of the list of blocks inside the model."""
    config: Any = None
    """Config of this stack; for a multimodal model or an encoder-decoder, that of the text decoder."""
    encoder: Encoder | None = None
    """Encoder that the decoder attends to; None for a decoder that stands alone."""
    left_out: Mapping[int, nn.Module] = field(default_factory=dict)
    """Position in the list -> module that is no block here, as text alone does not reach it."""
    last_parts: tuple[nn.Module, ...] = ()
    """Last module of each block, if a block is made of several that run in turn; empty otherwise."""

    @property
    def ends(self) -> tuple[nn.Module, ...]:
        """The modules whose outputs are the outputs of the blocks."""
        return self.last_parts or self.blocks

    @property
    def hidden(self) -> int | None:
        """Width of the residual stream according to the config; None if it does not say."""
        return getattr(self.config, "hidden_size", None)


def state_given(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return the state that a block is given: its first argument, whatever its name."""
    return args[0] if args else kwargs.get("hidden_states", next(iter(kwargs.values()), None))


def state_of(output: Any) -> Any:
    """Return the state in what a module gives out, which some wrap in a tuple with other things."""
    return output[0] if isinstance(output, tuple | list) and output else output


def find_decoder(model: Any, layers_path: str | None = None) -> Decoder:
    """Return the decoder of a Hugging Face model, with its blocks.

    The blocks are the ModuleList under `get_decoder()` with as many entries as that decoder's config has layers, of
    several such lists the shallowest; if none has that length, the only list of what transformers marks as layers.

    layers_path: dotted path of the list of blocks, for models in which this rule finds none or several.

    Raises:
        CaptureError: no list fits or several do, a block is listed twice, or an encoder does not read text.
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
    encoder = _encoder(model, module, config) if getattr(model.config, "is_encoder_decoder", False) else None
    return Decoder(module, blocks, layers_path, config, encoder, left_out, last_parts)


def context_length(config: Any) -> int | None:
    """Return how many tokens a decoder reads with the same rotary frequencies; None if its config does not say.

    LongRoPE has two sets of frequencies, and takes the second for all tokens once a sequence is longer than the context
    of the first training, so that a token would depend on what comes behind it. A length of -1, which XLNet's config
    always says, is none.
    """
    rope = getattr(config, "rope_parameters", None)
    first = rope.get("original_max_position_embeddings") if isinstance(rope, dict) else None
    length: int | None = getattr(config, "max_position_embeddings", None)
    length = None if length == -1 else length
    if isinstance(first, int) and rope is not None and rope.get("rope_type") == "longrope":
        return min(first, length or first)
    return length


def _blocks(model: Any) -> tuple[str, tuple[nn.Module, ...], tuple[nn.Module, ...]]:
    """Return the path of the list of blocks, its modules, and the last module of each block if that is another one."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    decoder = _get_decoder(model)
    config = _config(model, decoder)
    # Some configs of encoder-decoders count the encoder under num_hidden_layers; these have decoder_layers, too. For
    # FSMT that is right in the model's config and wrong in what get_text_config returns, so the former comes first.
    places = ((model.config, "decoder_layers"), (config, "decoder_layers"), (config, "num_hidden_layers"))
    counts = (getattr(holder, name, None) for holder, name in places)
    expected = next((count for count in counts if count is not None), None)
    lists = _module_lists(decoder)
    fitting = [(name, modules) for name, modules in lists if len(modules) == expected]
    if not fitting:
        # Longcat counts two layers per block. Only whole layers are of this class, in every model of transformers.
        fitting = [item for item in lists if all(isinstance(module, GradientCheckpointingLayer) for module in item[1])]
    else:
        # T5's blocks are lists themselves, and can have that length, too; a vision tower lies deeper than the text.
        depth = min(name.count(".") for name, _ in fitting)
        fitting = [(name, modules) for name, modules in fitting if name.count(".") == depth]
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
    """Return True if block L is made of entry L of every list, one after the other, as in XLM.

    XLM has lists of attentions, norms and feed-forwards. Lists are assumed to be such if they are in one module, each
    of one class, and the first class is not the last: stacks of blocks are of one class, or in separate modules. The
    certificate's continuity shows whether the assumption holds.
    """
    kinds = [{type(member) for member in modules} for _, modules in lists]
    parents = {name.rpartition(".")[0] for name, _ in lists}
    return len(lists) > 1 and len(parents) == 1 and all(len(kind) == 1 for kind in kinds) and kinds[0] != kinds[-1]


def _get_decoder(model: Any) -> Any:
    """Return the innermost result of `get_decoder()`: for a multimodal model, the decoder of its language model.

    `get_decoder()` does not always return a stack (for ModernBert's decoder it returns the head): a module without
    lists is none.
    """
    decoder = model
    while True:
        inner = decoder.get_decoder() if hasattr(decoder, "get_decoder") else None
        if inner is None or not _module_lists(inner):
            inner = getattr(decoder, "base_model", decoder)
        if inner is decoder:
            return decoder
        decoder = inner


def _reader(model: Any, layers_path: str) -> Any:
    """Return the innermost module around the blocks that reads token ids: the stack without the language-model head.

    A module that requires arguments which only the modules around it know, as FSMT's decoder its masks, is passed over.
    """
    path = layers_path
    while path:
        path = path.rpartition(".")[0]
        module = model.get_submodule(path)
        parameters = inspect.signature(module.forward).parameters
        if "input_ids" in parameters and _required(parameters.values()) <= GIVEN:
            return module
    return model


def _reached_by_text(blocks: tuple[nn.Module, ...]) -> tuple[tuple[nn.Module, ...], dict[int, nn.Module]]:
    """Return the blocks that run on text alone, and the others by their position.

    The others require more arguments, such as Mllama's blocks of attention to an image, which it skips on text alone.
    The tap makes sure that they do not run; a layers_path takes every block.
    """
    counts = [len(_required(list(inspect.signature(block.forward).parameters.values())[1:])) for block in blocks]
    left_out = {position: block for position, block in enumerate(blocks) if counts[position] > min(counts)}
    return tuple(block for block in blocks if block not in left_out.values()), left_out


def _required(parameters: Iterable[inspect.Parameter]) -> set[str]:
    """Return the names of the parameters without a default."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {
        parameter.name for parameter in parameters if parameter.kind in kinds and parameter.default is parameter.empty
    }


def _config(model: Any, module: Any) -> Any:
    return getattr(module, "config", model.config).get_text_config(decoder=True)


def _named(model: Any, layers_path: str) -> tuple[nn.Module, ...]:
    from torch.nn import ModuleDict, ModuleList, Sequential

    try:
        container = model.get_submodule(layers_path)
    except AttributeError:
        raise CaptureError(
            f"layers_path = {layers_path!r} names no module of {type(model).__name__}; "
            f"lists of modules it has: {_described(model)}. Correct layers_path, in models.toml or where it is given."
        ) from None
    # children() would leave out a block that is listed twice.
    blocks = tuple(module for module in container._modules.values() if module is not None)
    if not blocks or not isinstance(container, ModuleList | Sequential | ModuleDict):
        raise CaptureError(
            f"layers_path = {layers_path!r} names a module of {type(model).__name__} that is no list of decoder blocks "
            f"({type(container).__name__}); lists of modules it has: {_described(model)}. "
            f"Correct layers_path, in models.toml or where it is given."
        )
    return blocks


def _encoder(model: Any, module: Any, config: Any) -> Encoder:
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
                _check_start(model, module, name, start)
                return Encoder(encoder, start)
    raise CaptureError(
        f"what the decoder of {type(model).__name__} reads first is unknown: its config has neither "
        f"decoder_start_token_id nor bos_token_id. Add decoder_start_token_id to the config.json of the model."
    )


def _check_start(model: Any, module: Any, name: str, start: int) -> None:
    """Refuse a token that the decoder reads first and has no embedding for: a GPU would end the process."""
    try:  # a decoder may have a vocabulary of its own
        count = module.get_input_embeddings().weight.shape[0]
    except (AttributeError, NotImplementedError):  # it does not tell its embedding
        return
    if not 0 <= start < count:
        raise CaptureError(
            f"the decoder of {type(model).__name__} reads {name} = {start} first, and the model embeds {count} ids. "
            f"Correct it in the model's generation_config.json or config.json."
        )


def _module_lists(module: Any) -> list[tuple[str, nn.ModuleList]]:
    import torch

    return [(name, child) for name, child in module.named_modules() if isinstance(child, torch.nn.ModuleList) and child]


def _described(model: Any) -> str:
    """Return the lists of modules of a model and their lengths, for a message."""
    lists = [f"{name} ({len(modules)})" for name, modules in _module_lists(model)]
    return ", ".join(lists[:8]) + (", ..." if len(lists) > 8 else "") if lists else "none"
