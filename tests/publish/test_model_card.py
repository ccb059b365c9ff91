"""Model cards: metadata that the hub's own classes read back, beside text that stays its author's."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import yaml
from delta_suite.cli import app
from delta_suite.errors import RecordError
from delta_suite.publish.card import END, START, eval_results, newest, write_card
from delta_suite.publish.card_plots import COSINES, RANKS, card_plots
from delta_suite.records.store import load
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from typer.testing import CliRunner, Result

from tests.publish.conftest import Place, created, with_boundaries, with_calibration, with_intervals


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def write(place: Place, folder: Path) -> ModelCard:
    board = place.board()
    write_card(folder, board, *newest(board, "tiny"))
    return ModelCard((folder / "README.md").read_text("utf-8"))


def test_the_metadata_reads_back_as_it_was_meant(place: Place, tmp_path: Path) -> None:
    place.add()
    card = write(place, tmp_path)
    board = place.board()
    group, entry = newest(board, "tiny")
    assert isinstance(card.data, ModelCardData)
    assert card.data.model_name == "tiny"
    assert card.data.eval_results == eval_results(group, entry)
    assert [result.metric_value for result in card.data.eval_results] == [
        row.observed for row in entry.rows if row.observed is not None
    ]
    assert {result.dataset_revision for result in card.data.eval_results} == {group.calibration.sha256}
    front = (tmp_path / "README.md").read_text("utf-8").split("---\n")[1]
    first = yaml.safe_load(front)["model-index"][0]["results"][0]["metrics"][0]
    assert first["args"]["verdict"] == next(row for row in entry.rows if row.observed is not None).verdict


def test_the_section_has_the_table_and_both_plots(place: Place, tmp_path: Path) -> None:
    place.add(change=with_intervals)
    text = write(place, tmp_path).content
    for row in newest(place.board(), "tiny")[1].rows:
        assert f"| {row.hypothesis}/{row.expectation} | `{row.claim}` |" in text
    for image in ("delta-suite-cosines.svg", "delta-suite-ranks.svg"):
        assert f"]({image})" in text
        root = ET.fromstring((tmp_path / image).read_text("utf-8"))
        assert root.tag.endswith("svg")


def test_a_card_without_arrays_names_the_file_that_its_heat_map_needs(place: Place, tmp_path: Path) -> None:
    path = place.add(arrays=None)
    text = write(place, tmp_path).content
    assert f"not drawn, its arrays, {path.with_suffix('.safetensors').name}, are not beside the record of tiny" in text
    assert not (tmp_path / COSINES).exists()
    assert f"]({RANKS})" in text


def test_an_authors_card_keeps_all_that_is_not_the_suites(place: Place, tmp_path: Path) -> None:
    place.add()
    other = EvalResult("text-generation", "wikitext", "WikiText", "perplexity", 12.5)
    data = ModelCardData(model_name="My model", license="mit", tags=["llama"], eval_results=[other])
    readme = tmp_path / "README.md"
    readme.write_text(f"---\n{data.to_yaml()}\n---\n# My model\n\nMine, every word.\n")
    card = write(place, tmp_path)
    assert "Mine, every word." in card.text
    assert (card.data.license, card.data.model_name) == ("mit", "My model")
    assert card.data.tags == ["llama", "delta-suite"]
    assert card.data.eval_results[0] == other
    assert len(card.data.eval_results) == 1 + 7

    readme.write_text(readme.read_text().replace(f"\n{END}", f"\nold\n{END}") + "\nAnd below.\n")
    again = write(place, tmp_path)
    assert "\nold\n" not in again.text
    assert "And below." in again.text
    assert again.text.count(START) == again.text.count(END) == 1
    assert len(again.data.eval_results) == 1 + 7


def test_twice_is_once(place: Place, tmp_path: Path) -> None:
    place.add()
    write(place, tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    write(place, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == first
    assert len(first) == 3


def test_the_plots_are_the_same_to_the_byte_and_show_the_values(place: Place) -> None:
    view = load(place.add(change=lambda record: (with_intervals(record), with_boundaries(record))))
    drawn = card_plots(view)
    assert drawn == card_plots(load(place.add("again", change=lambda r: (with_intervals(r), with_boundaries(r))))) | {
        name: svg for name, svg in drawn.items() if "tiny" in svg
    }
    for svg in drawn.values():
        root = ET.fromstring(svg)
        assert [child.tag.rpartition("}")[2] for child in root][:2] == ["title", "desc"]
    other = load(place.add("other", arrays=lambda arrays: arrays["raw.cosines"].__setitem__(1, 0.987)))
    assert card_plots(other)[COSINES] != drawn[COSINES]
    assert COSINES not in card_plots(load(place.add("bare", arrays=None)))


def test_the_newest_record_of_a_model_is_taken_or_the_one_named(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    old = place.add(file="old")
    place.add(
        file="new",
        change=lambda record: (with_calibration("core", "e" * 64)(record), created("2026-12-01T00:00:00Z")(record)),
    )
    result = run("card", "--model", "tiny")
    assert result.exit_code == 0, result.output
    assert "from runs/tiny/new.json: Calibration core" in result.output
    assert (place.results / "cards" / "tiny" / "README.md").exists()
    named = run("card", "--record", old, "--out", place.root / "here")
    assert "from runs/tiny/old.json: Calibration seed" in named.output
    assert (place.root / "here" / "README.md").exists()


def test_what_cannot_be_written_is_one_clear_error(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.root)
    place.add()
    assert "--model NAME" in run("card").stderr
    unknown = run("card", "--model", "tinny")
    assert "no record of 'tinny'; it has records of: tiny" in unknown.stderr
    torn = tmp_path / "torn.json"
    torn.write_text("{")
    assert "torn.json is not a measurement record" in run("card", "--record", torn).stderr
    (tmp_path / "card").mkdir()
    (tmp_path / "card" / "README.md").write_text(f"# Mine\n{START}\n")
    with pytest.raises(RecordError, match="without"):
        write(place, tmp_path / "card")
    (tmp_path / "card" / "README.md").write_text("---\n- a list\n---\n")
    with pytest.raises(RecordError, match="metadata"):
        write(place, tmp_path / "card")
