"""Fingerprints of models: which files decide them, and the memo that keeps the hashes of files."""

import ast
import hashlib
import importlib.util
import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from delta_suite.errors import ModelUnavailableError
from delta_suite.models import control
from delta_suite.models import fingerprint as module
from delta_suite.models.files import TOKENIZER_FILES, ModelFiles
from delta_suite.models.fingerprint import fingerprint
from delta_suite.models.sources import base, locate

from tests.models.test_files import spec_of


def test_equal_files_have_equal_fingerprints_wherever_they_are(checkpoint: Path, tmp_path: Path) -> None:
    first = fingerprint(locate(spec_of(checkpoint)))
    assert len(first) == 64
    copy = shutil.copytree(checkpoint, tmp_path / "elsewhere")
    assert fingerprint(locate(spec_of(copy))) == first


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_every_file_that_decides_the_measurement_counts(checkpoint: Path, name: str) -> None:
    first = fingerprint(locate(spec_of(checkpoint)))
    data = bytearray((checkpoint / name).read_bytes())
    data[-1] = data[-1] ^ 1 if name.endswith(".safetensors") else data[-1]
    (checkpoint / name).write_bytes(bytes(data) + (b"" if name.endswith(".safetensors") else b"\n"))
    assert fingerprint(locate(spec_of(checkpoint))) != first


def test_other_files_do_not_count(checkpoint: Path) -> None:
    first = fingerprint(locate(spec_of(checkpoint)))
    (checkpoint / "generation_config.json").write_text('{"temperature": 1}')
    (checkpoint / "README.md").write_text("#")
    assert fingerprint(locate(spec_of(checkpoint))) == first


def test_a_renamed_file_changes_the_fingerprint(checkpoint: Path) -> None:
    first = fingerprint(locate(spec_of(checkpoint)))
    (checkpoint / "tokenizer.json").rename(checkpoint / "vocab.json")
    assert fingerprint(locate(spec_of(checkpoint))) != first


@pytest.mark.parametrize(
    "name",
    [
        *("source.spm", "bpe.codes", "vocab-src.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"),
        *("tokenizer.model.v3", "tokenizer.5.0.0.json", "qwen.tiktoken"),
    ],
)
def test_every_file_of_a_tokenizer_counts(checkpoint: Path, name: str) -> None:
    (checkpoint / name).parent.mkdir(exist_ok=True)
    seen = {fingerprint(locate(spec_of(checkpoint)))}
    for text in ("one", "two"):
        (checkpoint / name).write_text(text)
        seen.add(fingerprint(locate(spec_of(checkpoint))))
    assert len(seen) == 3


def test_the_tokenizers_of_transformers_read_no_other_files() -> None:
    """The table is kept by hand, so that no fingerprint waits for transformers; here it is compared with the source."""
    (package,) = importlib.util.find_spec("transformers").submodule_search_locations
    read = {name for path in Path(package).rglob("tokenization_*.py") for name in _vocabulary_files(path)}
    assert {"source.spm", "bpe.codes", "tokenizer.json"} <= read
    assert read <= TOKENIZER_FILES


def _vocabulary_files(path: Path) -> Iterator[str]:
    """Yield the file names in VOCAB_FILES_NAMES of one module; constants of the same module stand for their value."""
    assignments = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Assign)]
    by_name = {target.id: node.value for node in assignments for target in node.targets if isinstance(target, ast.Name)}
    for name in ("VOCAB_FILES_NAMES", "vocab_files_names"):
        if isinstance(by_name.get(name), ast.Dict):
            for value in by_name[name].values:
                constant = by_name[value.id] if isinstance(value, ast.Name) else value
                yield ast.literal_eval(constant)


@pytest.mark.parametrize(
    ("settings", "config"), [({"decoder_start_token_id": 2}, {}), ({"bos_token_id": 2}, {"is_encoder_decoder": True})]
)
def test_what_a_decoder_reads_first_counts(checkpoint: Path, settings: dict, config: dict) -> None:
    first = fingerprint(locate(spec_of(checkpoint)))
    (checkpoint / "config.json").write_text(json.dumps({"model_type": "t5", **config}))
    seen = {first}
    for token in (2, 3):
        (checkpoint / "generation_config.json").write_text(json.dumps(dict.fromkeys(settings, token)))
        seen.add(fingerprint(locate(spec_of(checkpoint))))
    assert len(seen) == 3


def test_files_that_a_config_or_trusted_code_names_count(checkpoint: Path) -> None:
    (checkpoint / "words.dat").write_text("one")
    (checkpoint / "config.5.0.0.json").write_text("{}")
    spec = spec_of(checkpoint, trust_remote_code=True)
    assert not {"words.dat", "config.5.0.0.json"} & _names(locate(spec))
    (checkpoint / "tokenizer_own.py").write_text("FILES = {'vocab_file': 'words.dat', 'old': \"model.safetensors\"}")
    (checkpoint / "config.json").write_text(json.dumps({"configuration_files": ["config.5.0.0.json"]}))
    assert {"words.dat", "config.5.0.0.json"} <= _names(locate(spec))
    assert "words.dat" not in _names(locate(spec_of(checkpoint)))
    assert len(locate(spec).others) == len(_names(locate(spec)) - {"model.safetensors"})


def test_a_tokenizer_beside_a_gguf_file_counts(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AutoTokenizer.from_pretrained(DIRECTORY, gguf_file=...) prefers the tokenizer.json that is there."""
    monkeypatch.setattr(base, "weights_problem", lambda _: None)
    monkeypatch.setattr(control, "gguf_architecture", lambda _: iter([b"llama"]))
    (checkpoint / "m.gguf").touch()
    spec = spec_of(checkpoint, gguf="m.gguf")
    assert _names(locate(spec)) == {"m.gguf", "tokenizer.json", "tokenizer_config.json"}
    seen = {of(locate(spec)) for of in (fingerprint, control.control_fingerprint)}
    (checkpoint / "config.json").write_text("{}")
    seen |= {of(locate(spec)) for of in (fingerprint, control.control_fingerprint)}
    (checkpoint / "tokenizer.json").unlink()
    seen |= {of(locate(spec)) for of in (fingerprint, control.control_fingerprint)}
    (checkpoint / "tokenizer_config.json").unlink()
    seen |= {of(locate(spec)) for of in (fingerprint, control.control_fingerprint)}
    assert len(seen) == 6


def _names(files: ModelFiles) -> set[str]:
    return {path.name for path in (*files.weights, *files.others)}


def test_the_fingerprint_is_a_hash_over_sorted_names_and_hashes(checkpoint: Path) -> None:
    lines = "".join(
        f"{name}\0{hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()}\n"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    )
    assert fingerprint(locate(spec_of(checkpoint))) == hashlib.sha256(lines.encode()).hexdigest()


# --- the memo --------------------------------------------------------------------------------------------------


@pytest.fixture
def all_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the hash of every file, however small and young."""
    monkeypatch.setattr(module, "MEMO_ABOVE", 0)
    monkeypatch.setattr(module, "SETTLED", 0.0)


@pytest.fixture
def read_anew(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are read, in some order."""
    names: list[str] = []
    original = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda path, report: names.append(path.name) or original(path, report))
    return names


@pytest.mark.usefixtures("all_kept")
def test_files_in_the_memo_are_not_read_again(checkpoint: Path, tmp_path: Path, read_anew: list[str]) -> None:
    memo, files = tmp_path / "cache/fingerprints", locate(spec_of(checkpoint))
    first = fingerprint(files, memo)
    assert len(read_anew) == 4
    assert fingerprint(files, memo) == first == fingerprint(files)
    assert len(read_anew) == 8
    assert {path.suffix for path in memo.iterdir()} <= {".json", ".lock"}


@pytest.mark.usefixtures("all_kept")
@pytest.mark.parametrize("how", ["rewritten", "replaced", "linked"])
def test_other_content_of_the_same_size_and_time_is_read(checkpoint: Path, tmp_path: Path, how: str) -> None:
    weights, other = checkpoint / "model.safetensors", tmp_path / "other"
    original = tmp_path / "original"
    shutil.copy2(weights, original)
    weights.unlink()
    weights.symlink_to(original)
    memo = tmp_path / "memo"
    first = fingerprint(locate(spec_of(checkpoint)), memo)
    data = bytearray(original.read_bytes())
    data[-1] ^= 1
    status = original.stat()
    target = original if how == "rewritten" else other
    target.write_bytes(data)
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    if how == "replaced":
        other.replace(original)
    elif how == "linked":
        weights.unlink()
        weights.symlink_to(other)
    changed = fingerprint(locate(spec_of(checkpoint)), memo)
    assert changed == fingerprint(locate(spec_of(checkpoint))) != first


@pytest.mark.usefixtures("all_kept")
def test_the_name_of_a_blob_of_the_hub_cache_is_not_believed(checkpoint: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "commit"
    shutil.copytree(checkpoint, snapshot)
    data = bytearray((snapshot / "model.safetensors").read_bytes())
    blob = snapshot.parents[1] / "blobs" / hashlib.sha256(data).hexdigest()
    blob.parent.mkdir()
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(Path("../../blobs") / blob.name)
    blob.write_bytes(data)
    first = fingerprint(locate(spec_of(snapshot)), tmp_path / "memo")
    assert first == fingerprint(locate(spec_of(checkpoint)))
    data[-1] ^= 1
    blob.write_bytes(data)
    assert fingerprint(locate(spec_of(snapshot)), tmp_path / "memo") != first


def test_small_files_and_files_that_were_just_written_are_read_each_time(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_anew: list[str]
) -> None:
    files, memo = locate(spec_of(checkpoint)), tmp_path / "memo"
    monkeypatch.setattr(module, "MEMO_ABOVE", (checkpoint / "model.safetensors").stat().st_size)
    monkeypatch.setattr(module, "SETTLED", 3600.0)
    for _ in range(2):
        fingerprint(files, memo)
    assert read_anew.count("model.safetensors") == 2
    monkeypatch.setattr(module, "SETTLED", 0.0)
    for _ in range(2):
        fingerprint(files, memo)
    assert read_anew.count("model.safetensors") == 3
    assert read_anew.count("config.json") == 4


def test_a_file_that_changes_while_it_is_read_is_an_error(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def changed_meanwhile(path: Path, _: object) -> str:
        path.write_bytes(path.read_bytes() + b" ")
        return "0" * 64

    files = locate(spec_of(checkpoint))
    monkeypatch.setattr(module, "_sha256", changed_meanwhile)
    with pytest.raises(ModelUnavailableError, match=r"was changed while it was read\. Run again"):
        fingerprint(files)


def test_a_file_that_is_gone_is_an_error(checkpoint: Path) -> None:
    files = replace(locate(spec_of(checkpoint)), weights=(checkpoint / "gone.safetensors",))
    with pytest.raises(ModelUnavailableError, match=r"gone\.safetensors was removed while it was read"):
        fingerprint(files)


@pytest.mark.usefixtures("all_kept")
@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"sha256": 3}', '{"state": [], "sha256": "x"}', "\0"])
def test_a_damaged_memo_is_ignored_and_written_again(checkpoint: Path, tmp_path: Path, text: str) -> None:
    memo, files = tmp_path / "memo", locate(spec_of(checkpoint))
    first = fingerprint(files, memo)
    for path in memo.glob("*.json"):
        path.write_text(text)
    assert fingerprint(files, memo) == first
    assert all(json.loads(path.read_text())["state"] for path in memo.glob("*.json"))


@pytest.mark.usefixtures("all_kept")
@pytest.mark.parametrize("obstacle", ["a file for the folder", "folders for the files", "nothing may be written"])
def test_a_memo_that_cannot_be_written_stops_no_run(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, obstacle: str
) -> None:
    memo, files = tmp_path / "cache" / "memo", locate(spec_of(checkpoint))
    if obstacle == "a file for the folder":
        memo.parent.touch()
    elif obstacle == "folders for the files":
        fingerprint(files, memo)
        for path in list(memo.iterdir()):
            path.unlink()
            path.mkdir()
    else:  # root may write into every folder, so permissions cannot be tried

        def refuse(*_: object, **__: object) -> None:
            raise PermissionError(30, "Read-only file system")

        monkeypatch.setattr(module.FileLock, "acquire", refuse)
    assert fingerprint(files, memo) == fingerprint(files)


@pytest.mark.usefixtures("all_kept")
def test_models_do_not_wait_for_each_other(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one model's file is being hashed, another model's fingerprint is computed to its end."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    hashing, other_is_done, original = threading.Event(), threading.Event(), module._sha256

    def slow(path: Path, report: module._Report) -> str:
        if path == checkpoint / "model.safetensors":
            hashing.set()
            assert other_is_done.wait(60)
        return original(path, report)

    monkeypatch.setattr(module, "_sha256", slow)
    memo, results = tmp_path / "memo", []
    first = threading.Thread(target=lambda: results.append(fingerprint(locate(spec_of(checkpoint)), memo)))
    first.start()
    assert hashing.wait(60)
    results.append(fingerprint(locate(spec_of(other)), memo))
    other_is_done.set()
    first.join(60)
    assert len(results) == 2
    assert len(set(results)) == 1


def _counted(files: ModelFiles, memo: Path) -> tuple[str, int]:
    module.MEMO_ABOVE, module.SETTLED = 0, 0.0
    count, original = [], module._sha256
    module._sha256 = lambda path, report: count.append(path) or time.sleep(0.05) or original(path, report)
    try:
        return fingerprint(files, memo), len(count)
    finally:
        module._sha256 = original


def test_of_several_processes_one_reads_a_file(checkpoint: Path, tmp_path: Path) -> None:
    memo, files = tmp_path / "memo", locate(spec_of(checkpoint))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(_counted, [(files, memo)] * 6)
    assert {digest for digest, _ in results} == {fingerprint(files)}
    assert sum(count for _, count in results) == 4
