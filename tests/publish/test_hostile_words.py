"""Words of a record in everything that is published: they are shown, and nothing runs, links or breaks by them."""

from __future__ import annotations

import base64
import csv
import hashlib
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from delta_suite.cli import app
from delta_suite.errors import OptionError, RecordError
from delta_suite.publish.card import END, START, newest, write_card
from delta_suite.publish.leaderboard import files
from delta_suite.publish.site.run_page import standalone
from typer.testing import CliRunner

from tests.publish.conftest import Change, Place, checkpoint

EVIL = f'"><script>alert(1)</script>[press](javascript:alert(2)) \x1b[31m\u202e\n{END}\n=1+2|`a`'


def hostile(record: dict[str, Any]) -> None:
    record["provenance"]["hardware"] = EVIL
    record["provenance"]["git"] = {"commit": EVIL, "dirty": False}
    record["calibration"]["name"] = EVIL
    record["model"]["architecture"] = EVIL


def hostile_at(step: int) -> Change:
    return lambda record: (checkpoint(step)(record), hostile(record))


class Page(HTMLParser):
    """What of a page could run or be followed, and its content policy."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.policy: dict[str, list[str]] = {}
        self.inline: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self._runs = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if values.get("http-equiv") == "Content-Security-Policy":
            assert not self.inline
            assert not self.loaded  # a policy counts for what follows it
            parts = (part.split() for part in values["content"].split(";"))
            self.policy = {name: sources for name, *sources in parts}
        self._runs = tag == "script" and values.get("type") != "application/json"
        if self._runs and "src" in values:
            self.loaded.append(values["src"])
        elif self._runs:
            self.inline.append("")
        self.handlers += [name for name in values if name.startswith("on")]
        self.links += [values[name] for name in ("href", "src", "action") if name in values]

    def handle_endtag(self, tag: str) -> None:
        self._runs = False

    def handle_data(self, data: str) -> None:
        if self._runs and self.inline:
            self.inline[-1] += data


def check(page: Page) -> None:
    """Nothing runs but what the policy names, and every link is relative or of the web."""
    assert page.policy["default-src"] == page.policy["base-uri"] == page.policy["form-action"] == ["'none'"]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.inline]
    assert page.policy["script-src"] == ([f"'sha256-{digest}'" for digest in hashes] or ["'self'"])
    assert all(re.fullmatch(r"(\.\./)?assets/[\w.-]+\.js", source) for source in page.loaded)
    assert not (page.inline and page.loaded)
    assert not page.handlers
    for link in page.links:
        assert re.match(r"https://example\.org/|data:,$|#|[^:]*$", link), link


@pytest.mark.parametrize("repository", [None, "https://example.org/me"])
def test_every_page_of_the_site_has_a_policy_and_runs_nothing_else(place: Place, repository: str | None) -> None:
    for step in (100, 200):
        place.add(f"big--checkpoint-{step}", change=hostile_at(step))
    place.add("other")
    pages = {name: text.decode() for name, text in files(place.board(repository)) if name.endswith(".html")}
    assert {Path(name).parent.name for name in pages} == {"site", "models", "trajectories", "hypotheses"}
    for text in pages.values():
        check(Page(text))
        assert not re.search("[\x1b\u202e]|<script>alert", text)


def test_a_page_that_stands_alone_names_its_scripts_by_hash(place: Place) -> None:
    for step in (100, 200):
        place.add(f"big--checkpoint-{step}", change=hostile_at(step))
    (((_, run),),) = place.board().runs.values()
    page = Page(standalone(run.name, run.entries))
    check(page)
    assert len(page.inline) == 2  # plotly.js and the page's own


def test_no_cell_and_no_markdown_of_the_leaderboard_obeys_a_word(place: Place) -> None:
    place.add("=1+2", change=hostile)
    built = dict(files(place.board()))
    rows = list(csv.reader(built["leaderboard.csv"].decode().splitlines()))
    assert [cell for row in rows for cell in row if re.match(r"\s*[=+@]|-[^\d]", cell)] == []
    assert {row[3] for row in rows[1:]} == {"'=1+2"}
    assert all(float(row[11]) <= 1e9 for row in rows[1:] if row[11])  # numbers are numbers, also below 0
    text = built["leaderboard.md"].decode()
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(javascript|[\x1b\u202e]", text)


def test_a_card_is_the_same_when_it_is_written_again(place: Place, tmp_path: Path) -> None:
    place.add("tiny", change=hostile)
    board = place.board()
    written = []
    for _ in range(3):
        write_card(tmp_path, board, *newest(board, "tiny"))
        written.append((tmp_path / "README.md").read_bytes())
    assert len(set(written)) == 1
    text = written[0].decode()
    assert text.count(f"\n{START}\n") == text.count(f"\n{END}\n") == 1
    front, body = text.removeprefix("---\n").split("\n---\n", 1)
    assert "\x1b" not in text
    name = yaml.safe_load(front)["model-index"][0]["results"][0]["dataset"]["name"]
    assert "<script>" in name  # data stays as it is
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\(javascript", body)
    for plot in tmp_path.glob("*.svg"):
        ET.fromstring(plot.read_text("utf-8"))


def test_an_authors_card_of_any_line_ends_and_words_stays(place: Place, tmp_path: Path) -> None:
    place.add("tiny")
    board = place.board()
    readme = tmp_path / "README.md"
    readme.write_bytes(b"---\r\ntags: mine\r\n---\r\nSee `" + START.encode() + b"` in a line.\r\n")
    for _ in range(2):
        write_card(tmp_path, board, *newest(board, "tiny"))
    text = readme.read_text("utf-8")
    assert f"See `{START}` in a line." in text
    assert yaml.safe_load(text.split("---\n")[1])["tags"] == ["mine", "delta-suite"]
    assert text.count(f"\n{END}\n") == 1


@pytest.mark.parametrize(
    ("card", "why"),
    [
        (f"a\n{START}\nb", "more than once"),
        (f"{END}\n", "without"),
        (f"{START}\n{END}\n{START}\n{END}\n", "more than once"),
        ("---\n[: {\n---\n", "metadata"),
        ("---\n- a\n---\n", "metadata"),
        ("---\nmodel-index: 5\n---\n", "metadata"),
        ("---\na: " + "[" * 5000 + "\n---\n", "metadata"),
    ],
)
def test_a_card_that_cannot_be_completed_is_refused_and_stays(
    place: Place, tmp_path: Path, card: str, why: str
) -> None:
    place.add("tiny")
    board = place.board()
    (tmp_path / "README.md").write_text(card)
    with pytest.raises(RecordError, match=why):
        write_card(tmp_path, board, *newest(board, "tiny"))
    assert (tmp_path / "README.md").read_text() == card


def test_links_begin_with_an_address_of_the_web(place: Place) -> None:
    place.add("tiny")
    with pytest.raises(OptionError, match="--repository javascript:alert"):
        place.board("javascript:alert(1)//")
    options = ["--results-dir", str(place.results), "--repository", "javascript:alert(1)//"]
    for command in ("leaderboard", "card"):
        extra = ["--model", "tiny"] if command == "card" else []
        result = CliRunner().invoke(app, [command, *options, *extra, "--hypotheses", str(place.root / "hypotheses")])
        assert result.exit_code == 2
        assert "--repository javascript:alert(1)// is no address" in result.stderr
    assert not (place.results / "leaderboard.md").exists()
