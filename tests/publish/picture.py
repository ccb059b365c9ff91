"""The README's picture of the leaderboard: `python -m tests.publish.picture` shows the site in a real Chromium."""

from __future__ import annotations

from pathlib import Path

from playwright.sync_api import sync_playwright

from tests.publish.browser import CHROMIUM

RESULTS = Path("results")


def main() -> None:
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        tab.goto((RESULTS / "site" / "index.html").absolute().as_uri())
        tab.screenshot(path=RESULTS / "leaderboard.png")
        browser.close()


if __name__ == "__main__":
    main()
