"""Two models of the leaderboard side by side, chosen by the reader and kept in the address."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from markupsafe import Markup

from delta_suite.escaping import script_json, terminal
from delta_suite.publish.board import Board
from delta_suite.publish.comparable import Group, Heading
from delta_suite.publish.depth_profile import comparison, highest
from delta_suite.publish.entries import Entry
from delta_suite.publish.model_tables import PHASE_COLUMNS
from delta_suite.publish.pages import SITE, claim_anchor, page_link
from delta_suite.publish.rows import margin_text, marks
from delta_suite.publish.site.head import Page
from delta_suite.publish.templates import template
from delta_suite.publish.wording import NONE, SYMBOLS, interval_text, number

NAME = "compare.html"

DESCRIPTION = "Two models side by side: their profiles over depth, the numbers of their phases, and every claim."


def compare_key(group: Group | Heading, entry: Entry) -> str:
    """Return what the address calls one row of one table."""
    return terminal(f"{group.id}/{entry.model}")


def compare_link(group: Group | Heading, entry: Entry) -> str:
    """Return the link to the page with this model chosen, from the site's folder."""
    return f"{NAME}?{urlencode({'a': compare_key(group, entry)})}"


def compare_page(board: Board) -> str:
    """Return the page that compares any two models."""
    profiles = [entry.profile for group in board.groups for entry in group.entries if entry.profile]
    most = highest(profiles)
    groups = [
        {
            "title": group.title,
            "entries": [
                {
                    "key": compare_key(group, entry),
                    "label": entry.model,
                    "drawing": Markup(comparison(entry.profile, most)) if entry.profile else "",
                }
                for entry in group.entries
            ],
        }
        for group in board.largest_first
    ]
    data = {
        "columns": list(PHASE_COLUMNS.values()),
        "symbols": SYMBOLS,
        "claims": _claims(board),
        "groups": {group.id: _plain(group.facts) for group in board.groups},
        "models": {
            compare_key(group, entry): _model(group, entry) for group in board.groups for entry in group.entries
        },
    }
    page = Page.of(board, NAME, "Compare two models", DESCRIPTION)
    return template("compare.html.j2").render(page=page, groups=groups, data=script_json(data))


def _claims(board: Board) -> list[dict[str, str | None]]:
    rows = next((entry.rows for group in board.groups for entry in group.entries), ())
    return [
        {
            "name": f"{row.hypothesis}/{row.expectation}",
            "stated": row.claim,
            "link": board.claim_link(row.where, SITE),
        }
        for row in rows
    ]


def _plain(facts: Mapping[str, str]) -> dict[str, str]:
    """Return words that a page shows and does not obey."""
    return {name: terminal(fact) for name, fact in facts.items()}


def _model(group: Group, entry: Entry) -> dict[str, Any]:
    record, profile = entry.head, entry.profile
    return {
        "label": terminal(entry.model),
        "group": group.id,
        "page": f"{page_link(entry.model)}#{group.id}",
        "facts": _plain(
            {
                "family": record.model.architecture,
                "layers x hidden": f"{record.model.layers} x {record.model.hidden}",
                "tokens": str(record.calibration.tokens),
                "source": entry.source,
                "measured": f"{record.provenance.created[:10]} on {record.provenance.device}, {entry.seconds:.1f} s",
            }
        ),
        "phases": {}
        if profile is None
        else {
            terminal(f"{name}, layers {first}-{last}"): [
                NONE if value is None else f"{value:.4f}" for value in profile.by_phase[name]
            ]
            for name, (first, last) in profile.phases.items()
        },
        "rows": [
            [
                row.word,
                marks(row),
                number(row.observed),
                interval_text(row.interval),
                margin_text(row),
                f"{page_link(entry.model)}#{claim_anchor(group.id, row.hypothesis, row.expectation)}",
            ]
            for row in entry.rows
        ],
    }
