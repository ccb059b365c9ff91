"""Tables of verdicts: claims by models, under every variant, and in how many models a claim holds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from delta_suite.claims.verdict import Verdict, combine_verdicts
from delta_suite.metrics.intervals import CONFIDENCE, holm, partial_conjunction
from delta_suite.publish.rows import Row, marks
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.wording import FLIPS, NONE, interval_text, verdict_text

INTERVALS_UP_TO = 2
"""Models beside each other whose intervals still fit into the grid of verdicts."""

CLAIM_WIDTH = 30
"""Columns without which a terminal leaves the claims out of the grid."""


def verdict_grid(rows: Sequence[Row], models: Sequence[str] = ()) -> Table:
    """Return hypotheses and their expectations by models, with a column for each of `models`, judged or not."""
    models = list(dict.fromkeys([*models, *(row.model for row in rows)]))
    adjusted = _holm_by_model(rows, models)
    families = {
        model: len({row.hypothesis for row in rows if row.model == model and row.severity == "fail"})
        for model in models
    }
    lines: list[list[str | Cell]] = []
    for hypothesis in dict.fromkeys(row.hypothesis for row in rows):
        claims = [row for row in rows if row.hypothesis == hypothesis]
        overall: list[str | Cell] = []
        for model in models:
            counted = [row for row in claims if row.model == model and row.severity == "fail"]
            overall.append(_overall(counted, adjusted[model].get(hypothesis), families[model]) if counted else NONE)
        lines.append([hypothesis, "", *overall])
        for expectation in dict.fromkeys(row.expectation for row in claims):
            with_interval = len(models) <= INTERVALS_UP_TO
            cells = {
                row.model: verdict_cell(row, interval=with_interval) for row in claims if row.expectation == expectation
            }
            claim = next(row.claim for row in claims if row.expectation == expectation)
            lines.append([f". {expectation}", claim, *(cells.get(model, NONE) for model in models)])
    return Table.of(["hypothesis", "claim", *models], lines, drop={"claim": CLAIM_WIDTH})


def verdict_cell(row: Row, *, interval: bool = True) -> Cell:
    """Return verdict, value and marks of one claim for one model, with the interval where it is asked for."""
    shown = f" {interval_text(row.interval)}" if interval and row.interval is not None else ""
    text = verdict_text(row.word, row.observed) + shown + marks(row)
    return Cell(text, text, verdict=row.word)


def _holm_by_model(rows: Sequence[Row], models: Iterable[str]) -> dict[str, dict[str, tuple[float, float]]]:
    return {model: holm_by_hypothesis([row for row in rows if row.model == model]) for model in models}


def holm_by_hypothesis(rows: Sequence[Row]) -> dict[str, tuple[float, float]]:
    """Return for each hypothesis of one model the p that it does not hold, as it is and adjusted by Holm.

    All expectations of a hypothesis must hold, so its p is the largest of theirs (an intersection-union test needs no
    correction); across hypotheses it is Holm's. The family is every hypothesis judged on the model: one without a p,
    because an expectation has none or a gate is shut, is not returned, and counts among them all the same.
    """
    ps: dict[str, list[float | None]] = {}
    for row in rows:
        if row.severity == "fail":
            ps.setdefault(row.hypothesis, []).append(None if row.gates else row.p)
    whole = {
        name: max(known)
        for name, values in ps.items()
        if len(known := [p for p in values if p is not None]) == len(values)
    }
    family = [whole.get(name, 1.0) for name in ps]
    adjusted = dict(zip(ps, holm(family), strict=True))
    return {name: (p, adjusted[name]) for name, p in whole.items()}


def chance_text(rows: Sequence[Row]) -> str:
    """Return how many claims chance alone would support, if none of them held, in words; "" where none was decided.

    A claim is supported where its interval lies inside, which has a probability of at most half of 1 - CONFIDENCE where
    the truth is outside or at the end. Those that a gate keeps undecided cannot be supported.
    """
    claims = [row for row in rows if row.judged_by is not None]  # a plain test is no claim
    decided = sum(row.verdict != Verdict.NOT_MEASURED.value and not row.gates for row in claims)
    if not decided:
        return ""
    supported = sum(row.verdict == Verdict.SUPPORTED.value for row in claims)
    level = (1 - CONFIDENCE) / 2
    return (
        f"{supported} of {decided} claims that could be decided are supported; if none held, chance alone would "
        f"support {decided * level:.1f} of them ({level:.1%} each)."
    )


def _overall(rows: Sequence[Row], p: tuple[float, float] | None, family: int) -> Cell:
    """Return the verdict on a hypothesis, and where it is supported p, as it is and adjusted over the family."""
    verdict = combine_verdicts(Verdict(row.verdict) for row in rows)
    shown = f" (p {p[0]:.2g}, Holm over {family} {p[1]:.2g})" if p and verdict is Verdict.SUPPORTED else ""
    return Cell(verdict.value + shown, verdict=verdict.value)


def in_several_models(rows: Sequence[Row]) -> Table | None:
    """Return for each hypothesis with a p in how many of several models it holds, and with what p; None without any."""
    models = list(dict.fromkeys(row.model for row in rows))
    by_model = _holm_by_model(rows, models)
    lines = []
    for hypothesis in dict.fromkeys(row.hypothesis for row in rows):
        known = [hypotheses[hypothesis][0] for hypotheses in by_model.values() if hypothesis in hypotheses]
        ps = [*known, *[1.0] * (len(models) - len(known))]  # a model without a p has not shown the hypothesis
        cells = [f"{partial_conjunction(ps, holding):.2g}" for holding in range(1, len(models) + 1)]
        if known:
            lines.append([hypothesis, f"{len(known)} of {len(models)}", *cells])
    head = ["hypothesis", "models with a p", *(f"p: in {r} or more" for r in range(1, len(models) + 1))]
    return Table.of(head, lines) if lines else None


def variant_table(rows: Sequence[Row]) -> Table:
    """Return the verdict of each claim under every variant, for each model."""
    variants = list(dict.fromkeys(name for row in rows for name in row.variants))
    several = ["model"] if len({row.model for row in rows}) > 1 else []
    lines: list[list[str | Cell]] = [
        [
            f"{row.hypothesis}/{row.expectation}",
            *([row.model] if several else []),
            *variant_cells(row, variants),
            FLIPS if row.flips else "",
        ]
        for row in rows
        if row.variants
    ]
    return Table.of(["expectation", *several, *variants, ""], lines, keys=1 + len(several))


def variant_cells(row: Row, variants: Iterable[str]) -> list[Cell]:
    """Return the verdict of one claim under each of these variants."""
    cells = []
    for name in variants:
        verdict, observed = row.variants.get(name, (NONE, None))
        word = row.word_of(verdict)
        cells.append(Cell(verdict_text(word, observed), observed, verdict=word))
    return cells
