"""A Chromium that shows the site, and a page whose every console line and request is looked at."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("CHROMIUM") or next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
"""The system's Chromium, or $CHROMIUM."""

PHONE: dict[str, Any] = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True}

MARKS = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on PATH (or in $CHROMIUM) to show the site in"),
    pytest.mark.site,
]
"""The marks of a module that needs it."""


@contextmanager
def opened(browser: Any, site: Path | str, page: str, **options: Any) -> Iterator[Any]:
    """A page that is silent on the console, and asks for nothing outside the site, a folder or its address."""
    root = site if isinstance(site, str) else site.as_uri()
    context = browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | options))
    tab = context.new_page()
    said: list[str] = []
    asked: list[str] = []
    tab.on("console", lambda line: said.append(f"{line.type}: {line.text}"))
    tab.on("pageerror", lambda error: said.append(f"error: {error}"))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(f"{root}/{page}")
    tab.wait_for_selector(".plot:not([data-drawn])", state="detached")
    yield tab
    tab.wait_for_selector(".plot:not([data-drawn])", state="detached")
    assert [line for line in said if line.startswith(("error", "warning"))] == []
    # data: is the empty icon, and blob: a picture that a plot makes of itself; neither leaves the page.
    outside = [url for url in asked if not url.startswith((f"{root}/", "data:", "blob:"))]
    assert outside == []
    assert len(asked) >= 3
    context.close()
