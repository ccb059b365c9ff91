"""Line numbers for the keys of a TOML document; tomllib gives them only for syntax errors."""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from collections.abc import Mapping

Loc = tuple[str | int, ...]
"""Place of a value in a document: keys, and the index in an array, such as ("expect", 0, "op")."""

_BLANK = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
_SCALAR = re.compile(
    r"""
      \"{3} (?:\\.|[^\\])*? \"{3}(?!\")   # up to two quotes may stand right before the closing three
    | '{3} .*? '{3}(?!')
    | "(?:\\.|[^"\\])*"
    | '[^']*'
    | [^,\]}\#\n]+                       # a number, a boolean, or a date, which may hold a space
    """,
    re.VERBOSE | re.DOTALL,
)


def key_lines(text: str) -> dict[Loc, int]:
    """Return the line, from 1, of every key, table and array item of a TOML document that tomllib has accepted.

    A table stands at its header; one without, at the first key or header that implies it.

    Example:
        >>> key_lines("a = 1\\n[b]\\nc = 2\\n")[("b", "c")]
        3
    """
    return _Scanner(text).lines


def line_of(lines: Mapping[Loc, int], loc: Loc) -> int:
    """Return the line of a value or, if the document lacks it, of the innermost table around it.

    lines: the result of `key_lines`.

    Example:
        >>> line_of({("b",): 2, ("b", "c"): 3}, ("b", "missing"))
        2
    """
    while loc and loc not in lines:
        loc = loc[:-1]
    return lines[loc] if loc else 1


class _Scanner:
    """A walk over a document that is known to be valid, and so needs no checks."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.lines: dict[Loc, int] = {}
        self._newlines = [match.start() for match in re.finditer("\n", text)]
        self._tables_in: dict[Loc, int] = {}
        """Number of tables that an array of [[tables]] has so far."""
        self._document()

    def _document(self) -> None:
        table: Loc = ()
        while self._skip_blank():
            if self.text.startswith("[", self.at):
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Loc:
        line = self._line()
        is_array_item = self.text.startswith("[[", self.at)
        self.at += 1 + is_array_item
        *parents, name = self._key()
        self.at += 1 + is_array_item
        table: Loc = ()
        for parent in parents:
            table = self._newest((*table, parent))
            self.lines.setdefault(table, line)
        table = (*table, name)
        if is_array_item:
            self.lines.setdefault(table, line)
            self._tables_in[table] = self._tables_in.get(table, 0) + 1
            table = self._newest(table)
        self.lines[table] = line
        return table

    def _newest(self, table: Loc) -> Loc:
        """Return the table that is meant: [a.b] after [[a]] means the last a."""
        count = self._tables_in.get(table)
        return (*table, count - 1) if count else table

    def _pair(self, table: Loc) -> None:
        line = self._line()
        for name in self._key():
            table = (*table, name)
            self.lines.setdefault(table, line)
        self.at += 1  # the =
        self._value(table)

    def _key(self) -> list[str]:
        """Read a dotted key, and the blanks after it."""
        names = []
        while True:
            self._skip_blank()
            part = self._take(_KEY_PART)
            names.append(next(iter(tomllib.loads(f"{part} = 0"))) if part[0] in "\"'" else part)
            self._skip_blank()
            if not self.text.startswith(".", self.at):
                return names
            self.at += 1

    def _value(self, loc: Loc) -> None:
        self._skip_blank()
        match self.text[self.at]:
            case "[":
                index = 0
                while self._next_item("]"):
                    self.lines[*loc, index] = self._line()
                    self._value((*loc, index))
                    index += 1
            case "{":
                while self._next_item("}"):
                    self._pair(loc)
            case _:
                self._take(_SCALAR)

    def _next_item(self, closing: str) -> bool:
        """Step over an opening bracket or a comma to the next item, or over the closing bracket."""
        self._skip_blank()
        if self.text[self.at] != closing:
            self.at += 1
            self._skip_blank()
        if self.text[self.at] != closing:
            return True
        self.at += 1
        return False

    def _skip_blank(self) -> bool:
        """Step over blanks and comments, and return True if anything follows."""
        self._take(_BLANK)
        return self.at < len(self.text)

    def _take(self, pattern: re.Pattern[str]) -> str:
        match = pattern.match(self.text, self.at)
        assert match is not None, f"tomllib accepted what the line scanner cannot read, at {self.at}"
        self.at = match.end()
        return match[0]

    def _line(self) -> int:
        return bisect_left(self._newlines, self.at) + 1
