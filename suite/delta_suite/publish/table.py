"""One table, rendered to a terminal, to Markdown, or by the site's templates to HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from tabulate import tabulate

NONE = "-"
"""Shown where a number does not exist."""


@dataclass(frozen=True)
class Cell:
    """A table's cell: text, what it sorts by (None: last), a link, and a verdict's word where it is one."""

    text: str
    value: float | str | None = None
    link: str | None = None
    verdict: str | None = None
    title: str | None = None

    @property
    def sort(self) -> str:
        """The sort key as text, for the page's script."""
        return "" if self.value is None else repr(self.value) if isinstance(self.value, float) else str(self.value)

    @property
    def markdown(self) -> str:
        """The text as Markdown, with its link."""
        return f"[{self.text}]({self.link})" if self.link else self.text


@dataclass(frozen=True)
class Line:
    """A table's row, and the verdicts by which a page shows or hides it."""

    cells: tuple[Cell, ...]
    verdicts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table with a heading for each column; on a page its columns sort, and the first cell of a row is its header."""

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
        rows: Iterable[Sequence[str]],
        *,
        align: str = "",
        widths: Sequence[int | None] = (),
    ) -> Table:
        """Return a table of plain texts.

        Example:
            >>> print(Table.of(["phase", "N"], [["A", "4"]], align="lr").text())
            phase      N
            -------  ---
            A          4
        """
        lines = tuple(Line(tuple(Cell(text) for text in row)) for row in rows)
        return cls(tuple(head), lines, align, tuple(widths))

    def text(self) -> str:
        """Return the table for a terminal."""
        return self._tabulated([[cell.text for cell in line.cells] for line in self.lines], "simple")

    def plain(self) -> str:
        """Return the rows for a terminal, without heading and rules."""
        rows = [[cell.text for cell in line.cells] for line in self.lines]
        return tabulate(rows, tablefmt="plain", disable_numparse=True)

    def markdown(self) -> str:
        """Return the table as GitHub's Markdown, with its links."""
        rows = [self.head, ["---"] * len(self.head), *([cell.markdown for cell in line.cells] for line in self.lines)]
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)

    def _tabulated(self, rows: list[list[str]], style: str) -> str:
        sides = {"r": "right", "l": "left"}
        columns = [sides[side] for side in self.align.ljust(len(self.head), "l")]
        return tabulate(
            rows,
            headers=self.head,
            tablefmt=style,
            disable_numparse=True,
            colalign=columns if rows else None,
            maxcolwidths=list(self.widths) if self.widths else None,
        )
