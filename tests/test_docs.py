"""The documentation against the code: quoted errors exist, pages are complete, and the README is short."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text("utf-8")

VARYING = "…"
"""What stands for names and numbers in a quoted text."""

QUOTED = re.findall(r"^> `(.+)`$", (DOCS / "troubleshooting.md").read_text("utf-8"), re.MULTILINE)


def texts_of(source: Path) -> Iterator[str]:
    """Yield every text of a module, with one `…` for the values that an f-string puts in side by side."""
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(part.value) if isinstance(part, ast.Constant) else VARYING for part in node.values)
            yield re.sub(f"{VARYING}+", VARYING, text)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


@pytest.fixture(scope="module")
def source_texts() -> list[str]:
    return [" ".join(text.split()) for path in sorted((ROOT / "suite").rglob("*.py")) for text in texts_of(path)]


@pytest.mark.parametrize("quoted", QUOTED)
def test_each_quoted_error_is_one_of_the_code(quoted: str, source_texts: list[str]) -> None:
    """A quoted text may leave out the beginning or the end of a message, but nothing between."""
    core = quoted.removesuffix(VARYING).removeprefix(VARYING).strip()
    assert len(core.replace(VARYING, "")) >= 12, "too short to be found by"
    assert any(core in text for text in source_texts)


def test_errors_are_quoted() -> None:
    assert len(QUOTED) == len(set(QUOTED)) > 20


@pytest.mark.parametrize("page", ["researchers.md", "training-teams.md", "publishing.md", "install.md"])
def test_each_user_starts_from_the_installation_of_the_readme(page: str) -> None:
    block = re.search(r"^```\n(pip install .*?)```", README, re.DOTALL | re.MULTILINE)
    assert block is not None
    assert f"```\n{block[1]}```" in (DOCS / page).read_text("utf-8")


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 180


def test_the_glossary_is_in_order_and_has_each_term_once() -> None:
    terms = re.findall(r"^\| ([^|]+?) \|", (DOCS / "glossary.md").read_text("utf-8"), re.MULTILINE)[2:]
    assert terms == sorted(set(terms), key=str.lower)


def test_every_bold_word_of_a_users_page_is_explained_first() -> None:
    """The pages say that their words in bold are explained in `concepts.md`."""
    explained = re.findall(r"\*\*(.+?)\*\*", (DOCS / "concepts.md").read_text("utf-8"))
    known = {word.lower().rstrip("s") for word in explained}
    for page in ("researchers.md", "training-teams.md", "publishing.md"):
        bold = {word.lower().rstrip("s") for word in re.findall(r"\*\*(.+?)\*\*", (DOCS / page).read_text("utf-8"))}
        assert bold
        assert bold <= known, page
