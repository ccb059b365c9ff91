"""Words on their way out: whatever a file holds, its reader shows it and does not obey it."""

from __future__ import annotations

import csv
import io
import json
import re
import unicodedata
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from delta_suite.escaping import (
    csv_cell,
    is_web_address,
    markdown,
    markdown_code,
    markdown_link,
    plot_text,
    script_json,
    terminal,
    terminal_lines,
    xml,
)
from delta_suite.publish.screen import NARROWEST, Screen
from delta_suite.publish.table import Cell, Table
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len

# Signs that mean something somewhere are drawn far more often than chance would.
SIGNS = st.sampled_from(
    list("\x00\x07\x08\t\n\r\x1b\x7f\x85\x9b\u061c\u200b\u200e\u2028\u202e\u2066\ufeff\udcff=+-@＝")
)
MARKUP = st.sampled_from([*"`|[](){}<>!*_#~$&;:/\\\"'%", "](", "<!--", "-->", "</script>", "://", "www."])
WORDS = st.lists(SIGNS | MARKUP | st.characters() | st.text(max_size=5), max_size=12).map("".join)

FORBIDDEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")


@settings(deadline=None)
@given(WORDS)
@example("red\x1b[31m\x1b]0;own\x07\u202ename\udcff")
def test_no_terminal_is_told_anything(text: str) -> None:
    shown = terminal(text)
    assert not FORBIDDEN.search(shown)
    assert all(unicodedata.category(sign)[0] != "C" for sign in shown)
    assert terminal(shown) == shown
    assert not FORBIDDEN.search(terminal_lines(text).replace("\n", ""))
    assert terminal_lines(text).count("\n") == text.count("\n")
    shown.encode()  # undecodable bytes of file names have no encoding of their own


@settings(deadline=None)
@given(st.lists(st.lists(WORDS, min_size=2, max_size=2), min_size=1, max_size=3))
def test_a_table_has_as_many_lines_as_rows(rows: list[list[str]]) -> None:
    table = Table.of(["one\n", "two\x1b"], rows)
    assert len(table.text(Screen(10_000)).split("\n")) == 2 + len(rows)
    lines = table.markdown().split("\n")
    assert len(lines) == 2 + len(rows)
    assert {len(re.findall(r"(?<!\\)(?:\\\\)*\|", line)) for line in lines} == {3}
    assert not FORBIDDEN.search(table.markdown().replace("\n", ""))
    for width in (NARROWEST, 33, 80):
        drawn = table.text(Screen(width))
        assert not FORBIDDEN.search(drawn.replace("\n", ""))
        assert max(map(cell_len, drawn.split("\n"))) <= width


LIVE = re.compile(r"(?<!\\)(?:\\\\)*(?:[`*_<|#~$&]|\]\(|\]:|\]\[)|(?<!\\)://|(?<!\\)www\.")
"""What Markdown would act on, unless an odd number of backslashes stands before it."""


@settings(deadline=None)
@given(WORDS)
@example("\\](")
def test_no_markup_begins_in_a_text_of_markdown(text: str) -> None:
    assert not LIVE.search(markdown(text))
    link = markdown_link(text, "models/a.html")
    assert re.sub(r"\\.", "", link).count("]") == 1
    assert link.endswith("](models/a.html)")
    code = markdown_code(text)
    assert not LIVE.search(code) or (code.count("`") == 2 and code[0] == code[-1] == "`" and "|" not in code)


@settings(deadline=None)
@given(st.lists(WORDS | st.floats(allow_nan=False) | st.none(), min_size=1, max_size=4))
def test_no_cell_begins_a_formula(cells: list[str | float | None]) -> None:
    out = io.StringIO()
    csv.writer(out).writerow(map(csv_cell, cells))
    (read,) = csv.reader(io.StringIO(out.getvalue()))
    for cell, shown in zip(cells, read, strict=True):
        if isinstance(cell, str):
            assert not re.match(r"\s*[=+\-@＝＋－＠\t\r]", shown)
            assert terminal(cell) == shown.removeprefix("'") or terminal(cell) == shown
        else:
            assert shown == ("" if cell is None else str(cell))  # a number that we wrote stays one


class _Script(HTMLParser):
    """The content of the one script element of a page, and every tag."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.content = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.content += data


@settings(deadline=None)
@given(st.dictionaries(WORDS, WORDS, max_size=3))
def test_json_in_a_page_stays_in_its_element(content: dict[str, str]) -> None:
    content = {terminal(key): value.replace("\udcff", "") for key, value in content.items()}
    page = _Script()
    page.feed(f'<script type="application/json">{script_json(content)}</script>')
    page.close()
    assert page.tags == ["script"]
    assert json.loads(page.content) == content
    assert not re.search("[\u2028\u2029]", page.content)


@settings(deadline=None)
@given(WORDS)
def test_xml_holds_every_text(text: str) -> None:
    root = ET.fromstring(f'<text name="{xml(text)}">{xml(text)}</text>')
    assert root.get("name") == root.text or (not root.text and not text)
    assert len(root) == 0


@settings(deadline=None)
@given(WORDS)
def test_no_tag_and_no_template_begins_in_a_figure(text: str) -> None:
    assert not re.search(r"<|%\{", plot_text(text))


@pytest.mark.parametrize(
    ("written", "fits"),
    [
        ("https://github.com/me/it/blob/main", True),
        ("http://localhost:8000", True),
        ("HTTPS://example.org/a/", True),
        ("javascript:alert(1)//", False),
        (" https://example.org", False),
        ("https://example.org/a b", False),
        ("https://example.org/)[x](javascript:alert(1)", False),
        ('https://example.org/"onclick=', False),
        ("https://me:secret@example.org", False),
        ("https://example.org/?q=1", False),
        ("https://example.org/#part", False),
        ("https://", False),
        ("https://[x", False),
        ("//example.org", False),
        ("data:text/html,x", False),
        ("file:///etc", False),
        ("../other", False),
        ("", False),
        ("https://example.org\n", False),
    ],
)
def test_links_begin_with_an_address_of_the_web_alone(written: str, fits: bool) -> None:
    assert is_web_address(written) is fits


def test_a_cell_is_text_first() -> None:
    evil = "](javascript:alert(1))<script>\n| x"
    assert Cell(evil, link="a.html").markdown == r"[\]\(javascript:alert(1))\<script\>\\n\| x](a.html)"
