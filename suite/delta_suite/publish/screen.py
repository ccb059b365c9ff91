"""Lay out tables and lines for a terminal: they fit its width, and have colour where it has."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from io import StringIO
from typing import TYPE_CHECKING, TextIO

from rich.cells import cell_len

from delta_suite.escaping import terminal
from delta_suite.publish.wording import COLOURS, SYMBOLS

if TYPE_CHECKING:
    from delta_suite.publish.table import Cell, Table

WITHOUT_TERMINAL = 120
"""Columns where nothing says how many there are, as in a file or the log of a CI."""

NARROWEST = 20
"""Fewest columns that anything is laid out for."""

GAP = 2
"""Columns between those of a table."""

LABEL = 13
"""Columns that a label takes in front of a text."""

KEY_WIDTH = 26
"""Columns that the first column of a table keeps, if it needs them."""

_GOES_ON = " \\"
"""How a line of a shell ends that goes on in the next one."""

_RULE = "    \n    \n -- \n    \n    \n    \n    \n    \n"
"""The lines of a table in the form of rich: a rule below the head, and nothing else."""

_WORD = re.compile(r"(?:\[[^\[\]]*\]|\S)+")
"""A word, or what stands in brackets: an interval is read as one."""

_BREAK = re.compile(r"(?<=[A-Za-z0-9][-/_@:])(?=[A-Za-z])")
"""A place within a name at which it may go on in the next line."""


@dataclass(frozen=True)
class Screen:
    """The place where text is shown."""

    width: int = WITHOUT_TERMINAL
    colour: bool = False
    symbols: bool = True
    """False where the encoding has no signs for verdicts; their words stand alone then."""

    @classmethod
    def of(cls, stream: TextIO | None = None) -> Screen:
        """Return what a stream shows: no colour unless it is a terminal, nor with NO_COLOR or a dumb terminal.

        The width is that of COLUMNS, else of whichever standard stream is a terminal, as in `delta-suite ... | less`.
        """
        stream = stream or sys.stdout
        is_plain = bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"
        return cls(columns(), stream.isatty() and not is_plain, _has_symbols(stream))


def columns() -> int:
    """Return the columns of the terminal."""
    with suppress(ValueError):
        if (stated := int(os.environ.get("COLUMNS", "0"))) > 0:
            return max(stated, NARROWEST)
    for descriptor in (1, 2, 0):
        with suppress(OSError):
            if (known := os.get_terminal_size(descriptor).columns) > 0:
                return max(known, NARROWEST)
    return WITHOUT_TERMINAL


def _has_symbols(stream: TextIO) -> bool:
    try:
        "".join(SYMBOLS.values()).encode(stream.encoding or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


# --- lines -----------------------------------------------------------------------------------------------------


def cells_of(text: str) -> int:
    """Return how many columns a text takes, by rich or by wcwidth, with which tabulate counts, whichever is more.

    They differ where a sign changes the one before it, such as the colour of a skin behind a letter.

    Example:
        >>> cells_of("model"), cells_of("模型")
        (5, 4)
    """
    if text.isascii():
        return len(text)
    from wcwidth import wcswidth  # a tenth of the time that collecting takes, and seldom needed

    return max(cell_len(text), wcswidth(text))


def wrap(text: str, width: int, *, fold: bool = True) -> list[str]:
    """Return a text as lines of at most so many columns, broken at spaces, and a longer word after `-`, `/`, `_`, `@`.

    fold: without it longer words stay whole, such as a path that somebody wants to copy.

    Example:
        >>> wrap("closer-than-at-the-same-distance", 24)
        ['closer-than-at-the-same-', 'distance']
        >>> wrap("FAIL 0.481 [0.465, 0.498] *", 16), wrap("see /a/long/path", 5, fold=False)
        (['FAIL 0.481', '[0.465, 0.498] *'], ['see', '/a/long/path'])
    """
    lines, line, end = [], "", 0
    for word in _WORD.finditer(text):
        space = text[end : word.start()][:GAP] if line else ""
        end = word.end()
        is_long = cells_of(word[0]) > width // 2 and cells_of(line + space + word[0]) > width
        for piece in _pieces(word[0], width) if fold and is_long else [word[0]]:
            if line and cells_of(line + space + piece) > width:
                lines.append(line)
                line, space = "", ""
            line += space + piece
            space = ""
    return [*lines, line]


def _pieces(word: str, width: int) -> list[str]:
    """Return a word in pieces of at most so many columns."""
    pieces: list[str] = []
    for part in _BREAK.split(word):
        pieces.append("")
        for sign in part:
            if pieces[-1] and cells_of(pieces[-1] + sign) > max(width, 2):
                pieces.append("")
            pieces[-1] += sign
    return pieces


def prose(text: str, width: int, label: str = "") -> str:
    """Return a text as lines that stand below each other, with a label in front of the first. Long words stay whole.

    Example:
        >>> print(prose("intra_cosine over C >= 0.5 (sink_free)", 40, "  claim"))
          claim      intra_cosine over C >= 0.5
                     (sink_free)
    """
    return _labelled(wrap(terminal(text), _room(width, label), fold=False), label)


def paragraphs(text: str, width: int) -> str:
    """Return lines of text, each as lines that fit and begin as far to the right as it does.

    Example:
        >>> print(paragraphs("The memory ran out.\\n  Use a larger device, or bfloat16.", 26))
        The memory ran out.
          Use a larger device, or
          bfloat16.
    """
    fitting = []
    for line in text.split("\n"):
        indent = " " * min(len(line) - len(line.lstrip()), LABEL)
        fitting += [f"{indent}{each}" for each in prose(line, width - len(indent)).split("\n")]
    return "\n".join(fitting)


def command(line: str, width: int, label: str) -> str:
    r"""Return a command of a shell as lines that can be copied together: each but the last ends with a backslash.

    Example:
        >>> print(command("pytest 'a.toml::a/b[tiny]' --model=tiny", 44, "  reproduce"))
          reproduce  pytest 'a.toml::a/b[tiny]' \
                     --model=tiny
    """
    words = [terminal(shlex.quote(word)) for word in shlex.split(line)]
    lines = _filled(words, _room(width, label) - len(_GOES_ON), " ")
    return _labelled([*(each + _GOES_ON for each in lines[:-1]), lines[-1]], label)


def listed(items: Iterable[str], width: int, label: str = "") -> str:
    """Return items beside each other, each whole, as lines.

    Example:
        >>> print(listed(["0: 0.5", "1: 0.25 <- worst", "2: 0.7"], 40, "  per layer"))
          per layer  0: 0.5  1: 0.25 <- worst
                     2: 0.7
    """
    return _labelled(_filled(map(terminal, items), _room(width, label), "  "), label)


def _filled(items: Iterable[str], width: int, gap: str) -> list[str]:
    lines = [""]
    for item in items:
        if lines[-1] and cells_of(lines[-1] + gap + item) > width:
            lines.append(item)
        else:
            lines[-1] += gap + item if lines[-1] else item
    return lines


def _room(width: int, label: str) -> int:
    return max(width - (LABEL if label else 0), NARROWEST)


def _labelled(lines: list[str], label: str) -> str:
    indent = LABEL if label else 0
    return "\n".join(f"{label if index == 0 else '':<{indent}}{line}" for index, line in enumerate(lines))


# --- tables ----------------------------------------------------------------------------------------------------


@dataclass
class _Column:
    """A column of a table with the widths between which it can be shown."""

    head: str
    cells: list[str]
    wraps: bool
    """False for numbers, of which only the heading wraps."""
    needed: int | None
    """Columns without which it is left out; None for one that is never left out."""

    def __post_init__(self) -> None:
        longest = max(map(cells_of, self.cells), default=0)
        self.natural = max(cells_of(self.head), longest)
        self.least = max(_longest(self.head), *map(_longest, self.cells), 1) if self.wraps else longest
        self.compact = max(_longest(self.head), longest)
        if not self.wraps:
            self.least = self.compact
        self.enough = min(self.needed, self.compact) if self.wraps and self.needed is not None else self.compact


def _longest(text: str) -> int:
    """Return the columns of the longest part that is not broken."""
    return max((cells_of(part) for word in _WORD.findall(text) for part in _BREAK.split(word)), default=0)


def draw(table: Table, screen: Screen) -> str:
    """Return a table that fits the screen.

    Columns that may be left out go first, which a line below says. Then texts wrap. What still finds no room goes on
    below, beside the columns that name the rows.
    """
    shown = [[_shown(cell, screen) for cell in line.cells] for line in table.lines]
    columns = []
    for index, name in enumerate(table.head):
        cells = [line[index] for line in shown]
        wraps = table.align[index : index + 1] != "r"
        columns.append(_Column(terminal(name), cells, wraps, table.drop.get(name)))
    chosen = list(range(len(columns)))
    for index in map(table.head.index, table.drop):
        others = sum(columns[other].enough + GAP for other in chosen if other != index)
        if others + columns[index].enough > screen.width:
            chosen.remove(index)
    if columns:
        columns[0].least = max(columns[0].least, min(columns[0].natural, KEY_WIDTH))
    parts = [_drawn(table, columns, band, screen) for band in _bands(columns, chosen, table.keys, screen.width)]
    if absent := [column.head for index, column in enumerate(columns) if index not in chosen]:
        parts[-1] += "\n" + prose(f"({screen.width} columns are too few for: {', '.join(absent)})", screen.width)
    return "\n\n".join(parts)


def _shown(cell: Cell, screen: Screen) -> str:
    return terminal(cell.shown if screen.symbols else cell.text)


def _bands(columns: list[_Column], chosen: list[int], keys: int, width: int) -> list[list[int]]:
    """Return the columns that stand beside each other, those that name a row in each band."""
    bands = [chosen[:keys]]
    for index in chosen[keys:]:
        if len(bands[-1]) > keys and sum(columns[other].least + GAP for other in [*bands[-1], index]) - GAP > width:
            bands.append(chosen[:keys])
        bands[-1].append(index)
    return bands


def _widths(columns: list[_Column], width: int) -> list[int]:
    """Return how wide each column of a band is: those that could be left out give way first, then the widest."""
    widths = [column.natural for column in columns]
    room = width - GAP * (len(columns) - 1)
    optional = [column.natural if column.needed is None else column.enough for column in columns]
    for least in (optional, [column.least for column in columns], [1] * len(columns)):
        while sum(widths) > room:
            wider = [index for index, one in enumerate(widths) if one > least[index]]
            if not wider:
                break
            widths[max(wider, key=widths.__getitem__)] -= 1
    return widths


def _drawn(table: Table, columns: list[_Column], band: list[int], screen: Screen) -> str:
    shown = [columns[index] for index in band]
    widths = _widths(shown, screen.width)
    head = [_block(column.head, width, column) for column, width in zip(shown, widths, strict=True)]
    rows = [
        [_block(column.cells[number], width, column) for column, width in zip(shown, widths, strict=True)]
        for number in range(len(table.lines))
    ]
    if not screen.colour:
        return _plain(head, rows, ["left" if column.wraps else "right" for column in shown])
    colours = [[_colour(line.cells[index]) for index in band] for line in table.lines]
    return _coloured(head, rows, colours, widths, screen.width)


def _plain(head: list[str], rows: list[list[str]], sides: list[str]) -> str:
    """Return the table as text for a pipe or a file."""
    from tabulate import tabulate

    # The head is a row like the others: as a head it would take two columns more than its text.
    columns = zip(head, *rows, strict=True)
    rule = ["-" * max(cells_of(line) for cell in column for line in cell.split("\n")) for column in columns]
    text = tabulate([head, rule, *rows], tablefmt="plain", disable_numparse=True, colalign=sides)
    return "\n".join(line.rstrip() for line in text.split("\n"))


def _coloured(head: list[str], rows: list[list[str]], colours: list[list[str]], widths: list[int], width: int) -> str:
    """Return the table for a terminal, with colours."""
    from rich.box import Box
    from rich.console import Console
    from rich.table import Table as Drawing
    from rich.text import Text

    drawing = Drawing(box=Box(_RULE, ascii=True), show_edge=False, pad_edge=False, padding=0, header_style="bold")
    for index, (name, least) in enumerate(zip(head, widths, strict=True)):
        room = least if index == len(head) - 1 else least + GAP - 1  # and the box's own space between two columns
        drawing.add_column(Text(name), width=room)
    for row, styles in zip(rows, colours, strict=True):
        drawing.add_row(*(Text(text, style) for text, style in zip(row, styles, strict=True)))
    written = StringIO()
    Console(
        file=written,
        width=max(width, sum(widths) + GAP * len(widths)),
        force_terminal=True,
        color_system="standard",
        markup=False,
        highlight=False,
        emoji=False,
        legacy_windows=False,
    ).print(drawing)
    return "\n".join(line.rstrip() for line in written.getvalue().rstrip("\n").split("\n"))


def _block(text: str, width: int, column: _Column) -> str:
    """Return a text as the lines of a cell, numbers on the right."""
    lines = wrap(text, width)
    return "\n".join(lines if column.wraps else (f"{' ' * (width - cells_of(line))}{line}" for line in lines))


def _colour(cell: Cell) -> str:
    return COLOURS.get(cell.verdict or "", "")
