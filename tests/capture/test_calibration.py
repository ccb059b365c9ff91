"""Calibration sets: reading, token sequences, and the errors of bad files."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from delta_suite.capture.calibration import calibration_of, first_bytes, headline, load_calibration
from delta_suite.capture.tokens import MAX_TOKENS, tokenize
from delta_suite.errors import CalibrationError


class Words:
    """A tokenizer of one id per word."""

    def __call__(self, text: str, **options: object) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


def test_seed_is_the_reference_stream() -> None:
    seed = load_calibration("seed")
    assert len(seed.documents) == 1
    assert seed.drop_first_token
    assert seed.documents[0].startswith("The Eiffel Tower is located in\n\nPhotosynthesis")
    assert seed.documents[0].count("\n\n") >= 24


def test_core_is_the_declared_set() -> None:
    core = load_calibration("core")
    assert len(core.documents) == 112
    assert core.bytes_per_document == 512
    assert not core.drop_first_token


def test_core_english_is_the_english_of_core() -> None:
    core, english = load_calibration("core"), load_calibration("core-english")
    expected = [text for text, language in zip(core.documents, core.languages, strict=True) if language == "en"]
    assert list(english.documents) == expected
    assert english.units.count == 56
    assert load_calibration("core-english", 12).documents == english.documents[:12]


@pytest.mark.parametrize("text", ["plain words", "naïve café", "кириллица", "漢字かな交じり", "𝔘𝔫𝔦", "e\u0301te\u0301"])
def test_a_cut_in_bytes_keeps_whole_characters(text: str) -> None:
    for limit in range(len(text.encode()) + 2):
        cut = first_bytes(text, limit)
        assert text.startswith(cut)
        following = text[len(cut) : len(cut) + 1]
        assert len(cut.encode()) <= limit
        assert not following or len((cut + following).encode()) > limit


def test_the_hash_names_texts_and_their_borders(tmp_path: Path) -> None:
    for name, texts in {"a": ["one two", "three"], "b": ["one", "two three"], "c": ["one two", "three"]}.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    a, b, c = (load_calibration(str(tmp_path / f"{name}.jsonl")).sha256 for name in "abc")
    assert a == c != b


def test_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "notes.pdf").write_text("not read")
    assert load_calibration(str(tmp_path)).documents == ("first", "second")
    assert load_calibration(str(tmp_path / "b.txt")).documents == ("second",)


@pytest.mark.parametrize(
    ("name", "content", "telling"),
    [
        ("bad.jsonl", '{"text": "fine"}\n{"txt": "no"}\n', r"bad.jsonl:2: not a document"),
        ("bad.jsonl", '{"text": "fine"}\n{broken\n', r"bad.jsonl:2: not a document"),
        ("empty.txt", "  \n", "holds no text"),
        ("latin.txt", b"caf\xe9", "UTF-8"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, name: str, content: str | bytes, telling: str) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalibrationError, match=telling):
        load_calibration(str(path))


@pytest.mark.parametrize(
    ("texts", "telling"),
    [
        ("one text", "is one string"),
        (b"one text", "is bytes, and a calibration is a list"),
        ({"one text": "another"}, "is dict, whose keys or columns are no texts"),
        (SimpleNamespace(columns=["text"]), "is SimpleNamespace, whose keys or columns are no texts"),
        ({"one text", "another"}, r"is set, which has no order, and figures must repeat: texts=sorted"),
        (Path("texts.txt"), r"is PosixPath, and a file or folder is read by calibration='texts\.txt'"),
        (["one text", None], r"texts\[1\] is NoneType, not text"),
        (iter([["one text"]]), r"texts\[0\] is list, not text"),
        (5, "is int, and a calibration is a list"),
    ],
)
def test_what_is_no_list_of_texts_is_refused(texts: Any, telling: str) -> None:
    with pytest.raises(CalibrationError, match=f"^texts.*{telling}" if telling.startswith("is") else telling):
        calibration_of(texts)


def test_texts_may_be_drawn_from_a_generator() -> None:
    assert calibration_of(text for text in ("one text", "another")).documents == ("one text", "another")


def test_the_header_says_what_a_set_is_good_for(tmp_path: Path) -> None:
    assert headline("core") == "core (112 documents, the first 512 bytes of each)"
    assert headline("core", 20) == "core (20 documents, the first 512 bytes of each)"
    assert "no interval" in headline("seed")
    assert headline("hf:org/corpus") == "hf:org/corpus (its first 128 documents)"
    assert headline(str(tmp_path / "absent.txt")) == str(tmp_path / "absent.txt")  # not read for the header


def test_unknown_names_list_the_bundled_sets() -> None:
    with pytest.raises(CalibrationError, match="core, core-english, seed"):
        load_calibration("cor")


def test_long_documents_run_in_pieces_and_keep_their_document(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    texts = ["a b c", "word " * (2 * MAX_TOKENS + 5)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    sequences = tokenize(load_calibration(str(path)), Words(), vocabulary=100, context=None)
    assert [len(ids) for ids in sequences.ids] == [MAX_TOKENS, MAX_TOKENS, 5, 3]
    assert sequences.documents == (1, 1, 1, 0)
    assert sequences.starts_document == (True, False, False, True)
    assert sequences.tokens == 2 * MAX_TOKENS + 8
    short = tokenize(load_calibration(str(path)), Words(), vocabulary=100, context=1000)
    assert max(len(ids) for ids in short.ids) == 1000


def test_the_seed_keeps_its_first_piece_only() -> None:
    sequences = tokenize(load_calibration("seed"), Words(), vocabulary=100, context=16)
    assert len(sequences.ids) == 1
    assert len(sequences.ids[0]) == 16
    assert torch.equal(sequences.ids[0][:3], torch.tensor([3, 6, 5]))


def test_a_context_of_one_token_is_the_models_fault() -> None:
    with pytest.raises(CalibrationError, match=r"max_position_embeddings = 1, (?s:.*)config\.json"):
        tokenize(load_calibration("seed"), Words(), vocabulary=100, context=1)


def test_a_foreign_tokenizer_is_caught() -> None:
    with pytest.raises(CalibrationError, match="do not belong together"):
        tokenize(load_calibration("seed"), Words(), vocabulary=5, context=None)


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("word")
    with pytest.raises(CalibrationError, match="at least 2"):
        tokenize(load_calibration(str(tmp_path / "one.txt")), Words(), vocabulary=100, context=None)
