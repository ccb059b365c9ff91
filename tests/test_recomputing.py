"""`verify --recompute`: a tiny model measured again, and every way in which that is no confirmation."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from delta_suite.cli import app
from delta_suite.errors import UnknownModelError
from delta_suite.models.models_file import load_registry
from delta_suite.models.recorded import recorded_model
from delta_suite.models.spec import ModelSpec
from delta_suite.pipeline import Settings, measure
from delta_suite.records import store
from delta_suite.records.arrays import pack, unpack
from delta_suite.records.cache import Cache
from typer.testing import CliRunner, Result

from tests.tiny import make_tiny

Content = dict[str, Any]
Alter = Callable[[Callable[[Content], object]], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("again") / "small", layers=4, hidden=16)


@pytest.fixture(scope="module")
def small(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A record of four layers on eight documents, with a phase map of its own."""
    root = tmp_path_factory.mktemp("first")
    spec = ModelSpec(name="small", path=model, phases={"C": (0, 2), "E": (3, 3)})
    settings = Settings(documents=8, device="cpu", results=root, cache=Cache(root / "cache"))
    return measure(spec, settings).path


def verify(record: Path, *options: str) -> Result:
    return CliRunner().invoke(app, ["verify", str(record), "--recompute", "--device", "cpu", *options])


@pytest.fixture
def altered(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alter:
    """A function that changes the record in one respect, of which `verify` alone says nothing."""
    monkeypatch.setattr(store, "problems", lambda *_: [])

    def alter(change: Callable[[Content], object]) -> Path:
        content = json.loads(small.read_text())
        change(content)
        shutil.copy(small.with_suffix(".safetensors"), tmp_path)
        (tmp_path / small.name).write_text(json.dumps(content))
        return tmp_path / small.name

    return alter


def test_a_record_is_confirmed_and_nothing_is_written(small: Path) -> None:
    before = sorted(small.parents[2].rglob("*"))
    result = verify(small)
    assert result.exit_code == 0, result.output
    assert "again, and nothing else: spectra" in result.stderr
    assert "measured again on cpu in float32 (the record: cpu, float32):" in result.output
    assert "figures agree within 1e-5, 0 differ" in result.output
    assert sorted(small.parents[2].rglob("*")) == before


def test_forged_figures_are_one_table(altered: Alter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # so that no name is wrapped

    def forge(content: Content) -> None:
        content["layers"][1]["metrics"]["raw"]["effective_rank"]["value"] *= 1.001
        content["scopes"]["C"]["metrics"]["raw"]["intra_cosine"]["interval"][0] -= 0.2

    result = verify(altered(forge))
    assert result.exit_code == 1
    assert "2 differ" in result.output
    table = [line.split() for line in result.output.splitlines() if line.startswith("small ")]
    assert [row[1] for row in table] == ["C", "layer:1"]  # what differs most comes first
    assert {"effective_rank", "intra_cosine"} == {word for row in table for word in row if "_" in word}


def test_replicates_in_another_order_are_not_confirmed(small: Path, tmp_path: Path) -> None:
    """Every figure follows from them as before, so that nothing in the record contradicts it."""
    beside = small.with_suffix(".safetensors")
    arrays = dict(unpack(beside.read_bytes(), beside))
    arrays["raw.units.effective_rank"] = arrays["raw.units.effective_rank"][::-1]
    packed = pack(arrays)
    (tmp_path / beside.name).write_bytes(packed)
    content = json.loads(small.read_text())
    content["arrays"]["sha256"] = hashlib.sha256(packed).hexdigest()
    (tmp_path / small.name).write_text(json.dumps(content))
    assert store.examine(tmp_path / small.name).problems == []
    result = verify(tmp_path / small.name)
    assert result.exit_code == 1
    assert "the replicates of raw.units.effective_rank are of other groups than those here" in result.stderr


def test_other_arithmetic_is_held_to_the_intervals(altered: Alter) -> None:
    def on_a_gpu(content: Content) -> None:
        content["provenance"] |= {"device": "cuda", "hardware": "1 x GPU"}
        content["layers"][1]["metrics"]["raw"]["effective_rank"]["corrected"] *= 1.001

    result = verify(altered(on_a_gpu))
    assert result.exit_code == 0, result.output
    assert "(the record: cuda, float32)" in result.output
    assert "figures agree within their intervals, 0 differ" in result.output


def of_other_files(content: Content) -> None:
    content["model"]["fingerprint"] = "f" * 64


def of_other_texts(content: Content) -> None:
    content["calibration"]["sha256"] = "f" * 64


def of_a_file(content: Content) -> None:
    content["calibration"]["name"] = "mine.jsonl"


def from_elsewhere(content: Content) -> None:
    content["model"]["source"] = "directory:/nowhere/at/all"


def in_memory(content: Content) -> None:
    content["model"]["source"] = "memory:LlamaForCausalLM"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (of_other_files, "the files here are others: their fingerprint is"),
        (of_other_texts, "the texts of core here are others"),
        (of_a_file, "its calibration is a file, 'mine.jsonl': name it with --calibration"),
        (from_elsewhere, "its directory /nowhere/at/all is not on this machine: name the model"),
        (in_memory, "it was a module in memory"),
    ],
)
def test_what_cannot_be_measured_again_is_not_confirmed(
    altered: Alter, change: Callable[[Content], object], expected: str
) -> None:
    result = verify(altered(change))
    assert result.exit_code == 1
    assert "is not confirmed: " in result.stderr
    assert expected in result.stderr
    assert "Internal error" not in result.stderr


def test_the_place_of_the_files_can_be_named(altered: Alter, model: Path) -> None:
    result = verify(altered(from_elsewhere), "--model", str(model))
    assert result.exit_code == 0, result.output


def test_a_model_is_named_for_one_record_alone(small: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(small), str(small), "--recompute", "--model", "x"])
    assert result.exit_code == 2
    assert "--model is of one record, and 2 are given" in result.stderr
    assert CliRunner().invoke(app, ["verify", str(small), "--model", "x"]).exit_code == 2


@pytest.mark.parametrize(
    ("source", "revision", "expected"),
    [
        ("hub:Qwen/Qwen3-0.6B", "0" * 40, {"name": "qwen3-0.6b", "revision": "0" * 40}),
        ("hub:acme/tiny", None, {"hub": "acme/tiny", "revision": None}),
        ("hub:acme/tiny/quants/m.gguf", None, {"hub": "acme/tiny", "gguf": "quants/m.gguf"}),
        ("package:llm_other/m.gguf", None, {"package": "llm_other", "gguf": "m.gguf"}),
        ("random-weights, seed 0, splitmix64, as hub:acme/tiny", None, {"hub": "acme/tiny", "random_weights": True}),
    ],
)
def test_a_source_is_found_again(source: str, revision: str | None, expected: dict[str, object]) -> None:
    spec = recorded_model(load_registry(), source, revision)
    assert {key: getattr(spec, key) for key in expected} == expected
    assert spec.source == source


@pytest.mark.parametrize("source", ["", "hub:", "hub:../..", "package:os/../x.gguf", "package:a b/m.gguf", "nonsense"])
def test_what_is_no_source(source: str) -> None:
    with pytest.raises(UnknownModelError, match="name the model"):
        recorded_model(load_registry(), source, None)
