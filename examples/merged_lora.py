"""Measure a LoRA adapter on its base model and merged into it, and show what it changed in each layer.

    python examples/merged_lora.py BASE ADAPTER [--calibration texts.jsonl]
    python examples/merged_lora.py               # makes a tiny model and a random adapter first

All three models are measured in memory. BASE and ADAPTER are folders, or ids of the Hugging Face hub. It needs peft.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import delta_suite as ds
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_example(folder: Path) -> tuple[str, str]:
    """Save a Llama of six layers and an adapter for it, both with random weights, and return where they are."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    letters = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = decoders.ByteLevel()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config)
    base.save_pretrained(folder / "base")
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder / "base")
    # Layers 3 and 4 alone, and not the zeros with which a new adapter begins.
    lora = LoraConfig(r=4, target_modules=["down_proj"], layers_to_transform=[3, 4], init_lora_weights=False)
    get_peft_model(base, lora).save_pretrained(folder / "adapter")
    return str(folder / "base"), str(folder / "adapter")


def measure_all(base: str, adapter: str, calibration: str) -> dict[str, ds.Measurement]:
    """Return the measurements of the base model, of the base model with its adapter, and of both merged."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)

    def measured(module: torch.nn.Module, name: str) -> ds.Measurement:
        return ds.measure(module, tokenizer=tokenizer, calibration=calibration, parts="spectra", name=name)

    measurements = {"base": measured(model, "base")}
    adapted = PeftModel.from_pretrained(model, adapter)
    measurements["adapter"] = measured(adapted, "adapter")
    measurements["merged"] = measured(adapted.merge_and_unload(), "merged")
    return measurements


def main(words: Sequence[str] | None = None) -> None:
    """Print the effective rank of each layer of the three models."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", help="the base model")
    parser.add_argument("adapter", nargs="?", help="the adapter")
    parser.add_argument(
        "--calibration", default="seed", help="as in delta-suite; with 50 documents there are intervals"
    )
    given = parser.parse_args(words)
    if given.base and not given.adapter:
        parser.error("name the adapter, too")

    with tempfile.TemporaryDirectory() as folder:
        base, adapter = (given.base, given.adapter) if given.base else make_example(Path(folder))
        measurements = measure_all(base, adapter, given.calibration)
    ranks = {
        name: [row["effective_rank"] for row in measurement.layers("effective_rank")]
        for name, measurement in measurements.items()
    }
    print("effective rank\nlayer" + "".join(f"{name:>12}" for name in ranks))
    for layer, values in enumerate(zip(*ranks.values(), strict=True)):
        changed = "  changed" if abs(values[0] - values[2]) > 1e-3 * values[0] else ""
        print(f"{layer:5}" + "".join(f"{value:12.4f}" for value in values) + changed)
    apart = max(abs(a - b) / a for a, b in zip(ranks["adapter"], ranks["merged"], strict=True))
    print(f"adapter and merged differ by {apart:.1e} at most, relative: merging rounds")


if __name__ == "__main__":
    main()
