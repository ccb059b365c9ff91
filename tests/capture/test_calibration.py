"""Calibration sets: reading, token sequences, and the errors of bad files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from delta_suite.capture.calibration import Calibration, headline, load_calibration
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
    assert len(core.documents) == 136
    assert core.tokens_per_document == 128
    assert not core.drop_first_token


def test_the_token_limit_cuts_each_document_and_is_in_the_hash() -> None:
    limited = Calibration("x", ("a b c d", "word " * 9, "f"), tokens_per_document=3)
    sequences = tokenize(limited, Words(), vocabulary=100, context=None)
    assert [ids.tolist() for ids in sequences.ids] == [[1, 1, 1], [4, 4, 4], [1]]
    assert sequences.starts_document == (True, True, True)
    assert limited.sha256 not in {
        replace(limited, tokens_per_document=None).sha256,
        replace(limited, tokens_per_document=4).sha256,
    }


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


def test_the_header_says_what_a_set_is_good_for(tmp_path: Path) -> None:
    assert headline("core") == "core (136 documents, the first 128 tokens of each)"
    assert headline("core", 20) == "core (20 documents, the first 128 tokens of each)"
    assert "no interval" in headline("seed")
    assert headline("hf:org/corpus") == "hf:org/corpus (its first 128 documents)"
    assert headline(str(tmp_path / "absent.txt")) == str(tmp_path / "absent.txt")  # not read for the header


def test_unknown_names_list_the_bundled_sets() -> None:
    with pytest.raises(CalibrationError, match="core, seed"):
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
