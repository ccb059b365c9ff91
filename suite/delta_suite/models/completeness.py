"""Comparison of a checkpoint with the model built from it: nothing is missing, and nothing that matters is unread.

transformers fills a missing tensor with random numbers, and drops one it has no place for; of both it tells in a
warning at most. A measurement would then be that of another model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from delta_suite.errors import CaptureError, UnavailableError
from delta_suite.models.blocks import find_decoder
from delta_suite.models.files import ModelFiles
from delta_suite.models.spec import ModelSpec
from delta_suite.models.weights import StoredTensor, differing_copies, stored_tensors

if TYPE_CHECKING:
    import torch

ADAPTER = re.compile(r"(^|\.)lora_|\.base_layer\.|\.modules_to_save\.|^base_model\.model\.")
"""Names of tensors that peft adds to a model."""

WRAPPER = re.compile(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Parts of names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing add."""

DERIVED = re.compile(
    r"inv_freq$|(cos|sin)_cached$|position_ids$|token_type_ids$|relative_position_index$|causal_mask$|_extra_state$"
    r"|(^|\.)version$|_float_tensor$|embed_positions(\.weights)?$"
    r"|\.EncDecAttention\.relative_attention_bias\.weight$"  # in T5's checkpoints; no release has read it
)
"""Names of buffers that older releases saved and that follow from the config, so that nobody needs to read them."""

MASK = re.compile(r"(^|\.)(cross)?(attn|attention)(\.attention)?\.(masked_)?bias$")
"""Names of the causal masks in checkpoints of GPT-2, GPT-J, GPT-Neo and GPT-NeoX; a mask is no vector, a bias is."""

PACKING = re.compile(
    r"(scale|scale_inv|scales|zero_points?|zeros|g_idx|weight_shape|weight_format|SCB|absmax|quant_map"
    r"|quant_state\.\w+|perm|scale_2|act_order)$"
)
"""Names of what quantised weights carry beside them; the quantiser knows which of them it needs."""

WHOLE = ("I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL")
"""Dtypes in which quantised weights are packed, as safetensors names them."""

PACKED = (".qweight", ".weight_packed")
"""Ends of the names of packed weights that stand in place of a weight: of gptq and awq, and of compressed-tensors."""

BESIDE_TEXT = re.compile(r"(^|[._])(mtp|nextn|vision|visual|image|img|audio|video|speech|talker|projector)", re.I)
"""Names of parts that text does not go through."""

STREAM = re.compile(r"emb|wte|wpe|pos(?!t)|norm|(^|_)ln(_|$)", re.I)
"""Names beside the blocks that stand for something the stream goes through: an embedding or a norm."""


@contextmanager
def unread_names() -> Iterator[set[str]]:
    """Yield a set that receives the names of the tensors that transformers finds no place for while it loads.

    Its own report leaves out those that a class of models asks it to ignore, by patterns as wide as "attn.bias".
    """
    from transformers import PreTrainedModel

    names: set[str] = set()
    adjust = PreTrainedModel._adjust_missing_and_unexpected_keys

    def record(model: Any, *reports: Any) -> Any:
        names.update(
            getattr(reports[-1], "unexpected_keys", reports[-1])
        )  # transformers 5.0 passes the names themselves
        return adjust(model, *reports)

    PreTrainedModel._adjust_missing_and_unexpected_keys = record  # type: ignore[method-assign, assignment]
    try:
        yield names
    finally:
        PreTrainedModel._adjust_missing_and_unexpected_keys = adjust  # type: ignore[method-assign]


def check_complete(
    spec: ModelSpec, files: ModelFiles, model: Any, report: Mapping[str, Any], unread: Iterable[str]
) -> None:
    """Refuse a model with random numbers in place of weights, or weights of which a part went unread.

    The output head alone may be missing: a checkpoint of the bare decoder has none, and the residual stream ends before
    it. What a head shares with the embedding may not.

    report: what transformers says of missing tensors and of those of another shape.
    unread: the names of tensors in the files that went nowhere, as `unread_names` collects them.
    """
    unread = sorted(unread)
    known = set(model.state_dict())
    missing = sorted(name for name in report.get("missing_keys", ()) if not _in_head(name, model))
    mismatched = sorted(_shapes(key) for key in report.get("mismatched_keys", ()))
    where = files.directory / (files.gguf or "")
    if adapter := [name for name in unread if ADAPTER.search(name)]:
        raise UnavailableError(
            spec.name,
            f"{where} has {len(adapter)} tensors of an adapter that is not merged, such as {adapter[0]}",
            "Merge it into its base model (merge_and_unload of peft) and pass what that saves.",
        )
    if missing and (prefix := _prefix(unread, known)):
        raise UnavailableError(
            spec.name,
            f"the tensors in {where} have the prefix `{prefix}` in their names, which a wrapper around the model adds, "
            f"such as {unread[0]}",
            "Save the model without it: accelerator.unwrap_model(model).save_pretrained(DIRECTORY), or that of "
            f"model.{prefix.removesuffix('.')}.",
        )
    if missing and (packed := [name for name in unread if name.endswith(PACKED)]):
        raise UnavailableError(
            spec.name,
            f"{where} has {len(packed)} packed weights, such as {packed[0]}, and config.json has no "
            "quantization_config that says how to unpack them",
            "Add the one that they were packed by, or pass the unquantised model.",
        )
    if wrong := missing or mismatched:
        raise UnavailableError(
            spec.name,
            f"{where} lacks {len(wrong)} of the tensors that {type(model).__name__} is made of"
            f"{'' if missing else ' (or has them in another shape)'}, such as {wrong[0]}",
            "They would be random numbers. Check that the weights belong to the config and were saved completely.",
        )
    if files.gguf is None:
        _check_unread(spec, files, model, unread)


def _in_head(name: str, model: Any) -> bool:
    """Return True if a tensor belongs to the output head alone; the embedding's name for a shared tensor does not."""
    head = model.get_output_embeddings()
    if head is None or head is _embedding(model):
        return False
    paths = [path for path, module in model.named_modules(remove_duplicate=False) if module is head]
    return any(name.startswith(f"{path}.") for path in paths)


def _embedding(model: Any) -> Any:
    """Return the module that embeds the tokens; None for a model that does not tell it."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def _shapes(key: Any) -> str:
    """Return a tensor of another shape for a message: its name, and both shapes if transformers reports them."""
    if not isinstance(key, tuple):
        return str(key)
    name, *shapes = key
    return f"{name}: {' there, '.join(str(tuple(shape)) for shape in shapes)} by the config" if shapes else str(name)


def _prefix(unread: list[str], known: set[str]) -> str | None:
    """Return the part that a wrapper added to the names of the tensors; None if none did."""
    for name in unread:
        if (added := WRAPPER.search(name)) and WRAPPER.sub(r"\1", name) in known:
            return f"{added[2]}."
    return None


def _check_unread(spec: ModelSpec, files: ModelFiles, model: Any, unread: list[str]) -> None:
    """Refuse tensors without a place in the model that belong to what text goes through."""
    try:
        stack = _TextStack(model, spec)
    except CaptureError:  # the capture refuses this model, and says why
        return
    stored = stored_tensors(files.weights)
    quantised = getattr(model.config, "quantization_config", None) is not None
    _check_stored(spec, files, model, stored, quantised=quantised)
    layers: list[str] = []
    matters: list[str] = []
    for name in unread:
        kind = stack.kind(name)
        if kind == "layer":
            layers.append(name)
        elif kind == "inside" and not _harmless(name, model, stored, quantised=quantised):
            matters.append(name)
    if layers := stack.regular(layers):
        raise UnavailableError(
            spec.name,
            f"{files.directory} has {len(layers)} tensors of layers that its config leaves out, such as {layers[0]}",
            "A part of the model would be measured as if it were all. Correct the number of layers in config.json.",
        )
    if matters:
        raise UnavailableError(
            spec.name,
            f"{files.directory} has {len(matters)} tensors that {type(model).__name__} has no place for as config.json "
            f"describes it, such as {matters[0]}",
            "Without them another model would be measured. Correct config.json (model_type, attention_bias, mlp_bias, "
            "quantization_config and the like), or save the model anew.",
        )


def _check_stored(
    spec: ModelSpec, files: ModelFiles, model: Any, stored: Mapping[str, StoredTensor], *, quantised: bool
) -> None:
    """Refuse two tensors for one place, and packed weights without a config that says how to unpack them."""
    base = f"{model.base_model_prefix}."
    if twice := [name for name in stored if name.startswith(base) and name.removeprefix(base) in stored]:
        raise UnavailableError(
            spec.name,
            f"{files.directory} has two tensors for one place: {twice[0]} and {twice[0].removeprefix(base)}",
            "Which one is meant cannot be told. Save the model again.",
        )
    if copies := differing_copies(files.weights):
        first, second = copies
        raise UnavailableError(
            spec.name,
            f"{files.directory} has two tensors {first.name}, which differ: in {first.path.name} and "
            f"{second.path.name}",
            "Which one is meant cannot be told. Copy or save the model again.",
        )
    state = {} if quantised else model.state_dict()
    whole = [name for name, tensor in stored.items() if tensor.dtype in WHOLE and name in state]
    if packed := [name for name in whole if state[name].is_floating_point()]:
        raise UnavailableError(
            spec.name,
            f"{files.directory} has {len(packed)} weights as {stored[packed[0]].dtype}, such as {packed[0]}, and "
            "config.json has no quantization_config that says how to unpack them",
            "Add it, or pass the unquantised model.",
        )


class _TextStack:
    """The modules that text goes through: decoder, encoder and embedding, by their paths in the model."""

    def __init__(self, model: Any, spec: ModelSpec) -> None:
        """Find the modules. Raises CaptureError where the blocks cannot be told."""
        decoder = find_decoder(model, spec.layers_path)
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._base = f"{model.base_model_prefix}."
        stacks = [decoder.module, *([decoder.encoder.module] if decoder.encoder is not None else [])]
        parts = [*stacks, _embedding(model)]
        self._roots = [path for path, module in self._modules.items() if any(module is part for part in parts)]
        lists = [path for path, module in self._modules.items() if any(module is stack for stack in stacks)]
        self._holders = {path[:end] for path in [*lists, decoder.path] for end in _ends(path)}
        self._head = model.get_output_embeddings()

    def kind(self, name: str) -> str:
        """Return "inside" for a name in what text goes through, "layer" for one in a layer too many, else "outside"."""
        # A name that fits nowhere is told as the file has it, with or without the prefix of the base model.
        kinds = {self._kind(other) for other in (name, self._base + name, name.removeprefix(self._base))}
        return next((kind for kind in ("inside", "layer") if kind in kinds), "outside")

    def _kind(self, name: str) -> str:
        path, rest = self._nearest(name)
        module = self._modules[path]
        in_text = any(not root or path == root or path.startswith(f"{root}.") for root in self._roots)
        if module is self._head:
            return "outside"
        if in_text and rest[0].isdigit() and type(module).__name__ == "ModuleList":
            return "layer"
        if path in self._holders:
            beside = BESIDE_TEXT.search(".".join(rest))
            return "inside" if in_text and STREAM.search(rest[0]) and not beside else "outside"
        return "inside" if in_text else "outside"

    def _nearest(self, name: str) -> tuple[str, list[str]]:
        """Return the path of the innermost module around a tensor, and what of the name is behind it."""
        parts = name.split(".")
        for end in range(len(parts) - 1, -1, -1):
            if (path := ".".join(parts[:end])) in self._modules:
                return path, parts[end:]
        raise AssertionError("the model itself has the path ''")

    def regular(self, names: list[str]) -> list[str]:
        """Return those names of layers too many that are made as the others are.

        A layer that predicts later tokens (MTP, as DeepSeek and GLM have it behind the last one) also has tensors that
        no other layer has.
        """
        layers: dict[str, list[str]] = {}
        for name in names:
            *_, path = (other for other in (name, self._base + name) if self._kind(other) == "layer")
            around, rest = self._nearest(path)
            layers.setdefault(f"{around}.{rest[0]}", []).append(".".join(rest[1:]))
        regular: list[str] = []
        for layer, inner in layers.items():
            around = layer.rpartition(".")[0]
            others = {_any_number(name) for name in self._modules[around].state_dict()}
            if all(f"*.{_any_number(name)}" in others for name in inner):
                regular += [f"{layer}.{name}" for name in inner]
        return sorted(regular)


def _ends(path: str) -> list[int]:
    """Return where the parts of a dotted path end, the empty path included."""
    return [0, *(match.start() for match in re.finditer(r"\.", path)), len(path)]


def _any_number(name: str) -> str:
    """Return the name of a tensor with a star in place of each number."""
    return re.sub(r"\b\d+\b", "*", name)


def _harmless(name: str, model: Any, stored: Mapping[str, StoredTensor], *, quantised: bool) -> bool:
    """Return True if an unread tensor changes nothing: it follows from the config, or adds zero."""
    # transformers adds or drops the prefix of the base model.
    alike = (key for key in stored if name == key or name.endswith(f".{key}") or key.endswith(f".{name}"))
    tensor = next((stored[key] for key in alike), None)
    if name.endswith("inv_freq") and tensor is not None:
        return _same_frequencies(tensor.read(), model)
    if DERIVED.search(name):
        return True
    if MASK.search(name):
        return tensor is None or len(tensor.shape) != 1 or tensor.shape == (1,)
    if quantised and PACKING.search(name):
        return True
    if name.endswith("bias") and tensor is not None:  # AutoGPTQ writes zeros where the model has no bias
        return not bool(tensor.read().any())
    ignored = [pattern for pattern in model._keys_to_ignore_on_load_unexpected or () if not pattern.endswith("bias")]
    return any(re.search(pattern, name) for pattern in ignored)


def _same_frequencies(stored: torch.Tensor, model: Any) -> bool:
    """Return True if rotary frequencies in the file are, as far as their precision shows, those that the model has."""
    import torch

    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default":  # older releases scaled the positions, not these
        return True
    buffers = [buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    stored = stored.float().flatten()
    alike = [buffer.float().cpu().flatten() for buffer in buffers if buffer.numel() == stored.numel()]
    # float16 rounds the smallest frequencies to multiples of 6e-8, bfloat16 all of them to 0.4%.
    return not alike or any(torch.allclose(stored, buffer, rtol=0.02, atol=1e-7) for buffer in alike)
