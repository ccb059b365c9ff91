"""Fingerprints of models: which files decide them, and the memo that keeps the hashes of files."""

import json
import multiprocessing
import os
import shutil
from pathlib import Path

import pytest
from delta_suite.errors import RecordError
from delta_suite.models import fingerprint as module
from delta_suite.models.fingerprint import fingerprint
from delta_suite.models.sources import locate

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


def test_files_in_the_memo_are_not_read_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memo, files = tmp_path / "cache/fingerprints.json", locate(spec_of(checkpoint))
    assert fingerprint(files, memo) == fingerprint(files)
    monkeypatch.setattr(module, "_sha256", lambda *_: pytest.fail("a file was read again"))
    assert fingerprint(files, memo)
    assert not [path for path in memo.parent.iterdir() if path.name not in (memo.name, f"{memo.name}.lock")]


def test_a_changed_file_is_read_again(checkpoint: Path, tmp_path: Path) -> None:
    memo, files = tmp_path / "fingerprints.json", locate(spec_of(checkpoint))
    first = fingerprint(files, memo)
    stat = (checkpoint / "model.safetensors").stat()
    data = bytearray((checkpoint / "model.safetensors").read_bytes())
    data[-1] ^= 1  # the same size; only the time tells
    (checkpoint / "model.safetensors").write_bytes(data)
    os.utime(checkpoint / "model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert fingerprint(files, memo) != first


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 3}'])
def test_a_damaged_memo_is_written_again(checkpoint: Path, tmp_path: Path, text: str) -> None:
    memo, files = tmp_path / "fingerprints.json", locate(spec_of(checkpoint))
    memo.write_text(text)
    assert fingerprint(files, memo) == fingerprint(files)
    assert len(json.loads(memo.read_text())) == 4


def test_a_memo_that_cannot_be_written_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RecordError, match=r"memo of fingerprints .* cannot be written"):
        fingerprint(locate(spec_of(checkpoint)), tmp_path / "file" / "fingerprints.json")


def test_a_folder_in_place_of_the_memo_is_named(checkpoint: Path, tmp_path: Path) -> None:
    memo = tmp_path / "cache" / "fingerprints.json"
    memo.mkdir(parents=True)
    with pytest.raises(RecordError, match=r"memo of fingerprints .* cannot be written \(Is a directory\)"):
        fingerprint(locate(spec_of(checkpoint)), memo)
    assert {path.name for path in memo.parent.iterdir()} == {memo.name, f"{memo.name}.lock"}


def test_processes_share_a_memo(checkpoint: Path, tmp_path: Path) -> None:
    memo, files = tmp_path / "fingerprints.json", locate(spec_of(checkpoint))
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.starmap(fingerprint, [(files, memo)] * 6)
    assert set(results) == {fingerprint(files)}
    assert len(json.loads(memo.read_text())) == 4
