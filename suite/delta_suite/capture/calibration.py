"""Calibration sets: the documents to measure on."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

from delta_suite.capture.texts import HUB, HUB_DOCUMENTS, Document, distinct, listed, read_texts
from delta_suite.capture.units import Units
from delta_suite.command_line import DOCUMENTS_OUT_OF_BOUNDS, EMPTY_VALUE, MOST_DOCUMENTS
from delta_suite.errors import CalibrationError

CORE_BYTES = 512
"""Number of UTF-8 bytes of each document of `core` that run, or a few less where a character would be cut. A limit in
bytes gives every tokenizer the same text; tokens of one text differ fivefold between languages (data/DATASHEET.md)."""

CORE_ENGLISH = "core-english"
CORES = ("core", CORE_ENGLISH)
"""The default set, and its documents in English, for models that know no other language."""

BUNDLED = (*CORES, "seed")
"""The sets that come with the package, by name; every other name is a file, a folder or a dataset."""


@dataclass(frozen=True)
class Calibration:
    """Documents to measure on. Each runs through the model by itself, from position 0.

    Example:
        >>> Calibration("mine", ("one text", "another")).sha256[:8]
        'e103817f'
    """

    name: str
    documents: tuple[str, ...]
    """The text of each document."""
    drop_first_token: bool = False
    """True if the first token of each document is dropped, as the reference script does with its one stream."""
    bytes_per_document: int | None = None
    """Number of UTF-8 bytes that the documents were cut at; None means that they are whole."""
    first: int | None = None
    """Number of documents that were taken from the start of the source; None means all of them."""
    duplicates: int = 0
    """Number of documents that were left out because they repeat another."""
    domains: tuple[str, ...] = ()
    """The domain of each document; empty where none are declared."""
    languages: tuple[str | None, ...] = ()
    """The language of each document, None where it is not declared; empty where none are."""

    @cached_property
    def units(self) -> Units:
        """The units that intervals are formed over: domains where they are declared, else documents."""
        return Units.of(len(self.documents), self.domains)

    @property
    def documents_by_language(self) -> dict[str, int]:
        """The number of documents in each language; empty where none are declared."""
        return dict(Counter(language or "unknown" for language in self.languages))

    @property
    def sha256(self) -> str:
        """Hash of the texts in order, as they run."""
        digest = hashlib.sha256()
        for text in self.documents:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()


def load_calibration(name: str, documents: int | None = None) -> Calibration:
    """Return a bundled set by name, or the documents of a file, folder or hub dataset.

    Only the first `documents` are taken, if a number is given. A text that repeats another, but for white space, is
    left out, and does not count among them.

    `core` has 112 documents, each of a domain of its own, in 8 languages and in code; the first 512 bytes of each run
    (data/DATASHEET.md). `core-english` is its 56 documents in English. `seed` is the stream of the reference script:
    its 25 prompts joined by blank lines, one document whose first token is dropped. It serves parity: one document has
    no halves and no interval. Any other name is read by `texts.read_texts`: a `.jsonl` or `.parquet` file (key or
    column `text`, and `domain` and `language` where it has them), a folder (one document per `.txt` or `.md` file, by
    name), any other file (one document), or `hf:org/name[/config][:split[:column]]`, of which 128 documents are taken
    where no number is given.

    Raises CalibrationError for an unknown name, and for unreadable, empty or malformed files.

    Example:
        >>> core = load_calibration("core", documents=20)
        >>> len(core.documents), max(len(text.encode()) for text in core.documents)
        (20, 512)
    """
    if documents is not None and not 1 <= documents <= MOST_DOCUMENTS:
        raise CalibrationError(DOCUMENTS_OUT_OF_BOUNDS)
    if not name:
        raise CalibrationError(f"--calibration {EMPTY_VALUE}")  # as a path it would be the current folder
    if name == "seed":
        prompts = json.loads(_bundled("seed.json"))
        return Calibration("seed", ("\n\n".join(prompts),), drop_first_token=True)
    if name in CORES:
        rows = [json.loads(line) for line in _bundled("core.jsonl").splitlines()]
        if name == CORE_ENGLISH:
            rows = [row for row in rows if row["language"] == "en"]
        cut = [
            Document(first_bytes(row["text"], CORE_BYTES), row["domain"], row["language"]) for row in rows[:documents]
        ]
        return _calibration(name, cut, bytes_per_document=CORE_BYTES, first=documents)
    if name.startswith(HUB):
        documents = documents or HUB_DOCUMENTS
    texts, duplicates = read_texts(name, documents)
    if not name.startswith(HUB):
        name = _utf8_name(Path(name).resolve())
    return _calibration(name, texts, first=documents, duplicates=duplicates)


def load_calibrations(names: Iterable[str], documents: int | None = None) -> dict[str, Calibration]:
    """Return the calibrations of these names, each read once. Raises CalibrationError as `load_calibration` does.

    Example:
        >>> list(load_calibrations(["seed", "core", "seed"]))
        ['seed', 'core']
    """
    return {name: load_calibration(name, documents) for name in dict.fromkeys(names)}


def _calibration(
    name: str,
    documents: Sequence[Document],
    *,
    first: int | None,
    duplicates: int = 0,
    bytes_per_document: int | None = None,
) -> Calibration:
    """Return the calibration of documents, which either all have a domain, or none."""
    domains = tuple(document.domain for document in documents if document.domain is not None)
    languages = tuple(document.language for document in documents)
    return Calibration(
        name,
        tuple(document.text for document in documents),
        bytes_per_document=bytes_per_document,
        first=first,
        duplicates=duplicates,
        domains=domains,
        languages=languages if any(languages) else (),
    )


def first_bytes(text: str, limit: int) -> str:
    """Return the longest start of a text that has at most `limit` bytes in UTF-8. No character is cut.

    Example:
        >>> first_bytes("naïve", 3)
        'na'
    """
    return text.encode()[:limit].decode(errors="ignore")


def calibration_of(texts: Iterable[str], documents: int | None = None) -> Calibration:
    """Return the calibration `texts` of a list of texts, as a file of them would be read.

    Blank ones, and those that repeat another, are left out, and only the first `documents` are taken, if a number is
    given. Raises CalibrationError for what is no text, and where none is left.

    Example:
        >>> calibration_of(["one text", "another", "one text"]).documents
        ('one text', 'another')
    """
    chosen, duplicates = distinct(map(Document, listed(texts)), documents)
    if not chosen:
        raise CalibrationError("texts holds no text. Give it at least one document.")
    return _calibration("texts", chosen, first=documents, duplicates=duplicates)


def _utf8_name(path: Path) -> str:
    try:
        path.name.encode()
    except UnicodeEncodeError:
        raise CalibrationError(f"calibration {path.name!a}: the name is not UTF-8. Rename it.") from None
    return path.name


def headline(name: str, documents: int | None = None) -> str:
    """Describe a calibration for the header of a run. No file is read except those of bundled sets.

    Example:
        >>> headline("hf:org/corpus")
        'hf:org/corpus (its first 128 documents)'
    """
    if name == "seed":
        return "seed (one document, so no interval; it is there for parity)"
    if name in CORES:
        core = load_calibration(name, documents)
        return f"{name} ({len(core.documents)} documents, the first {core.bytes_per_document} bytes of each)"
    if name.startswith(HUB):
        documents = documents or HUB_DOCUMENTS
    return name + (f" (its first {documents} documents)" if documents else "")


def _bundled(name: str) -> str:
    return resources.files("delta_suite.capture").joinpath(f"data/{name}").read_text("utf-8")
