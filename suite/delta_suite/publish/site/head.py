"""The head of a page: its title, what it says of itself, and the address by which others show it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from delta_suite.publish.board import Board
from delta_suite.publish.templates import policy

PREVIEW = "assets/preview.png"
"""The picture that others show of a link to the site."""


@dataclass(frozen=True)
class Page:
    """The page that a template renders; every template extends the same one."""

    path: str
    """Path from the site's folder."""
    heading: str
    description: str
    policy: str
    url: str | None = None
    """The address of the site, where it is known."""
    note: str = ""
    """A sentence about the records, at the foot of the page."""

    @classmethod
    def of(
        cls,
        board: Board | None,
        path: str,
        heading: str,
        description: str,
        *,
        inline: Iterable[str] = (),
        note: str = "",
    ) -> Page:
        """Return the head of a page of this board, or of one that stands alone with these scripts in it."""
        return cls(path, heading, description, policy(inline), None if board is None else board.url, note)

    @property
    def title(self) -> str:
        """The page's title, which names the suite."""
        return self.heading if "delta-suite" in self.heading else f"{self.heading} - delta-suite"

    @property
    def root(self) -> str:
        """The way from the page to the site's folder."""
        return "../" * self.path.count("/")

    @property
    def address(self) -> str | None:
        """The page's own address, where that of the site is known."""
        return self.url and f"{self.url.rstrip('/')}/{self.path.removesuffix('index.html')}"

    @property
    def preview(self) -> str | None:
        """The address of the picture."""
        return self.url and f"{self.url.rstrip('/')}/{PREVIEW}"
