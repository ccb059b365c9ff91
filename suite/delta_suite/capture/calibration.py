"""Calibration sets: the documents to measure on."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from delta_suite.capture.texts import HUB, HUB_DOCUMENTS, read_texts
from delta_suite.command_line import DOCUMENTS_OUT_OF_BOUNDS, EMPTY_VALUE, MOST_DOCUMENTS
from delta_suite.errors import CalibrationError

CORE_TOKENS = 128
"""Number of tokens of each document of `core` that run. Its documents have at least 220 under every tokenizer that was
tried (data/DATASHEET.md), so each document and each domain has the same number of rows."""


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
    tokens_per_document: int | None = None
    """Number of tokens of each document that run, special tokens included; None means the whole document."""
    first: int | None = None
    """Number of documents that were taken from the start of the source; None means all of them."""
    duplicates: int = 0
    """Number of documents that were left out because they repeat another."""

    @property
    def sha256(self) -> str:
        """Hash of the texts in order and of the token limit, so that it identifies exactly what ran."""
        digest = hashlib.sha256()
        for text in self.documents:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        if self.tokens_per_document is not None:
            digest.update(f"first {self.tokens_per_document} tokens".encode())
        return digest.hexdigest()


def load_calibration(name: str, documents: int | None = None) -> Calibration:
    """Return a bundled set by name, or the documents of a file, folder or hub dataset.

    Only the first `documents` are taken, if a number is given. A text that repeats another, but for white space, is
    left out, and does not count among them.

    `core` has 136 documents in 17 domains and 8 languages; the first 128 tokens of each run, each document by itself
    (data/DATASHEET.md). `seed` is the stream of the reference script: its 25 prompts joined by blank lines, one
    document whose first token is dropped. It serves parity: one document has no halves and no interval. Any other name
    is read by `texts.read_texts`: a `.jsonl` or `.parquet` file (key or column `text`), a folder (one document per
    `.txt` or `.md` file, by name), any other file (one document), or `hf:org/name[/config][:split[:column]]`, of which
    128 documents are taken where no number is given.

    Raises CalibrationError for an unknown name, and for unreadable, empty or malformed files.

    Example:
        >>> core = load_calibration("core", documents=20)
        >>> len(core.documents), core.tokens_per_document
        (20, 128)
    """
    if documents is not None and not 1 <= documents <= MOST_DOCUMENTS:
        raise CalibrationError(DOCUMENTS_OUT_OF_BOUNDS)
    if not name:
        raise CalibrationError(f"--calibration {EMPTY_VALUE}")  # as a path it would be the current folder
    if name == "seed":
        prompts = json.loads(_bundled("seed.json"))
        return Calibration("seed", ("\n\n".join(prompts),), drop_first_token=True)
    if name == "core":
        texts = tuple(json.loads(line)["text"] for line in _bundled("core.jsonl").splitlines())
        return Calibration("core", texts[:documents], tokens_per_document=CORE_TOKENS, first=documents)
    if name.startswith(HUB):
        documents = documents or HUB_DOCUMENTS
    texts, duplicates = read_texts(name, documents)
    if not name.startswith(HUB):
        name = _utf8_name(Path(name).resolve())
    return Calibration(name, texts, first=documents, duplicates=duplicates)


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
    if name == "core":
        core = load_calibration(name, documents)
        return f"core ({len(core.documents)} documents, the first {core.tokens_per_document} tokens of each)"
    if name.startswith(HUB):
        documents = documents or HUB_DOCUMENTS
    return name + (f" (its first {documents} documents)" if documents else "")


def _bundled(name: str) -> str:
    return resources.files("delta_suite.capture").joinpath(f"data/{name}").read_text("utf-8")
