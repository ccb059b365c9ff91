"""The page of a model: a summary, its plots over depth, every claim, and where the figures come from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.claims.verdict import Verdict
from delta_suite.escaping import script_json
from delta_suite.pool import Pool
from delta_suite.publish.board import Board
from delta_suite.publish.comparable import Heading
from delta_suite.publish.entries import Entry
from delta_suite.publish.model_tables import calibration_text, special_tokens_text, stream_text
from delta_suite.publish.pages import PAGES, SITE, claim_anchor, page_name, run_link
from delta_suite.publish.rows import Row, margin_text, mark_lines
from delta_suite.publish.site.compare_page import compare_link
from delta_suite.publish.site.head import Page
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.templates import template
from delta_suite.publish.verdict_tables import variant_cells
from delta_suite.publish.wording import NEVER_MIXED, NONE, OUTCOMES, WARN, interval_text, number

FIRST = ("ranks", "cosines")
"""The plots at the top of the page: the profile over depth, and which layers share a direction."""


class Subject(NamedTuple):
    """The model of one page."""

    name: str
    entries: tuple[tuple[Heading, Entry], ...]
    superseded: tuple[str, ...]
    """Its records that newer ones replace."""


def model_files(board: Board, pool: Pool) -> Iterator[tuple[str, bytes]]:
    """Yield path relative to the results folder and content, for the page of every model."""
    superseded: dict[str, list[str]] = {}
    for item in board.superseded:
        superseded.setdefault(item.model, []).append(item.record)
    subjects = [
        Subject(
            model,
            tuple((group.heading(entry), entry) for group, entry in entries),
            tuple(superseded.get(model, ())),
        )
        for model, entries in board.models.items()
    ]
    # A page needs no other model, so that a process that renders it is not sent all of them.
    alone = replace(board, groups=(), superseded=(), broken=())
    for subject, page in zip(subjects, pool.map(partial(_model, alone), subjects), strict=True):
        yield f"{SITE}/{PAGES}/{page_name(subject.name)}", page


def _model(board: Board, subject: Subject) -> bytes:
    model = subject.name
    shown = [_measurement(board, heading, entry) for heading, entry in subject.entries]
    data = ",".join(f"{script_json(section['id'])}:{section.pop('plots')}" for section in shown)
    page: str = template("model.html.j2").render(
        page=Page.of(board, f"{PAGES}/{page_name(model)}", model, shown[0]["summary"]),
        plots=True,
        never_mixed=NEVER_MIXED if len(shown) > 1 else "",
        measurements=shown,
        superseded=[Cell(record, link=board.record_link(record, f"{SITE}/{PAGES}")) for record in subject.superseded],
        data=f"{{{data}}}",
    )
    return page.encode()


def _measurement(board: Board, group: Heading, entry: Entry) -> dict[str, Any]:
    drawn = entry.drawn
    variants, identity = list(drawn.variants), group.id
    return {
        "id": identity,
        "title": group.title,
        "summary": summary(entry),
        "compare": f"../{compare_link(group, entry)}",
        "facts": _facts(board, group, entry),
        "changed": tuple(f"{name}, {how}" for name, how in entry.changed.items()),
        "verdicts": [_verdict(board, group, row) for row in entry.rows],
        "multiverse": _multiverse(entry, variants, identity),
        "variants": variants,
        "first": sorted(
            (figure for figure in drawn.figures if figure.name in FIRST), key=lambda figure: FIRST.index(figure.name)
        ),
        "more": [figure for figure in drawn.figures if figure.name not in FIRST],
        "boundaries": drawn.boundaries,
        "phases": replace(drawn.phases, id=f"phases-{identity}", caption="Phases"),
        "layers": replace(drawn.layers, id=f"layers-{identity}", caption="Every layer, variant raw"),
        "plots": drawn.plots,
    }


def _facts(board: Board, group: Heading, entry: Entry) -> list[tuple[str, Cell]]:
    record = entry.head
    model, calibration, provenance = record.model, record.calibration, record.provenance
    git = provenance.git or {}
    commit = f", commit {git['commit'][:12]}{' with changes' if git.get('dirty') else ''}" if git.get("commit") else ""
    steps = ", ".join(f"{step} {seconds:.1f}" for step, seconds in provenance.seconds.items())
    peak = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in sorted(provenance.peak_memory_bytes.items()))
    sinks = record.sinks
    judged = [f"{name} {stamp.text}" for name, stamp in entry.judged_by.items()]
    facts = [
        ("model", f"{model.architecture}, {model.layers} layers, hidden size {model.hidden}"),
        (
            "weights",
            f"{entry.source}{f' at {model.revision}' if model.revision else ''}; SHA-256 {model.fingerprint[:12]}",
        ),
        ("calibration", f"{calibration_text(calibration)}; {calibration.dropped} left out"),
        ("special tokens", special_tokens_text(calibration)),
        ("comparable with", f"{group.title}: {group.described}"),
        ("sinks", f"{sinks.position_zero} tokens at position 0, {sinks.large_norm} of large norm"),
        (
            "run as",
            f"{provenance.dtype} on {provenance.device} ({provenance.hardware}), attention {provenance.attention}",
        ),
        ("seconds", f"{entry.seconds:.1f}: {steps}"),
        ("peak memory", peak or NONE),
        *([("stream", stream_text(provenance.stream, provenance.device))] if provenance.stream else ()),
        ("measured", f"{provenance.created}, delta-suite {provenance.suite}{commit}"),
        ("libraries", ", ".join(f"{name} {version}" for name, version in sorted(provenance.versions.items()))),
        ("certificate", f"{len(record.certificate.identities)} identities of the capture hold"),
        ("last judged by", "; ".join(judged) or "no run that left a note of it"),
    ]
    return [
        *((name, Cell(text)) for name, text in facts),
        *(("training run", Cell(run, link=f"../{run_link(run)}")) for run in group.runs),
        ("record", Cell(entry.record, link=board.record_link(entry.record, f"{SITE}/{PAGES}"))),
    ]


def _verdict(board: Board, group: Heading, row: Row) -> dict[str, Any]:
    hypothesis, expectation = _stated(board, row.hypothesis, row.expectation)
    return {
        "anchor": claim_anchor(group.id, row.hypothesis, row.expectation),
        "name": f"{row.hypothesis}/{row.expectation}",
        "claim": row.claim,
        "word": row.word,
        "observed": number(row.observed),
        "interval": interval_text(row.interval),
        "required": number(row.required),
        "margin": margin_text(row),
        "marks": "; ".join([*row.gates, *([row.reason] if row.reason else []), *mark_lines([row])]),
        "title": hypothesis.title,
        "rationale": " ".join((expectation.rationale or hypothesis.rationale).split()),
        "origin": " ".join(expectation.origin.split()),
        "stated": Cell(board.claim_place(row.where), link=board.claim_link(row.where, f"{SITE}/{PAGES}")),
    }


def summary(entry: Entry) -> str:
    """Return the measurement in a sentence or two: what became of the claims, and the profile."""
    words = Counter(row.word for row in entry.rows)
    counts = [f"{words[word]} {outcome}" for word, outcome in OUTCOMES.items() if words[word]]
    if words[WARN]:
        counts.insert(min(2, len(counts)), f"{words[WARN]} refuted with a warning only")
    vacuous = f", {entry.vacuous} of the supported also for random weights" if entry.vacuous else ""
    held = [tally.hypothesis for tally in entry.tallies if tally.verdict == Verdict.SUPPORTED.value]
    hypotheses = f"The hypothes{'is' if len(held) == 1 else 'es'} {_listed(held)} hold{'s' if len(held) == 1 else ''}"
    verb = "is" if counts[0].startswith("1 ") else "are"
    counts[0] = counts[0].replace(" ", f" {verb} ", 1)
    text = f"Of {len(entry.rows)} claims about {entry.model}, {_listed(counts)}{vacuous}. "
    text += f"{hypotheses}. " if held else "No hypothesis holds with all of its claims. "
    return text + (f"{entry.profile.described}, without sinks." if entry.profile else "")


def _listed(words: Sequence[str]) -> str:
    """Return words as a list in a sentence.

    Example:
        >>> _listed(["a", "b", "c"]), _listed(["a"])
        ('a, b and c', 'a')
    """
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _stated(board: Board, hypothesis: str, expectation: str) -> tuple[Hypothesis, Expectation]:
    stated = next(other for other in board.hypotheses if other.id == hypothesis)
    return stated, next(claim for claim in stated.expect if claim.id == expectation)


def _multiverse(entry: Entry, variants: Sequence[str], identity: str) -> Table:
    lines: list[list[Cell]] = []
    for row in entry.rows:
        flips = "flips" if row.flips else "agrees"
        lines.append([Cell(f"{row.hypothesis}/{row.expectation}"), *variant_cells(row, variants), Cell(flips, flips)])
    caption = "The multiverse: each claim under every variant"
    return Table.of(["claim", *variants, "agreement"], lines, id=f"multiverse-{identity}", caption=caption)
