"""Loading real files with the real libraries: what comes out, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from suite.errors import DeviceError, ModelUnavailableError, SuiteError
from suite.models.files import locate
from suite.models.loading import LoadedModel, load, load_tokenizer
from suite.models.registry import ModelSpec


def spec_of(directory: Path, **more: object) -> ModelSpec:
    return ModelSpec.model_validate({"name": "x", "path": directory, **more})


def loaded(directory: Path, *, spec: dict[str, object] | None = None, **options: Any) -> LoadedModel:
    made = spec_of(directory, **(spec or {}))
    return load(made, locate(made), **options)


def problem(directory: Path, *, spec: dict[str, object] | None = None, **options: Any) -> str:
    with pytest.raises(ModelUnavailableError) as caught:
        loaded(directory, spec=spec, **options)
    return str(caught.value)


def configure(directory: Path, **changes: object) -> None:
    """Change the config; a key set to None is taken out."""
    config = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def in_bfloat16(directory: Path) -> None:
    tensors = load_file(directory / "model.safetensors")
    save_file(
        {name: tensor.bfloat16() for name, tensor in tensors.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    configure(directory, dtype="bfloat16")


class TestLoaded:
    def test_it_is_ready_for_a_forward_pass(self, llama: Path) -> None:
        found = loaded(llama)
        assert (found.devices, found.dtype, found.attention) == (("cpu",), "float32", "sdpa")
        assert found.seconds > 0
        assert not found.model.training
        assert not any(parameter.requires_grad for parameter in found.model.parameters())
        tokens = found.tokenizer("The Eiffel Tower is", return_tensors="pt").input_ids
        assert tokens.shape[1] > 1
        assert found.model(tokens).logits.isfinite().all()

    def test_the_weights_are_those_of_the_file(self, llama: Path) -> None:
        state = loaded(llama).model.state_dict()
        for name, tensor in load_file(llama / "model.safetensors").items():
            assert torch.equal(state[name], tensor), name

    def test_two_loads_are_equal(self, llama: Path) -> None:
        tokens = torch.arange(3, 30)[None]
        assert torch.equal(loaded(llama).model(tokens).logits, loaded(llama).model(tokens).logits)

    @pytest.mark.parametrize(
        ("entry", "asked", "told"),
        [
            ("auto", "auto", "bfloat16"),
            ("float32", "auto", "float32"),
            ("auto", "float32", "float32"),
            ("float32", "bfloat16", "bfloat16"),
            ("auto", "float16", "float16"),
        ],
    )
    def test_dtype(self, llama: Path, entry: str, asked: str, told: str) -> None:
        in_bfloat16(llama)
        assert loaded(llama, spec={"dtype": entry}, dtype=asked).dtype == told

    def test_attention(self, llama: Path) -> None:
        assert loaded(llama, attention="eager").attention == "eager"
        assert "no_such_kernel" in problem(llama, attention="no_such_kernel")

    def test_shards(self, llama: Path) -> None:
        whole = loaded(llama).model
        whole.save_pretrained(llama, max_shard_size="20KB")
        (llama / "model.safetensors").unlink()
        made = spec_of(llama)
        assert len(locate(made).weights) > 2
        tokens = torch.arange(3, 30)[None]
        assert torch.equal(load(made, locate(made)).model(tokens).logits, whole(tokens).logits)

    def test_the_bare_decoder_will_do(self, llama: Path) -> None:
        """The residual stream ends before the output head."""
        tensors = load_file(llama / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        configure(llama, tie_word_embeddings=False)
        assert loaded(llama).model is not None

    def test_a_pickle_where_it_is_allowed(self, llama: Path) -> None:
        torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
        (llama / "model.safetensors").unlink()
        assert "pickles alone" in problem(llama)
        assert loaded(llama, spec={"allow_pickle": True}).dtype == "float32"


class TestRefused:
    def test_an_unknown_dtype(self, llama: Path) -> None:
        with pytest.raises(SuiteError, match="dtype 'fp16' is unknown: it is auto, float32, bfloat16, float16"):
            loaded(llama, dtype="fp16")

    def test_weights_that_lack_a_tensor(self, llama: Path) -> None:
        """transformers would fill it with random numbers, and warn."""
        tensors = load_file(llama / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        told = problem(llama)
        assert "lacks 1 of the tensors that LlamaForCausalLM is made of, such as model.layers.1.mlp.up_proj" in told
        assert "random numbers" in told

    def test_weights_of_another_shape(self, llama: Path) -> None:
        configure(llama, intermediate_size=80)
        assert "weights belong to the config" in problem(llama)

    def test_a_config_of_more_layers_than_the_weights(self, llama: Path) -> None:
        configure(llama, num_hidden_layers=13)
        assert "lacks 9 of the tensors" in problem(llama)

    def test_a_config_of_fewer_layers_than_the_weights(self, llama: Path) -> None:
        """transformers would build the lower part of the model, and warn."""
        configure(llama, num_hidden_layers=11)
        assert "has 9 tensors of layers that its config leaves out, such as model.layers.11." in problem(llama)

    def test_other_tensors_beside_the_model_are_let_be(self, llama: Path) -> None:
        tensors = load_file(llama / "model.safetensors") | {"vision_tower.weight": torch.zeros(3)}
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        assert loaded(llama).dtype == "float32"

    def test_code_of_the_models_own(self, llama: Path) -> None:
        configure(llama, model_type="acme", auto_map={"AutoConfig": "configuration_acme.AcmeConfig"})
        told = problem(llama)
        assert "the config of x says model_type 'acme', whose code is not in transformers but comes with" in told
        assert "trust_remote_code = true" in told

    def test_code_that_is_not_needed_is_not_run(self, llama: Path) -> None:
        configure(llama, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
        (llama / "modeling_evil.py").write_text("raise SystemExit('was run')")
        assert type(loaded(llama).model).__name__ == "LlamaForCausalLM"

    def test_code_that_is_trusted_is_run(self, llama: Path) -> None:
        configure(llama, model_type="acme", auto_map={"AutoConfig": "configuration_acme.AcmeConfig"})
        (llama / "configuration_acme.py").write_text(
            "from transformers import LlamaConfig\n\n\nclass AcmeConfig(LlamaConfig):\n    model_type = 'acme'\n"
        )
        told = problem(llama, spec={"trust_remote_code": True})
        assert "model_type 'acme', which is not a causal language model" in told

    @pytest.mark.parametrize(
        ("kind", "telling"),
        [("acme", "says model_type 'acme', which transformers"), (None, "the config of x has no model_type")],
    )
    def test_a_type_that_transformers_does_not_know(self, llama: Path, kind: str | None, telling: str) -> None:
        configure(llama, model_type=kind)
        assert telling in problem(llama)

    @pytest.mark.parametrize(
        ("kind", "architecture", "telling"),
        [
            ("t5", "T5ForConditionalGeneration", "'t5', an encoder-decoder model"),
            ("vit", "ViTModel", "'vit', which is not a causal language model"),
            ("bert", "BertForMaskedLM", "'bert' and BertForMaskedLM, an encoder"),
            ("roberta", "RobertaModel", "'roberta' and RobertaModel, an encoder"),
        ],
    )
    def test_what_is_not_a_causal_decoder(self, llama: Path, kind: str, architecture: str, telling: str) -> None:
        (llama / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
        told = problem(llama)
        assert telling in told
        assert "causal (decoder-only)" in told

    @pytest.mark.parametrize("text", ["{}", "", "<html>", '{"added_tokens": []}', '{"added_tokens": [], "model": {}}'])
    def test_a_tokenizer_that_cannot_be_built(self, llama: Path, text: str) -> None:
        (llama / "tokenizer.json").write_text(text)
        with pytest.raises(ModelUnavailableError, match=r"its tokenizer cannot be built from(?s:.*)save_pretrained"):
            load_tokenizer(spec_of(llama), locate(spec_of(llama)))

    def test_a_gguf_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        """Whole by its header, but of no architecture."""
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes([3] + [0] * 19) + bytes(64))
        told = problem(tmp_path)
        assert f"cannot read the config of {tmp_path / 'm.gguf'}" in told

    def test_memory_that_runs_out(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import AutoModelForCausalLM

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
        with pytest.raises(DeviceError, match=r"the memory of cpu ran out(?s:.*)--dtype bfloat16"):
            loaded(llama)
