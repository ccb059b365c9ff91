"""`submit`: a verified copy with a name, in its place, and nothing rewritten."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from delta_suite.cli import app
from delta_suite.metrics.registry import METRICS
from delta_suite.records.store import examine
from typer.testing import CliRunner, Result


def submit(record: Path, results: Path, *options: str, handle: str = "ada") -> Result:
    words = ["submit", record, "--results-dir", results, "--handle", handle, *options]
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def checkout(record: Path, tmp_path: Path) -> Path:
    """A results folder that holds the record."""
    shutil.copytree(record.parents[2], tmp_path / "results")
    return tmp_path / "results"


def test_only_the_submitter_and_the_name_of_the_arrays_are_new(record: Path, tmp_path: Path) -> None:
    result = submit(record, tmp_path, "--hardware", "a phone", "--note", "for fun", handle="@ada")
    assert result.exit_code == 0, result.output
    (copy,) = tmp_path.glob("runs/*/*.json")
    assert f"submitted: {copy}" in result.output
    assert f"git add {copy} {copy.with_suffix('.safetensors')}" in result.output
    assert copy.name != record.name
    assert copy.with_suffix(".safetensors").read_bytes() == record.with_suffix(".safetensors").read_bytes()
    before, after = json.loads(record.read_text()), json.loads(copy.read_text())
    assert after.pop("submitter") == {"handle": "ada", "hardware": "a phone", "note": "for fun"}
    assert after["arrays"].pop("file") == copy.with_suffix(".safetensors").name
    del before["arrays"]["file"]
    assert after == before
    assert examine(copy).problems == []


def test_the_measurement_itself_is_not_touched(checkout: Path) -> None:
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in checkout.glob("runs/*/*")}
    (mine,) = checkout.glob("runs/*/*.json")
    assert submit(mine, checkout).exit_code == 0
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    assert len(list(checkout.glob("runs/*/*"))) == 2 * len(before)


def test_a_second_time_nothing_happens(record: Path, tmp_path: Path) -> None:
    submit(record, tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")}
    assert submit(record, tmp_path).exit_code == 0
    (copy,) = tmp_path.glob("runs/*/*.json")
    assert "submitted already" in submit(copy, tmp_path).output
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/*")} == before


def test_what_another_has_submitted_is_not_taken_over(record: Path, tmp_path: Path) -> None:
    submit(record, tmp_path)
    (copy,) = tmp_path.glob("runs/*/*.json")
    result = submit(copy, tmp_path, handle="bob")
    assert result.exit_code == 1
    assert "has a submitter, ada" in result.stderr


def test_another_file_in_the_place_stays(record: Path, tmp_path: Path) -> None:
    submit(record, tmp_path)
    (copy,) = tmp_path.glob("runs/*/*.json")
    copy.write_text("mine")
    result = submit(record, tmp_path)
    assert result.exit_code == 1
    assert f"{copy} is there already, and is another file" in result.stderr
    assert copy.read_text() == "mine"


def test_a_refused_record_keeps_all_from_being_submitted(record: Path, checkout: Path, tmp_path: Path) -> None:
    (mine,) = checkout.glob("runs/*/*.json")
    mine.with_suffix(".safetensors").unlink()
    result = CliRunner().invoke(
        app, ["submit", str(record), str(mine), "--handle", "ada", "--results-dir", str(tmp_path / "new")]
    )
    assert result.exit_code == 1
    assert "its arrays are not beside it" in result.stderr
    assert not (tmp_path / "new").exists()


def test_figures_of_an_older_version_could_be_anything(
    record: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METRICS, "effective_rank", replace(METRICS["effective_rank"], version=99))
    result = submit(record, tmp_path / "new")
    assert result.exit_code == 1
    assert "figures of older versions are not formed anew: effective_rank" in result.stderr
    assert not (tmp_path / "new").exists()
    assert CliRunner().invoke(app, ["verify", str(record)]).exit_code == 0
    assert CliRunner().invoke(app, ["verify", "--whole", str(record)]).exit_code == 1


def test_a_folder_may_hold_records_of_others(checkout: Path) -> None:
    result = submit(checkout, checkout)
    assert result.exit_code == 2
    assert "name the records that are yours" in result.stderr


def test_a_renamed_record_is_told_its_own_name(record: Path, tmp_path: Path) -> None:
    shutil.copy(record.with_suffix(".safetensors"), tmp_path)
    mine = Path(shutil.copy(record, tmp_path / "mine.json"))
    result = submit(mine, tmp_path / "results")
    assert result.exit_code == 1
    assert f"its own is {record.name}" in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        {"handle": "a b"},
        {"handle": "-ada"},
        {"handle": "a" * 41},
        {"handle": "\x1b[31m"},
        {"note": "two\nlines"},
        {"note": "x" * 501},
        {"hardware": " "},
    ],
)
def test_words_that_a_record_does_not_take(record: Path, tmp_path: Path, words: dict[str, str]) -> None:
    options = [f"--{name}={value}" for name, value in words.items() if name != "handle"]
    result = submit(record, tmp_path, *options, handle=words.get("handle", "ada"))
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_verify_holds_the_submitter_against_the_same_rules(record: Path, tmp_path: Path) -> None:
    submit(record, tmp_path)
    (copy,) = tmp_path.glob("runs/*/*.json")
    content = json.loads(copy.read_text())
    content["submitter"]["handle"] = "<script>"
    copy.write_text(json.dumps(content))
    assert any(problem.where == "submitter" for problem in examine(copy).problems)
