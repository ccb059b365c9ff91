"""The site's templates, the files that it ships with, and what every page of it shares."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING

from markupsafe import Markup, escape

from delta_suite.escaping import terminal
from delta_suite.metrics.intervals import PERCENT
from delta_suite.publish.wording import CHANGED, LEGEND, NONE, SYMBOLS, VERDICT_MARKS

if TYPE_CHECKING:
    from jinja2 import Environment, Template

    from delta_suite.publish.table import Cell, Table


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
        policy=policy(),
        symbols=SYMBOLS,
        marks=VERDICT_MARKS,
        changed_note=CHANGED,
        legend=LEGEND,
        percent=PERCENT,
        none_text=NONE,
        inline=None,  # only a page that stands alone has its assets in it
        plots=False,
    )
    environment.filters["body"] = table_body
    return environment


def table_body(table: Table) -> Markup:
    """Return the rows of a table as HTML. A template takes three times as long, and a site can have a million cells."""
    parts = ["<tbody>\n"]
    for line in table.lines:
        parts.append(f'<tr data-verdicts="{escaped("|".join(line.verdicts))}">\n')
        opening, closing = '<th scope="row"', "</th>\n"
        for cell in line.cells:
            parts += [opening, f' data-value="{escaped(cell.sort)}">', _content(cell), closing]
            opening, closing = "<td", "</td>\n"
        parts.append("</tr>\n")
    parts.append("</tbody>\n")
    return Markup("".join(parts))


def _content(cell: Cell) -> str:
    if cell.link:
        title = f' title="{escaped(cell.title)}"' if cell.title else ""
        return f'<a href="{escaped(cell.link)}"{title}>{escaped(cell.text).replace("/", "/<wbr>")}</a>'
    if cell.verdict in SYMBOLS:
        kind = cell.verdict.lower().replace(" ", "-")
        return f'<span class="verdict v-{escaped(kind)}">{escaped(cell.shown)}</span>'
    return escaped(cell.text)


def escaped(text: str) -> str:
    """Return words for an element or an attribute of a page, as templates write them."""
    shown = terminal(text)
    return str(escape(shown)) if _SPECIAL.search(shown) else shown


_SPECIAL = re.compile("[&<>'\"]")


def template(name: str) -> Template:
    """Return a template, which knows the signs of verdicts, their legend and the content policy."""
    return _environment().get_template(name)
