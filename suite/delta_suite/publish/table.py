"""One table, rendered to a terminal, to Markdown, or by the site's templates to HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from delta_suite.escaping import markdown, markdown_code, markdown_link
from delta_suite.publish.wording import SYMBOLS

if TYPE_CHECKING:
    from delta_suite.publish.screen import Screen


@dataclass(frozen=True)
class Cell:
    """A cell of a table. A terminal shows its text and the verdict's symbol; Markdown and HTML add the link."""

    text: str
    value: float | str | None = None
    """The value to sort by; None comes last."""
    link: str | None = None
    verdict: str | None = None
    """The verdict that the text begins with."""
    title: str | None = None
    """Further words for a reader who rests on the cell."""
    code: bool = False
    """True for text that Markdown sets as code."""

    @property
    def sort(self) -> str:
        """The value to sort by as text, for the page's script."""
        return "" if self.value is None else repr(self.value) if isinstance(self.value, float) else str(self.value)

    @property
    def shown(self) -> str:
        """The text, after the symbol of its verdict."""
        return f"{SYMBOLS[self.verdict]} {self.text}" if self.verdict in SYMBOLS else self.text

    @property
    def markdown(self) -> str:
        """The cell as Markdown.

        Example:
            >>> Cell("a|b", link="a.html").markdown, Cell("gamma > 1", code=True).markdown, Cell("PASS *").markdown
            ('[a\\\\|b](a.html)', '`gamma > 1`', 'PASS \\\\*')
        """
        if self.link:
            return markdown_link(self.shown, self.link)
        return markdown_code(self.text) if self.code else markdown(self.shown)


@dataclass(frozen=True)
class Line:
    """A row of a table, and the verdicts by which a page shows or hides it."""

    cells: tuple[Cell, ...]
    verdicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table with a heading for each column.

    On a page of the site, where it needs `id` and `caption`, its columns sort. The first cell of a row is its heading.
    """

    head: tuple[str, ...]
    lines: tuple[Line, ...]
    align: str = ""
    """`l` or `r` for each column, left where it is shorter than the head."""
    drop: Mapping[str, int] = field(default_factory=dict)
    """Columns that a narrow terminal leaves out, the first to go first, and the least width of such a text."""
    keys: int = 1
    """Columns that name a row; a terminal repeats them where columns go on below."""
    id: str = ""
    caption: str = ""

    @classmethod
    def of(
        cls,
        head: Sequence[str],
        rows: Iterable[Sequence[str | Cell]],
        *,
        align: str = "",
        drop: Mapping[str, int] | None = None,
        keys: int = 1,
        id: str = "",
        caption: str = "",
    ) -> Table:
        """Return a table of rows, whose cells may be plain texts.

        Example:
            >>> print(Table.of(["phase", "N"], [["A", "4"]], align="lr").text())
            phase  N
            -----  -
            A      4
        """
        lines = (Line(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row)) for row in rows)
        return cls(tuple(head), tuple(lines), align, drop or {}, keys, id, caption)

    def text(self, screen: Screen | None = None) -> str:
        """Return the table for a terminal; without `screen` for the width of the current one, and without colour."""
        from delta_suite.publish.screen import Screen, columns, draw

        return draw(self, screen or Screen(columns()))

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown.

        Columns are not padded: a longer cell would rewrite every line of a published file.

        Example:
            >>> print(Table.of(["claim", "verdict"], [["a", Cell("PASS", verdict="PASS")]]).markdown())
            | claim | verdict |
            | --- | --- |
            | a | ✓ PASS |
        """
        head = [markdown(name) for name in self.head]
        rows = [head, ["---"] * len(head), *([cell.markdown for cell in line.cells] for line in self.lines)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def html(self) -> str:
        """Return the table as HTML, for a notebook; pages of the site render it themselves, with more around it."""
        from delta_suite.publish.templates import template

        return str(template("table.html.j2").module.plain(self))  # type: ignore[attr-defined]
