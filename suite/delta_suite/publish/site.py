"""The static site: one page for all models, one page per model. It asks nothing of any network, not even its plots."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from delta_suite.claims.schema import Expectation, Hypothesis
from delta_suite.claims.verdict import Verdict
from delta_suite.metrics.intervals import PERCENT
from delta_suite.publish.board import Board, Entry, Group
from delta_suite.publish.model_tables import LAYER_COLUMNS, PHASE_COLUMNS, stream_text
from delta_suite.publish.plots import Plot, layer_values, plots
from delta_suite.publish.rows import FLIPS, VACUOUS, WARN, interval_text, margin_text, number, relative_margin
from delta_suite.publish.table import NONE, Cell, Line, Table
from delta_suite.publish.wording import (
    CHANGED,
    LEGEND,
    NEVER_MIXED,
    NO_SCORE,
    SYMBOLS,
    memory_text,
    tally_text,
    worst_text,
)
from delta_suite.records.store import folder_name
from delta_suite.records.view import RecordView

if TYPE_CHECKING:
    from jinja2 import Environment, Template

SITE = "site"
"""The site's folder in the results folder."""

RUNS = "trajectories"
"""The folder of the pages of training runs in the site."""

SHIPPED = ("site.css", "site.js", "plotly-cartesian.min.js", "plotly-LICENSE.txt")
"""Copied as they are. The bundle is plotly.js without maps, 3D and WebGL: a third of the whole, and no function is made
from text in it, so that the page's content policy can forbid that."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; "
    "base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy. Nothing may be fetched but the site's own scripts, styles and images, and nothing may be
sent. Styles may stand in the page because plotly.js writes them there; a style fetches only what img-src allows."""


def page_name(model: str) -> str:
    """Return the file of a model's page in `models/`. A name that another could share gets a part of its hash."""
    folder = folder_name(model)
    safe = "".join(sign if sign.isalnum() or sign in "-_.@" else "-" for sign in folder)
    if safe == model.replace("/", "--") and "--" not in model:
        return f"{safe}.html"
    return f"{safe}-{hashlib.sha256(model.encode()).hexdigest()[:8]}.html"


def page_link(model: str) -> str:
    """Return the link from the site's folder."""
    return f"models/{quote(page_name(model))}"


def run_page_name(run: str) -> str:
    """Return the file of a training run's page in `trajectories/`."""
    return page_name(run.removesuffix("*").rstrip("-_@"))


def run_link(run: str) -> str:
    """Return the link from the site's folder."""
    return f"{RUNS}/{quote(run_page_name(run))}"


def site_files(board: Board) -> dict[str, bytes]:
    """Return path relative to the results folder -> content, for the site without the pages of training runs."""
    files = {f"assets/{name}": asset(name) for name in SHIPPED}
    files["index.html"] = _index(board).encode()
    for model, entries in board.models.items():
        files[f"models/{page_name(model)}"] = _model(board, model, entries).encode()
    return {f"{SITE}/{name}": content for name, content in files.items()}


def asset(name: str) -> bytes:
    """Return a file of the package's `assets/`."""
    return resources.files("delta_suite.publish").joinpath("assets", name).read_bytes()


@cache
def _environment() -> Environment:
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    environment = Environment(
        loader=FunctionLoader(lambda name: asset(name).decode()),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals.update(policy=POLICY, symbols=SYMBOLS, changed_note=CHANGED, legend=LEGEND.replace("`", ""))
    return environment


def template(name: str) -> Template:
    """Return a page's template, which knows the signs of verdicts, their legend and the content policy."""
    return _environment().get_template(name)


def figures_json(figures: Mapping[str, Any]) -> str:
    """Return figures as JSON for a script element, in which "</" and "<!" would mean something, so "<" is escaped."""
    text = json.dumps(figures, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")


# --- all models ------------------------------------------------------------------------------------------------


def _index(board: Board) -> str:
    words = [*(verdict.value for verdict in Verdict), WARN]
    return template("index.html.j2").render(
        no_score=NO_SCORE,
        never_mixed=NEVER_MIXED if len(board.groups) > 1 else "",
        words=sorted(words, key=list(SYMBOLS).index),
        groups=[
            {
                **{"id": group.id, "title": group.title, "described": group.described},
                **{"changed": group.changed, "tables": _group(board, group)},
                "runs": [(Cell(run.name, link=run_link(run.name)), len(run.entries)) for run in group.runs],
            }
            for group in board.groups
        ],
        superseded=[
            (Cell(item.record, link=board.record_link(item.record, SITE)), item.by) for item in board.superseded
        ],
        broken=[item.why for item in board.broken],
    )


def _group(board: Board, group: Group) -> tuple[Table, Table]:
    hypotheses = [tally.hypothesis for tally in group.entries[0].tallies]
    head = (
        *("model", *hypotheses, "worst margin", "vacuous", "seconds", "peak memory", "layers x hidden"),
        *("measured", "record"),
    )
    models = Table(head, tuple(_summary(board, group)), id=f"models-{group.id}", caption="Models and hypotheses")
    claims = Table(
        (
            "model",
            "claim",
            "verdict",
            "observed",
            f"{PERCENT} interval",
            "required",
            "margin",
            "other variants",
            "marks",
            "record",
        ),
        tuple(line for entry in group.entries for line in _claims(board, group, entry)),
        id=f"claims-{group.id}",
        caption="Claim by claim",
    )
    return models, claims


def _summary(board: Board, group: Group) -> Iterable[Line]:
    for entry in group.entries:
        record, worst = entry.view.record, entry.worst
        provenance = record.provenance
        # Sorted by the verdict, and by the counts only within it: there is no score.
        tallies = [
            Cell(tally_text(tally), f"{_rank(tally.verdict)} {tally_text(tally)}", verdict=tally.verdict)
            for tally in entry.tallies
        ]
        yield Line(
            (
                Cell(group.label(entry), group.label(entry), f"{page_link(entry.model)}#{group.id}-{entry.dtype}"),
                *tallies,
                Cell(worst_text(entry), None if worst is None else relative_margin(worst)),
                Cell(str(entry.vacuous), entry.vacuous),
                Cell(f"{entry.seconds:.1f}", entry.seconds),
                Cell(memory_text(entry), entry.host_bytes + entry.gpu_bytes),
                Cell(f"{record.model.layers} x {record.model.hidden}", record.model.layers),
                Cell(f"{provenance.created[:10]}, {entry.dtype} on {provenance.device}", provenance.created),
                Cell("JSON", entry.record, board.record_link(entry.record, SITE), title=entry.record),
            ),
            tuple(tally.verdict for tally in entry.tallies if tally.verdict),
        )


def _rank(verdict: str | None) -> int:
    return list(SYMBOLS).index(verdict) if verdict else len(SYMBOLS)


def _claims(board: Board, group: Group, entry: Entry) -> Iterable[Line]:
    for row in entry.rows:
        word = row.word
        others = ", ".join(f"{name} {verdict}" for name, (verdict, _) in row.variants.items() if verdict != row.verdict)
        marks = [*([f"vacuous{VACUOUS}"] if row.vacuous else []), *row.gates]
        name = f"{row.hypothesis}/{row.expectation}"
        yield Line(
            (
                Cell(group.label(entry), group.label(entry), f"{page_link(entry.model)}#{group.id}-{entry.dtype}"),
                Cell(
                    f"{name}: {row.claim}", name, board.claim_link(row.where, SITE), title=board.claim_place(row.where)
                ),
                Cell(f"{SYMBOLS[word]} {word}", word, verdict=word),
                Cell(number(row.observed), row.observed),
                Cell(interval_text(row.interval), None if row.interval is None else row.interval[0]),
                Cell(number(row.required), row.required),
                Cell(margin_text(row), None if row.margin is None else relative_margin(row)),
                Cell(f"{others}{FLIPS}" if others else "all agree" if row.variants else NONE, others),
                Cell("; ".join(marks) or row.reason or NONE, "; ".join(marks)),
                Cell("JSON", entry.record, board.record_link(entry.record, SITE), title=entry.record),
            ),
            (word,),
        )


# --- one model -------------------------------------------------------------------------------------------------


def _model(board: Board, model: str, entries: list[tuple[Group, Entry]]) -> str:
    shown = [_measurement(board, group, entry) for group, entry in entries]
    data = figures_json({section["id"]: section.pop("figures") for section in shown})
    return template("model.html.j2").render(
        model=model,
        never_mixed=NEVER_MIXED if len(shown) > 1 else "",
        measurements=shown,
        superseded=[
            Cell(item.record, link=board.record_link(item.record, f"{SITE}/models"))
            for item in board.superseded
            if item.model == model
        ],
        data=data,
    )


def _measurement(board: Board, group: Group, entry: Entry) -> dict[str, Any]:
    view = entry.view
    variants = list(view.variants)
    figures: dict[str, tuple[Plot, ...]] = {variant: plots(view, variant) for variant in variants}
    identity = f"{group.id}-{entry.dtype}"
    return {
        "id": identity,
        "title": f"{group.title}, {entry.dtype}",
        "facts": _facts(board, group, entry),
        "changed": tuple(f"{name}, {how}" for name, how in entry.changed.items()),
        "verdicts": [_verdict(board, row, entry) for row in entry.rows],
        "multiverse": _multiverse(entry, variants, identity),
        "variants": variants,
        "plots": figures["raw"],
        "boundaries": _boundaries(entry),
        "phases": Table(
            ("phase", "layers", "N", *PHASE_COLUMNS.values()),
            tuple(_phases(view)),
            id=f"phases-{identity}",
            caption="Phases",
        ),
        "layers": Table(
            ("layer", "phase", *LAYER_COLUMNS.values()),
            tuple(
                Line((Cell(str(layer), layer), Cell(phase, phase), *(Cell(x, _float(x)) for x in values)))
                for layer, phase, values in layer_values(view, "raw", list(LAYER_COLUMNS))
            ),
            id=f"layers-{identity}",
            caption="Every layer, variant raw",
        ),
        "figures": {
            variant: {plot.name: plot.figure for plot in drawn if plot.figure} for variant, drawn in figures.items()
        },
    }


def _float(text: str) -> float | None:
    return None if text == NONE else float(text)


def _facts(board: Board, group: Group, entry: Entry) -> list[tuple[str, Cell]]:
    record = entry.view.record
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
        ("calibration", f"{calibration.name}: {calibration.tokens} tokens counted, {calibration.dropped} left out"),
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
    runs = [run.name for run in group.runs if entry in run.entries.values()]
    return [
        *((name, Cell(text)) for name, text in facts),
        *(("training run", Cell(run, link=f"../{run_link(run)}")) for run in runs),
        ("record", Cell(entry.record, link=board.record_link(entry.record, f"{SITE}/models"))),
    ]


def _verdict(board: Board, row: Any, entry: Entry) -> dict[str, Any]:
    hypothesis, expectation = _stated(board, row.hypothesis, row.expectation)
    word = row.word
    return {
        "name": f"{row.hypothesis}/{row.expectation}",
        "claim": row.claim,
        "word": word,
        "observed": number(row.observed),
        "interval": interval_text(row.interval),
        "required": number(row.required),
        "margin": margin_text(row),
        "marks": "; ".join(
            [
                *([f"vacuous{VACUOUS}: the claim also holds where there is nothing to find"] if row.vacuous else []),
                *row.gates,
                *([row.reason] if row.reason else []),
                *([f"{FLIPS.strip()} another variant gives another verdict"] if row.flips else []),
            ]
        ),
        "title": hypothesis.title,
        "rationale": " ".join((expectation.rationale or hypothesis.rationale).split()),
        "origin": " ".join(expectation.origin.split()),
        "stated": Cell(board.claim_place(row.where), link=board.claim_link(row.where, f"{SITE}/models")),
        "record": board.record_link(entry.record, f"{SITE}/models"),
    }


def _stated(board: Board, hypothesis: str, expectation: str) -> tuple[Hypothesis, Expectation]:
    stated = next(other for other in board.hypotheses if other.id == hypothesis)
    return stated, next(claim for claim in stated.expect if claim.id == expectation)


def _multiverse(entry: Entry, variants: list[str], identity: str) -> Table:
    lines = []
    for row in entry.rows:
        cells = []
        for variant in variants:
            verdict, observed = row.variants.get(variant, (NONE, None))
            mark = f"{SYMBOLS.get(verdict, '')} {verdict}".strip()
            cells.append(
                Cell(f"{mark} {number(observed, 3)}" if observed is not None else mark, observed, verdict=verdict)
            )
        flips = "flips" if row.flips else "agrees"
        lines.append(Line((Cell(f"{row.hypothesis}/{row.expectation}"), *cells, Cell(flips, flips))))
    return Table(
        ("claim", *variants, ""),
        tuple(lines),
        id=f"multiverse-{identity}",
        caption="The multiverse: each claim under every variant",
    )


def _phases(view: RecordView) -> Iterable[Line]:
    for name, (first, last) in view.phases.items():
        estimates = [view.over(range(first, last + 1), metric, "raw") for metric in PHASE_COLUMNS]
        yield Line(
            (
                Cell(name, name),
                Cell(f"{first}-{last}", first),
                Cell(str(last - first + 1), last - first + 1),
                *(Cell(number(estimate.value), estimate.value) for estimate in estimates),
            )
        )


def _boundaries(entry: Entry) -> str | None:
    boundaries = entry.view.record.boundaries.get("raw")
    if boundaries is None:
        return None
    parts = [f"Detected (variant raw): before layers {', '.join(map(str, boundaries.detected)) or 'none'}."]
    if boundaries.declared:
        parts.append(f"Declared: before layers {', '.join(map(str, boundaries.declared))}.")
    if boundaries.recurrence:
        recurrence = ", ".join(f"{share:.0%}" for share in boundaries.recurrence)
        parts.append(f"Share of resampled documents in which each is detected again: {recurrence}.")
    p = boundaries.metrics["boundary_p"].value
    if p is not None:
        parts.append(f"p = {number(p, 3)} of the detected structure under smooth drift over depth.")
    return " ".join(parts)
