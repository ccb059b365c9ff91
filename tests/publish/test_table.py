"""One table in three forms, and the tables of a terminal."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import replace

import pytest
from delta_suite.escaping import markdown
from delta_suite.publish.model_tables import boundary_tables, layer_table, metric_table, model_line, phase_table
from delta_suite.publish.rows import Row, mark_lines, marks
from delta_suite.publish.screen import Screen
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.verdict_tables import (
    chance_text,
    holm_by_hypothesis,
    in_several_models,
    variant_table,
    verdict_grid,
)
from delta_suite.publish.wording import LEGEND, MARKS, SYMBOLS
from delta_suite.records.view import RecordView

from tests.planted_records import planted_view, without_arrays

HELD = Row(
    *("phase-c", "shared", "intra_cosine over C > 0.5", "a", "PASS"),
    observed=0.8123,
    required=0.5,
    margin=0.3123,
    interval=(0.78, 0.84),
    where="hypotheses/phase_c.toml:14",
    variants={"raw": ("PASS", 0.8123), "sink_free": ("FAIL", 0.31)},
    p=0.01,
    vacuous=True,
)
REFUTED = replace(
    HELD, expectation="few", verdict="FAIL", observed=0.31, margin=-0.19, interval=None, vacuous=False, p=1.0
)
WARNS = replace(REFUTED, hypothesis="extra", expectation="loose", severity="warn", observed=0.4, margin=-0.1)


@pytest.fixture(scope="module")
def view() -> RecordView:
    return planted_view(parts=("spectra", "boundaries"))


# --- one table -------------------------------------------------------------------------------------------------


@pytest.fixture
def table() -> Table:
    name = Cell("a|b*", link="a.html")
    rows = [[name, Cell("PASS 0.81", 0.81, verdict="PASS")], ["<c>", Cell("gamma > |x|", code=True)]]
    return Table.of(["model", "claim"], rows)


def test_a_terminal_shows_texts_and_symbols_without_markup(table: Table) -> None:
    assert table.text().splitlines() == [
        "model  claim",
        "-----  -----------",
        "a|b*   ✓ PASS 0.81",
        "<c>    gamma > |x|",
    ]


def test_markdown_adds_links_symbols_and_code_and_escapes_the_rest(table: Table) -> None:
    assert table.markdown().splitlines() == [
        "| model | claim |",
        "| --- | --- |",
        r"| [a\|b\*](a.html) | ✓ PASS 0.81 |",
        r"| \<c\> | gamma \> \|x\| |",
    ]


def test_html_adds_links_and_symbols_and_escapes_the_rest(table: Table) -> None:
    root = ET.fromstring(table.html())
    assert [head.text for head in root.iter("th")][:2] == ["model", "claim"]
    link, verdict = next(root.iter("a")), next(root.iter("span"))
    assert (link.get("href"), link.text) == ("a.html", "a|b*")
    assert (verdict.get("class"), verdict.text) == ("verdict v-pass", "✓ PASS 0.81")
    assert "&lt;c&gt;" in table.html()


def test_numbers_sort_as_numbers_and_what_is_missing_last() -> None:
    assert [Cell("x", value).sort for value in (0.1, 12, "b", None)] == ["0.1", "12", "b", ""]


@pytest.mark.parametrize(
    "text", ["[x](javascript:y)", "[x]: y", "[x][y]", "**x**", "<b>", "a|b", "`x`", "_x_", "# x", r"\[x](y)"]
)
def test_no_text_becomes_markdown(text: str) -> None:
    escaped = markdown(text)
    assert escaped != text
    assert escaped.replace("\\\\", "/").replace("\\", "") == text.replace("\\", "/")


def test_a_table_without_rows_has_its_head() -> None:
    assert Table.of(["a", "b"], []).text().splitlines()[0].split() == ["a", "b"]


# --- verdicts --------------------------------------------------------------------------------------------------


def test_the_grid_has_claims_by_models_with_every_mark() -> None:
    head, _, *lines = (
        verdict_grid([HELD, REFUTED, WARNS, replace(HELD, model="b", variants={}, vacuous=False)])
        .text(Screen(160))
        .splitlines()
    )
    assert head.split() == ["hypothesis", "claim", "a", "b"]
    assert [" ".join(line.split()) for line in lines] == [
        "phase-c ✗ FAIL ✓ PASS (p 0.01, Holm over 1 0.01)",
        ". shared intra_cosine over C > 0.5 ✓ PASS 0.812 [0.780, 0.840] * ° ✓ PASS 0.812 [0.780, 0.840]",
        ". few intra_cosine over C > 0.5 ✗ FAIL 0.310 * -",
        "extra - -",
        ". loose intra_cosine over C > 0.5 ! WARN 0.400 * -",
    ]


def test_intervals_leave_the_grid_where_many_models_stand_in_it() -> None:
    rows = [replace(HELD, model=name) for name in "abc"]
    assert "[0.780" in verdict_grid(rows[:2]).text()
    assert "[0.780" not in verdict_grid(rows).text()


def test_every_mark_is_explained_where_it_is_shown() -> None:
    assert marks(HELD) == " * °"
    assert mark_lines([HELD]) == [f"* {MARKS['*']}", f"° {MARKS['°']}"]
    assert mark_lines([REFUTED]) == [f"* {MARKS['*']}"]
    assert mark_lines([replace(HELD, variants={}, vacuous=False)]) == []
    for word, symbol in SYMBOLS.items():
        assert f"{symbol} {word}: " in LEGEND
    for mark, meaning in MARKS.items():
        assert f"{mark} {meaning}." in LEGEND


def test_a_claim_is_shown_under_every_variant() -> None:
    (line,) = variant_table([HELD, replace(HELD, variants={})]).text().splitlines()[2:]
    assert line.split() == ["phase-c/shared", "✓", "PASS", "0.812", "✗", "FAIL", "0.310", "*"]


def test_a_model_without_a_p_has_not_shown_a_hypothesis() -> None:
    rows = [HELD, replace(HELD, model="b", p=0.2), replace(HELD, model="c", p=None)]
    table = in_several_models(rows)
    assert table is not None
    (line,) = table.text().splitlines()[2:]
    assert line.split() == ["phase-c", "2", "of", "3", "0.03", "0.4", "1"]
    assert in_several_models([replace(HELD, p=None)]) is None


def test_the_family_is_every_hypothesis_of_a_model() -> None:
    others = [replace(HELD, hypothesis="b", p=None), replace(HELD, hypothesis="c", p=0.02, gates=("n/d",))]
    assert holm_by_hypothesis([HELD]) == {"phase-c": (0.01, 0.01)}
    assert holm_by_hypothesis([HELD, *others]) == {"phase-c": (0.01, 0.03)}
    assert "(p 0.01, Holm over 3 0.03)" in verdict_grid([HELD, *others]).text()


GATED = replace(HELD, verdict="INCONCLUSIVE", gates=("n/d",))


def test_a_board_says_how_many_passes_chance_alone_would_give() -> None:
    judged = [replace(row, judged_by=(1, "0")) for row in (HELD, REFUTED, WARNS, GATED)]
    plain = replace(HELD, judged_by=None)
    unmeasured = replace(judged[0], verdict="NOT MEASURED")
    assert chance_text([*judged * 20, plain, unmeasured]) == (
        "20 of 60 claims that could be decided are supported; if none held, chance alone would support 1.5 of them "
        "(2.5% each)."
    )
    assert chance_text([plain, unmeasured]) == ""


def test_a_pass_that_random_weights_would_have_but_for_a_gate_is_marked() -> None:
    assert marks(replace(REFUTED, no_better=True)) == " * ≈"
    assert mark_lines([replace(HELD, no_better=True)])[-1] == f"≈ {MARKS['≈']}"


# --- one model -------------------------------------------------------------------------------------------------


def test_phases_are_shown_with_their_figures(view: RecordView) -> None:
    head, _, *lines = phase_table(view).text().splitlines()
    assert head.split() == ["phase", "layers", "N", "intra", "cross", "block", "rank", "capture"]
    assert [line.split()[:3] for line in lines] == [["C", "6-10", "5"], ["E", "14-21", "8"]]
    intra = view.over(range(6, 11), "intra_cosine", "raw").value
    assert lines[0].split()[3] == f"{intra:.4f}"


def test_layers_are_shown_one_a_line(view: RecordView) -> None:
    head, _, *lines = layer_table(view).text(Screen(130)).splitlines()
    assert head.split()[:4] == ["layer", "phase", "||h||", "||delta||"]
    assert [line.split()[0] for line in lines] == [str(layer) for layer in range(24)]
    assert lines[6].split()[1] == "C"


def test_boundaries_are_shown_beside_the_declared_ones(view: RecordView) -> None:
    drawn, summary = boundary_tables(view)
    assert isinstance(drawn, Table)
    assert isinstance(summary, str)
    table = drawn.text()
    detected = view.boundaries("raw").detected
    assert [line.split()[0] for line in table.splitlines()[2:] if line.split()[0] != "-"] == list(map(str, detected))
    assert summary.splitlines()[0].startswith("met ")
    p = view.boundaries("raw").metrics["boundary_p"].value
    assert f"p {p:.3f} against smooth drift" in " ".join(summary.split())


def test_boundaries_that_cannot_be_formed_say_why(view: RecordView) -> None:
    gone = without_arrays(view)
    record = gone.record.model_copy(update={"boundaries": {}})
    (text,) = boundary_tables(RecordView(record))
    assert str(text).startswith("no boundaries: its arrays, gone.safetensors, are not beside")


def test_the_line_of_a_model_says_what_was_measured(view: RecordView) -> None:
    assert model_line(view).startswith("planted: ")
    assert "24 layers x 32; calibration planted, 80 documents, 960 tokens; float32 on cpu" in model_line(view)


def test_the_reference_of_metrics_has_every_formula() -> None:
    text = metric_table().text(Screen(250))
    assert text.splitlines()[0].split() == ["metric", "scope", "formula", "unit", "range", "version", "source"]
    assert "effective_rank" in text
    assert "unbounded" in text
