"""Loading real files with the real libraries: the models that come out, and the files that are refused."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from delta_suite.errors import CaptureError, DeviceError, ModelUnavailableError
from delta_suite.models.blocks import context_length, find_decoder
from delta_suite.models.loading import LoadedModel, load, skeleton
from delta_suite.models.sources import locate
from delta_suite.models.spec import ModelSpec
from delta_suite.models.tokenizer import load_tokenizer
from delta_suite.pipeline import Settings, measure
from delta_suite.records.cache import Cache
from delta_suite.records.view import RecordView
from safetensors.torch import load_file, save_file


def spec_of(directory: Path, **more: object) -> ModelSpec:
    return ModelSpec.model_validate({"name": "x", "path": directory, **more})


def loaded(directory: Path, *, spec: dict[str, object] | None = None, **options: Any) -> LoadedModel:
    model = spec_of(directory, **(spec or {}))
    return load(model, locate(model), **options)


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
    def test_the_model_is_ready_for_a_forward_pass(self, llama: Path) -> None:
        result = loaded(llama)
        assert (result.devices, result.dtype, result.attention) == (("cpu",), "float32", "sdpa")
        assert result.seconds > 0
        assert not result.model.training
        assert not any(parameter.requires_grad for parameter in result.model.parameters())
        tokens = result.tokenizer("The Eiffel Tower is", return_tensors="pt").input_ids
        assert tokens.shape[1] > 1
        assert result.model(tokens).logits.isfinite().all()

    def test_the_weights_are_those_of_the_file(self, llama: Path) -> None:
        state = loaded(llama).model.state_dict()
        for name, tensor in load_file(llama / "model.safetensors").items():
            assert torch.equal(state[name], tensor), name

    def test_weights_that_are_released_take_no_memory(self, llama: Path) -> None:
        result = loaded(llama)
        weights = list(result.model.parameters())
        assert result.release is not None
        result.release()
        assert sum(tensor.nbytes for tensor in weights) == 0

    def test_two_loads_are_equal(self, llama: Path) -> None:
        tokens = torch.arange(3, 30)[None]
        assert torch.equal(loaded(llama).model(tokens).logits, loaded(llama).model(tokens).logits)

    @pytest.mark.parametrize(
        ("entry", "option", "expected"),
        [
            ("auto", "auto", "bfloat16"),
            ("float32", "auto", "float32"),
            ("auto", "float32", "float32"),
            ("float32", "bfloat16", "bfloat16"),
            ("auto", "float16", "float16"),
        ],
    )
    def test_dtype(self, llama: Path, entry: str, option: str, expected: str) -> None:
        in_bfloat16(llama)
        assert loaded(llama, spec={"dtype": entry}, dtype=option).dtype == expected

    def test_shards(self, llama: Path) -> None:
        whole = loaded(llama).model
        whole.save_pretrained(llama, max_shard_size="20KB")
        (llama / "model.safetensors").unlink()
        spec = spec_of(llama)
        assert len(locate(spec).weights) > 2
        tokens = torch.arange(3, 30)[None]
        assert torch.equal(load(spec, locate(spec)).model(tokens).logits, whole(tokens).logits)

    def test_a_context_of_minus_one_is_none(self) -> None:
        """XLNet's config says so whatever it was saved with."""
        from transformers import XLNetConfig

        assert context_length(XLNetConfig()) is None

    def test_a_bare_decoder_can_be_loaded(self, llama: Path) -> None:
        """The residual stream ends before the output head."""
        tensors = load_file(llama / "model.safetensors")
        tensors.pop("lm_head.weight", None)
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        configure(llama, tie_word_embeddings=False)
        assert loaded(llama).model is not None

    def test_a_pickle_is_read_if_allowed(self, llama: Path) -> None:
        torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
        (llama / "model.safetensors").unlink()
        assert "pickles alone" in problem(llama)
        assert loaded(llama, spec={"allow_pickle": True}).dtype == "float32"


SMALL = {"num_hidden_layers": 3, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}


def replaced(directory: Path, kind: str, **config: Any) -> Path:
    """Write another model, with random weights, in place of the directory's, and keep the tokenizer."""
    import transformers

    ids = {"vocab_size": 400, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    model_class = getattr(transformers, kind)
    model_class(model_class.config_class(**config | ({} if "text_config" in config else ids))).save_pretrained(
        directory
    )
    return directory


def encoder_decoder(directory: Path, kind: str) -> Path:
    if kind == "T5ForConditionalGeneration":
        sizes = {"d_model": 48, "d_kv": 12, "d_ff": 64, "num_layers": 2, "num_decoder_layers": 3, "num_heads": 4}
    else:
        sizes = {"d_model": 48, "encoder_layers": 2, "decoder_layers": 3, "max_position_embeddings": 512}
        sizes |= {f"{side}_{what}": size for side in ("encoder", "decoder") for what, size in HEADS.items()}
    return replaced(directory, kind, decoder_start_token_id=0, **sizes)


HEADS = {"attention_heads": 4, "ffn_dim": 64}


def multimodal(directory: Path) -> Path:
    from transformers import CLIPVisionConfig, LlamaConfig

    text = LlamaConfig(vocab_size=400, bos_token_id=0, eos_token_id=0, num_key_value_heads=2, **SMALL)
    vision = CLIPVisionConfig(image_size=16, patch_size=8, projection_dim=32, **SMALL)
    return replaced(
        directory, "LlavaForConditionalGeneration", text_config=text, vision_config=vision, image_token_index=399
    )


class TestWithAnEncoder:
    @pytest.mark.parametrize("kind", ["T5ForConditionalGeneration", "BartForConditionalGeneration"])
    def test_an_encoder_decoder_is_measured(self, llama: Path, kind: str, tmp_path: Path) -> None:
        view = measured(encoder_decoder(llama, kind), tmp_path, "seed")
        assert (view.model.architecture, view.model.layers, view.model.hidden) == (kind, 3, 48)
        assert view.record.certificate.holds

    @pytest.mark.parametrize("start", [400, -1])
    def test_a_first_token_that_no_embedding_has(self, llama: Path, start: int) -> None:
        """On a GPU, looking it up would end the process."""
        encoder_decoder(llama, "T5ForConditionalGeneration")
        model = loaded(llama).model
        model.generation_config.decoder_start_token_id = start
        with pytest.raises(CaptureError, match=rf"reads decoder_start_token_id = {start} first, and"):
            find_decoder(model)

    def test_the_text_decoder_of_a_multimodal_model_is_measured(self, llama: Path, tmp_path: Path) -> None:
        texts = tmp_path / "texts"
        texts.mkdir()
        for name in "abc":
            (texts / f"{name}.txt").write_text(f"Document {name} is short, and not the same as the others. " * 4)
        view = measured(multimodal(llama), tmp_path, str(texts))
        assert (view.model.architecture, view.model.layers) == ("LlavaForConditionalGeneration", 3)
        assert view.record.provenance.settings["blocks_path"] == "model.language_model.layers"
        assert (view.record.calibration.documents, view.record.certificate.holds) == (3, True)

    def test_the_decoder_of_an_encoder_decoder_alone(self, llama: Path) -> None:
        """The same model_type stands for both; the architecture saved with it tells which."""
        sizes = {"d_model": 48, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
        replaced(llama, "BartForCausalLM", encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, **sizes)
        assert type(loaded(llama).model).__name__ == "BartForCausalLM"

    def test_weights_that_lack_the_decoder(self, llama: Path) -> None:
        encoder_decoder(llama, "T5ForConditionalGeneration")
        tensors = {k: v for k, v in load_file(llama / "model.safetensors").items() if not k.startswith("decoder.")}
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        configure(llama, architectures=["T5EncoderModel"])
        assert "of the tensors that T5ForConditionalGeneration is made of, such as decoder." in problem(llama)

    def test_an_encoder_of_real_weights_is_refused(self, llama: Path) -> None:
        replaced(llama, "BertForMaskedLM", **SMALL)
        assert "'bert' and BertForMaskedLM, an encoder" in problem(llama)


def measured(directory: Path, folder: Path, calibration: str) -> RecordView:
    settings = Settings(
        calibration=calibration, device="cpu", results=folder / "results", cache=Cache(folder / "cache")
    )
    return measure(spec_of(directory), settings).view


class TestQuantised:
    """Checkpoints whose weights are quantised, where the package that unpacks them is not installed."""

    @pytest.mark.parametrize(
        ("written", "package"),
        [
            ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
            ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
            ({"quant_method": "gptq", "bits": 4}, "optimum"),
            ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
            ({"quant_method": "compressed-tensors", "config_groups": {}, "format": "dense"}, "compressed-tensors"),
        ],
    )
    def test_the_message_names_the_missing_package(self, llama: Path, written: dict[str, object], package: str) -> None:
        if importlib.util.find_spec(package.replace("-", "_")):
            pytest.skip(f"{package} is installed")
        configure(llama, quantization_config=written)
        message = problem(llama)
        assert f"its weights are quantised ({written['quant_method']}), and transformers could not load them" in message
        assert package in message.split("\n")[0]
        assert "Install the package that is named" in message

    @pytest.mark.parametrize(
        ("written", "named"),
        [({"quant_method": "acme"}, "acme"), ({"bits": 4}, "in a way that the config does not name")],
    )
    def test_a_method_that_transformers_does_not_know(
        self, llama: Path, written: dict[str, object], named: str
    ) -> None:
        """transformers would warn, and take the packed numbers for the weights."""
        configure(llama, quantization_config=written)
        assert f"quantised ({named}), in a way that transformers" in problem(llama)


class TestRefused:
    def test_weights_that_lack_a_tensor(self, llama: Path) -> None:
        """transformers would fill it with random numbers, and warn."""
        tensors = load_file(llama / "model.safetensors")
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        message = problem(llama)
        assert "lacks 1 of the tensors that LlamaForCausalLM is made of, such as model.layers.1.mlp.up_proj" in message
        assert "random numbers" in message

    def test_weights_of_another_shape(self, llama: Path) -> None:
        """transformers says in a table which, and then: You set `ignore_mismatched_sizes` to `False`."""
        configure(llama, intermediate_size=80)
        message = problem(llama)
        assert (
            "lacks 36 of the tensors that LlamaForCausalLM is made of (or has them in another shape), such as "
            in message
        )
        assert "model.layers.0.mlp.down_proj.weight: (48, 96) there, (48, 80) by the config" in message
        assert "weights belong to the config" in message

    @pytest.mark.parametrize(
        ("changes", "told"),
        [
            ({"num_hidden_layers": "three"}, "says num_hidden_layers = 'three', where a whole number belongs"),
            ({"attention_dropout": "x"}, "says attention_dropout = 'x', where a number or null belongs"),
            ({"hidden_act": "nosuch"}, "says hidden_act = 'nosuch', which transformers"),
            (
                {"rope_parameters": {"rope_type": "nosuch", "rope_theta": 10000.0}},
                "says rope_parameters.rope_type = 'nosuch', which transformers",
            ),
            (
                {"rope_parameters": {"rope_type": "default", "rope_theta": "10000"}},
                "says rope_parameters.rope_theta = '10000', where a number above 0 belongs",
            ),
            (
                {"rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": "128"}},
                "says rope_parameters.original_max_position_embeddings = '128', where a whole number belongs",
            ),
            ({"num_local_experts": 4, "num_experts_per_tok": 5}, "says num_experts_per_tok = 5, of 4 experts"),
            ({"num_local_experts": 4, "num_experts_per_tok": 0}, "says num_experts_per_tok = 0, of 4 experts"),
            ({"head_dim": 0}, "says head_dim = 0, where a whole number above 0 belongs"),
            ({"rope_parameters": "linear"}, "says rope_parameters = 'linear', where a table or null belongs"),
            ({"rms_norm_eps": -1.0}, "says rms_norm_eps = -1.0, and what a norm adds is not negative"),
            ({"quantization_config": "awq"}, "says quantization_config = 'awq', where a table belongs"),
            ({"layer_types": ["full_attention"]}, "has values that cannot be (ValueError: `num_hidden_layers` (12) "),
        ],
        ids=lambda value: value[:40] if isinstance(value, str) else "",
    )
    def test_a_value_that_a_config_cannot_have(self, llama: Path, changes: dict[str, object], told: str) -> None:
        """transformers names no file, and of a word that it looks up in vain no key either."""
        configure(llama, **changes)
        message = problem(llama)
        assert f"{llama / 'config.json'} {told}" in message
        assert "\n  Correct it, or save or download the file again" in message

    def test_a_word_that_transformers_does_not_know_is_told_before_weights_are_read(self, llama: Path) -> None:
        configure(llama, hidden_act="nosuch")
        with pytest.raises(ModelUnavailableError, match="says hidden_act = 'nosuch', which transformers"):
            skeleton(spec_of(llama), locate(spec_of(llama)))

    @pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_a_byte_order_mark(self, llama: Path, name: str) -> None:
        (llama / name).write_text((llama / name).read_text("utf-8"), "utf-8-sig")
        assert f"{llama / name} begins with a byte order mark, which transformers does not read" in problem(llama)

    def test_a_config_of_more_layers_than_the_weights(self, llama: Path) -> None:
        configure(llama, num_hidden_layers=13)
        assert "lacks 9 of the tensors" in problem(llama)

    def test_a_config_of_fewer_layers_than_the_weights(self, llama: Path) -> None:
        """transformers would build the lower part of the model, and warn."""
        configure(llama, num_hidden_layers=11)
        assert "has 9 tensors of layers that its config leaves out, such as model.layers.11." in problem(llama)

    def test_tensors_that_are_not_of_the_decoder_are_ignored(self, llama: Path) -> None:
        tensors = load_file(llama / "model.safetensors") | {"vision_tower.weight": torch.zeros(3)}
        save_file(tensors, llama / "model.safetensors", {"format": "pt"})
        assert loaded(llama).dtype == "float32"

    def test_a_model_that_needs_its_code(self, llama: Path) -> None:
        configure(llama, model_type="acme", auto_map={"AutoConfig": "configuration_acme.AcmeConfig"})
        message = problem(llama)
        assert "the config of x says model_type 'acme', whose code is not in transformers but comes with" in message
        assert "trust_remote_code = true" in message

    def test_code_that_is_not_trusted_is_not_run(self, llama: Path) -> None:
        configure(llama, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil"})
        (llama / "modeling_evil.py").write_text("raise SystemExit('was run')")
        assert type(loaded(llama).model).__name__ == "LlamaForCausalLM"

    def test_code_that_is_trusted_is_run(self, llama: Path) -> None:
        configure(llama, model_type="acme", auto_map={"AutoConfig": "configuration_acme.AcmeConfig"})
        (llama / "configuration_acme.py").write_text(
            "from transformers import LlamaConfig\n\n\nclass AcmeConfig(LlamaConfig):\n    model_type = 'acme'\n"
        )
        message = problem(llama, spec={"trust_remote_code": True})
        assert "model_type 'acme', which is not a causal language model" in message

    @pytest.mark.parametrize(
        ("kind", "expected"),
        [("acme", "says model_type 'acme', which transformers"), (None, "the config of x has no model_type")],
    )
    def test_a_type_that_transformers_does_not_know(self, llama: Path, kind: str | None, expected: str) -> None:
        configure(llama, model_type=kind)
        assert expected in problem(llama)

    @pytest.mark.parametrize(
        ("kind", "architecture", "expected"),
        [
            ("vit", "ViTModel", "'vit', which is not a causal language model"),
            ("bert", "BertForMaskedLM", "'bert' and BertForMaskedLM, an encoder"),
            ("roberta", "RobertaModel", "'roberta' and RobertaModel, an encoder"),
        ],
    )
    def test_a_model_that_is_no_causal_decoder(self, llama: Path, kind: str, architecture: str, expected: str) -> None:
        (llama / "config.json").write_text(json.dumps({"model_type": kind, "architectures": [architecture]}))
        message = problem(llama)
        assert expected in message
        assert "causal language models: decoders, encoder-decoders, and the text decoders of multimodal" in message

    @pytest.mark.parametrize("text", ["{}", "", "<html>", '{"added_tokens": []}', '{"added_tokens": [], "model": {}}'])
    def test_a_tokenizer_that_cannot_be_built(self, llama: Path, text: str) -> None:
        (llama / "tokenizer.json").write_text(text)
        with pytest.raises(ModelUnavailableError, match=r"its tokenizer cannot be built from(?s:.*)save_pretrained"):
            load_tokenizer(spec_of(llama), locate(spec_of(llama)))

    def test_a_gguf_file_that_cannot_be_read(self, tmp_path: Path) -> None:
        """Whole by its header, but of no architecture."""
        (tmp_path / "m.gguf").write_bytes(b"GGUF" + bytes([3] + [0] * 19) + bytes(64))
        message = problem(tmp_path)
        assert f"cannot read the config of {tmp_path / 'm.gguf'}" in message

    def test_out_of_memory(self, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import AutoModelForCausalLM

        def full(*_: object, **__: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
        with pytest.raises(DeviceError, match=r"the memory of cpu ran out(?s:.*)--dtype bfloat16"):
            loaded(llama)
