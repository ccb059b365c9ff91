"""Pictures from a real Chromium: the README's of the leaderboard, and the one that others show of a link to any site.

`python -m tests.publish.picture` makes both anew.
"""

from __future__ import annotations

from pathlib import Path

from delta_suite.publish.templates import asset
from delta_suite.publish.wording import VERDICT_MARKS
from playwright.sync_api import sync_playwright

from tests.publish.browser import CHROMIUM

RESULTS = Path("results")

PREVIEW = Path("suite/delta_suite/publish/assets/preview.png")

SIZE = {"width": 1200, "height": 630}
"""The size that those who show links ask for."""

ROWS = ("00 2213004 0112 101111", "13 0011320 0204 113011", "22 1100014 3012 041101", "01 2030110 1100 100213")
"""Marks by their place among all marks, in the columns of four hypotheses: an ornament, of no model."""


def preview() -> str:
    """Return a page of that size: what the suite asks, over rows of marks."""
    cells = [
        "<i></i>"
        if sign == " "
        else f"<span class='mark {VERDICT_MARKS[int(sign)].short}'>{VERDICT_MARKS[int(sign)].symbol}</span>"
        for row in ROWS
        for sign in row
    ]
    style = (
        "body{max-width:none;margin:0;padding:64px 72px;width:1200px;height:630px;overflow:hidden}"
        "h1{font-size:68px;margin:0 0 20px}p{font-size:34px;line-height:1.35;max-width:26em;margin:0 0 48px}"
        ".grid{display:grid;grid-template-columns:repeat(2,40px) 16px repeat(7,40px) 16px repeat(4,40px) 16px "
        "repeat(6,40px);gap:9px}.mark{width:40px;height:44px;font-size:22px}"
    )
    return (
        f"<!doctype html><meta charset='utf-8'><style>{asset('site.css').decode()}{style}</style>"
        "<h1>delta-suite leaderboard</h1><p>Which predictions about the depth structure of language models hold, "
        f"for which model, and by how much.</p><div class='grid'>{''.join(cells)}</div>"
    )


def main() -> None:
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        tab.goto((RESULTS / "site" / "index.html").absolute().as_uri())
        tab.screenshot(path=RESULTS / "leaderboard.png")
        tab.set_viewport_size(SIZE)
        tab.goto("about:blank")
        tab.set_content(preview())
        tab.screenshot(path=PREVIEW)
        browser.close()


if __name__ == "__main__":
    main()
