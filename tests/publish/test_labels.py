"""Models of one name: a record stands for its source, revision and fingerprint, and for no other model."""

from __future__ import annotations

import json
from typing import Any

import pytest
from delta_suite.claims.null_kinds import NO_CONTROL
from delta_suite.models.spec import control_source
from delta_suite.publish.leaderboard import files
from delta_suite.publish.pages import page_name
from delta_suite.records.store import load, newest_control

from tests.publish.conftest import Change, Place, checkpoint, created, with_source
from tests.test_cli import run

LATER = created("2026-11-25T00:00:00Z")


AGAINST_CONTROL = """
schema = 1
id = "against"
title = "A claim against random weights"
version = 1
rationale = "needs the control"

[[expect]]
id = "more"
metric = "effective_rank"
scope = "C"
op = ">="
than = { null = "random-weights", times = 0.5 }
origin = "none"
"""


def with_model(**model: Any) -> Change:
    return lambda record: (record["model"].update(model), LATER(record))


@pytest.mark.parametrize(
    ("change", "labels"),
    [
        (with_model(source="hub:b/x"), ["tiny (hub:a/x)", "tiny (hub:b/x)"]),
        (with_model(revision="c" * 40), ["tiny", "tiny (cccccccccccc)"]),
        (with_model(fingerprint="e" * 64), ["tiny (00000000)", "tiny (eeeeeeee)"]),
        (
            with_model(source="directory:/b/x", fingerprint="e" * 64),
            ["tiny (directory:x, eeeeeeee)", "tiny (hub:a/x, 00000000)"],
        ),
    ],
)
def test_no_record_replaces_that_of_another_model(place: Place, change: Change, labels: list[str]) -> None:
    for file in ("20261124T100000Z-aaaaaaaa", "20261124T100000Z-bbbbbbbb"):
        place.add(file=file, change=lambda record: record["model"].update(source="hub:a/x", fingerprint="0" * 64))
    place.add(
        file="20261125T000000Z-cccccccc",
        change=lambda record: (record["model"].update(source="hub:a/x", fingerprint="0" * 64), change(record)),
    )
    board = place.board()
    (group,) = board.groups
    assert [entry.model for entry in group.entries] == sorted(labels)
    assert [entry.model for entry in group.entries] == [row.model for entry in group.entries for row in entry.rows[:1]]
    (old,) = board.superseded
    assert (old.record[-13:], old.by[-13:]) == ("aaaaaaaa.json", "bbbbbbbb.json")
    content = dict(files(board))
    assert {f"site/models/{page_name(label)}" for label in labels} <= set(content)
    assert all(label.replace("_", "") in content["leaderboard.md"].decode() for label in labels)
    models = json.loads(content["leaderboard.json"])["groups"][0]["models"]
    assert {model["model"]: model["provenance"]["source"] for model in models}.keys() == set(labels)


def test_equal_weights_of_two_folders_of_one_name_are_told_apart_by_the_whole_path(place: Place) -> None:
    for letter in "ab":
        place.add(file=f"20261124T100000Z-{letter * 8}", change=with_source(f"directory:/{letter}/run/x"))
    labels = [entry.model for entry in place.board().groups[0].entries]
    assert labels == ["tiny (directory:/a/run/x)", "tiny (directory:/b/run/x)"]


def test_two_models_at_one_step_are_no_run(place: Place) -> None:
    for step in (1, 2):
        place.add(f"big--checkpoint-{step}", change=checkpoint(step))
    assert [run.name for run in place.board().groups[0].runs] == ["big--checkpoint-*"]
    place.add("big--checkpoint-2", "20261125T000000Z-cccccccc", lambda record: (
        checkpoint(2)(record), with_model(source="directory:/other/big/checkpoint-2")(record)
    ))  # fmt: skip
    board = place.board()
    assert len(board.groups[0].entries) == 3
    assert board.runs == {}


@pytest.mark.parametrize(
    ("control", "counts"),
    [
        ({"source": control_source("hub:a/x")}, True),
        ({"source": control_source("hub:b/x")}, False),
        ({"source": "hub:a/x"}, False),
        ({"source": control_source("hub:a/x"), "architecture": "Other"}, False),
    ],
)
def test_only_a_models_own_control_is_compared_with(place: Place, control: dict[str, str], counts: bool) -> None:
    (place.root / "hypotheses" / "against.toml").write_text(AGAINST_CONTROL)
    path = place.add(change=with_source("hub:a/x"))
    place.add("tiny@random-weights", change=lambda record: record["model"].update(control, fingerprint="c" * 64))
    place.add("tiny@random-weights", "19990101T000000Z-00000000", with_source(control_source("hub:z/z")))
    entry = next(entry for entry in place.board().groups[0].entries if entry.model == "tiny")
    (row,) = (row for row in entry.rows if row.hypothesis == "against")
    assert (NO_CONTROL not in (row.reason or "")) is counts
    assert (newest_control(place.results, load(path)) is not None) is counts


def test_records_of_one_name_are_judged_side_by_side(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    one = place.add()
    two = place.add(file="20261125T000000Z-cccccccc", change=with_model(source="hub:b/x"))
    output = run("judge", one, two, "--hypotheses", place.root / "hypotheses").output
    assert "tiny (20261124T100000Z-00000000)" in output
    assert "tiny (20261125T000000Z-cccccccc)" in output
