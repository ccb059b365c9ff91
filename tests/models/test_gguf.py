"""GGUF files: what transformers' loader leaves out is applied, or the file is refused by the name of key or tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from delta_suite.models import loading
from delta_suite.models.gguf_check import gguf_read_once
from delta_suite.models.gguf_header import gguf_content
from delta_suite.models.sources import locate

from tests.models.test_files import problem as unlocated
from tests.models.test_files import spec_of
from tests.models.test_loading import loaded, problem

HEAD = 12
"""Width of a head of the tiny Llama."""

TOKENS = torch.arange(3, 60)[None]


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the tokenizer out: rebuilding one from GGUF is the slow part, and no matter here."""
    monkeypatch.setattr(loading, "load_tokenizer", lambda spec, files: None)


def model_of(**config: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 60, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.3, **config)).eval()


def write(
    path: Path,
    model: Any,
    *,
    keys: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
    omit: str = "-",
    split: tuple[int, int] | None = None,
    architecture: str = "llama",
) -> Path:
    """Write a Llama as llama.cpp's converter does. keys: without the architecture; None leaves one out."""
    import gguf

    config, writer = model.config, gguf.GGUFWriter(str(path), architecture)
    values: dict[str, object] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "rope.dimension_count": HEAD,
        "vocab_size": config.vocab_size,
    }
    methods = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}
    for key, value in (values | (keys or {})).items():
        if value is not None:
            getattr(writer, methods[type(value)])(f"{architecture}.{key}", value)
    for name, number in zip(("split.no", "split.count"), split or (), strict=False):
        writer.add_uint16(name, number)
    names = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj"}
    names |= {"attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
    names |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    tensors = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        tensors["output.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        for short, long in names.items():
            tensor = state[f"model.layers.{layer}.{long}.weight"]
            if short in heads:  # the converter pairs the halves of each head
                parts = tensor.reshape(heads[short], 2, tensor.shape[0] // heads[short] // 2, -1)
                tensor = np.ascontiguousarray(parts.swapaxes(1, 2).reshape(tensor.shape))
            tensors[f"blk.{layer}.{short}.weight"] = tensor
    for name, tensor in (tensors | (extra or {})).items():
        if omit not in name:
            writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.parent


def logits(directory: Path) -> torch.Tensor:
    result: torch.Tensor = loaded(directory).model(TOKENS % 60).logits
    return result


class TestApplied:
    @pytest.mark.parametrize("tied", [True, False])
    def test_a_plain_file(self, tmp_path: Path, tied: bool) -> None:
        model = model_of(tie_word_embeddings=tied)
        assert torch.equal(logits(write(tmp_path / "m.gguf", model)), model(TOKENS % 60).logits)

    def test_the_factors_of_llama_3(self, tmp_path: Path) -> None:
        rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        model = model_of(rope_parameters=rope | {"original_max_position_embeddings": 64, "rope_theta": 10000.0})
        plain = 1 / 10000.0 ** (np.arange(0, HEAD, 2) / HEAD)
        factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
        assert factors.max() == pytest.approx(8)
        stored = logits(write(tmp_path / "m.gguf", model, extra={"rope_freqs.weight": factors}))
        torch.testing.assert_close(stored, model(TOKENS % 60).logits, rtol=1e-4, atol=1e-4)

    def test_linear_scaling(self, tmp_path: Path) -> None:
        model = model_of(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
        keys = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
        assert torch.equal(logits(write(tmp_path / "m.gguf", model, keys=keys)), model(TOKENS % 60).logits)

    def test_a_control_has_the_same_frequencies(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", model_of(), keys={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
        control = loaded(tmp_path, spec={"random_weights": True}).model
        assert torch.equal(control.model.rotary_emb.inv_freq, loaded(tmp_path).model.model.rotary_emb.inv_freq)

    @pytest.mark.parametrize(
        "keys",
        [
            {"attention.key_length": HEAD, "attention.value_length": HEAD, "rope.scaling.type": "none"},
            {"attention.sliding_window": 512, "tensor_data_layout": "Meta AI original pth"},
            {"rope.dimension_count": None, "expert_count": 0},
        ],
    )
    def test_keys_that_change_nothing(self, tmp_path: Path, keys: dict[str, object]) -> None:
        model = model_of()
        assert torch.equal(logits(write(tmp_path / "m.gguf", model, keys=keys)), model(TOKENS % 60).logits)


class TestRefused:
    @pytest.mark.parametrize("tied", [True, False])
    def test_without_the_embedding(self, tmp_path: Path, tied: bool) -> None:
        message = problem(write(tmp_path / "m.gguf", model_of(tie_word_embeddings=tied), omit="token_embd"))
        assert "such as model.embed_tokens.weight" in message

    @pytest.mark.parametrize(
        "name",
        [
            "blk.0.attn_q.bias",
            "blk.1.attn_q_norm.weight",
            "blk.0.attn_k.scale",
            "output_norm.bias",
            "position_embd.weight",
        ],
    )
    def test_a_tensor_that_nothing_reads(self, tmp_path: Path, name: str) -> None:
        message = problem(write(tmp_path / "m.gguf", model_of(), extra={name: np.ones(48, np.float32)}))
        assert f"has 1 tensors that the model built by transformers lacks, such as {name}" in message

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("rope.scaling.type", "yarn"),
            ("rope.scaling.attn_factor", 1.19),
            ("rope.freq_base", -1.0),
            ("attention.key_length", 24),
            ("attention.sliding_window", 64),
            ("attention.scale", 0.5),
            ("attn_logit_softcapping", 50.0),
            ("embedding_scale", 12.0),
            ("expert_count", 8),
            ("no_such_key", 1),
        ],
    )
    def test_a_key_that_changes_the_arithmetic(self, tmp_path: Path, key: str, value: object) -> None:
        message = problem(write(tmp_path / "m.gguf", model_of(), keys={key: value}))
        assert f"llama.{key}" in message
        assert "m.gguf" in message

    @pytest.mark.parametrize("key", ["attention.head_count", "attention.layer_norm_rms_epsilon"])
    def test_a_key_that_is_not_there(self, tmp_path: Path, key: str) -> None:
        assert f"llama.{key}" in problem(write(tmp_path / "m.gguf", model_of(), keys={key: None}))

    def test_more_blocks_than_tensors(self, tmp_path: Path) -> None:
        write(tmp_path / "m.gguf", model_of(), keys={"block_count": 10**9})
        assert "m.gguf says llama.block_count = 1000000000" in problem(tmp_path)

    def test_a_part_of_a_file(self, tmp_path: Path) -> None:
        for number in (1, 2):
            write(tmp_path / f"m-0000{number}-of-00002.gguf", model_of())
        for message in (unlocated(spec_of(tmp_path)), unlocated(spec_of(tmp_path, gguf="m-00002-of-00002.gguf"))):
            assert "of 2 of a split GGUF file" in message
            first, whole = tmp_path / "m-00001-of-00002.gguf", tmp_path / "m.gguf"
            assert f"llama-gguf-split --merge {first} {whole}" in message


def test_a_part_under_another_name(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model_of(), split=(1, 3), omit="blk.1")
    assert "m.gguf is part 2 of 3 of a split GGUF file" in problem(tmp_path)


def test_a_file_of_one_part(tmp_path: Path) -> None:
    model = model_of()
    write(tmp_path / "m-00001-of-00001.gguf", model, split=(0, 1))
    assert torch.equal(logits(tmp_path), model(TOKENS % 60).logits)


def test_it_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import gguf

    parsed: list[str] = []
    tables: list[int] = []
    read, table = gguf.GGUFReader.__init__, gguf.get_tensor_name_map
    monkeypatch.setattr(gguf.GGUFReader, "__init__", lambda self, path: parsed.append(path) or read(self, path))
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda arch, count: tables.append(count) or table(arch, count))
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    loaded(write(tmp_path / "m.gguf", model_of()))
    assert (len(parsed), tables) == (1, [2])
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_it_is_parsed_as_transformers_does(tmp_path: Path) -> None:
    import gguf
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_block_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "naïve", "模型", ""])
    writer.add_token_scores([0.0, -1.5, 2.0, 1.0])
    writer.add_token_merges(["a b", "ï v"])
    writer.add_add_bos_token(True)
    writer.add_tensor("output_norm.weight", np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    expected = load_gguf_checkpoint(tmp_path / "m.gguf")
    assert expected["tokenizer"]["tokens"] == ["a", "naïve", "模型", ""]
    with gguf_read_once(locate(spec_of(tmp_path))):
        assert load_gguf_checkpoint(tmp_path / "m.gguf") == expected


def test_the_content_of_a_header(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", model_of(), keys={"a": True, "b": "x"})
    values, shapes = gguf_content(tmp_path / "m.gguf")
    assert (values["llama.a"], values["llama.b"], values["llama.block_count"]) == (True, "x", 2)
    assert shapes["blk.0.ffn_up.weight"] == (64, 48)
    assert locate(spec_of(tmp_path)).gguf == "m.gguf"
