"""The config of a model: checked before anything is built from it, and rid of what a folder must not decide."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.errors import SuiteError, UnavailableError, brief
from delta_suite.models.config_errors import impossible, wrong_value
from delta_suite.models.files import ModelFiles, nested
from delta_suite.models.gguf_check import check_required, settle_gguf_config
from delta_suite.models.gguf_header import gguf_content
from delta_suite.models.spec import ModelSpec
from delta_suite.models.weights import stored_tensors
from delta_suite.paths import shorten
from delta_suite.reading import open_regular, read_json

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

LAYERS = re.compile(r"(\w*_)?(layers|n_layer|block_count|num_blocks)")
"""Keys that count layers."""

SIZES = re.compile(
    LAYERS.pattern + r"|(decoder_|encoder_|text_|moe_|num_|n_|attention\.)?((vocab|hidden|intermediate|embedding)_size"
    r"|head_dim|d_model|d_ff|d_kv|n_embd|n_inner|head|heads|attention_heads|key_value_heads|ffn_dim|(local_|routed_)?experts"
    r"|embedding_length|feed_forward_length|head_count|head_count_kv|key_length|expert_count)"
)
"""Keys of sizes and counts; each shows in the shape of a tensor."""

LENGTHS = re.compile(
    r"(\w*_)?(position_embeddings|n_positions|n_ctx|context_length|max_seq_len|seq_length|num_labels|num_buckets)"
)
"""Keys of lengths of which tables are made: sines, masks, names of labels."""

AT_LEAST_ONE = re.compile(
    r"(decoder_|encoder_)?(vocab_size|hidden_size|d_model|n_embd|intermediate_size|d_ff|n_head|n_layer"
    r"|head_dim|query_pre_attn_scalar|num_layers|num_hidden_layers|num_attention_heads|num_key_value_heads|num_heads|layers|attention_heads"
    r"|max_position_embeddings|n_positions)"
)
"""Keys that no decoder can have as 0, a negative number or a truth value."""

ROTARY = re.compile(
    r"(.*\.)?(((global|local)_)?rope_theta|rope_(local_)?base_freq|rotary_emb_base|rope_(scaling|parameters)\.(.*\.)?factor)"
)
"""Dotted keys of the numbers that rotary frequencies are made of."""

TABLES = re.compile(r"(.*\.)?(text_config|vision_config|audio_config|quantization_config|id2label|label2id)")
"""Dotted keys of tables."""

EPSILON = re.compile(r"(\w*_)?(eps|epsilon)")
"""Keys of what a norm adds to a variance."""

MARK = b"\xef\xbb\xbf"
"""The byte order mark of UTF-8, which some editors write at the start of a file."""

MOST_LAYERS = 4096
"""Most layers of a model without weights to compare with; the deepest decoders that were trained had 1,000."""

EXPERTS = re.compile(r"(\w*_)?experts")
"""Keys that count the experts of a layer."""

KINDS_OF_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""Keys of the experts that a token may go to."""

MOST_EXPERTS = 1 << 16
"""Most experts in all layers of a model without weights to compare with; Switch-C has 30,000. Each may be a module."""

MOST = 1 << 24
"""Largest size, count or length; contexts of ten million tokens and vocabularies of a million have been published."""

MOST_LABELS = 1 << 17
"""Most labels of a classifier; the config of any model makes a name for each of them."""

SLACK = 16
"""How many times the largest dimension of a stored tensor a size may be; packed weights are up to 16 times shorter."""

HALVES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "float": "float32", "half": "float16"}
"""Names that people write for a dtype -> torch's."""

ATTENTION = ("eager", "sdpa")
"""Attention that runs everywhere; a config that asks for another gets what transformers takes by itself."""


def read_config(spec: ModelSpec, files: ModelFiles) -> PreTrainedConfig:
    """Return the model's config, of a type that transformers knows, with values that can be.

    Attention kernels that the folder asks for, fused kernels and a padding token outside the vocabulary are set aside:
    the first two would decide what code runs, and no embedding of the padding token is looked up.

    Raises:
        UnavailableError: the config has an impossible value, or transformers does not know the model.
    """
    from transformers import AutoConfig

    where = files.directory / (files.gguf or "config.json")
    _check_marks(spec, files)
    if files.gguf is None:
        content = read_json(where)
        _check_model_type(spec, content)
        _check_dtypes(spec, where, content)
    else:
        content = gguf_content(where)[0]
        if isinstance(count := content.get("split.count"), int) and count > 1:
            raise UnavailableError(
                spec.name,
                f"{where} is part {content.get('split.no', 0) + 1} of {count} of a split GGUF file",
                "Join them: llama-gguf-split --merge FIRST_PART WHOLE.gguf, and pass that file.",
            )
        check_required(spec, where)
    _check_sizes(spec, files, where, content)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            files.directory,
            local_files_only=True,
            trust_remote_code=spec.trust_remote_code,
            **({"gguf_file": files.gguf} if files.gguf is not None else {}),
        )
        _settle(config)
        if files.gguf is not None:
            settle_gguf_config(files, config)
    except SuiteError:
        raise
    except Exception as error:  # transformers checks some of the values, and raises anything
        if (told := wrong_value(spec, where, content, error)) is not None:
            raise told from error
        raise UnavailableError(
            spec.name,
            f"{transformers_release()} cannot read the config of {where} ({brief(error)})",
            f"Check that the file is whole. {newer_transformers()}",
        ) from error
    return config


def _check_marks(spec: ModelSpec, files: ModelFiles) -> None:
    """Refuse JSON files that begin with a byte order mark, which transformers does not read."""
    for path in (path for path in files.others if path.suffix == ".json"):
        with open_regular(path) as file:
            if file.read(len(MARK)) == MARK:
                raise UnavailableError(
                    spec.name,
                    f"{path} begins with a byte order mark, which transformers does not read",
                    "Save it as UTF-8 without one.",
                )


def _check_model_type(spec: ModelSpec, config: dict[str, Any]) -> None:
    """Refuse a type of model that transformers does not know; its message for it has many lines."""
    from transformers import CONFIG_MAPPING

    kind = config.get("model_type")
    if isinstance(kind, str) and (kind in CONFIG_MAPPING or (spec.trust_remote_code and "auto_map" in config)):
        return
    described = f"the config of {spec.name} " + (f"says model_type {kind!r}" if kind else "has no model_type")
    if kind and not isinstance(kind, str):
        raise UnavailableError(spec.name, f"{described}, which is no text", 'Write one, such as "llama".')
    if "auto_map" in config:
        raise UnavailableError(
            spec.name,
            f"{described}, whose code is not in transformers but comes with the model",
            "Read that code, and if you trust it set trust_remote_code = true in an entry of models.toml.",
        )
    unknown = f"{described}, which {transformers_release()} does not know" if kind else described
    raise UnavailableError(spec.name, unknown, newer_transformers() if kind else "Save it with save_pretrained.")


def _check_dtypes(spec: ModelSpec, where: Path, content: dict[str, Any]) -> None:
    """Refuse a dtype that torch does not have, or that no decoder computes in."""
    import torch

    for key, value in nested(content):
        if key.rpartition(".")[2] not in ("dtype", "torch_dtype") or value is None or "quantization_config" in key:
            continue
        dtype = getattr(torch, value, None) if isinstance(value, str) else None
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point or dtype.itemsize == 1:
            meant = HALVES.get(value) if isinstance(value, str) else None
            raise UnavailableError(
                spec.name,
                f"{where} says {key} = {value!r}, which is no dtype to compute in",
                f'Write "{meant}".' if meant else 'Write "float32", "bfloat16" or "float16".',
            )


def _check_sizes(spec: ModelSpec, files: ModelFiles, where: Path, content: dict[str, Any]) -> None:
    """Refuse sizes and counts that cannot be those of the weights, before memory is asked for."""
    if files.gguf is not None:
        shapes = gguf_content(where)[1]
        blocks = len({match[1] for name in shapes if (match := re.search(r"blk\.(\d+)\.", name))})
    else:
        shapes = {name: tensor.shape for name, tensor in stored_tensors(files.weights).items()}
        blocks = len(shapes)  # their names differ from one architecture to the next, but a block has a tensor at least
    layers, size = MOST_LAYERS, MOST
    if shapes and not spec.random_weights:
        # A size is a dimension of a tensor.
        layers, size = blocks, min(MOST, SLACK * max(max(shape, default=1) for shape in shapes.values()))
    for key, value in nested(content):
        numbers = (member for member in _members(value) if member is not None)
        # A model without rotary positions may say 0; in one with them the stream is then not finite, and is refused.
        if ROTARY.fullmatch(key) and not all(_is_number(member) and member >= 0 for member in numbers):
            raise impossible(spec, where, key, value, "where a number above 0 belongs")
        if TABLES.fullmatch(key) and value is not None:
            raise impossible(spec, where, key, value, "where a table belongs")
        name = key.rpartition(".")[2]
        if isinstance(value, str) and (SIZES.fullmatch(name) or LENGTHS.fullmatch(name)):
            raise impossible(spec, where, key, value, "where a whole number belongs")
    _check_experts(spec, where, content)
    deepest = max((value for key, value in _numbers(content) if LAYERS.fullmatch(key.rpartition(".")[2])), default=1)
    for key, value in _numbers(content):
        name = key.rpartition(".")[2]
        if AT_LEAST_ONE.fullmatch(name) and (isinstance(value, bool) or value < 1):
            raise impossible(spec, where, key, value, "where a whole number above 0 belongs")
        if SIZES.fullmatch(name) and not LAYERS.fullmatch(name) and value < 0:
            raise impossible(spec, where, key, value, "and no size is negative")
        if EPSILON.fullmatch(name) and value < 0:
            raise impossible(spec, where, key, value, "and what a norm adds is not negative")
        if LAYERS.fullmatch(name) and value > layers:
            there = f"and the weights have no tensors for more than {layers}" if shapes else f"and {layers} is the most"
            raise impossible(spec, where, key, value, there)
        if spec.random_weights and EXPERTS.fullmatch(name) and value * deepest > MOST_EXPERTS:
            raise impossible(spec, where, key, value, f"in up to {deepest} layers, and {MOST_EXPERTS} are the most")
        most = MOST_LABELS if name == "num_labels" else MOST
        if (SIZES.fullmatch(name) and value > size) or (LENGTHS.fullmatch(name) and value > most):
            raise impossible(spec, where, key, value, "which is more than these weights can have")


def _check_experts(spec: ModelSpec, where: Path, content: dict[str, Any]) -> None:
    """Refuse a token that goes to no expert, or to more than there are."""
    values = {key: value for key, value in nested(content) if _is_number(value)}
    for key, chosen in values.items():
        if key.rpartition(".")[2] != "num_experts_per_tok":
            continue
        table = key.removesuffix("num_experts_per_tok")
        experts = next((count for kind in KINDS_OF_EXPERTS if (count := values.get(f"{table}{kind}", 0)) > 0), 0)
        if experts and not 1 <= chosen <= experts:
            raise impossible(spec, where, key, chosen, f"of {experts} experts")


def _numbers(content: dict[str, Any]) -> Iterator[tuple[str, int | float]]:
    """Yield the keys with numbers, and of keys with a list of numbers each."""
    for key, value in nested(content):
        for member in _members(value):
            if isinstance(member, int | float):
                yield key, member


def _members(value: Any) -> list[Any]:
    """Return the members of a list; any other value is its own."""
    return value if isinstance(value, list) else [value]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _settle(config: Any) -> None:
    """Set aside what the folder must not decide, in the config and the configs inside it."""
    parts = [config, *(part for name in config.sub_configs if (part := getattr(config, name, None)) is not None)]
    for part in parts:
        pad, vocabulary = getattr(part, "pad_token_id", None), getattr(part, "vocab_size", None)
        if isinstance(pad, int) and isinstance(vocabulary, int) and not -vocabulary <= pad < vocabulary:
            part.pad_token_id = None
    for part in parts:
        if getattr(part, "_attn_implementation", None) not in ATTENTION:
            part._attn_implementation = None
        if getattr(part, "_experts_implementation", None) is not None:
            part._experts_implementation = None
        if getattr(part, "fusion_config", None) is not None:
            part.fusion_config = None


AUTO_CLASSES = (
    ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING"),
    ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING"),
    ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING"),
    ("AutoModelForMultimodalLM", "MODEL_FOR_MULTIMODAL_LM_MAPPING"),  # sound and video, too; not in 5.0
)
"""Auto classes that build a model with a text decoder, and the mapping of configs each knows, in order of choice."""


def auto_class(config: PreTrainedConfig, spec: ModelSpec) -> Any:
    """Return the auto class that builds the model.

    Raises:
        UnavailableError: the model has no causal text decoder.
    """
    import transformers

    kind = f"the config of {spec.name} says model_type {config.model_type!r}"
    do = (
        "delta-suite measures causal language models: decoders, encoder-decoders, and the text decoders of multimodal "
        "models. Choose one of those."
    )
    architectures = config.architectures or []
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        raise UnavailableError(
            spec.name,
            f"the config of {spec.name} says architectures = {shorten(repr(architectures))}, which is no list of names",
            "Write the class that was trained, or remove the key.",
        )
    fitting: dict[str, tuple[str, ...]] = {}
    for name, mapping in AUTO_CLASSES:
        known = getattr(transformers, mapping, {})
        if type(config) in known:
            classes = known[type(config)]
            fitting[name] = tuple(kind.__name__ for kind in (classes if isinstance(classes, tuple) else (classes,)))
    named = [name for name, classes in fitting.items() if set(classes) & set(architectures)]
    if getattr(config, "is_encoder_decoder", False) and "AutoModelForSeq2SeqLM" in fitting and not named:
        named = ["AutoModelForSeq2SeqLM"]
    chosen = next(iter(named or fitting), None)
    if chosen is None:
        if spec.trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
            return transformers.AutoModelForCausalLM
        raise UnavailableError(spec.name, f"{kind}, which is not a causal language model", do)
    # BERT and its relatives can be built as decoders; a checkpoint trained with bidirectional attention must not be.
    bidirectional = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING and not (
        getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
    )
    if bidirectional and architectures and not named:
        raise UnavailableError(spec.name, f"{kind} and {architectures[0]}, an encoder", do)
    return getattr(transformers, chosen)


def quantisation_method(config: PreTrainedConfig, spec: ModelSpec) -> str | None:
    """Return the method by which the config says the weights are quantised, such as "gptq"; None if it names none.

    Raises:
        UnavailableError: transformers does not know the method. It would warn, and take the packed numbers for the
            weights themselves.
    """
    from transformers.quantizers.auto import AutoHfQuantizer

    quantisation: Any = getattr(config, "quantization_config", None)
    if quantisation is None:
        return None
    is_dict = isinstance(quantisation, dict)
    method = quantisation.get("quant_method") if is_dict else getattr(quantisation, "quant_method", None)
    named = str(getattr(method, "value", method) or "in a way that the config does not name")
    try:
        known = not is_dict or AutoHfQuantizer.supports_quant_method(quantisation)  # type: ignore[no-untyped-call]
    except ValueError:  # no method is named
        known = False
    if not known:
        raise UnavailableError(
            spec.name,
            f"its weights are quantised ({named}), in a way that {transformers_release()} does not know",
            f"Pass the unquantised model. {newer_transformers()}",
        )
    return named


def transformers_release() -> str:
    """Return the name and the version of transformers here."""
    import transformers

    return f"transformers {transformers.__version__}"


def newer_transformers() -> str:
    """Return the advice for a model that may be younger than the transformers here."""
    release = transformers_release().split()[1]
    return f"A newer transformers than {release} may know it: pip install --upgrade transformers."
