"""Checkpoints that say less or more than the model built from them: refused by name, or accepted with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models.test_loading import SMALL, configure, encoder_decoder, loaded, problem, replaced

Tensors = dict[str, torch.Tensor]


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """Save what `change` makes of the tensors of a directory."""
    path = directory / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(path)).items()}, path, {"format": "pt"})
    return directory


def without(directory: Path, word: str) -> Path:
    return rewrite(directory, lambda tensors: {name: tensor for name, tensor in tensors.items() if word not in name})


def with_more(directory: Path, **tensors: torch.Tensor) -> Path:
    """Add tensors; in their names, two underscores stand for a dot."""
    return rewrite(directory, lambda old: old | {name.replace("__", "."): value for name, value in tensors.items()})


def gpt2(directory: Path, **config: Any) -> Path:
    return replaced(directory, "GPT2LMHeadModel", n_embd=48, n_layer=3, n_head=4, n_positions=256, **config)


class TestMissing:
    def test_the_embedding_of_a_tied_llama(self, llama: Path) -> None:
        replaced(llama, "LlamaForCausalLM", tie_word_embeddings=True, **SMALL)
        assert "such as model.embed_tokens.weight" in problem(without(llama, "embed_tokens"))

    def test_the_embedding_of_gpt2(self, llama: Path) -> None:
        assert "such as transformer.wte.weight" in problem(without(gpt2(llama), "wte"))

    def test_the_embedding_of_t5(self, llama: Path) -> None:
        message = problem(without(encoder_decoder(llama, "T5ForConditionalGeneration"), "shared"))
        assert "shared.weight" in message or "embed_tokens.weight" in message

    def test_a_head_under_its_name_stands_for_the_tied_embedding(self, llama: Path) -> None:
        replaced(llama, "LlamaForCausalLM", tie_word_embeddings=True, **SMALL)
        weight = load_file(llama / "model.safetensors")["model.embed_tokens.weight"]
        rewrite(llama, lambda old: {n: t for n, t in old.items() if "embed" not in n} | {"lm_head.weight": weight})
        assert torch.equal(loaded(llama).model.get_input_embeddings().weight, weight)

    @pytest.mark.parametrize("name", ["qweight", "weight_packed"])
    def test_packed_weights_that_no_config_tells_of(self, llama: Path, name: str) -> None:
        """As of gptq, awq and compressed-tensors, with a config from elsewhere."""
        words = torch.zeros(4, 4, dtype=torch.int32)
        message = problem(
            rewrite(
                llama,
                lambda old: {
                    f"{tensor.removesuffix('weight')}{name}" if tensor.endswith("proj.weight") else tensor: (
                        words.clone() if tensor.endswith("proj.weight") else value
                    )
                    for tensor, value in old.items()
                },
            )
        )
        assert f"packed weights, such as model.layers.0.mlp.down_proj.{name}" in message
        assert "no quantization_config that says how to unpack them" in message

    @pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "_fsdp_wrapped_module."])
    def test_the_prefix_of_a_wrapper(self, llama: Path, prefix: str) -> None:
        message = problem(rewrite(llama, lambda old: {prefix + name: tensor for name, tensor in old.items()}))
        assert f"have the prefix `{prefix}` in their names" in message
        assert "unwrap_model" in message

    def test_the_prefix_of_a_compiled_block(self, llama: Path) -> None:
        old = load_file(llama / "model.safetensors")
        named = {name.replace("layers.1.", "layers.1._orig_mod."): tensor for name, tensor in old.items()}
        assert "have the prefix `_orig_mod.`" in problem(rewrite(llama, lambda _: named))


class TestUnread:
    @pytest.mark.parametrize(
        "name",
        [
            "model.layers.1.self_attn.q_proj.bias",
            "model.layers.2.mlp.up_proj.bias",
            "model.layers.0.self_attn.q_norm.weight",
            "model.layers.3.mlp.down_proj.weight_scale",
            "model.layers.0.post_feedforward_layernorm.weight",
            "model.norm.bias",
            "model.embed_tokens.weight_scale",
            "model.embed_positions.weight",
            "model.word_embeddings_layernorm.weight",
            "layers.1.self_attn.k_norm.weight",
        ],
    )
    def test_a_tensor_that_text_would_go_through(self, llama: Path, name: str) -> None:
        message = problem(with_more(llama, **{name.replace(".", "__"): torch.rand(48) + 1}))
        assert (
            f"1 tensors that LlamaForCausalLM has no place for as config.json describes it, such as {name}" in message
        )

    def test_biases_that_the_config_denies(self, llama: Path) -> None:
        replaced(llama, "LlamaForCausalLM", attention_bias=True, **SMALL)
        rewrite(llama, lambda old: {n: torch.rand_like(t) if n.endswith("bias") else t for n, t in old.items()})
        configure(llama, attention_bias=False)
        assert "self_attn.k_proj.bias" in problem(llama)

    def test_norms_of_another_type_of_model(self, llama: Path) -> None:
        replaced(llama, "Qwen3ForCausalLM", head_dim=12, num_key_value_heads=4, **SMALL)
        configure(llama, model_type="llama", architectures=["LlamaForCausalLM"])
        assert "self_attn.k_norm.weight" in problem(llama)

    def test_float8_without_a_quantisation_config(self, llama: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        small = load_file(llama / "model.safetensors")[name].to(torch.float8_e4m3fn)
        rewrite(llama, lambda old: old | {name: small, f"{name}_scale": torch.tensor([0.02])})
        assert "up_proj.weight_scale" in problem(llama)

    def test_packed_weights_without_a_quantisation_config(self, llama: Path) -> None:
        name = "model.layers.0.mlp.up_proj.weight"
        rewrite(llama, lambda old: old | {name: (old[name] * 100).to(torch.int8)})
        assert f"has 1 weights as I8, such as {name}" in problem(llama)

    def test_two_tensors_for_one_place(self, llama: Path) -> None:
        name = "layers.0.mlp.up_proj.weight"
        rewrite(llama, lambda old: old | {name: old[f"model.{name}"] + 1})
        assert f"two tensors for one place: model.{name} and {name}" in problem(llama)

    @pytest.mark.parametrize("differs", [True, False])
    def test_a_tensor_in_two_files(self, llama: Path, differs: bool) -> None:
        name, norm = "model.layers.0.mlp.up_proj.weight", "model.norm.weight"
        tensors = load_file(llama / "model.safetensors")
        (llama / "model.safetensors").rename(llama / "a.safetensors")
        save_file({name: tensors[name] + differs, norm: tensors[norm]}, llama / "b.safetensors", {"format": "pt"})
        places = {other: "b.safetensors" if other == norm else "a.safetensors" for other in tensors}
        index = {"metadata": {}, "weight_map": places}
        (llama / "model.safetensors.index.json").write_text(json.dumps(index))
        if differs:
            assert f"two tensors {name}, which differ: in a.safetensors and b.safetensors" in problem(llama)
        else:
            loaded(llama)

    def test_an_adapter_in_the_weights(self, llama: Path) -> None:
        message = problem(with_more(llama, model__layers__0__self_attn__q_proj__lora_A__weight=torch.rand(4, 48)))
        assert "1 tensors of an adapter that is not merged, such as model.layers.0.self_attn.q_proj.lora_A" in message
        assert "merge_and_unload" in message

    def test_a_bias_in_the_name_of_a_mask(self, llama: Path) -> None:
        """transformers ignores every name with "attn.bias" in a GPT-2."""
        assert "h.1.attn.bias" in problem(with_more(gpt2(llama), h__1__attn__bias=torch.rand(48)))

    def test_a_layer_behind_the_last_that_is_like_the_others(self, llama: Path) -> None:
        configure(llama, num_hidden_layers=11)
        assert "9 tensors of layers that its config leaves out, such as model.layers.11." in problem(llama)


class TestHarmless:
    @pytest.mark.parametrize(
        ("name", "shape"),
        [
            ("model.layers.0.self_attn.rotary_emb.cos_cached", (8, 8)),
            ("vision_tower.layers.0.self_attn.q_proj.bias", (48,)),
            ("model.mtp.layers.0.q_proj.weight", (48, 48)),
            ("mtp.norm.weight", (48,)),
            ("lm_head.bias", (400,)),
            ("score.weight", (2, 48)),
            ("model.position_ids", (1, 64)),
        ],
    )
    def test_what_text_does_not_go_through(self, llama: Path, name: str, shape: tuple[int, ...]) -> None:
        assert loaded(with_more(llama, **{name.replace(".", "__"): torch.rand(shape)})).dtype == "float32"

    def test_masks_of_gpt2_and_names_without_the_base_model(self, llama: Path) -> None:
        """The form of the checkpoint `gpt2` on the hub."""
        mask = torch.ones(1, 1, 256, 256).tril()
        extra = {f"h.{layer}.attn.bias": mask.clone() for layer in range(3)}
        extra |= {f"h.{layer}.attn.masked_bias": torch.tensor(-1e4) for layer in range(3)}
        rewrite(gpt2(llama), lambda old: {n.removeprefix("transformer."): t for n, t in old.items()} | extra)
        assert loaded(llama).dtype == "float32"

    def test_a_bias_of_zeros(self, llama: Path) -> None:
        """AutoGPTQ writes them."""
        assert loaded(with_more(llama, model__layers__0__self_attn__q_proj__bias=torch.zeros(48))).dtype == "float32"

    def test_the_bias_that_t5_has_stored_and_never_read(self, llama: Path) -> None:
        encoder_decoder(llama, "T5ForConditionalGeneration")
        name = "decoder__block__0__layer__1__EncDecAttention__relative_attention_bias__weight"
        assert loaded(with_more(llama, **{name: torch.rand(32, 4)})).dtype == "float32"

    def test_a_layer_that_predicts_later_tokens(self, llama: Path) -> None:
        """DeepSeek and GLM store it behind the last layer."""
        old = load_file(llama / "model.safetensors")
        last = {n.replace(".11.", ".12."): t.clone() for n, t in old.items() if ".layers.11." in n}
        last |= {"model.layers.12.eh_proj.weight": torch.rand(48, 96), "model.layers.12.enorm.weight": torch.rand(48)}
        assert loaded(rewrite(llama, lambda _: old | last)).dtype == "float32"


class TestFrequencies:
    NAME = "model__layers__0__self_attn__rotary_emb__inv_freq"

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_those_of_the_config(self, llama: Path, dtype: torch.dtype) -> None:
        stored = (1 / 10000 ** (torch.arange(0, 12, 2) / 12)).to(dtype)
        assert loaded(with_more(llama, **{self.NAME: stored})).dtype == "float32"

    def test_others(self, llama: Path) -> None:
        stored = 1 / 1e6 ** (torch.arange(0, 12, 2) / 12)
        assert "rotary_emb.inv_freq" in problem(with_more(llama, **{self.NAME: stored}))


class TestValues:
    """Values of config.json that cannot be, refused before anything is built from them."""

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("num_hidden_layers", 10**9),
            ("num_hidden_layers", 0),
            ("num_hidden_layers", True),
            ("hidden_size", 2**40),
            ("hidden_size", -48),
            ("vocab_size", 10**12),
            ("num_attention_heads", 10**6),
            ("max_position_embeddings", 10**12),
            ("intermediate_size", 10**7),
            ("num_labels", 10**9),
            ("head_dim", -12),
        ],
    )
    def test_impossible(self, llama: Path, key: str, value: int) -> None:
        configure(llama, **{key: value})
        assert f"{llama / 'config.json'} says {key} = {json.dumps(value)}" in problem(llama)

    def test_of_a_config_inside(self, llama: Path) -> None:
        configure(llama, text_config={"hidden_size": 10**12})
        assert "says text_config.hidden_size = 1000000000000" in problem(llama)

    def test_of_a_control(self, llama: Path) -> None:
        configure(llama, num_hidden_layers=10**9)
        assert "says num_hidden_layers = 1000000000" in problem(llama, spec={"random_weights": True})

    @pytest.mark.parametrize("kind", [["llama"], {"a": 1}, 5])
    def test_a_type_of_model_that_is_no_text(self, llama: Path, kind: object) -> None:
        configure(llama, model_type=kind)
        assert f"says model_type {kind!r}, which is no text" in problem(llama)

    @pytest.mark.parametrize(
        ("value", "cure"),
        [
            ("bf16", 'Write "bfloat16"'),
            ("int8", 'Write "float32"'),
            (["float32"], 'Write "float32"'),
            ("fp16", "float16"),
        ],
    )
    def test_a_dtype(self, llama: Path, value: object, cure: str) -> None:
        configure(llama, dtype=None, torch_dtype=value)
        message = problem(llama)
        assert f"says torch_dtype = {value!r}, which is no dtype to compute in" in message
        assert cure in message

    @pytest.mark.parametrize("stored", ["config", "weights"])
    def test_float64_is_measured_in_float32(self, llama: Path, stored: str) -> None:
        if stored == "config":
            configure(llama, dtype="float64")
        else:
            configure(llama, dtype=None)
            rewrite(llama, lambda old: {name: tensor.double() for name, tensor in old.items()})
        assert loaded(llama).dtype == "float32"

    @pytest.mark.parametrize("pad", [5000, -5000, 400])
    def test_a_padding_token_outside_the_vocabulary(self, llama: Path, pad: int) -> None:
        tokens = torch.arange(3, 30)[None]
        expected = loaded(llama).model(tokens).logits
        configure(llama, pad_token_id=pad)
        assert torch.equal(loaded(llama).model(tokens).logits, expected)

    @pytest.mark.parametrize("kernel", ["flash_attention_2", "kernels-community/flash-attn", "no_such"])
    def test_an_attention_that_is_set_aside(self, llama: Path, kernel: str) -> None:
        configure(llama, _attn_implementation=kernel)
        assert loaded(llama).attention == "sdpa"

    def test_quantisation_to_float8_is_not_computed_in_float32(self, llama: Path) -> None:
        configure(llama, quantization_config={"quant_method": "fp8", "weight_block_size": [16, 16]})
        assert "quantised (fp8), and the kernels for them compute in bfloat16" in problem(llama, dtype="float32")


def test_a_vocabulary_that_sentencepiece_reads(llama: Path) -> None:
    import importlib.util

    if importlib.util.find_spec("sentencepiece"):
        pytest.skip("sentencepiece is installed")
    (llama / "tokenizer.json").unlink()
    (llama / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    (llama / "spiece.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    assert "spiece.model is read by packages that are not installed here: pip install sentencepiece" in problem(llama)


def test_an_adapter_beside_the_weights_is_not_loaded(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would load it if peft is installed."""
    from transformers.integrations import peft
    from transformers.models.auto import auto_factory

    for module in (peft, auto_factory):
        monkeypatch.setattr(module, "is_peft_available", lambda: True)
    (llama / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "x/y"}')
    assert type(loaded(llama).model).__name__ == "LlamaForCausalLM"
