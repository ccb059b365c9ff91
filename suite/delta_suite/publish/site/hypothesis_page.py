"""The page of a hypothesis file: what it predicts, how its claims fare, and the file with an anchor at each line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from delta_suite.claims.schema import Hypothesis
from delta_suite.errors import RecordError
from delta_suite.escaping import terminal_lines
from delta_suite.publish.board import Board
from delta_suite.publish.pages import SITE, hypothesis_link
from delta_suite.publish.site.head import Page
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.templates import template
from delta_suite.publish.wording import SYMBOLS
from delta_suite.reading import TOML_LIMIT, UnreadableFileError, decode, read_bytes


def hypothesis_files(board: Board) -> Iterator[tuple[str, bytes]]:
    """Yield path relative to the results folder and content, for the page of every hypothesis file.

    Raises RecordError where a file that was loaded can no longer be read.
    """
    for hypothesis in board.hypotheses:
        yield f"{SITE}/{hypothesis_link(hypothesis.id)}", _page(board, hypothesis).encode()


def _page(board: Board, hypothesis: Hypothesis) -> str:
    try:
        text = decode(read_bytes(hypothesis.path, TOML_LIMIT), hypothesis.path)
    except UnreadableFileError as error:
        raise RecordError(f"{error} Restore it, or build the leaderboard again.") from None
    path = hypothesis_link(hypothesis.id)
    place = board.claim_place(f"{hypothesis.path}:0").rpartition(":")[0]
    rationale = " ".join(hypothesis.rationale.split())
    return template("hypothesis.html.j2").render(
        page=Page.of(board, path, f"{hypothesis.id}: {hypothesis.title}", rationale),
        hypothesis=hypothesis,
        rationale=rationale,
        file=Cell(place, link=board.file_link(hypothesis.path)),
        claims=_claims(board, hypothesis),
        lines=terminal_lines(text.removesuffix("\n")).split("\n"),
    )


def _claims(board: Board, hypothesis: Hypothesis) -> Table:
    """Return the claims, and how often each has which verdict in all tables together."""
    words: dict[str, Counter[str]] = {claim.id: Counter() for claim in hypothesis.expect}
    for group in board.groups:
        for entry in group.entries:
            for row in entry.rows:
                if row.hypothesis == hypothesis.id:
                    words[row.expectation][row.word] += 1
    lines = [
        [
            Cell(claim.id, claim.id, f"#L{claim.line}"),
            Cell(claim.claim()),
            *(Cell(str(words[claim.id][word]), words[claim.id][word]) for word in SYMBOLS),
        ]
        for claim in hypothesis.expect
    ]
    head = ["claim", "stated", *(f"{symbol} {word}" for word, symbol in SYMBOLS.items())]
    return Table.of(head, lines, id="claims", caption="Claims, and the rows of the leaderboard with each verdict")
