"""A row is recomputed where somebody else has measured the same and found the same."""

from __future__ import annotations

from typing import Any

from delta_suite.publish.board import Board
from delta_suite.publish.recomputed import recomputed_by
from delta_suite.records.record import Record

from tests.planted_records import planted_view
from tests.publish.conftest import Place


def of(record: Record, handle: str | None, created: str = "2026-11-25T00:00:00Z", **model: str) -> Record:
    """Return the record as somebody else would have measured it, some time later, under another name of the model."""
    submitter = None if handle is None else {"handle": handle}
    content = record.model_dump(mode="json", by_alias=True)
    content["provenance"]["created"] = created
    content["model"] |= model
    return Record.model_validate(content | {"submitter": submitter})


def changed(record: Record, name: str, value: Any) -> Record:
    content = record.model_dump(mode="json", by_alias=True)
    content["layers"][0]["metrics"]["raw"]["gamma"][name] = value
    return Record.model_validate(content)


def test_who_counts() -> None:
    record = of(planted_view().record, "ada", "2026-11-24T00:00:00Z")
    assert recomputed_by(record, []) == ()
    assert recomputed_by(record, [of(record, "Bob", name="another", source="hub:b/b"), of(record, "carl")]) == (
        "Bob",
        "carl",
    )
    assert recomputed_by(record, [of(record, "ADA")]) == ()  # her own, a second time
    assert recomputed_by(record, [of(record, None)]) == ()  # nobody stands for it
    assert recomputed_by(record, [of(record, "bob", record.provenance.created)]) == ()  # the same measurement
    assert recomputed_by(record, [changed(of(record, "bob"), "value", 1e9)]) == ()
    assert recomputed_by(record, [of(record, "bob", fingerprint="f" * 64)]) == ()
    assert recomputed_by(of(record, None, record.provenance.created), [of(record, "bob")]) == ("bob",)


def row_of(board: Board) -> tuple[bool, tuple[str, ...]]:
    (group,) = board.groups
    (entry,) = group.entries
    return entry.recomputed, entry.recomputed_by


def by(handle: str, created: str) -> Any:
    def change(record: dict[str, Any]) -> None:
        record["submitter"] = {"handle": handle}
        record["provenance"]["created"] = created

    return change


def test_the_board_asks_all_records_of_a_model(place: Place) -> None:
    place.add(file="20261124T100000Z-00000000", change=by("ada", "2026-11-24T10:00:00Z"))
    assert row_of(place.board()) == (False, ())
    place.add(file="20261124T110000Z-00000000", change=by("ada", "2026-11-24T11:00:00Z"))
    assert row_of(place.board()) == (False, ())
    place.add(file="20261124T090000Z-00000000", change=by("bob", "2026-11-24T09:00:00Z"))
    assert row_of(place.board()) == (True, ("bob",))


def test_the_leaderboard_as_json_names_them(place: Place) -> None:
    from delta_suite.publish.leaderboard import as_json

    place.add(file="20261124T100000Z-00000000", change=by("ada", "2026-11-24T10:00:00Z"))
    place.add(file="20261124T090000Z-00000000", change=by("bob", "2026-11-24T09:00:00Z"))
    text = as_json(place.board())
    assert '"handle": "ada"' in text
    assert '"recomputed_by": [\n' in text
