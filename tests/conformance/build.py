"""Every text decoder that transformers knows, built from a tiny random config.

The config of a type is its default one, shrunk by the names of its attributes; `OVERRIDES` holds the few facts about
configs that the names do not show. The package knows nothing of this file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

LAYERS = 4
HIDDEN = 64
HEADS = 4
VOCAB = 160
FIRST_SPECIAL = 130
"""Ids from here on are given to special tokens (image, end of sequence); documents are written in lower ids."""

NOISE = 0.05
"""Standard deviation of what is added to every parameter, so that no norm is the identity and no bias is zero."""


@dataclass(frozen=True)
class Architecture:
    """One entry of transformers' auto mappings."""

    model_type: str
    class_name: str
    mapping: str
    """The auto class that builds it."""


def architectures() -> list[Architecture]:
    """List causal models, encoder-decoders and multimodal models with a text decoder, each class once a type."""
    import transformers.models.auto.modeling_auto as auto

    mappings = {
        "AutoModelForCausalLM": auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForImageTextToText": auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    }
    by_name: dict[tuple[str, str], Architecture] = {}
    for mapping, names in mappings.items():
        for model_type, class_name in names.items():
            by_name.setdefault((model_type, class_name), Architecture(model_type, class_name, mapping))
    return sorted(by_name.values(), key=lambda entry: (list(mappings).index(entry.mapping), entry.model_type))


SIZES: tuple[tuple[str, int], ...] = (
    (r"index_n_heads", 16),  # with few heads, scores tie at zero, and which of the tied are taken depends on the length
    (r"index_topk", 8),
    (r"num_(hidden|decoder|encoder)_layers|n_layers?|num_layers|layers|(encoder|decoder)_layers|num_blocks", LAYERS),
    (r"(unpadded_|decoder_|src_|tgt_|mel_)?vocab_size(_per_layer_input)?", VOCAB),
    (r"(\w+_)?(num_key_value_heads|num_kv_heads|n_head_kv|num_query_groups|num_key_heads|kv_n_heads)", 2),
    (r"(\w+_)?(num_attention_heads|num_heads|attention_heads|n_heads?|num_value_heads)", HEADS),
    (r"qk_(rope|nope)_head_dim|rotary_dim", HIDDEN // HEADS // 2),
    (r"\w*(head_dim|head_size|d_kv|d_head|dim_head|headdim)", HIDDEN // HEADS),
    (r"\w*_rank|d_rel", 16),
    (r"(n_group|num_group|num_expert_group|n_groups|mamba_n_?groups)", 2),
    (r"topk_group", 1),
    (r"\w*(num_experts|routed_experts|local_experts|n_experts)", 4),
    (r"\w*(experts_per_tok(en)?|top_?k|topk|top_k_experts)|moe_k", 2),
    (r"(text_|out_|image_text_|attention_)?hidden_size|d_model|n_embd|(word_|\w+_)?embed(_proj)?_dim", HIDDEN),
    (r"dim|emb_dim|embedding_dim|hidden_dim|lru_width|(input|output)_embedding_size|projection_dim", HIDDEN),
    (r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|mlp_dim|n_inner|d_inner|dim_ff|ffn_size)", 96),
    (r"\w*(sliding_window|attention_window_size|local_attention|window_size)", 8),
    (r"depth", 2),
)
"""Attribute names of configs (whole, as a pattern) and what they become; the first that fits counts."""

FILLED = {"head_dim": HIDDEN // HEADS, "num_key_value_heads": 2}
"""Attributes that must have a value where the default config leaves them open."""

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MROPE = ROPE | {"mrope_section": [2, 3, 3]}
"""Rotary positions of images in three parts; they must add up to half of head_dim."""
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
    "hc_lowrank": 8,
    "ngram_vocab_size_base": 100,
    "split_ngram_parts": 1,
}
SSM = {"mamba_d_head": 32, "mamba_d_state": 16}

OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": SSM | {"attn_layer_indices": [1, 3]},
    "bloom": {"n_layer": LAYERS},
    "blt": {
        "encoder_hash_byte_group_vocab": 64,
        "patcher_config.num_key_value_heads": 4,
        "encoder_config.num_hidden_layers": 1,
    },
    "chameleon": {"vocabulary_map": {"<image>": 131}, "vq_config.base_channels": 32},
    "cohere_compass": {"text_config.rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE}},
    "cosmos3_edge": {"text_config.rope_parameters": MROPE},
    "dbrx": {"attn_config.rope_theta": 10000.0, "attn_config.clip_qkv": 8.0},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_ocr2": {
        "text_config.mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        "text_config.num_experts_per_tok": 2,
        "text_config.topk_group": 1,
        "text_config.n_group": 1,
    },
    "diffusion_gemma": {
        "text_config.num_experts": 4,
        "text_config.top_k_experts": 2,
        "text_config.moe_intermediate_size": 32,
    },
    "doge": {"keep_window_size": 2048},  # below it, which keys are kept hangs on rounding
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32},
    "dots3_note": {
        "vision_config.adapter_in_dim": HIDDEN,
        "vision_config.adapter_out_dim": HIDDEN,
        "audio_config.adapter_input_size": HIDDEN,
        "audio_config.adapter_out_dim": HIDDEN,
    },
    "emu3": {"vocabulary_map": {"<image>": 131, "<|extra_200|>": 132}, "vq_config.base_channels": 32},
    "ernie4_5_vl_moe": {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 2, 4]}},
    "encoder-decoder": {
        "decoder.is_decoder": True,
        "decoder.add_cross_attention": True,
        "decoder_start_token_id": 1,
    },
    "falcon_h1": SSM | {"mamba_d_ssm": 128},
    "florence2": {"vision_config.embed_dim": (32, 32, 32, 32), "vision_config.depths": (1, 1, 1, 1)},
    "gemma3n_text": {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2},
    "glm46v": {"text_config.rope_parameters": MROPE},
    "glm4v": {"text_config.rope_parameters": MROPE},
    "glm4v_moe": {"text_config.rope_parameters": ROPE | {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}},
    "glm5_next": {"text_config.index_kpool": 2},
    "glm_ocr": {"text_config.rope_parameters": MROPE},
    "glmga": {"text_config.rope_parameters": MROPE},
    "granite4_vision": {"deepstack_layer_map": [[-1, 0]], "downsample_rate": "1/2"},
    "granitemoehybrid": SSM,
    "hunyuan_vl": {"text_config.rope_parameters": MROPE},
    "idefics": {"cross_layer_interval": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longt5": {"decoder_start_token_id": 0},
    "longcat_flash": {"expert_ffn_hidden_size": 32, "zero_expert_num": 2},
    "mamba2": {"head_dim": 32, "state_size": 16},
    "mllama": {"text_config.cross_attention_layers": [1]},
    "molmo2": {"adapter_config.vision_feature_layer": [-1, -2]},
    "nemotron_h_omni": {"vision_config.video_temporal_patch_size": 2},
    "nemo_speechlm": {"audio_config.diarization_config.head_config.audio_hidden_size": HIDDEN},
    "paddleocr_vl": {"text_config.rope_parameters": MROPE},
    "qwen2_5_omni_thinker": {"text_config.rope_parameters": MROPE},
    "qwen2_5_vl": {"text_config.rope_parameters": MROPE},
    "qwen2_vl": {"text_config.rope_parameters": MROPE},
    "qwen4_exp": {f"text_config.{key}": value for key, value in INDEXER.items()},
    "qwen4_exp_text": INDEXER,
    "reformer": {
        "is_decoder": True,
        "attn_layers": ["local", "lsh"] * 2,
        "axial_pos_shape": (8, 8),
        "axial_pos_embds_dim": (HIDDEN // 2, HIDDEN // 2),
        "num_buckets": 2,
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
    },
    "rwkv": {"rescale_every": 2},
    "step3p7": {"text_config.sliding_window": 8},
    "switch_transformers": {"decoder_start_token_id": 0},
    "t5": {"decoder_start_token_id": 0},
    "udop": {"decoder_start_token_id": 0},
    "vibevoice_asr": {f"{kind}_tokenizer_encoder_config.num_filters": 2 for kind in ("acoustic", "semantic")},
    "xlm": {"causal": True},  # as for BERT and its kin: by default it is an encoder
    "xlnet": {"attn_type": "uni"},  # the same
    "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32, "mamba_dt_rank": 4},
    "zamba2": {"attention_hidden_size": 2 * HIDDEN, "attention_head_dim": 32, "mamba_headdim": 32, "n_mamba_heads": 4},
}
"""By model type: config values by dotted path that names alone do not give."""


def tiny_config(architecture: Architecture) -> Any:
    """Return the shrunk config of a type. Raises what transformers raises where there is none."""
    from transformers import CONFIG_MAPPING

    default = CONFIG_MAPPING[architecture.model_type]()
    overrides = dict(OVERRIDES.get(architecture.model_type, {}))
    if architecture.mapping == "AutoModelForCausalLM" and getattr(default, "is_decoder", None) is False:
        overrides["is_decoder"] = True  # BERT and its kin: else their attention goes both ways
    return _shrunk(default, overrides, iter(range(FIRST_SPECIAL, VOCAB)))


def _shrunk(config: Any, overrides: dict[str, Any], special: Iterator[int]) -> Any:
    from transformers import PreTrainedConfig

    values: dict[str, Any] = {}
    depths = {value for name, value in vars(config).items() if _size(name) == LAYERS and isinstance(value, int)}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            inner = {key.removeprefix(f"{name}."): new for key, new in overrides.items() if key.startswith(f"{name}.")}
            values[name] = _shrunk(value, inner, special)
        elif value is None and name in FILLED:
            values[name] = FILLED[name]
        elif name.startswith("_") or value is None or isinstance(value, (bool, str)):
            continue
        elif re.fullmatch(r"\w*_token_(id|index)", name) and isinstance(value, int):
            values[name] = next(special)
        elif isinstance(value, int):
            smaller = _size(name)
            if smaller is not None:
                values[name] = min(value, smaller)
        elif isinstance(value, (list, tuple)) and len(value) in depths and len(value) > LAYERS:
            values[name] = type(value)(_each_kind(value))
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = HEADS  # latent attention has no groups
        if config.head_dim == config.qk_rope_head_dim:
            values["head_dim"] = values["qk_rope_head_dim"]
    values |= {key: value for key, value in overrides.items() if "." not in key}
    return type(config)(**values)


def _size(name: str) -> int | None:
    return next((size for pattern, size in SIZES if re.fullmatch(pattern, name)), None)


def _each_kind(per_layer: Any) -> list[Any]:
    """Cut a per-layer list to LAYERS entries, with as many of its kinds as fit."""
    kinds = list(dict.fromkeys(str(value) for value in per_layer))[:LAYERS]
    firsts = [next(value for value in per_layer if str(value) == kind) for kind in kinds]
    return [firsts[layer * len(firsts) // LAYERS] for layer in range(LAYERS)]


def build(architecture: Architecture, **changes: Any) -> Any:
    """Return the model with random weights, in evaluation mode. Raises what transformers raises.

    `changes` apply to its config; weights of unchanged shape stay the same.
    """
    import transformers

    config = tiny_config(architecture)
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = getattr(transformers, architecture.mapping).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(NOISE * torch.randn_like(parameter))
    return model.eval()
