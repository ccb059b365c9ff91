"""One table, rendered to a terminal, to Markdown, or by the site's templates to HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

from delta_suite.escaping import markdown, markdown_code, markdown_link, terminal
from delta_suite.publish.wording import SYMBOLS


@dataclass(frozen=True)
class Cell:
    """A cell of a table. Only `text` shows in a terminal; Markdown and HTML add the link and the verdict's symbol."""

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
    widths: tuple[int | None, ...] = ()
    """Characters after which a column wraps in a terminal; None for no limit."""
    id: str = ""
    caption: str = ""

    @classmethod
    def of(
        cls,
        head: Sequence[str],
        rows: Iterable[Sequence[str | Cell]],
        *,
        align: str = "",
        widths: Sequence[int | None] = (),
        id: str = "",
        caption: str = "",
    ) -> Table:
        """Return a table of rows, whose cells may be plain texts.

        Example:
            >>> print(Table.of(["phase", "N"], [["A", "4"]], align="lr").text())
            phase      N
            -------  ---
            A          4
        """
        lines = (Line(tuple(cell if isinstance(cell, Cell) else Cell(cell) for cell in row)) for row in rows)
        return cls(tuple(head), tuple(lines), align, tuple(widths), id, caption)

    def text(self, *, head: bool = True) -> str:
        """Return the table for a terminal, or without `head` only its columns of text."""
        rows = [[terminal(cell.text) for cell in line.cells] for line in self.lines]
        if not head:
            return tabulate(rows, tablefmt="plain", disable_numparse=True)
        sides = {"r": "right", "l": "left"}
        return tabulate(
            rows,
            headers=[terminal(name) for name in self.head],
            tablefmt="simple",
            disable_numparse=True,
            colalign=[sides[side] for side in self.align.ljust(len(self.head), "l")] if rows else None,
            maxcolwidths=list(self.widths) if self.widths else None,
        )

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown.

        Columns are not padded: a longer cell would rewrite every line of a published file, and tabulate's padding
        differs between machines with and without the package wcwidth.

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
