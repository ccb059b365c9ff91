"""The files of a model in a directory, and every way in which they can be missing or damaged."""

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from delta_suite.errors import ModelUnavailableError
from delta_suite.models.files import ModelFiles
from delta_suite.models.gguf_header import _BLOCKS
from delta_suite.models.sources import locate
from delta_suite.models.spec import ModelSpec
from delta_suite.models.weights import weights_problem

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 98362432\n"


def spec_of(directory: Path, **more: object) -> ModelSpec:
    return ModelSpec.model_validate({"name": "x", "path": directory, **more})


def problem(spec: ModelSpec, **options: bool) -> str:
    with pytest.raises(ModelUnavailableError) as caught:
        locate(spec, **options)
    return str(caught.value)


def cut(path: Path, size: int) -> None:
    with path.open("rb+") as file:
        file.truncate(size)


def shard(directory: Path, names: list[str]) -> None:
    """Turn the single weights file into shards that an index names; only the first is written."""
    index = {"metadata": {}, "weight_map": {f"layer.{number}": name for number, name in enumerate(names)}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "model.safetensors").rename(directory / names[0])


def gguf(path: Path, *, tensors: int = 2) -> None:
    """Write a GGUF file with a string, an array of strings, a number, and float32 tensors of 8 elements."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    pairs = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("tokens") + struct.pack("<IIQ", 9, 8, 3) + text("a") + text("bb") + text("ccc"),
        text("scores") + struct.pack("<IIQ", 9, 6, 2) + struct.pack("<2f", 0.0, 1.0),
        text("general.alignment") + struct.pack("<II", 4, 64),
    ]
    infos = [text(f"t{n}") + struct.pack("<IQIQ", 1, 8, 0, 64 * n) for n in range(tensors)]
    header = b"GGUF" + struct.pack("<IQQ", 3, tensors, len(pairs)) + b"".join(pairs) + b"".join(infos)
    header += bytes(-len(header) % 64)
    path.write_bytes(header + bytes(64 * tensors))


class TestDirectory:
    def test_weights_config_and_tokenizer_are_loaded_and_nothing_else(self, checkpoint: Path) -> None:
        files = locate(spec_of(checkpoint))
        assert [path.name for path in files.weights] == ["model.safetensors"]
        assert [path.name for path in files.others] == ["config.json", "tokenizer.json", "tokenizer_config.json"]
        assert (files.directory, files.gguf, files.revision) == (checkpoint, None, None)

    def test_shards(self, checkpoint: Path) -> None:
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        shard(checkpoint, names)
        shutil.copy(checkpoint / names[0], checkpoint / names[1])
        assert [path.name for path in locate(spec_of(checkpoint)).weights] == names

    def test_code_of_the_model_is_loaded_only_if_trusted(self, checkpoint: Path) -> None:
        (checkpoint / "modeling_x.py").write_text("")
        assert all(path.suffix != ".py" for path in locate(spec_of(checkpoint)).others)
        assert any(path.suffix == ".py" for path in locate(spec_of(checkpoint, trust_remote_code=True)).others)

    def test_weights_that_the_config_names(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").write_text('{"transformers_weights": "other.safetensors"}')
        shutil.copy(checkpoint / "model.safetensors", checkpoint / "other.safetensors")
        assert [path.name for path in locate(spec_of(checkpoint)).weights] == ["other.safetensors"]

    def test_no_such_directory(self, tmp_path: Path) -> None:
        assert "no directory" in problem(spec_of(tmp_path / "nowhere"))
        assert "no directory" in problem(spec_of(tmp_path / ("x" * 5000)))

    def test_a_config_that_is_no_file(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").unlink()
        os.mkfifo(checkpoint / "config.json")
        assert "config.json is no regular file" in problem(spec_of(checkpoint))

    def test_no_config(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").unlink()
        assert "has no config.json" in problem(spec_of(checkpoint))
        shutil.copytree(checkpoint, checkpoint / "checkpoint-500")
        (checkpoint / "checkpoint-500/config.json").write_text("{}")
        assert f"Directories below it have one: {checkpoint / 'checkpoint-500'}" in problem(spec_of(checkpoint))
        (checkpoint / "adapter_config.json").write_text("{}")
        assert "merge_and_unload" in problem(spec_of(checkpoint))

    @pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 200_000], ids=["cut", "list", "latin", "deep"])
    def test_a_damaged_config(self, checkpoint: Path, text: str) -> None:
        (checkpoint / "config.json").write_text(text, encoding="latin-1")
        assert "config.json" in problem(spec_of(checkpoint))

    def test_no_weights(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
        message = problem(spec_of(checkpoint))
        assert "has a config.json but no weights (model.safetensors or model.safetensors.index.json)" in message
        assert "Similar files there: weights.safetensors" in message

    def test_pickles_are_refused_unless_asked_for(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
        message = problem(spec_of(checkpoint))
        assert "as pickles alone (pytorch_model.bin), which can run code" in message
        assert "save_pretrained" in message
        assert "allow_pickle = true" in message
        allowed = locate(spec_of(checkpoint, allow_pickle=True))
        assert [path.name for path in allowed.weights] == ["pytorch_model.bin"]

    def test_safetensors_are_taken_before_pickles_even_where_those_are_allowed(self, checkpoint: Path) -> None:
        (checkpoint / "pytorch_model.bin").touch()
        assert locate(spec_of(checkpoint, allow_pickle=True)).weights[0].name == "model.safetensors"

    def test_missing_shards(self, checkpoint: Path) -> None:
        shard(checkpoint, [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)])
        message = problem(spec_of(checkpoint))
        assert "lacks 2 of the 3 weight files that model.safetensors.index.json names: model-00002-of-00003" in message

    @pytest.mark.parametrize("text", ["{}", "[" * 200_000], ids=["empty", "deep"])
    def test_a_damaged_index(self, checkpoint: Path, text: str) -> None:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "model.safetensors.index.json").write_text(text)
        assert "has no weight_map that can be read" in problem(spec_of(checkpoint))

    @pytest.mark.parametrize("metadata", [{}, {"metadata": None}])
    def test_an_index_without_metadata(self, checkpoint: Path, metadata: dict[str, None]) -> None:
        names = ["model-00001-of-00001.safetensors"]
        shard(checkpoint, names)
        index = checkpoint / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"weight": names[0]}, **metadata}))
        message = problem(spec_of(checkpoint))
        assert f"{index} has no table `metadata`, which transformers reads" in message
        assert 'Add "metadata": {} to it' in message

    def test_no_tokenizer(self, checkpoint: Path) -> None:
        for path in checkpoint.glob("tokenizer*"):
            path.unlink()
        message = problem(spec_of(checkpoint))
        assert "has no tokenizer" in message
        assert "tokenizer.save_pretrained" in message

    def test_a_git_lfs_pointer_in_place_of_the_weights(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").write_bytes(POINTER)
        message = problem(spec_of(checkpoint))
        assert f"model.safetensors is a Git LFS pointer of {len(POINTER)} bytes, not the content" in message
        assert "git lfs pull" in message

    def test_a_tokenizer_that_is_a_pointer(self, checkpoint: Path) -> None:
        (checkpoint / "tokenizer.json").write_bytes(POINTER)
        assert "tokenizer.json is a Git LFS pointer" in problem(spec_of(checkpoint))

    def test_a_truncated_file_is_noticed_before_anything_is_loaded(self, checkpoint: Path) -> None:
        size = (checkpoint / "model.safetensors").stat().st_size
        cut(checkpoint / "model.safetensors", size - 4)
        message = problem(spec_of(checkpoint))
        assert f"model.safetensors is cut short: {size - 4} bytes, where its header declares {size}" in message
        assert "Copy or download it again" in message


class TestSafetensors:
    @pytest.mark.parametrize(
        ("damage", "expected"),
        [
            (lambda data: b"", "is empty"),
            (lambda data: data[:5], "ends within its first 8 bytes"),
            (lambda data: data[:20], "cut short within its header"),
            (lambda data: data + b"\0", "is damaged"),
            (lambda data: b"\xff" * 8 + data[8:], "ask for a header of"),
            (lambda data: data[:8] + b"!" + data[9:], "its header does not parse"),
            (lambda data: struct.pack("<Q", 2) + b"[]", "its header does not parse"),
            (lambda data: struct.pack("<Q", 200_000) + b"[" * 200_000, "its header does not parse"),
        ],
    )
    def test_damage(self, checkpoint: Path, damage: Callable[[bytes], bytes], expected: str) -> None:
        path = checkpoint / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        assert expected in str(weights_problem(path))


class TestGguf:
    def test_one_file_in_a_directory_is_the_model(self, tmp_path: Path) -> None:
        gguf(tmp_path / "m.gguf")
        files = locate(spec_of(tmp_path))
        assert (files.gguf, files.weights, files.others) == ("m.gguf", (tmp_path / "m.gguf",), ())

    def test_one_of_several_files_must_be_named(self, tmp_path: Path) -> None:
        gguf(tmp_path / "a.gguf")
        gguf(tmp_path / "b.gguf")
        message = problem(spec_of(tmp_path))
        assert "has 2 GGUF files and no config.json" in message
        assert f"Pass the file: {tmp_path / 'a.gguf'}" in message
        assert locate(spec_of(tmp_path, gguf="b.gguf")).gguf == "b.gguf"

    def test_the_named_file_is_not_there(self, tmp_path: Path) -> None:
        gguf(tmp_path / "a.gguf")
        assert "has no file b.gguf.\n  GGUF files there: a.gguf" in problem(spec_of(tmp_path, gguf="b.gguf"))

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.6])
    def test_a_truncated_file(self, tmp_path: Path, share: float) -> None:
        gguf(tmp_path / "m.gguf")
        cut(tmp_path / "m.gguf", int((tmp_path / "m.gguf").stat().st_size * share))
        assert "m.gguf is cut short" in problem(spec_of(tmp_path))

    def test_a_cut_in_the_last_tensor(self, tmp_path: Path) -> None:
        gguf(tmp_path / "m.gguf")
        end = (tmp_path / "m.gguf").stat().st_size - 32  # 8 numbers of 4 bytes in 64
        cut(tmp_path / "m.gguf", end - 1)
        assert f"m.gguf is cut short: {end - 1} bytes, where its last tensor ends at {end}" in problem(
            spec_of(tmp_path)
        )

    def test_the_sizes_of_blocks_are_those_of_its_library(self) -> None:
        from gguf import GGML_QUANT_SIZES

        for kind, size in GGML_QUANT_SIZES.items():
            assert _BLOCKS.get(int(kind), size) == size

    @pytest.mark.parametrize(
        ("version", "told"),
        [
            ((1).to_bytes(4, "little"), "says that it is a GGUF file of version 1, and versions 2 and 3 are read"),
            ((9).to_bytes(4, "little"), "says that it is a GGUF file of version 9, and versions 2 and 3 are read"),
            ((3).to_bytes(4, "big"), "is a GGUF file of version 3 for big-endian machines"),
        ],
    )
    def test_another_version(self, tmp_path: Path, version: bytes, told: str) -> None:
        gguf(tmp_path / "m.gguf")
        whole = (tmp_path / "m.gguf").read_bytes()
        (tmp_path / "m.gguf").write_bytes(whole[:4] + version + whole[8:])
        message = problem(spec_of(tmp_path))
        assert f"m.gguf {told}" in message
        assert "cut short" not in message

    def test_another_file_under_the_name(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"<!DOCTYPE html>")
        assert "m.gguf is not a GGUF file: it begins with b'<!DO'" in problem(spec_of(tmp_path))
        (tmp_path / "m.gguf").write_bytes(POINTER)
        assert "Git LFS pointer" in problem(spec_of(tmp_path))


def test_the_error_can_be_pickled(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        locate(spec_of(tmp_path / "nowhere"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_model_files_are_values(checkpoint: Path) -> None:
    files = locate(spec_of(checkpoint))
    assert files == ModelFiles(files.directory, None, files.weights, files.others)
    assert hash(files)


class TestOutside:
    """Weights are .safetensors files inside the folder, whoever names them."""

    @pytest.mark.parametrize(
        "name",
        [
            "pytorch_model.bin",
            "../x.safetensors",
            "/etc/x.safetensors",
            "a/../../x.safetensors",
            "x\0.safetensors",
            "x" * 300 + ".safetensors",
            "",
            5,
            None,
            ["x.safetensors"],
        ],
    )
    def test_what_an_index_may_not_name(self, checkpoint: Path, name: object) -> None:
        shard(checkpoint, ["model-00001-of-00001.safetensors"])
        (checkpoint / "pytorch_model.bin").write_bytes(b"x")
        index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors", "b": name}}
        (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
        message = problem(spec_of(checkpoint))
        assert "model.safetensors.index.json" in message
        assert "is no .safetensors file in that folder" in message or "has no weight_map that can be read" in message

    def test_a_pickle_in_the_index_of_pickles_is_read_if_allowed(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / "part.bin")
        index = {"metadata": {}, "weight_map": {"a": "part.bin"}}
        (checkpoint / "pytorch_model.bin.index.json").write_text(json.dumps(index))
        assert [path.name for path in locate(spec_of(checkpoint, allow_pickle=True)).weights] == ["part.bin"]

    @pytest.mark.parametrize("name", ["adapter_model.bin", "../x.safetensors", "x.pt", 5, ["a"], True])
    def test_what_a_config_may_not_name(self, checkpoint: Path, name: object) -> None:
        (checkpoint / "config.json").write_text(json.dumps({"transformers_weights": name}))
        message = problem(spec_of(checkpoint))
        assert "config.json says transformers_weights = " in message
        assert "which is no .safetensors file in that folder" in message


class TestShardsOfTraining:
    @pytest.mark.parametrize(
        ("name", "cure"),
        [
            ("pytorch_model_fsdp_0/__0_0.distcp", "accelerate merge-weights"),
            ("__0_0.distcp", "accelerate merge-weights"),
            ("global_step8/mp_rank_00_model_states.pt", "zero_to_fp32.py"),
            ("zero_to_fp32.py", "zero_to_fp32.py"),
        ],
    )
    @pytest.mark.parametrize("config", [True, False])
    def test_the_converter_is_named(self, checkpoint: Path, name: str, cure: str, config: bool) -> None:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / name).parent.mkdir(exist_ok=True)
        (checkpoint / name).write_bytes(b"x")
        if not config:
            (checkpoint / "config.json").unlink()
        message = problem(spec_of(checkpoint))
        assert f"It holds {name.split('/', maxsplit=1)[0]}, shards of" in message
        assert cure in message

    def test_shards_that_would_stand_in_for_the_weights(self, checkpoint: Path) -> None:
        """transformers reads them first, beside a whole model.safetensors."""
        shutil.copy(checkpoint / "model.safetensors", checkpoint / "shard-00000-model-00001-of-00001.safetensors")
        assert "holds shard-00000-model-00001-of-00001.safetensors, shards of" in problem(spec_of(checkpoint))


class TestNotes:
    def test_none_of_an_ordinary_checkpoint(self, checkpoint: Path) -> None:
        assert locate(spec_of(checkpoint)).notes == ()

    def test_an_adapter_beside_the_weights(self, checkpoint: Path) -> None:
        (checkpoint / "adapter_config.json").write_text("{}")
        (note,) = locate(spec_of(checkpoint)).notes
        assert "(adapter_config.json) is not measured, the model beside it is; merge it (merge_and_unload" in note

    def test_an_adapter_without_weights(self, checkpoint: Path) -> None:
        (checkpoint / "adapter_config.json").write_text("{}")
        (checkpoint / "model.safetensors").rename(checkpoint / "adapter_model.safetensors")
        assert "It holds an adapter: merge it into its base model (merge_and_unload" in problem(spec_of(checkpoint))

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    def test_code_that_is_not_trusted(self, checkpoint: Path, name: str) -> None:
        content = json.loads((checkpoint / name).read_text()) | {"auto_map": {"AutoModel": "modeling_x.X"}}
        (checkpoint / name).write_text(json.dumps(content))
        (note,) = locate(spec_of(checkpoint)).notes
        assert f"{name} names code of its own (modeling_x.X), which is not trusted and does not run" in note
        assert locate(spec_of(checkpoint, trust_remote_code=True)).notes == ()

    @pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
    @pytest.mark.parametrize("code", ["them/code--modeling_x.X", ["them/code--tokenization_x.X", None]])
    def test_trusted_code_of_another_repository(self, checkpoint: Path, name: str, code: object) -> None:
        """It could change between two runs, and no fingerprint would show it."""
        content = json.loads((checkpoint / name).read_text()) | {"auto_map": {"AutoModel": code}}
        (checkpoint / name).write_text(json.dumps(content))
        told = problem(spec_of(checkpoint, trust_remote_code=True))
        assert f"{name} takes code from another repository" in told
        assert "them/code--" in told
        assert "Copy its .py files into the folder" in told

    @pytest.mark.parametrize(
        ("changes", "expected"),
        [
            ({"_attn_implementation": "flash_attention_2"}, "asks for _attn_implementation = flash_attention_2"),
            ({"text_config": {"attn_implementation": "a/b"}}, "asks for text_config.attn_implementation = a/b"),
            ({"torch_dtype": "float64"}, "says torch_dtype = float64; the widest dtype"),
            (
                {"rope_scaling": {"type": "longrope"}, "original_max_position_embeddings": 64},
                "documents run in pieces of at most 64 tokens",
            ),
        ],
    )
    def test_what_a_config_asks_for_in_vain(self, checkpoint: Path, changes: dict[str, object], expected: str) -> None:
        (checkpoint / "config.json").write_text(json.dumps({"model_type": "llama", **changes}))
        (note,) = locate(spec_of(checkpoint)).notes
        assert expected in note
