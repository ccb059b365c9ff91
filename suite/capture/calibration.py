"""Calibration sets: documents, and the token sequences that a tokenizer makes of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from suite.errors import CalibrationError

if TYPE_CHECKING:
    from jaxtyping import Int64
    from torch import Tensor

MAX_TOKENS = 2048
"""Longest sequence run through a model, the reference's `max_length`; longer documents run in several pieces."""

DEFAULT_CALIBRATION = "seed"

BUNDLED = ("seed", "core")
"""Calibration sets that come with the suite."""


@dataclass(frozen=True)
class Calibration:
    """Documents to measure on. `sha256` is taken over the texts in order, so it names exactly what was read."""

    name: str
    documents: tuple[str, ...]
    drop_first_token: bool = False
    """The reference drops the first token of its one stream."""

    @property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for text in self.documents:
            encoded = text.encode()
            digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()


@dataclass(frozen=True)
class TokenSequences:
    """What goes through the model: pieces of documents, longest first, so that memory is tested at the start."""

    ids: tuple[Int64[Tensor, " tokens"], ...]
    documents: tuple[int, ...]
    """The document that each piece comes from."""
    starts_document: tuple[bool, ...]
    """Whether the piece holds its document's first token."""
    drop_first_token: bool

    @property
    def tokens(self) -> int:
        """All tokens that run through the model, the dropped ones included."""
        return sum(len(ids) for ids in self.ids)


def load_calibration(name: str) -> Calibration:
    """A bundled set by name, or the documents of a file or folder.

    `seed`: the reference's 25 prompts joined by blank lines, one document, its first token dropped. It is there for
    parity; one document has no halves and no interval. `core`: 136 documents in 17 domains and 8 languages, each run
    apart (capture/data/DATASHEET.md). A `.jsonl` file: one document a line, key `text`. A folder: one document per
    `.txt` or `.md` file, by name. Any other file: one document.

    Raises CalibrationError for an unknown name, and for unreadable, empty or malformed files.
    """
    if name == "seed":
        prompts = json.loads(_bundled("seed.json"))
        return Calibration("seed", ("\n\n".join(prompts),), drop_first_token=True)
    if name == "core":
        lines = _bundled("core.jsonl").splitlines()
        return Calibration("core", tuple(json.loads(line)["text"] for line in lines))
    path = Path(name)
    if not path.exists():
        raise CalibrationError(
            f"calibration {name!r} is neither a bundled set ({', '.join(BUNDLED)}) nor an existing file or folder "
            f"(looked for {path.absolute()}). Use --calibration {BUNDLED[0]}, or the path of a .txt, .md or "
            f".jsonl file, or of a folder of texts."
        )
    documents = tuple(text for text in _documents(path) if text.strip())
    if not documents:
        raise CalibrationError(f"calibration {path} holds no text. Put at least one document into it.")
    return Calibration(path.name, documents)


def _bundled(name: str) -> str:
    return resources.files("suite.capture").joinpath(f"data/{name}").read_text("utf-8")


def _documents(path: Path) -> Iterator[str]:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in {".txt", ".md"})
        if not files:
            raise CalibrationError(f"calibration folder {path} holds no .txt or .md file. Put one document in each.")
        for file in files:
            yield _read(file)
    elif path.suffix == ".jsonl":
        for number, line in enumerate(_read(path).splitlines(), start=1):
            if line.strip():
                yield _text_of(line, path, number)
    else:
        yield _read(path)


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"calibration file {path} cannot be read: {error}. It must be a UTF-8 text file."
        ) from None


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise CalibrationError(
            f"{path}:{number}: not a document: each line must be a JSON object with a string under the key `text`."
        )
    return text


def tokenize(calibration: Calibration, tokenizer: Any, vocabulary: int, context: int | None) -> TokenSequences:
    """Documents to token sequences, with the special tokens that the tokenizer adds by itself.

    A document longer than MAX_TOKENS, or than the model's `context`, runs in pieces of that length; of `seed` only the
    first piece is kept, as the reference does.

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
        for index, piece in enumerate(torch.split(ids, limit)):
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
