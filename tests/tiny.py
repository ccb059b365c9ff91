"""A tiny decoder with random weights and a real tokenizer, saved as a user's checkpoint would be."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

DOCUMENTS = 50
"""Documents of `core` on which tests measure a tiny model: the fewest that verdicts are given for."""

QUICK: dict[str, Any] = {"documents": 8, "parts": frozenset({"spectra"}), "device": "cpu"}
"""Settings of a measurement that takes a second, or a third of one on four layers, for tests in which any will do."""


def make_tiny(directory: Path, *, layers: int = 12, hidden: int = 48, seed: int = 0, scale: float = 0.2) -> Path:
    """Save a Llama of random weights in a directory. A large `scale` makes updates differ clearly between layers."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    prompts = json.loads(resources.files("delta_suite.capture").joinpath("data/seed.json").read_text("utf-8"))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(prompts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>").save_pretrained(directory)

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=scale,
        bos_token_id=0,
        eos_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory
