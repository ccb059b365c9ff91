"""A small Llama trained for real on the CPU, saved as a training team would save it; and ways to damage it.

`python -m tests.training FOLDER` trains the run whose records are in results/: make trajectory.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

LAYERS = 6
HIDDEN = 64
HEADS = 4
CONTEXT = 64
BATCH = 8
VOCABULARY = 512
TRAINED_ON = 900
"""Passages; the rest is for measuring."""

PUBLISHED_STEPS = (0, 50, 100, 200, 400, 800)
"""The checkpoints of the run in results/; at step 0 nothing is learnt yet, as in a control."""


def passages(characters: int = 200) -> list[str]:
    """English text that every Python brings along: its language reference, in passages of about one length."""
    text = " ".join(" ".join(topics[name].split()) for name in sorted(topics))
    words, out, line = text.split(" "), [], ""
    for word in words:
        line += word + " "
        if len(line) >= characters:
            out.append(line.strip())
            line = ""
    random.Random(0).shuffle(out)
    return out


def write_documents(path: Path, documents: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), "utf-8")
    return path


def train(
    folder: Path, *, steps: Sequence[int], texts: Sequence[str], seed: int = 0, layers: int = LAYERS
) -> list[Path]:
    """Train, and save `checkpoint-<step>` after so many steps, with the loss of the next batch in loss.json."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    own = Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, bos_token="<s>", eos_token="<s>")
    ids = torch.cat([torch.tensor(tokenizer(text)["input_ids"]) for text in texts])
    ids = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)

    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=HIDDEN,
            intermediate_size=2 * HIDDEN,
            num_hidden_layers=layers,
            num_attention_heads=HEADS,
            num_key_value_heads=HEADS,
            max_position_embeddings=512,
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    saved = []
    for step in range(max(steps) + 1):
        batch = ids[torch.randint(len(ids), (BATCH,))]
        loss = model(input_ids=batch, labels=batch).loss
        if step in steps:
            saved.append(folder / f"checkpoint-{step}")
            model.save_pretrained(saved[-1])
            tokenizer.save_pretrained(saved[-1])
            (saved[-1] / "loss.json").write_text(json.dumps({"step": step, "loss": loss.item()}))
        for group in optimiser.param_groups:
            group["lr"] = 3e-3 * min(1.0, (step + 1) / 20)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
    return saved


def damaged(checkpoint: Path, to: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint, to)
    weights = load_file(to / "model.safetensors")
    change(weights)
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return to


def scale_output_projection(layer: int, factor: float = 3.0) -> Callable[[dict[str, Any]], None]:
    """What a block's MLP adds to the stream, times a factor."""

    def change(weights: dict[str, Any]) -> None:
        weights[f"model.layers.{layer}.mlp.down_proj.weight"] *= factor

    return change


def zero_head(layer: int, head: int = 1) -> Callable[[dict[str, Any]], None]:
    """One attention head adds nothing any more."""

    def change(weights: dict[str, Any]) -> None:
        size = HIDDEN // HEADS
        weights[f"model.layers.{layer}.self_attn.o_proj.weight"][:, head * size : (head + 1) * size] = 0

    return change


if __name__ == "__main__":
    for checkpoint in train(Path(sys.argv[1]), steps=PUBLISHED_STEPS, texts=passages()[:TRAINED_ON]):
        print(f"{checkpoint}: loss {json.loads((checkpoint / 'loss.json').read_text())['loss']:.2f}")
