"""Train a small Llama on text that every Python brings along, and watch the structure of its depth while it learns.

    pip install delta-suite
    python examples/training_loop.py --steps 1000 --every 500
    python examples/training_loop.py --steps 1000 --every 500 --baseline runs/small.json

The last one writes the baseline at its first measurement, and compares every later one with it, also those of later
runs. It takes some ten minutes on two CPU cores; `--layers 6 --steps 100 --every 50` takes one.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pydoc_data.topics import topics

import delta_suite as ds
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments

VOCABULARY = 512
CONTEXT = 128
SHOWN = ("delta/C/effective_rank", "delta/C/intra_cosine", "delta/flips", "delta/training_steps")


def language_reference() -> list[str]:
    """Return the chapters of Python's language reference, which is real text of some 700,000 characters."""
    return [" ".join(topics[name].split()) for name in sorted(topics)]


def trained_tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def sequences(texts: Sequence[str], tokenizer: PreTrainedTokenizerFast) -> list[dict[str, torch.Tensor]]:
    """Return the texts as sequences of CONTEXT tokens, with themselves as labels."""
    ids = torch.tensor([token for text in texts for token in tokenizer(text)["input_ids"]])
    rows = ids[: len(ids) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)
    return [{"input_ids": row, "labels": row} for row in rows]


def new_model(layers: int, hidden: int) -> LlamaForCausalLM:
    """Return a Llama that has learnt nothing yet."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        attention_dropout=0.1,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def main(arguments: Sequence[str] | None = None) -> Trainer:
    """Train, print what was measured, and return the Trainer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=500, help="steps from one measurement to the next")
    parser.add_argument("--documents", type=int, default=56, help="documents of the calibration that are measured")
    parser.add_argument("--hypotheses", default=None, help="file or folder; by default the bundled claims")
    parser.add_argument("--baseline", default=None, help="baseline file; written where it does not exist")
    parser.add_argument("--output", default="runs/small")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    texts = language_reference()
    tokenizer = trained_tokenizer(texts)
    callback = ds.DeltaCallback(
        every=options.every,
        documents=options.documents,
        hypotheses=options.hypotheses,
        baseline=options.baseline,
        baseline_update=options.baseline is not None,
    )
    trainer = Trainer(
        model=new_model(options.layers, options.hidden),
        args=TrainingArguments(
            output_dir=options.output,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            learning_rate=2e-3,
            warmup_steps=20,
            logging_steps=max(1, options.steps // 20),
            save_strategy="no",
            report_to="none",  # or "tensorboard", "wandb", "trackio", "mlflow": the numbers go there, too
            use_cpu=not torch.cuda.is_available(),
        ),
        train_dataset=sequences(texts, tokenizer),
        processing_class=tokenizer,
        callbacks=[callback],
    )
    trainer.train()
    for entry in trainer.state.log_history:
        if "delta/flips" in entry:
            numbers = ", ".join(f"{name} {entry[name]:.3g}" for name in SHOWN if name in entry)
            print(f"step {entry['step']}: {numbers}")
    return trainer


if __name__ == "__main__":
    main()
