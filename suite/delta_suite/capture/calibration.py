"""Calibration sets: the documents to measure on, and their token sequences."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from delta_suite.capture.texts import HUB, HUB_DOCUMENTS, read_texts
from delta_suite.command_line import EMPTY_VALUE
from delta_suite.errors import CalibrationError

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

MAX_TOKENS = 2048
"""Longest sequence that runs through a model, the `max_length` of the reference script; longer documents run in
pieces."""

CORE_TOKENS = 128
"""Number of tokens of each document of `core` that run. Its documents have at least 220 under every tokenizer that was
tried (data/DATASHEET.md), so each document and each domain has the same number of rows."""

BUNDLED = ("core", "seed")
"""Names of the calibration sets in the package."""


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


@dataclass(frozen=True)
class TokenSequences:
    """Token sequences to run: pieces of documents, longest first, so that memory runs out at the start or never."""

    ids: tuple[Int64[Tensor, " tokens"], ...]
    """The token ids of each piece."""
    documents: tuple[int, ...]
    """The document of each piece."""
    starts_document: tuple[bool, ...]
    """True for each piece that holds the first token of its document."""
    drop_first_token: bool
    """True if the first token of each document is dropped from the stream."""

    @property
    def tokens(self) -> int:
        """Number of all tokens that run through the model, dropped ones included."""
        return sum(len(ids) for ids in self.ids)


def load_calibration(name: str, documents: int | None = None) -> Calibration:
    """Return a bundled set by name, or the documents of a file, folder or hub dataset.

    Only the first `documents` are taken, if a number is given.

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
    if documents is not None and documents < 1:
        raise CalibrationError(f"--documents {documents}: a calibration has at least one document.")
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
        return Calibration(name, read_texts(name, documents), first=documents)
    texts = read_texts(name, documents)
    return Calibration(Path(name).resolve().name, texts, first=documents)


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


def tokenize(calibration: Calibration, tokenizer: Any, vocabulary: int, context: int | None) -> TokenSequences:
    """Return the token sequences of the documents, with the special tokens that the tokenizer adds.

    Of each document the first `tokens_per_document` tokens run. A document that is still longer than MAX_TOKENS, or
    than the `context` of the model, runs in pieces of that length; of `seed` only the first piece is kept, as the
    reference script does.

    Raises CalibrationError where fewer than two tokens remain, or an id lies outside the model's `vocabulary`.
    """
    import torch

    if context is not None and context < 2:
        raise CalibrationError(
            f"the model's config says max_position_embeddings = {context}, and no document of one token can be "
            f"measured. Correct it in the model's config.json."
        )
    limit = min(MAX_TOKENS, context or MAX_TOKENS)
    pieces: list[tuple[Tensor, int, bool]] = []
    for document, text in enumerate(calibration.documents):
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        if len(ids) and int(ids.max()) >= vocabulary:
            raise CalibrationError(
                f"the tokenizer gives id {int(ids.max())} in document {document} of calibration {calibration.name!r}, "
                f"but the model embeds only {vocabulary} ids: tokenizer and weights do not belong together. "
                f"Check the model directory's tokenizer files."
            )
        for index, piece in enumerate(torch.split(ids[: calibration.tokens_per_document], limit)):
            if len(piece) and (index == 0 or not calibration.drop_first_token):
                pieces.append((piece, document, index == 0))
    pieces.sort(key=lambda piece: -len(piece[0]))  # stable: equal lengths stay in document order
    kept = sum(len(ids) - (calibration.drop_first_token and first) for ids, _, first in pieces)
    if kept < 2:
        raise CalibrationError(
            f"calibration {calibration.name!r} leaves {kept} token(s) under this model's tokenizer; "
            f"a spectrum needs at least 2. Give it more text."
        )
    return TokenSequences(
        ids=tuple(ids for ids, _, _ in pieces),
        documents=tuple(document for _, document, _ in pieces),
        starts_document=tuple(first for _, _, first in pieces),
        drop_first_token=calibration.drop_first_token,
    )
