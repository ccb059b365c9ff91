"""The site's templates, the files that it ships with, and what every page of it shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any

from delta_suite.metrics.intervals import PERCENT
from delta_suite.publish.wording import CHANGED, LEGEND, NONE, SYMBOLS

if TYPE_CHECKING:
    from jinja2 import Environment, Template

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy. Nothing may be fetched but the site's own scripts, styles and images, and nothing may be
sent. Styles may stand in the page because plotly.js writes them there; a style fetches only what img-src allows."""


def asset(name: str) -> bytes:
    """Return a file of the package's `assets/`."""
    return resources.files("delta_suite.publish").joinpath("assets", name).read_bytes()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda name: asset(name).decode()),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        policy=POLICY, symbols=SYMBOLS, changed_note=CHANGED, legend=LEGEND, percent=PERCENT, none_text=NONE
    )
    return environment


def template(name: str) -> Template:
    """Return a template, which knows the signs of verdicts, their legend and the content policy."""
    return _environment().get_template(name)


def figures_json(figures: Mapping[str, Any]) -> str:
    """Return figures as JSON for a script element, in which "</" and "<!" would mean something, so "<" is escaped."""
    text = json.dumps(figures, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")
