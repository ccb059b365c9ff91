"""Tiny models as a user's folder would hold them, and their figures computed without the product."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

torch.set_num_threads(1)

WORDS = [
    "river",
    "stone",
    "market",
    "letter",
    "window",
    "garden",
    "winter",
    "engine",
    "copper",
    "signal",
    "harbour",
    "field",
    "morning",
    "paper",
    "bridge",
    "colour",
    "answer",
    "number",
    "forest",
    "kitchen",
    "valley",
    "answer",
    "machine",
    "station",
    "teacher",
    "island",
    "question",
    "mountain",
    "silver",
    "pocket",
    "the",
    "a",
    "of",
    "and",
    "under",
    "over",
    "behind",
    "before",
    "after",
    "slowly",
    "never",
    "often",
    "always",
    "she",
    "he",
    "they",
    "we",
    "it",
    "was",
    "were",
    "has",
    "had",
    "will",
]


def prose(seed: int, words: int) -> str:
    """Text without meaning, the same each time."""
    draw = random.Random(seed)
    lines, left = [], words
    while left > 0:
        length = min(left, draw.randint(5, 14))
        lines.append(" ".join(draw.choice(WORDS) for _ in range(length)).capitalize() + ".")
        left -= length
    return " ".join(lines)


def write_texts(folder: Path) -> None:
    """text.txt, one document; docs.jsonl, twelve of them."""
    (folder / "text.txt").write_text(prose(1, 230))
    rows = [json.dumps({"text": prose(seed, 28)}) for seed in range(2, 14)]
    (folder / "docs.jsonl").write_text("\n".join(rows) + "\n")


# --- tokenizers -------------------------------------------------------------------------------------------------------


def byte_tokenizer(folder: Path, klass: str = "PreTrainedTokenizerFast", **settings: object) -> None:
    """One token for each byte: <|end|> is 0, <s> 1, <pad> 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocab = {word: index for index, word in enumerate(["<|end|>", "<s>", "<pad>"])}
    for letter in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[letter] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<s>", "<pad>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": klass, "eos_token": "<|end|>", "model_max_length": 1_000_000, **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def ids_of(folder: Path, text: str, gguf: str | None = None) -> list[int]:
    from transformers import AutoTokenizer

    named = {"gguf_file": gguf} if gguf else {}
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, **named)(text)["input_ids"][:2048]


# --- models -----------------------------------------------------------------------------------------------------------


def scrambled(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight, norm and bias random, so that nothing is what an initialisation would give."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=draw)
            if weight.ndim == 1:
                weight.copy_((1.0 if "norm" in name or "ln" in name else 0.0) + 0.2 * noise)
            else:
                weight.copy_(noise / weight.shape[-1] ** 0.5)
    return model.eval()


SMALL: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}


def llama(folder: Path, seed: int = 0, **config: Any) -> torch.nn.Module:
    """A Llama of 4 layers x 32 with random weights, saved in the folder with a byte tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    model = scrambled(LlamaForCausalLM(LlamaConfig(**{**SMALL, **config})), seed)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return model


def save(folder: Path, model: torch.nn.Module) -> torch.nn.Module:
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    byte_tokenizer(folder)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def put(folder: Path, weights: Mapping[str, torch.Tensor], name: str = "model.safetensors") -> None:
    from safetensors.torch import save_file

    save_file({key: value.contiguous().clone() for key, value in weights.items()}, folder / name, {"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; ... takes a key away."""
    content = json.loads(path.read_text("utf-8"))
    for key, value in changes.items():
        if value is ...:
            content.pop(key, None)
        else:
            content[key] = value
    path.write_text(json.dumps(content))


# --- the right figures ------------------------------------------------------------------------------------------------


def states(run: Callable[[], object], blocks: Sequence[torch.nn.Module]) -> np.ndarray:
    """h_0 .. h_N of one document, (N + 1, tokens, hidden), by hooks of our own."""
    seen: dict[int, torch.Tensor] = {}

    def into(index: int) -> Callable:
        def hook(_: object, args: tuple, kwargs: dict) -> None:
            seen[index] = (args[0] if args else kwargs["hidden_states"]).detach().clone()

        return hook

    def out(_: object, __: object, output: object) -> None:
        seen[len(blocks)] = (output[0] if isinstance(output, tuple) else output).detach().clone()

    hooks = [block.register_forward_pre_hook(into(index), with_kwargs=True) for index, block in enumerate(blocks)]
    hooks.append(blocks[-1].register_forward_hook(out))
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return np.stack([seen[index][0].double().numpy() for index in range(len(blocks) + 1)])


def spectra(stream: np.ndarray) -> dict[str, list[float]]:
    figures: dict[str, list[float]] = {"effective_rank": [], "gamma": []}
    for update in np.diff(stream, axis=0):
        sigma = np.linalg.svd(update, compute_uv=False)
        share = sigma**2 / (sigma**2).sum()
        share = share[share > 1e-12]
        figures["effective_rank"].append(float(np.exp(-(share * np.log(share)).sum())))
        figures["gamma"].append(float(sigma[0]))
    return figures


def figures_of(model: torch.nn.Module, ids: Sequence[int], blocks: Sequence | None = None) -> dict[str, list[float]]:
    """effective_rank and gamma of each layer's updates over one document."""
    layers = list(blocks) if blocks is not None else list(model.model.layers)
    return spectra(states(lambda: model(input_ids=torch.tensor([list(ids)])), layers))


def right(model: torch.nn.Module, folder: Path, shared: Path, gguf: str | None = None) -> dict[str, list[float]]:
    return figures_of(model, ids_of(folder, (shared / "text.txt").read_text(), gguf))


# --- GGUF -------------------------------------------------------------------------------------------------------------


def _as_converted(weight: torch.Tensor, heads: int) -> np.ndarray:
    """q and k as llama.cpp's converter lays them out."""
    array = weight.detach().float().numpy()
    parts = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
    return np.ascontiguousarray(parts.swapaxes(1, 2).reshape(array.shape))


def write_gguf(
    path: Path,
    model: torch.nn.Module,
    *,
    keys: Mapping[str, tuple[str, object]] | None = None,
    extra: Mapping[str, np.ndarray] | None = None,
    left_out: Callable[[str], bool] = lambda name: False,
) -> None:
    """A Llama as a GGUF file of float32. keys: name -> (the writer's method, value)."""
    import gguf
    from tokenizers import pre_tokenizers

    path.parent.mkdir(parents=True, exist_ok=True)
    config, writer = model.config, gguf.GGUFWriter(str(path), "llama")
    head = config.hidden_size // config.num_attention_heads
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(config.rope_parameters["rope_theta"]))
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    words = ["<|end|>", "<s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "he", "th"]
    words += [f"<unused{index}>" for index in range(config.vocab_size - len(words))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(words)
    writer.add_token_types([3, 3, 3] + [1] * (len(words) - 3))
    writer.add_token_merges(["h e", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    for key, (method, value) in (keys or {}).items():
        getattr(writer, method)(key, value)
    weights, made = model.state_dict(), {}
    made["token_embd.weight"] = weights["model.embed_tokens.weight"]
    made["output_norm.weight"] = weights["model.norm.weight"]
    if not config.tie_word_embeddings:
        made["output.weight"] = weights["lm_head.weight"]
    names = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for index in range(config.num_hidden_layers):
        for ours, theirs in names.items():
            for part in ("weight", "bias"):
                weight = weights.get(f"model.layers.{index}.{theirs}.{part}")
                if weight is not None:
                    made[f"blk.{index}.{ours}.{part}"] = _as_converted(weight, heads[ours]) if ours in heads else weight
    for name, weight in made.items():
        if not left_out(name):
            writer.add_tensor(name, weight if isinstance(weight, np.ndarray) else weight.detach().float().numpy())
    for name, weight in (extra or {}).items():
        writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def bare_llama(seed: int = 0, **config: Any) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return scrambled(LlamaForCausalLM(LlamaConfig(**{**SMALL, **config})), seed)
