"""One function for each way in which words from files leave the package: terminal, Markdown, CSV, XML, scripts, links.

Names of models, keys, file names and texts of errors may hold anything: codes that a terminal obeys, letters that turn
the direction of a line, markup, formulas. Each function returns text that its reader shows and does not obey.
"""

from __future__ import annotations

import html
import json
import re
from typing import Any
from unicodedata import category
from urllib.parse import urlsplit

_RUNS_IN_A_SPREADSHEET = "=+-@＝＋－＠"
"""Signs that begin a formula, also in full width. A spreadsheet may leave out white space before them."""

_IN_A_URL = re.compile(r"[A-Za-z0-9._~:/?#@!$&*+,;=%-]+")
"""A URL that Markdown, HTML and a spreadsheet take as it is: without brackets, quotes and spaces."""


def terminal(text: str) -> str:
    r"""Return text as one line that no terminal obeys: control and formatting characters are written as escapes.

    These are C0 and C1 with the sequences that they begin, DEL, line ends, signs that turn the direction, signs without
    a width, and halves of characters from undecodable file names. Every kind of space stays.

    Example:
        >>> print(terminal("red\x1b[31m\u202e\nname"))
        red\x1b[31m\u202e\nname
    """
    if text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or category(sign) == "Zs" else _escape(sign) for sign in text)


def terminal_lines(text: str) -> str:
    r"""Return text of several lines that no terminal obeys.

    Example:
        >>> print(terminal_lines("a\n\tb\x07"))
        a
            b\x07
    """
    return "\n".join(terminal(line.replace("\t", "    ").removesuffix("\r")) for line in text.split("\n"))


def _escape(sign: str) -> str:
    return sign.encode("unicode_escape").decode()


def markdown(text: str) -> str:
    r"""Return text that Markdown shows as it is, on one line: no emphasis, link, table cell or HTML begins in it.

    Example:
        >>> print(markdown("max_tokens [0.1, 0.2] * [x](y)"))
        max\_tokens [0.1, 0.2] \* [x]\(y)
    """
    # A bare address would become a link by its slashes or its www.
    shown = re.sub(r"[\\`*_<>|#&~$]|(?<=:)/(?=/)|(?<=www)\.", r"\\\g<0>", terminal(text))
    # Brackets alone are plain, as those of intervals are; a link or the definition of one needs what follows them.
    return shown.replace("](", "]\\(").replace("]:", "]\\:").replace("][", "]\\[")


def markdown_code(text: str) -> str:
    """Return text as code in Markdown; text that would end the code, or a table's cell, is escaped instead.

    Example:
        >>> markdown_code("gamma > 1"), markdown_code("a|b")
        ('`gamma > 1`', 'a\\\\|b')
    """
    return markdown(text) if re.search("[`|]", text) or not text.strip() else f"`{terminal(text)}`"


def markdown_link(text: str, target: str) -> str:
    r"""Return a link whose text Markdown shows as it is. `target` is a URL that was formed from quoted parts.

    Example:
        >>> print(markdown_link("a](b", "models/a.html"))
        [a\]\(b](models/a.html)
    """
    shown = re.sub(r"\\.|[\[\]]", lambda sign: sign[0] if len(sign[0]) == 2 else f"\\{sign[0]}", markdown(text))
    return f"[{shown}]({target})"


def csv_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet runs: text that would begin a formula gets an apostrophe before it.

    Numbers stay numbers, and None stays an empty cell.

    Example:
        >>> csv_cell("=1+2"), csv_cell(" @a"), csv_cell(-0.5), csv_cell("gamma")
        ("'=1+2", "' @a", -0.5, 'gamma')
    """
    if not isinstance(value, str):
        return value
    text = terminal(value)
    return f"'{text}" if text.lstrip()[:1] in set(_RUNS_IN_A_SPREADSHEET) else text


def xml(text: str) -> str:
    """Return text for an element or an attribute of XML, such as an SVG's; control characters are not allowed there.

    Example:
        >>> xml('<a b="c">')
        '&lt;a b=&quot;c&quot;&gt;'
    """
    return html.escape(terminal(text))


def plot_text(text: str) -> str:
    """Return words for a figure of plotly, whose texts may hold tags, links and %{...}.

    Example:
        >>> plot_text("<a href='x'>C</a>")
        "&lt;a href='x'>C&lt;/a>"
    """
    return terminal(text).replace("&", "&amp;").replace("<", "&lt;").replace("%{", "% {")


def script_json(content: Any) -> str:
    r"""Return JSON for a script element of a page, in which `</`, `<!` and two line ends would mean something.

    Example:
        >>> script_json({"a": "</script>"})
        '{"a":"\\u003c/script>"}'
    """
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return re.sub("[<\u2028\u2029]", lambda sign: f"\\u{ord(sign[0]):04x}", text)


def workflow_command(kind: str, message: str, **properties: str | int) -> str:
    r"""Return a command of GitHub Actions, which shows a message beside a file.

    Example:
        >>> workflow_command("error", "50% of\nC", file="a,b.toml", line=3)
        '::error file=a%2Cb.toml,line=3::50%25 of\\nC'
    """
    values = {name: terminal(str(value)).replace("%", "%25") for name, value in properties.items()}
    listed = ",".join(f"{name}={value.replace(':', '%3A').replace(',', '%2C')}" for name, value in values.items())
    return f"::{kind} {listed}::{terminal(message).replace('%', '%25')}"


def is_web_address(written: str) -> bool:
    """Return True for an http(s) address that may stand before a path in a link, and holds no user or password.

    Example:
        >>> is_web_address("https://github.com/me/it/blob/main"), is_web_address("javascript:alert(1)//")
        (True, False)
    """
    try:
        parts = urlsplit(written)
        host = parts.hostname
    except ValueError:
        return False
    plain = _IN_A_URL.fullmatch(written) is not None and "@" not in parts.netloc
    return plain and parts.scheme in {"http", "https"} and bool(host) and not parts.query and not parts.fragment
