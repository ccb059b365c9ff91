"""The static site, file by file. It asks nothing of any network, not even its plots."""

from __future__ import annotations

from collections.abc import Iterator

from delta_suite.pool import Pool
from delta_suite.publish.board import Board
from delta_suite.publish.pages import RECORDS, SITE
from delta_suite.publish.site.compare_page import NAME, compare_page
from delta_suite.publish.site.head import PREVIEW
from delta_suite.publish.site.hypothesis_page import hypothesis_files
from delta_suite.publish.site.model_page import model_files
from delta_suite.publish.site.run_page import run_files
from delta_suite.publish.templates import asset
from delta_suite.reading import read_bytes

SHIPPED = ("site.css", "site.js", "plotly-cartesian.min.js", "plotly-LICENSE.txt")
"""Copied as they are. The bundle is plotly.js without maps, 3D and WebGL: a third of the whole, and no function is made
from text in it, so that the page's content policy can forbid that."""


def site_files(board: Board, pool: Pool) -> Iterator[tuple[str, bytes]]:
    """Yield path relative to the results folder and content, for all of the site but its first page."""
    for name in SHIPPED:
        yield f"{SITE}/assets/{name}", asset(name)
    if board.url is not None:
        yield f"{SITE}/{PREVIEW}", asset("preview.png")
    if board.with_records:
        yield from _records(board)
    yield from hypothesis_files(board)
    yield from model_files(board, pool)
    yield from run_files(board)
    yield f"{SITE}/{NAME}", compare_page(board).encode()


def _records(board: Board) -> Iterator[tuple[str, bytes]]:
    """Yield a copy of each record that is shown or superseded, with its arrays."""
    shown = [entry.record for group in board.groups for entry in group.entries]
    for record in sorted({*shown, *(item.record for item in board.superseded)}):
        path = board.results / record
        for file in (path, path.with_suffix(".safetensors")):
            if file.is_file():
                yield (
                    f"{SITE}/{RECORDS}/{record.removeprefix('runs/')}".replace(path.name, file.name),
                    read_bytes(file, file.stat().st_size),
                )
