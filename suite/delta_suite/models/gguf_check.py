"""Comparison of a GGUF file's header with the model that transformers built from it.

transformers reads the keys and tensors that its table lists, and drops the rest. Whatever changes the arithmetic is
applied here, or the file is refused by the name of the key or tensor. llama.cpp is what the keys are defined by:
https://github.com/ggml-org/llama.cpp/blob/master/src/llama-arch.cpp
"""

from __future__ import annotations

import importlib
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import UnavailableError
from delta_suite.models.files import ModelFiles
from delta_suite.models.gguf_header import gguf_content
from delta_suite.models.spec import ModelSpec
from delta_suite.models.undisturbed import replaced

if TYPE_CHECKING:
    import torch

WITHOUT_EFFECT = re.compile(
    r"context_length|vocab_size|tensor_data_layout|decoder_start_token_id|pooling_type|rope\.scaling\.finetuned"
    r"|final_logit_softcapping|logit_scale"  # the output head's
    r"|embedding_length|block_count|decoder_block_count|nextn_predict_layers|(expert_)?(shared_)?feed_forward_length"
    r"|ssm\.(conv_kernel|state_size|inner_size|time_step_rank)|shortconv\.l_cache"  # the shapes of tensors show them
    r"|rope\.dimension_sections"  # text has one position on all axes
)
"""Keys of an architecture that change nothing in the blocks, or that the shapes of the tensors repeat."""

ROTARY = re.compile(r"rope\.(dimension_count|freq_base(_swa)?|scale_linear|scaling\..+)")
"""Keys that `_rotary` applies."""

EQUALS = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_attention_heads"),
    "attention.key_length": ("global_head_dim", "head_dim", "d_kv"),
    "attention.value_length": ("global_head_dim", "head_dim", "d_kv"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps", "layer_norm_epsilon", "layer_norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attention.relative_buckets_count": ("relative_attention_num_buckets",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "full_attention_interval": ("full_attention_interval",),
    "ssm.group_count": ("linear_num_key_heads",),
    "use_parallel_residual": ("use_parallel_residual",),
}
"""Key -> attributes of the config, the first of which that has a value must equal the key's."""

REQUIRED = (("attention.head_count",), ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"))
"""Keys without which the loader would take a default of another model; one of each group."""

DEFAULT_BASE = 10000.0
"""Base of the rotary frequencies where a file names none, as llama.cpp has it."""

LARGEST_GEMMA = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the Gemma models whose attention is scaled by the width of a head's share, as llama.cpp tells them."""


@dataclass(frozen=True)
class GgufKeys:
    """The keys of a GGUF file that are about its architecture."""

    path: Path
    """The file."""
    architecture: str
    """The architecture it names, which is the prefix of the keys."""
    values: dict[str, Any]
    """Key without the prefix -> value."""
    tensors: dict[str, tuple[int, ...]]
    """Name -> shape."""

    @classmethod
    def of(cls, path: Path) -> GgufKeys:
        """Return the keys in the header of a complete file."""
        content, tensors = gguf_content(path)
        architecture = str(content.get("general.architecture"))
        start = f"{architecture}."
        values = {key.removeprefix(start): value for key, value in content.items() if key.startswith(start)}
        return cls(path, architecture, values, tensors)

    def refusal(self, spec: ModelSpec, what: str) -> UnavailableError:
        """Return the error for a file of which transformers builds another model."""
        return UnavailableError(
            spec.name,
            f"{self.path} {what}",
            "Another model than the file's would be measured. Pass the checkpoint that it was converted from.",
        )


def check_required(spec: ModelSpec, path: Path) -> None:
    """Refuse a GGUF file without the keys that have no default."""
    keys = GgufKeys.of(path)
    for group in REQUIRED:
        if keys.values and not set(group) & set(keys.values):
            raise keys.refusal(spec, f"has no key {keys.architecture}.{group[0]}")


def settle_gguf_config(files: ModelFiles, config: Any) -> None:
    """Give the config what transformers leaves out of it, and what no tensor shows."""
    assert files.gguf is not None
    keys = GgufKeys.of(files.directory / files.gguf)
    window = keys.values.get("attention.sliding_window")
    if config.model_type == "phi3" and isinstance(window, int):
        config.sliding_window = window
    if LARGEST_GEMMA.get(config.model_type) == getattr(config, "num_hidden_layers", None):
        config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads


def check_gguf(spec: ModelSpec, files: ModelFiles, model: Any, read: set[str], unread: Iterable[str]) -> None:
    """Refuse a file that says more than the model built from it, after applying its rotary frequencies to the model.

    read: names of tensors that `names_read` collected.
    unread: names of tensors that went nowhere, as far as transformers' loader tells them.

    Raises:
        UnavailableError: a key or a tensor changes the arithmetic, and transformers does not read it.
    """
    assert files.gguf is not None
    keys = GgufKeys.of(files.directory / files.gguf)
    if not spec.random_weights:
        _check_tensors(spec, keys, read, unread)
    config = model.config.get_text_config()
    for key, value in keys.values.items():
        if WITHOUT_EFFECT.fullmatch(key) or ROTARY.fullmatch(key):
            continue
        if key == "attention.sliding_window" and isinstance(value, int) and value >= _context(keys):
            continue
        if key not in EQUALS:
            raise keys.refusal(spec, f"has the key {keys.architecture}.{key} = {value}, which transformers drops")
        built = _built(config, EQUALS[key])
        if not _equal(value, built):
            raise keys.refusal(
                spec,
                f"says {keys.architecture}.{key} = {value}, and transformers makes {EQUALS[key][0]} = {built}",
            )
    _apply_rotary(spec, keys, model)


def _context(keys: GgufKeys) -> int:
    length = keys.values.get("context_length")
    return length if isinstance(length, int) and length > 0 else 1 << 62


def _built(config: Any, names: tuple[str, ...]) -> Any:
    """Return the value that the config has for the first of the names that it gives a value."""
    built = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if built is None and "head_dim" in names:
        return config.hidden_size // config.num_attention_heads
    return built


def _equal(value: Any, built: Any) -> bool:
    """Return True if the header and the config say the same; a list of both zeros and a number says the number."""
    if isinstance(value, list):
        return bool(value) and all(_equal(member, built) for member in set(value) - {0})
    if isinstance(built, int | float) and isinstance(value, int | float):
        return math.isclose(value, built, rel_tol=1e-5)  # the file has float32
    return bool(value == built) or (value in (0, False) and built is None)


@contextmanager
def names_read() -> Iterator[set[str]]:
    """Yield a set that receives the names of the tensors that transformers reads from GGUF files while it loads.

    It stays empty for architectures of the newer loader, which reads every tensor and reports what went nowhere.
    """
    from transformers import modeling_gguf_pytorch_utils as loader

    names: set[str] = set()
    read = loader.get_gguf_hf_weights_map

    def record(*arguments: Any, **options: Any) -> Any:
        mapping = read(*arguments, **options)
        names.update(mapping)
        return mapping

    loader.get_gguf_hf_weights_map = record
    try:
        yield names
    finally:
        loader.get_gguf_hf_weights_map = read


@contextmanager
def gguf_read_once(files: ModelFiles) -> Iterator[None]:
    """Let transformers parse a GGUF file once, and not for each of config, tokenizer and weights, and do so fast.

    Parsing a vocabulary takes seconds; so does the table of tensor names, which it would make for each module.
    """
    try:
        gguf: Any = None if files.gguf is None else importlib.import_module("gguf")
    except ImportError:  # transformers says that it is needed
        gguf = None
    if gguf is None:
        yield
        return
    loader: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")
    faster = [
        (gguf, "GGUFReader", lru_cache(_plain_reader(gguf.GGUFReader))),
        (gguf, "get_tensor_name_map", lru_cache(gguf.get_tensor_name_map)),
        (loader, "_gguf_parse_value", partial(_parsed, loader._gguf_parse_value)),
    ]
    with replaced(faster):
        yield


def _plain_reader(reader: Any) -> Any:
    """Return a GGUFReader whose array is a plain one: each of a vocabulary's million slices of a memmap runs Python."""
    import numpy as np  # here, as collection and runs from the cache import this module, and do without

    class PlainReader(reader):  # type: ignore[misc]
        @property
        def data(self) -> Any:
            return self._data

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._data = mapped.view(np.ndarray)

    return PlainReader


_TEXT, _TEXTS = [8], [9, 8]
"""Types of a string, and of an item of an array of strings, in a GGUF file."""


def _parsed(parse: Any, value: Any, kinds: Any) -> Any:
    """Return a value of a GGUF file as `parse` of transformers does, which copies strings number by number."""
    return value.tobytes().decode() if kinds in (_TEXT, _TEXTS) else parse(value, kinds)


def _check_tensors(spec: ModelSpec, keys: GgufKeys, read: set[str], unread: Iterable[str]) -> None:
    """Refuse tensors that the loader has no place for."""
    # Frequencies are applied, and the head is behind the stream.
    names = {name for name in keys.tensors if name != "rope_freqs.weight" and not name.startswith("output.")}
    if read:
        dropped = {name for name in names if not {name, name.removesuffix(".weight")} & read}
    else:
        dropped = {name for name in unread if name != "rope_freqs.weight" and not name.startswith(("lm_head.", "mtp."))}
    if dropped:
        raise keys.refusal(
            spec, f"has {len(dropped)} tensors that the model built by transformers lacks, such as {min(dropped)}"
        )


def _frequencies(model: Any) -> Iterator[tuple[str, Any, torch.Tensor]]:
    """Yield the name of each buffer of rotary frequencies, its module, and the buffer."""
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name.endswith("inv_freq"):
                yield f"{path}.{name}", module, buffer


def _apply_rotary(spec: ModelSpec, keys: GgufKeys, model: Any) -> None:
    """Set the model's rotary frequencies to those of the file: base, linear scaling, and the factors of Llama 3."""
    import torch

    values, config = keys.values, model.config.get_text_config()
    kind = values.get("rope.scaling.type", "none")
    scale = _number(spec, keys, "rope.scale_linear", _number(spec, keys, "rope.scaling.factor", 1.0))
    if kind not in ("none", "linear"):
        raise keys.refusal(spec, f"says {keys.architecture}.rope.scaling.type = {kind!r}, which transformers drops")
    if values.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise keys.refusal(spec, f"has the key {keys.architecture}.rope.scaling.attn_factor, which transformers drops")
    factors = _tensor(keys.path, "rope_freqs.weight") if "rope_freqs.weight" in keys.tensors else None
    buffers = list(_frequencies(model))
    if not buffers and (scale != 1.0 or factors is not None):
        name = "rope_freqs.weight" if factors is not None else f"{keys.architecture}.rope.scaling.factor"
        raise keys.refusal(spec, f"has {name}, and the model that transformers builds has no rotary frequencies")
    for name, module, buffer in buffers:
        sliding = "sliding" in name or "local" in name
        width = int(_number(spec, keys, "rope.dimension_count", _built(config, EQUALS["attention.key_length"])))
        base = _number(spec, keys, "rope.freq_base_swa" if sliding else "rope.freq_base", DEFAULT_BASE)
        if width != 2 * buffer.numel():
            raise keys.refusal(
                spec,
                f"says {keys.architecture}.rope.dimension_count = {width}, of which transformers makes "
                f"{2 * buffer.numel()}",
            )
        exponents = torch.arange(0, width, 2, dtype=torch.int64, device=buffer.device).float() / width
        expected = 1.0 / base**exponents
        if not sliding:
            expected = expected / scale
            if factors is not None:
                expected = expected / factors.to(buffer.device)
        if torch.allclose(buffer.float(), expected, rtol=1e-5, atol=1e-12):
            continue
        if _rope_type(module, name) != "default":
            raise keys.refusal(spec, f"has other rotary frequencies than {name} of the model that transformers builds")
        buffer.copy_(expected)


def _number(spec: ModelSpec, keys: GgufKeys, key: str, default: float) -> float:
    """Return the value of a key as a number above zero; the default where the file has no such key."""
    value = keys.values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise keys.refusal(spec, f"says {keys.architecture}.{key} = {value!r}, where a number above 0 belongs")
    return value


def _rope_type(module: Any, name: str) -> Any:
    """Return the kind of rotary embedding a buffer belongs to; a module may have one for each kind of layer."""
    kind = getattr(module, "rope_type", "default")
    if not isinstance(kind, dict):
        return kind
    return kind.get(name.rpartition(".")[2].removesuffix("_inv_freq").removesuffix("_original"))


def _tensor(path: Path, name: str) -> torch.Tensor:
    """Return an unquantised tensor of a GGUF file."""
    import torch
    from gguf import GGUFReader, dequantize

    (tensor,) = (tensor for tensor in GGUFReader(path).tensors if tensor.name == name)
    return torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).float().flatten()
