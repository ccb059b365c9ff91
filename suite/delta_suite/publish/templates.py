"""The site's templates, the files that it ships with, and what every page of it shares."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from delta_suite.escaping import terminal
from delta_suite.metrics.intervals import PERCENT
from delta_suite.publish.wording import CHANGED, LEGEND, NONE, SYMBOLS

if TYPE_CHECKING:
    from jinja2 import Environment, Template


def policy(inline: Iterable[str] = ()) -> str:
    """Return the Content-Security-Policy of a page.

    Nothing may be fetched but the site's own scripts, styles and images, and nothing may be sent. Styles may stand in
    the page because plotly.js writes them there; a style fetches only what img-src allows.

    inline: the scripts that stand in the page itself, which then runs no other.
    """
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in inline]
    scripts = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'self'"
    return (
        f"default-src 'none'; script-src {scripts}; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def asset(name: str) -> bytes:
    """Return a file of the package's `assets/`."""
    return resources.files("delta_suite.publish").joinpath("assets", name).read_bytes()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FunctionLoader(lambda name: asset(name).decode()),
        autoescape=True,
        # Signs that turn the direction of a line would do so on a page, too. Markup is what the templates made.
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else terminal(value),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(
        policy=policy(), symbols=SYMBOLS, changed_note=CHANGED, legend=LEGEND, percent=PERCENT, none_text=NONE
    )
    return environment


def template(name: str) -> Template:
    """Return a template, which knows the signs of verdicts, their legend and the content policy."""
    return _environment().get_template(name)
