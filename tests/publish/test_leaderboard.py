"""Published files: the same bytes from the same records, stale when it should be, and with nothing left out."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from delta_suite.claims.loader import load_hypotheses
from delta_suite.cli import app
from delta_suite.publish.board import Board
from delta_suite.publish.leaderboard import files, stale, write
from delta_suite.publish.pages import page_name
from delta_suite.records.store import stamps_path
from typer.testing import CliRunner, Result

from tests.publish.conftest import (
    Place,
    checkpoint,
    make_place,
    with_boundaries,
    with_calibration,
    with_intervals,
    with_source,
)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def published(place: Place) -> dict[str, bytes]:
    folder = place.results
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_relative_to(folder / "runs")
    }


def fill(place: Place) -> None:
    place.add("a/model", change=with_intervals)
    place.add("b", change=with_boundaries)
    place.add("b", file="20251124T100000Z-00000000")
    place.add("b", file="core", change=with_calibration("core", "e" * 64))
    (place.results / "runs" / "b" / "torn.json").write_text('{"schema": 1, ')


def marked(board: Board) -> Board:
    """The same board with every mark that a verdict can have."""

    def mark(index: int, row: Any) -> Any:
        if index == 0:
            return replace(row, verdict="PASS", interval=(0.41, 0.59), vacuous=True)
        if index == 1:
            return replace(row, verdict="INCONCLUSIVE", gates=("reliability: 3 of 4 layers below 0.9",))
        if index == 2:
            return replace(row, verdict="NOT MEASURED", observed=None, margin=None, reason="no such phase")
        return row

    groups = tuple(
        replace(
            group,
            entries=tuple(
                replace(entry, rows=tuple(mark(index, row) for index, row in enumerate(entry.rows)))
                for entry in group.entries
            ),
        )
        for group in board.groups
    )
    return replace(board, groups=groups)


def test_the_same_records_give_the_same_bytes(
    measured: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = make_place(tmp_path / "one", measured), make_place(tmp_path / "far" / "two", measured)
    fill(first)
    shutil.copytree(first.results, second.results)
    monkeypatch.chdir(first.root)
    assert run("leaderboard").exit_code == 1  # there is a torn record
    monkeypatch.chdir(tmp_path)
    run("leaderboard", "--results-dir", second.results, "--hypotheses", second.root / "hypotheses")
    assert published(first) == published(second)
    assert len(published(first)) == 3 + 4 + (2 + 2) + 4 + 2  # tables, assets, first pages and downloads, claims, models
    for name, content in published(first).items():
        assert str(tmp_path).encode() not in content, name
        assert b"/tmp" not in content, name


def test_check_tells_what_is_stale_and_writes_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    place.add("a")
    place.add("b")
    assert run("leaderboard", "--check").exit_code == 1
    assert published(place) == {}
    assert run("leaderboard").exit_code == 0
    fresh = run("leaderboard", "--check")
    assert (fresh.exit_code, "up to date" in fresh.output) == (0, True)

    claims = place.root / "hypotheses" / "phase_c.toml"
    claims.write_text(claims.read_text().replace("threshold = 0.5", "threshold = 0.1"))
    before = published(place)
    edited = run("leaderboard", "--check")
    assert edited.exit_code == 1
    assert "stale: results/leaderboard.csv" in edited.output
    assert "stale: results/site/models/a.html" in edited.output
    assert "site.js" not in edited.output
    assert "delta-suite leaderboard" in edited.stderr
    assert published(place) == before


def test_a_full_disk_leaves_every_published_file_as_it_was(
    place: Place, monkeypatch: pytest.MonkeyPatch, largest_file: Callable[[int], None]
) -> None:
    monkeypatch.chdir(place.root)
    place.add("a")
    assert run("leaderboard").exit_code == 0
    place.add("b")
    before = published(place)
    largest_file(len(before["leaderboard.md"]) + 1000)
    full = run("leaderboard")
    assert full.exit_code == 1
    assert re.fullmatch(r"delta-suite: results/[a-z/.]+ cannot be written: File too large\. .*\n", full.stderr)
    assert published(place) == before


def test_the_page_of_a_model_that_is_gone_is_stale_and_then_removed(place: Place) -> None:
    place.add("kept")
    gone = place.add("gone")
    write(place.results, files(place.board()))
    gone.unlink()
    content = dict(files(place.board()))
    assert "site/models/gone.html" in stale(place.results, content.items())
    write(place.results, content.items())
    assert not (place.results / "site" / "models" / "gone.html").exists()
    assert stale(place.results, content.items()) == []


def test_broken_records_are_named_and_the_exit_code_says_so(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.root)
    fill(place)
    result = run("leaderboard")
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.startswith("delta-suite: omitted: runs/b/torn.json is not a measurement record")
    assert "Traceback" not in result.output
    assert "b" in {model["model"] for group in read_json(place)["groups"] for model in group["models"]}
    assert run("leaderboard", "--check").exit_code == 1  # up to date, and a record is still broken


def read_json(place: Place) -> dict[str, Any]:
    def refuse(constant: str) -> float:
        raise AssertionError(constant)

    content: dict[str, Any] = json.loads((place.results / "leaderboard.json").read_text("utf-8"), parse_constant=refuse)
    return content


def test_csv_json_and_markdown_say_the_same(place: Place) -> None:
    fill(place)
    board = marked(place.board())
    write(place.results, files(board))
    rows = list(csv.DictReader(io.StringIO((place.results / "leaderboard.csv").read_text("utf-8"))))
    listed = [
        (group, model, verdict)
        for group in read_json(place)["groups"]
        for model in group["models"]
        for verdict in model["verdicts"]
    ]
    claims = sum(len(hypothesis.expect) for hypothesis in load_hypotheses([place.root / "hypotheses"]))
    assert len(rows) == len(listed) == 3 * claims
    markdown = (place.results / "leaderboard.md").read_text("utf-8")
    for row, (group, model, verdict) in zip(rows, listed, strict=True):
        assert (row["model"], row["expectation"], row["verdict"]) == (
            model["model"],
            verdict["expectation"],
            verdict["verdict"],
        )
        assert row["calibration_sha256"] == group["calibration"]["sha256"]
        assert row["metric_set"] in group["id"]
        assert row["observed"] == ("" if verdict["observed"] is None else repr(verdict["observed"]))
        assert bool(int(row["vacuous"])) == verdict["vacuous"]
        assert row["stated_at"] == verdict["where"]
        assert row["record"] == model["record"]
        assert float(row["seconds"]) == pytest.approx(sum(model["cost"]["seconds"].values()))
        assert row["verdict"] in markdown
    assert {"0.41", "0.59"} <= {rows[0]["interval_low"], rows[0]["interval_high"]}
    assert "✓ PASS" in markdown
    assert r"[0.410, 0.590] \* °" in markdown
    assert "1 of the supported vacuous" in markdown
    assert markdown.count("## Calibration") == 2
    assert "are not comparable" in markdown
    assert "average" not in " ".join(rows[0])


def test_a_hypothesis_file_that_has_changed_since_is_seen_in_every_form(place: Place) -> None:
    """Until a run judges the record again; other records and other hypotheses are not marked."""
    loaded = load_hypotheses([place.root / "hypotheses"])
    now = {each.id: {"version": each.version, "sha256": each.sha256} for each in loaded}
    earlier = now | {"phase-c": {"version": 1, "sha256": "0" * 64}}
    path = place.add("old")
    for record, stamps in ((path, earlier), (place.add("same"), now)):
        judged_by = stamps_path(record)
        assert judged_by is not None
        judged_by.parent.mkdir(parents=True)
        judged_by.write_text(json.dumps(stamps))
    place.add("unjudged")
    content = {
        name: text.decode() for name, text in dict(files(place.board())).items() if name.endswith(("d", "v", "html"))
    }
    version, sha256 = now["phase-c"].values()
    telling = f"phase-c, version 1, SHA-256 {'0' * 12} then, version {version}, SHA-256 {str(sha256)[:12]} now"
    for name in ("leaderboard.md", "site/index.html"):
        assert f"old: {telling}" in content[name]
        assert content[name].count("now\n") + content[name].count("now</li>") == 1
    assert telling in content["site/models/old.html"]
    assert "since a run last judged" not in content["site/models/same.html"]
    assert "since a run last judged" not in content["site/models/unjudged.html"]
    rows = list(csv.DictReader(io.StringIO(content["leaderboard.csv"])))
    assert {(row["model"], row["hypothesis"]) for row in rows if row["changed"] == "1"} == {("old", "phase-c")}
    assert {row["hypothesis_sha256"] for row in rows} == {stamp["sha256"] for stamp in now.values()}

    judged = run("judge", path, "--hypotheses", place.root / "hypotheses")
    assert "phase-c has changed since this record was last judged: version 1" in judged.output
    board = place.board()
    assert board.groups[0].changed == ()
    assert board.groups[0].entries[0].judged_by["phase-c"].sha256 == now["phase-c"]["sha256"]


def test_checkpoints_of_a_run_have_a_page_of_their_own(place: Place) -> None:
    """In the order of the steps, and linked from wherever the models are."""
    for step in (1000, 5, 50):
        place.add(f"big--checkpoint-{step}", change=checkpoint(step))
    place.add("big--checkpoint-50@random-weights", change=with_source("random-weights, x"))
    place.add("llama-3")
    board = place.board()
    (name,) = board.runs
    assert name == "big--checkpoint-*"
    (run,) = board.groups[0].runs
    assert list(run.steps) == [5, 50, 1000]
    assert [entry.model for entry in board.groups[0].entries][:4] == [
        *("big--checkpoint-5", "big--checkpoint-50", "big--checkpoint-50@random-weights", "big--checkpoint-1000")
    ]
    content = dict(files(board))
    (page,) = (path for path in content if "/trajectories/" in path)
    text = content[page].decode()
    assert text.index("step 5<") < text.index("step 50<") < text.index("step 1000<")
    for path, link in (
        ("leaderboard.md", page),
        ("site/index.html", page.removeprefix("site/")),
        (f"site/models/{page_name('big--checkpoint-50')}", page.replace("site/", "../")),
        (page, f"../models/{page_name('big--checkpoint-50')}"),
    ):
        assert link in content[path].decode()
    write(place.results, content.items())
    assert read_json(place)["groups"][0]["runs"][0]["steps"]["50"] == "big--checkpoint-50"
    for step in (5, 50):
        shutil.rmtree(place.results / "runs" / f"big--checkpoint-{step}")
    assert page in stale(place.results, files(place.board()))


def test_one_table_needs_no_warning(place: Place) -> None:
    place.add("a")
    place.add("b")
    assert b"are not comparable" not in dict(files(place.board()))["leaderboard.md"]
    assert b"are not comparable" not in dict(files(place.board()))["site/index.html"]


def test_names_cannot_write_into_a_page_or_another_models_file(place: Place) -> None:
    name = "<script>alert(1)</script>|*x*"
    place.add("plain", change=lambda record: record["model"].update(name=name))
    content = dict(files(place.board()))
    for path in ("site/index.html", f"site/models/{page_name(name)}", "leaderboard.md"):
        assert b"<script>alert" not in content[path]
    assert page_name("a/b") != page_name("a--b")
    assert "/" not in page_name("../../etc/passwd")


def test_an_absent_results_folder_is_one_clear_error(tmp_path: Path) -> None:
    result = run("leaderboard", "--results-dir", tmp_path / "none")
    assert result.exit_code == 1
    assert "delta-suite measure NAME" in result.stderr
    assert "Traceback" not in result.output
