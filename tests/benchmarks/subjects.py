"""The models that are benchmarked: shapes with random weights, made on the device, and the embedded real model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from delta_suite.capture.calibration import load_calibration
from delta_suite.capture.tokens import TokenSequences, tokenize
from delta_suite.models.blocks import Decoder, find_decoder
from delta_suite.models.loading import release_weights

DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")

LARGE, SMALL, TINY, GPT2, GPT2_XL, EMBEDDED = "large", "small", "tiny", "gpt2", "gpt2-xl", "embedded"

NAMES = {
    LARGE: "Qwen3-32B shape, 64 x 5120",
    SMALL: "SmolLM2-135M shape, 30 x 576",
    TINY: "tiny Llama, 4 x 64",
    GPT2: "GPT-2 shape, 12 x 768",
    GPT2_XL: "GPT-2 XL shape, 48 x 1600",
}
"""Random weights."""

REHEARSAL = "tiny Qwen3, 4 x 64"
"""What `large` is without a GPU, so that the same code runs."""


@dataclass(frozen=True)
class Subject:
    """A model on its device, with what the floors need to know of it."""

    name: str
    model: Any
    decoder: Decoder
    device: torch.device
    seed: TokenSequences | None = None
    """The calibration `seed`, for the embedded model, which has a tokenizer."""
    core: TokenSequences | None = None
    """The calibration `core`, in the same way."""

    @property
    def rehearsal(self) -> bool:
        """Whether it stands in for the large model, so that its figures mean nothing by themselves."""
        return self.name == REHEARSAL

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def layers(self) -> int:
        return len(self.decoder.blocks)

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def parameters(self) -> int:
        """Of the blocks, each used once per token; embedding and head are not."""
        return sum(own.numel() for block in self.decoder.blocks for own in block.parameters())

    @property
    def stream_bytes(self) -> int:
        """Per token, h_0 to h_N."""
        return (self.layers + 1) * self.hidden * int(self.model.dtype.itemsize)

    def operations(self, tokens: int, length: int) -> float:
        """Of a forward pass of the blocks: two per parameter, and the lower half of the attention products."""
        heads = self.config.num_attention_heads
        head_dim = getattr(self.config, "head_dim", None) or self.hidden // heads
        return tokens * (2.0 * self.parameters + 2.0 * self.layers * length * heads * head_dim)

    def sequences(
        self, tokens: int, length: int = 2048, *, documents: bool = False, drop: bool = False
    ) -> TokenSequences:
        """Random ids: sequences of one length (the last may be shorter), as one document or one document each."""
        draw = torch.Generator().manual_seed(tokens)
        ids = torch.randint(0, self.config.vocab_size, (tokens,), generator=draw).split(min(length, tokens))
        numbers = range(len(ids))
        return TokenSequences(
            ids=tuple(ids),
            documents=tuple(numbers) if documents else (0,) * len(ids),
            starts_document=tuple(documents or number == 0 for number in numbers),
            drop_first_token=drop,
        )

    def free(self) -> None:
        """Give the weights' memory back, whoever still holds the model."""
        release_weights(self.model)


def build(which: str, device: torch.device = DEVICE) -> Subject:
    """Raises a SuiteError where the embedded model is not there."""
    if which == EMBEDDED:
        return _embedded(device)
    name = REHEARSAL if which == LARGE and device.type == "cpu" else NAMES[which]
    half = which == LARGE or (which == SMALL and device.type == "cuda")
    return _random(name, _config(which, device), device, torch.bfloat16 if half else torch.float32)


def shaped(
    device: torch.device = DEVICE, *, layers: int = 30, hidden: int = 576, dtype: torch.dtype = torch.float32
) -> Subject:
    """Return a Llama with the proportions of SmolLM2-135M, of another depth or width (a multiple of 256 or 192)."""
    config = _config(SMALL, device)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = layers, hidden, hidden * 8 // 3
    config.head_dim, config.num_attention_heads, config.vocab_size = 64, hidden // 64, 4096
    config.num_key_value_heads = hidden // (192 if hidden % 192 == 0 else 256)
    return _random(f"{layers} x {hidden}", config, device, dtype)


def _random(name: str, config: Any, device: torch.device, dtype: torch.dtype) -> Subject:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    return Subject(name, model, find_decoder(model), device)


def _config(which: str, device: torch.device) -> Any:
    from transformers import GPT2Config, LlamaConfig, Qwen3Config

    if which == LARGE and device.type == "cuda":
        return Qwen3Config(
            vocab_size=151936,
            hidden_size=5120,
            intermediate_size=25600,
            num_hidden_layers=64,
            num_attention_heads=64,
            num_key_value_heads=8,
            head_dim=128,
            max_position_embeddings=40960,
            tie_word_embeddings=False,
        )
    if which == SMALL:
        return LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        )
    if which == GPT2:
        return GPT2Config(n_positions=2048, architectures=["GPT2LMHeadModel"])
    if which == GPT2_XL:
        return GPT2Config(n_positions=2048, n_embd=1600, n_layer=48, n_head=25, architectures=["GPT2LMHeadModel"])
    shape = {
        "vocab_size": 1000,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    return Qwen3Config(head_dim=16, **shape) if which == LARGE else LlamaConfig(**shape)


def embedded_spec() -> Any:
    """The embedded model's entry, or the .gguf file that DELTA_BENCH_MODEL names."""
    from delta_suite.models.models_file import load_registry

    return load_registry().resolve(os.environ.get("DELTA_BENCH_MODEL", "smollm2-135m-q4"))


def _embedded(device: torch.device) -> Subject:
    from delta_suite.models.loading import load
    from delta_suite.models.sources import locate

    spec = embedded_spec()
    loaded = load(spec, locate(spec), device=str(device), dtype="float32")
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    context = loaded.model.config.max_position_embeddings
    seed, core = (tokenize(load_calibration(name), loaded.tokenizer, vocabulary, context) for name in ("seed", "core"))
    return Subject("smollm2-135m-q4", loaded.model, find_decoder(loaded.model), device, seed, core)
