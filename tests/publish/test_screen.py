"""What a terminal of any width shows: nothing wider than it, nothing cut without a word, colour where it is asked."""

from __future__ import annotations

import io
import re

import pytest
from delta_suite.publish.screen import WITHOUT_TERMINAL, Screen, columns, command, draw, paragraphs, prose, wrap
from delta_suite.publish.table import Cell, Table
from delta_suite.publish.wording import COLOURS, SYMBOLS
from rich.cells import cell_len

CLAIM = "intra_cosine_cross_fitted over C > 95% of windows of as many layers (sink_free)"
NAME = ". closer-than-at-the-same-distance"
VERDICT = "FAIL 0.482 [0.464, 0.500] *"
ESCAPE = "\x1b["


def grid(models: int) -> Table:
    cells = [Cell(VERDICT, verdict="FAIL")] * models
    heads = [f"checkpoint-{index}000" for index in range(models)]
    return Table.of(["hypothesis", "claim", *heads], [[NAME, CLAIM, *cells]], drop={"claim": 30})


def words(text: str) -> str:
    return re.sub(r"[\s-]", "", text)


@pytest.mark.parametrize("width", [20, 40, 80, 100, 120])
@pytest.mark.parametrize("models", [1, 2, 7])
def test_no_table_is_wider_than_the_screen_and_every_model_is_shown(models: int, width: int) -> None:
    drawn = draw(grid(models), Screen(width))
    assert max(map(cell_len, drawn.split("\n"))) <= width
    assert words(drawn).count("0.482") == models
    if width > 20:  # there, a name is broken in the middle
        assert all(words(f"checkpoint-{index}000") in words(drawn) for index in range(models))


def test_a_narrow_screen_says_which_column_it_has_no_room_for() -> None:
    assert CLAIM[:20] in draw(grid(1), Screen(120))
    narrow = draw(grid(1), Screen(80))
    assert "intra_cosine" not in narrow
    assert narrow.endswith("\n(80 columns are too few for: claim)")
    assert "too few" not in draw(grid(1), Screen(120))


def test_columns_without_room_go_on_below_beside_those_that_name_the_rows() -> None:
    table = Table.of(["a", "b", *"cdefgh"], [["key", "name", *["123456789"] * 6]], align="ll" + "r" * 6, keys=2)
    bands = draw(table, Screen(40)).split("\n\n")
    assert len(bands) == 3
    assert [band.splitlines()[-1].split() for band in bands] == [["key", "name", "123456789", "123456789"]] * 3


def test_numbers_are_never_broken() -> None:
    table = Table.of(["layer", "a long heading"], [["0", "1234567890"]], align="rr")
    assert "1234567890" in draw(table, Screen(20))


def test_colour_only_where_it_is_asked_for_and_names_are_no_markup() -> None:
    table = Table.of(["[bold]a", "b"], [[Cell("[red]x[/red] :smile:", verdict="FAIL"), "\x1b[31m\u202e"]])
    plain, coloured = draw(table, Screen(80)), draw(table, Screen(80, colour=True))
    assert ESCAPE not in plain
    assert "[bold]a" in plain
    assert r"✗ [red]x[/red] :smile:  \x1b[31m\u202e" in plain
    assert "\x1b[31m✗ [red]x[/red] :smile:" in coloured
    assert words(re.sub(r"\x1b\[\d*m", "", coloured)) == words(plain)


def test_a_screen_without_signs_shows_the_words() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert Screen.of(stream) == Screen(columns(), colour=False, symbols=False)
    assert draw(Table.of(["a"], [[Cell("FAIL", verdict="FAIL")]]), Screen.of(stream)).splitlines()[-1] == "FAIL"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_has_colour_but_not_with_no_color_nor_a_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert Screen.of(Terminal()).colour
    assert not Screen.of(io.StringIO()).colour
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Screen.of(Terminal()).colour


def test_the_width_is_that_of_columns_else_of_a_terminal_else_fixed(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int) -> None:
        raise OSError

    monkeypatch.setattr("os.get_terminal_size", none)
    monkeypatch.setenv("COLUMNS", "97")
    assert columns() == 97
    for value in ("", "0", "wide"):
        monkeypatch.setenv("COLUMNS", value)
        assert columns() == WITHOUT_TERMINAL


def test_every_verdict_has_a_symbol_and_a_colour_of_its_own() -> None:
    assert set(SYMBOLS) == set(COLOURS)
    assert len(set(SYMBOLS.values())) == len(SYMBOLS)


def test_prose_fits_but_for_words_that_are_copied() -> None:
    path = "/a/path/that/is/longer/than/the/screen/is/wide.json"
    assert wrap(f"see {path} there", 30, fold=False) == ["see", path, "there"]
    assert prose("one two three four five six", 30, "  label").split("\n") == [
        "  label      one two three four",
        "             five six",
    ]
    assert paragraphs("a b\n    c d", 20) == "a b\n    c d"
    lines = command(f"pytest {path} --model=tiny", 40, "  reproduce").split("\n")
    assert [line.removesuffix(" \\").split()[-1] for line in lines] == ["pytest", path, "--model=tiny"]
    assert [line.endswith(" \\") for line in lines] == [True, True, False]
